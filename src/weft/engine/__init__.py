"""FROM MESSAGES TO NUMBERS: what the checker, the worker and `remote="local"` are shells of."""
