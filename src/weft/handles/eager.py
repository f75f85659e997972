"""Runs of what is recorded so far, on a model that is here: looks and `trace(eager=True)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from weft.engine.kept import Kept

from .weights import Weights


@contextmanager
def aside(weights: Weights) -> Iterator[None]:
    """A run beside the real one leaves no trace: buffers are put back, and random numbers are
    those that the real one will draw."""
    module, device = weights.loaded(), weights.device()
    devices = [device] if device is not None and device.type == "cuda" else []
    with Kept.of(module).job(module), torch.random.fork_rng(devices=devices):
        yield
