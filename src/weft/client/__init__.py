"""Asking: one small `Backend` interface, and the local one behind it."""
