"""Where jobs, results and keys are kept. `interface` says what a store does; the rest does it."""
