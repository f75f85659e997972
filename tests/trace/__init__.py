"""Tests of `weft.trace`: recording, and the signatures of models."""
