"""No test leaves memory of the device reserved for the next one to trip over."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.place import IS_CUDA


@pytest.fixture(autouse=True)
def _memory_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if IS_CUDA and "memory" in request.node.nodeid:
        gc.collect()
        torch.cuda.empty_cache()
