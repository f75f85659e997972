"""THE OPERATIONS: what a forward calls, by name; its text; copies of it that tell of each call."""
