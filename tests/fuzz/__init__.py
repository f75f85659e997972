"""Strangers by the thousand: graphs that are admitted, and bytes that are none."""
