"""`call` runs torch's own functions, writes every byte, and draws by key only."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.errors import GraphError
from weft.graph.ops import OPS, RANDOM
from weft.kernels.abstract import flatten
from weft.kernels.execute import call, seed_of
from weft.kernels.table import _spellings

from . import byhand
from .compare import allowed
from .opdb import REFUSALS, Sample, tensors_in

FIXED = ("pure", "writes", "factory")


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def bytes_of(tensor: Tensor) -> bytes:
    """The elements in order, bit for bit."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def traces(result: Any, sample: Sample) -> list[tuple[Any, bytes]]:
    """All that a call leaves behind: its results, and its arguments."""
    tensors = [*flatten(result), *tensors_in((sample.args, sample.kwargs))]
    return [(tuple(t.shape), t.dtype, bytes_of(t)) for t in tensors]  # type: ignore[misc]


def run(sample: Sample, **how: Any) -> list[tuple[Any, bytes]]:
    sample = sample.copy()
    with quiet():
        return traces(call(sample.name, sample.args, sample.kwargs, **how), sample)


def test_a_call_is_the_function_itself(drawn: list[Sample]) -> None:
    different = set()
    for sample in drawn:
        if OPS[sample.name].kind not in FIXED or not allowed(sample):
            continue
        if sample.name.startswith("optim."):  # in torch a class: see `test_optimizers`
            continue
        again = sample.copy()
        with quiet():
            function = reduce(getattr, sample.name.split("."), torch)
            expected = traces(function(*again.args, **again.kwargs), again)
        if run(sample) != expected:
            different.add(sample.name)
    assert different == set()


# These are recorded as zeros, on purpose.
ZEROED = {"empty", "empty_like", "Tensor.new_empty", "Tensor.empty", "Tensor.empty_like"}


def test_spellings_of_an_operation_mean_the_same(drawn: list[Sample]) -> None:
    samples: dict[str, list[Sample]] = {}
    for sample in drawn:
        if OPS[sample.name].kind in (*FIXED, "plain") and allowed(sample):
            samples.setdefault(sample.name, []).append(sample)
    spellings = [pair for pair in _spellings() if pair[0] != pair[1] and pair[0] not in ZEROED]
    tried = {spelling for spelling, name in spellings if _agree(spelling, samples.get(name, []))}
    random = {spelling for spelling, name in spellings if OPS[name].kind in RANDOM}
    looks = {spelling for spelling, name in spellings if OPS[name].kind in ("look", "asked")}
    assert {spelling for spelling, _ in spellings} - tried - random - looks == set()


def _agree(spelling: str, samples: list[Sample]) -> bool:
    """Whether a spelling takes some of the calls; it must give the same for those it takes."""
    taken = False
    for sample in samples:
        again = sample.copy()
        try:
            with quiet():
                result = reduce(getattr, spelling.split("."), torch)(*again.args, **again.kwargs)
        except (*REFUSALS, NotImplementedError):
            continue
        if result is NotImplemented:
            continue
        result = list(result) if spelling.endswith("__iter__") else result
        assert traces(result, again) == run(sample), spelling
        taken = True
    return taken


@contextmanager
def poisoned(pattern: int) -> Iterator[None]:
    """Fresh memory is full of a pattern: glibc's own switch."""
    if sys.platform != "linux":
        pytest.skip("needs the allocator of glibc")
    mallopt, perturb = ctypes.CDLL(None).mallopt, -6
    mallopt(perturb, 255 ^ pattern)
    try:
        yield
    finally:
        mallopt(perturb, 0)


def test_poison_reaches_fresh_memory() -> None:
    for size in (64, 96, 1000, 4096, 65536):
        with poisoned(0x5A):
            assert (torch.empty(size, dtype=torch.uint8) == 0x5A).all(), size


def test_every_operation_writes_every_byte(drawn: list[Sample]) -> None:
    unwritten = set()
    for sample in drawn:
        if OPS[sample.name].kind not in FIXED or not allowed(sample):
            continue
        found = []
        for pattern in (0x5A, 0xA5):
            with poisoned(pattern):
                found.append(run(sample))
        if found[0] != found[1]:
            unwritten.add(sample.name)
    assert unwritten == set()


# Random operations

DRAWN = [sample for sample in byhand.calls() if OPS[sample.name].kind in RANDOM]
names = pytest.mark.parametrize("sample", DRAWN, ids=lambda s: s.name)


@names
def test_numbers_depend_on_the_key_alone(sample: Sample) -> None:
    before = torch.get_rng_state()
    first, second, other = (run(sample, seed_key=key) for key in (1, 1, 2))
    torch.manual_seed(77)
    torch.rand(5)
    assert run(sample, seed_key=1) == first == second
    assert other != first
    torch.set_rng_state(before)
    run(sample, seed_key=3)
    assert torch.equal(before, torch.get_rng_state())


@names
def test_numbers_are_those_that_torch_draws(sample: Sample) -> None:
    if sample.name == "nn.functional.rrelu":
        return  # draws for positive elements, too
    again = sample.copy()
    with quiet():
        torch.manual_seed(5)
        function = reduce(getattr, sample.name.split("."), torch)
        expected = traces(function(*again.args, **again.kwargs), again)
    assert run(sample, seed_key=5) == expected


def test_dropout_of_all_or_none() -> None:
    x = torch.ones(4, 5)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"):
        op = f"nn.functional.{name}"
        assert not call(op, (x, 1.0, True), {}, seed_key=1).any()
        assert call(op, (x, 0.0, True), {}, seed_key=1) is x
        assert call(op, (x, 0.5, False), {}, seed_key=1) is x
        with pytest.raises(ValueError, match="probability"):
            call(op, (x, 2.0), {}, seed_key=1)


def test_rrelu_has_slopes_in_its_range() -> None:
    x = -torch.ones(1000)
    y = -call("nn.functional.rrelu", (x, 0.1, 0.3, True), {}, seed_key=1)
    assert 0.1 <= y.min() < 0.12 and 0.28 < y.max() <= 0.3


def test_every_random_operation_is_tried() -> None:
    assert {s.name for s in DRAWN} == {op.name for op in OPS.values() if op.kind in RANDOM}


def test_threads_do_not_disturb_each_other() -> None:
    def numbers(key: int) -> list[bytes]:
        x = torch.zeros(64)
        drawn = [call("randn_like", (x,), {}, seed_key=seed_of(0, n, 0, key)) for n in range(20)]
        dropped = call("nn.functional.dropout", (torch.ones(64),), {}, seed_key=key)
        return [bytes_of(tensor) for tensor in (*drawn, dropped)]

    alone = [numbers(key) for key in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(numbers, list(range(8)) * 10))
    assert together == alone * 10


def test_a_draw_needs_a_key() -> None:
    with pytest.raises(ValueError, match="seed_key"):
        call("randn", (3,), {})


def test_keys_differ_in_every_part() -> None:
    keys = {seed_of(*parts) for parts in byproduct()}
    assert len(keys) == 5**4
    assert all(0 <= key < 2**64 for key in keys)
    assert seed_of(1, 2, 3, 4) == seed_of(1, 2, 3, 4)


def byproduct() -> Iterator[tuple[int, int, int, int]]:
    span = (0, 1, 2, 11, 12)
    yield from ((a, b, c, d) for a in span for b in span for c in span for d in span)


def test_factories_follow_the_device() -> None:
    assert call("zeros", (2,), {}, device="meta").is_meta
    assert call("randn", (2,), {}, seed_key=1).device.type == "cpu"
    assert call("normal", (0.0, 1.0, (2,)), {}, seed_key=1, device="cpu").shape == (2,)


def test_numbers_cannot_ask_for_too_much() -> None:
    with pytest.raises(GraphError, match="at most"):
        call("bincount", (torch.tensor([2**40]),), {})
    with pytest.raises(GraphError, match="at most"):
        call("repeat_interleave", (torch.ones(2), torch.tensor(2**33)), {})
    with pytest.raises(GraphError, match="at most"):
        call("nn.functional.one_hot", (torch.tensor([2**40]),), {})
    with pytest.raises(ValueError, match="output_size"):
        call("repeat_interleave", (torch.ones(2), torch.tensor([1, 2])), {"output_size": 9})
    assert call("bincount", (torch.tensor([1, 1]),), {}).tolist() == [0, 2]
    assert call("repeat_interleave", (torch.tensor([2, 1]),), {}).tolist() == [0, 0, 1]
    rows, repeats = torch.ones(3, 2), torch.tensor([2, 0, 1])
    assert call("repeat_interleave", (rows, repeats, 0), {"output_size": 3}).shape == (3, 2)
    assert call("repeat_interleave", (), {"repeats": repeats}).tolist() == [0, 0, 2]


@pytest.mark.gpu
@names
def test_numbers_depend_on_the_key_alone_on_a_gpu(sample: Sample) -> None:
    def drawn(key: int) -> list[bytes]:
        again = sample.copy()
        args = tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in again.args)
        with quiet():
            result = call(sample.name, args, again.kwargs, seed_key=key, device="cuda")
        return [bytes_of(leaf.cpu()) for leaf in flatten(result)]

    before = torch.cuda.get_rng_state()
    assert drawn(1) == drawn(1)
    assert torch.equal(before, torch.cuda.get_rng_state())
