"""Tests of Weft. Helpers are plain functions, imported as `tests.<folder>.<module>`."""
