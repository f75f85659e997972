"""Strangers by the thousand: graphs that are admitted, bytes that are none. `python -m tests.fuzz`."""
