"""One model, loaded, and the jobs drawn through it."""
