"""Nobody is given a byte that nobody wrote, nor one that lies beside what is his.

Each thing is done twice, with two patterns in fresh memory: what depends on them read it. That of
each operation on plain arguments is in `tests/kernels`, of those that draw numbers here.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import weft
from tests.fuzz import targets
from tests.fuzz.graphs import Maker
from tests.fuzz.poison import PATTERNS, beside, needs_glibc, poisoned
from tests.fuzz.samples import ALL, samples
from tests.fuzz.weights import is_ours
from tests.kernels.opdb import REFUSALS, Sample, tensors_in
from tests.kernels.test_execute import bytes_of
from tests.kernels.test_execute import run as traces_of
from weft.errors import WeftError
from weft.graph.ops import OPS, RANDOM
from weft.kernels.abstract import flatten
from weft.kernels.execute import call
from weft.testing import tiny_path
from weft.wire.results import encode_result

pytestmark = needs_glibc

ROUNDS = {"counting": 40, "tiny": 6}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def twice(act: Callable[[int], Any]) -> tuple[Any, Any]:
    """What comes of it with each of the patterns."""
    found = []
    for pattern in PATTERNS:
        with poisoned(pattern):
            found.append(act(pattern))
    return found[0], found[1]


def outcome(act: Callable[[], Any]) -> Any:
    """What it gives; or which error it raises, when that is not ours to explain."""
    try:
        return act()
    except WeftError as error:
        return type(error).__name__, error.message
    except Exception as error:
        if is_ours(error) and not hasattr(error, "weft_line"):
            raise
        return type(error).__name__


@pytest.mark.parametrize("size", [64, 1000, 65_536, 1 << 18, 1 << 24])
def test_poison_reaches_fresh_memory_of_every_size(size: int) -> None:
    for pattern in PATTERNS:
        with poisoned(pattern):
            assert (torch.empty(size, dtype=torch.uint8) == pattern).all()


def test_a_read_of_fresh_memory_is_seen() -> None:
    one, other = twice(lambda pattern: torch.empty_strided((3,), (2,)).tolist())
    assert one != other


def test_a_read_beside_an_argument_is_seen() -> None:
    sample = Sample("add", (torch.ones(3), 1.0), {}, "by hand")
    found = [beside(sample, pattern).args[0].as_strided((3,), (1,)) for pattern in PATTERNS]
    assert found[0].tolist() != found[1].tolist()


def test_what_draws_numbers_writes_every_byte() -> None:
    drawing = [s for name in sorted(ALL) if OPS[name].kind in RANDOM for s in samples()[name]]
    assert {sample.name for sample in drawing} == {n for n in ALL if OPS[n].kind in RANDOM}
    for sample in drawing:
        one, other = twice(lambda _, sample=sample: traces_of(sample, seed_key=7))
        assert one == other, sample.name


def test_no_operation_reads_beside_its_arguments() -> None:
    """Neighbours' rows lie there, where many requests share one tensor."""
    wrong, ran = set(), set()
    for name in sorted(ALL):
        for sample in samples()[name]:
            found = [_spread_out(sample, pattern) for pattern in PATTERNS]
            if found[0] != found[1] and _tells_apart(sample):
                wrong.add(name)
            elif type(found[0]) is list:
                ran.add(name)
    assert wrong == set()
    assert len(ran) > 0.95 * len(ALL)


def _tells_apart(sample: Sample) -> bool:
    """Whether no outcome beside one pattern is one beside the other. LAPACK rounds a least-squares
    solution in one of a few ways, by where its arguments lie, beside one and the same pattern."""
    one, other = ([_spread_out(sample, pattern) for _ in range(50)] for pattern in PATTERNS)
    return not any(found in other for found in one)


def test_what_lies_beside_is_told_apart_from_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above could not fail."""
    lstsq = [sample for sample in samples()["linalg.lstsq"] if not sample.kwargs]
    assert not any(map(_tells_apart, lstsq))
    beyond = lambda name, args, kwargs: args[0].as_strided((3,), (1,)).clone()
    monkeypatch.setattr("tests.fuzz.test_poison.call", beyond)
    assert _tells_apart(Sample("neg", (torch.ones(3),), {}, "by hand"))


def _spread_out(sample: Sample, pattern: int) -> Any:
    """All that a call leaves behind, and that it left alone what lies beside its arguments."""
    wide = beside(sample, pattern)
    key = {"seed_key": 7} if OPS[sample.name].kind in RANDOM else {}
    try:
        with torch.no_grad():
            result = call(wide.name, wide.args, wide.kwargs, **key)
    except (*REFUSALS, NotImplementedError) as error:
        return type(error).__name__  # it takes no tensors that lie like this
    for tensor in tensors_in((wide.args, wide.kwargs)):
        _check_beside(tensor, pattern)
    return _bytes_of(result)


def _check_beside(tensor: torch.Tensor, pattern: int) -> None:
    if tensor.numel() and tensor.storage_offset() == 3:
        raw = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
        wide = raw.view(-1, tensor.element_size())
        fill = pattern % 2 if tensor.dtype is torch.bool else pattern
        assert (wide[:3] == fill).all() and (wide[-3:] == fill).all()
        assert (wide[4:-3:2] == fill).all()


def _bytes_of(result: Any) -> list[Any]:
    found = []
    for leaf in flatten(result):
        dense = torch.zeros(leaf.numel(), dtype=leaf.dtype).copy_(leaf.reshape(-1))
        found.append((tuple(leaf.shape), leaf.dtype, bytes_of(dense)))
    return found


@pytest.mark.parametrize("name", ROUNDS)
def test_no_result_of_a_graph_has_bytes_that_nobody_wrote(name: str) -> None:
    """Results as they are stored: tensors, what lies between them, the manifest."""
    target = targets.TARGETS[name]()
    files = 0
    for number in range(ROUNDS[name]):
        graph, frames = Maker(target, random.Random(f"poison {number}")).make()

        def drawn(_: int, graph: Any = graph, frames: Any = frames) -> Any:
            return outcome(lambda: _file(target, graph, frames))

        one, other = twice(drawn)
        assert one == other, number
        files += type(one) is bytes
    assert files > 0.7 * ROUNDS[name]


def _file(target: targets.Target, graph: Any, frames: Any) -> bytes:
    drawn = target.drawn(target.admitted(graph, frames))
    return encode_result(drawn.manifest, drawn.frames)


def test_rows_of_a_shared_forward_have_no_bytes_that_nobody_wrote() -> None:
    """Invokes of several lengths, padded, cut, edited and put back."""
    model = weft.LanguageModel(tiny_path())
    prompts = ("one", "one two three four five", "two three")

    def block(_: int) -> list[bytes]:
        saved = []
        with model.trace() as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    h = model.model.layers[1].output
                    saved.append(h.transpose(1, 2).save())
                    h[:, -1] *= 2
                    model.model.layers[2].mlp.output = model.model.layers[2].mlp.output.flip(-1)
                    saved.append(model.lm_head.output.save())
        return [tensor.contiguous().numpy().tobytes() for tensor in saved]

    block(0)  # whatever is learnt once is known
    one, other = twice(block)
    assert one == other


def test_steps_of_shared_generations_have_none_either() -> None:
    model = weft.LanguageModel(tiny_path())

    def block(_: int) -> list[bytes]:
        saved = []
        with model.generate(max_new_tokens=3) as tracer:
            for prompt in ("one two three", "four"):
                with tracer.invoke(prompt):
                    saved.append(tracer.result.save())
                    saved.append(model.model.layers[1].output.save())
        return [tensor.contiguous().numpy().tobytes() for tensor in saved]

    block(0)
    one, other = twice(block)
    assert one == other
