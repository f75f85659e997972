"""The bytes: how graphs and tensors are written down. Nothing here imports torch."""
