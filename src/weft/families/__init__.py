"""Architectures: how an input becomes a model call, and where models come from."""
