"""Executing: a frozen graph drawn through a real module. `run` is the way in."""

from .hooks import Results, run

__all__ = ["Results", "run"]
