"""Tests of `weft.run`: graphs written by hand, plain PyTorch as the oracle."""
