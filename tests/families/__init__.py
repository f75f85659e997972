"""Tests of `weft.families`: inputs, loading, and the zoo of small random models."""
