"""What every test gets: the tiny trained model, and a check that nothing was left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from tests.leftovers import set_older_aside

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `&`: tests press Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _older_set_aside() -> None:
    """The collector passes over what is there before a module's tests, first of all the half a
    million objects that torch and transformers are: walking over them took a third of the time."""
    set_older_aside()


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    """Random inputs of a test are the same at every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """No mode stays on the torch function stack, and no block stays open."""
    before = torch._C._len_torch_function_stack()
    yield
    from weft.trace.current import CURRENT

    assert torch._C._len_torch_function_stack() == before
    assert CURRENT.get() is None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need one, or a device that stands in for it (`tests/gpu/place.py`)."""
    if torch.cuda.is_available() or os.environ.get("WEFT_GPU_STAND_IN"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
