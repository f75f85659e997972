"""The operations: what each name of the closed table does, abstractly and for real."""
