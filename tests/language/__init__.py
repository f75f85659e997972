"""The tests of meaning: what a block means, against plain PyTorch hooks."""
