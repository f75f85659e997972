"""Benchmarks: ratios and differences in one process, never a time on its own."""
