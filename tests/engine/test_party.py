"""Requests of many users in one forward: each has the numbers it has alone, whatever others do."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.engine.bench import limits
from tests.engine.strangers import KINDS, Asked, Experiments, Requests, ids, saved
from tests.families import zoo
from weft.engine import party
from weft.engine.draw import Drawn
from weft.engine.merging import merger_of
from weft.errors import CancelledError, ResultTooLargeError, TimeLimitError, WorkerMemoryError
from weft.graph.node import Call
from weft.run.interpreter import Interpreter
from weft.run.party import Party
from weft.testing.same import bitwise, bounded

SIZES = {"llama": {"max_position_embeddings": 256}, "gpt2": {"n_positions": 256}}


@pytest.fixture(scope="module")
def patching():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", params=SIZES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(family: str, patching) -> Requests:
    return Requests(zoo.build(family, **SIZES[family]), patching)


@pytest.fixture(scope="module")
def everyone(family: str, made: Requests) -> list[Asked]:
    """32 different graphs on prompts of 5 to 200 tokens."""
    tried = Experiments(family)
    return [
        made.ask(lambda model, n=n: getattr(tried, KINDS[n % 8])(model, 5 + 195 * n // 31, n))
        for n in range(32)
    ]


def count_passes(monkeypatch) -> list[int]:
    sizes: list[int] = []
    run = Party.run

    def counted(self: Party) -> None:
        sizes.append(len(self._seats))
        run(self)

    monkeypatch.setattr(Party, "run", counted)
    return sizes


def test_thirty_two_users_in_one_pass(made, everyone, monkeypatch):
    sizes = count_passes(monkeypatch)
    found = made.together(everyone)
    merged = [one for one in found if one is not None]
    assert len(merged) >= 0.9 * len(everyone)
    assert sizes and sum(sizes) / len(sizes) >= 8
    for asked, one in zip(everyone, found, strict=True):
        if one is not None:
            bounded(saved(one), asked.alone)


def test_nothing_of_the_model_has_changed(made, everyone):
    before = {name: tensor.clone() for name, tensor in made.net.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in made.net.modules())
    made.together(everyone[:6])
    bitwise(dict(made.net.state_dict()), before)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in made.net.modules())
    assert after == hooks


# -- hostile neighbours ----------------------------------------------------------------------------


def enemy(made: Requests, family: str, act: Any) -> Asked:
    """A request that does something to its hidden states in the first layer."""
    tried = Experiments(family)

    def block(model: Any) -> Any:
        with model.trace(ids(9, 77)) as tracer:
            act(tried.layer(model, 0))
            tried.head(model).output[:, -1].save("logits")
        return tracer

    return made.ask(block)


def fills(value: float) -> Any:
    def act(layer: Any) -> None:
        layer.output[:] = value

    return act


def harmless(layer: Any) -> None:
    layer.output[:] = layer.output * 1.0


@pytest.fixture(scope="module")
def beside_a_harmless_one(made, family, everyone) -> list[dict[str, Any]]:
    """What some users get beside a neighbour that does nothing."""
    neighbour = enemy(made, family, harmless)
    return [saved(one) for one in made.together([*everyone[:7], neighbour])[:7]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_of_a_neighbour_reach_nobody(made, family, everyone, value, beside_a_harmless_one):
    found = made.together([*everyone[:7], enemy(made, family, fills(value))])
    assert isinstance(found[7], Drawn)
    for one, expected in zip(found[:7], beside_a_harmless_one, strict=True):
        bitwise(saved(one), expected)


FAULTS = {
    "an operation that fails": (RuntimeError("a kernel fails"), RuntimeError),
    "an index out of range": (IndexError("index 9 is out of range"), IndexError),
    "out of memory": (torch.OutOfMemoryError("out of memory"), WorkerMemoryError),
    "a mistake of our own": (KeyError("x"), KeyError),
    "cancelled": (CancelledError("the job was cancelled"), CancelledError),
    "too slow": (TimeLimitError("the job runs longer"), TimeLimitError),
    "too large": (ResultTooLargeError("too much is saved"), ResultTooLargeError),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("after_an_edit", [False, True])
def test_faults_of_a_neighbour_reach_nobody(
    made, family, everyone, fault, after_an_edit, beside_a_harmless_one, monkeypatch
):
    raised, expected = FAULTS[fault]

    def act(layer: Any) -> None:
        if after_an_edit:
            layer.output[:] = float("nan")
        layer.output[:, -1] = layer.output[:, -1].erfinv()

    neighbour = enemy(made, family, act)
    fail_at(monkeypatch, "erfinv", raised)
    found = made.together([*everyone[:7], neighbour])
    assert isinstance(found[7], expected)
    for one, beside in zip(found[:7], beside_a_harmless_one, strict=True):
        bitwise(saved(one), beside)


def fail_at(monkeypatch, op: str, error: BaseException, sleep: float = 0.0) -> None:
    """Lets an operation of graphs fail."""
    run = Interpreter.table[Call]

    def fails(self: Any, step: Any) -> None:
        if step.node.op == op:
            time.sleep(sleep)
            raise error
        run(self, step)

    monkeypatch.setitem(Interpreter.table, Call, fails)


def test_the_time_of_neighbours_does_not_count(made, family, everyone, monkeypatch):
    """A limit of some seconds, and a neighbour whose operation takes longer."""
    neighbour = enemy(made, family, lambda layer: layer.output.erfinv().sum().save("s"))
    fail_at(monkeypatch, "erfinv", RuntimeError("at last"), sleep=4.2)
    entries = [made.entry(one) for one in [*everyone[:3], neighbour]]
    short = [
        party.Entry(e.opened, limits(run_seconds=4.0), e.overwritten, e.strict) for e in entries
    ]
    merger = merger_of(made.known)
    assert merger is not None
    found = party.draw_together(made.net, short, merger)
    assert isinstance(found[3], RuntimeError)
    for one, asked in zip(found[:3], everyone, strict=False):
        bounded(saved(one), asked.alone)


# -- what the model itself cannot do ---------------------------------------------------------------


def test_a_batch_that_is_too_large_is_cut(made, family, everyone, monkeypatch):
    """The model runs out of memory on more than five rows, in its last layer."""
    sizes = count_passes(monkeypatch)

    def before(module: Any, args: Any, kwargs: Any) -> None:
        if (args[0] if args else kwargs["hidden_states"]).shape[0] > 5:
            raise torch.OutOfMemoryError("out of memory")

    last = made.net.get_submodule(zoo.paths(family).layer(-1))
    handle = last.register_forward_pre_hook(before, with_kwargs=True)
    try:
        said: list[str] = []
        found = made.together(everyone[:9], on_log=said.append)
    finally:
        handle.remove()
    for asked, one in zip(everyone[:9], found, strict=True):
        if one is not None:
            bounded(saved(one), asked.alone)
    assert sum(one is not None for one in found) >= 7
    assert len(sizes) > 1 and len(said) == 1  # what is run again says nothing twice


def test_alone_means_alone(made, everyone):
    opened = everyone[0].opened
    solitary = type(opened)(**{**vars(opened), "alone": True})
    found = made.together([Asked(solitary, True, None), *everyone[1:4]])
    assert found[0] is None
    assert all(isinstance(one, Drawn) for one in found[1:])


def test_a_fill_beside_a_write_reaches_what_shares_the_tensor(patching):
    """The residual shares `ln_1.input`: one user's write leaves it, another's fill changes it."""
    made = Requests(zoo.build("gpt2"), patching)

    def block(fill: bool) -> Any:
        def act(model: Any) -> Any:
            with model.trace(ids(6, 3)) as tracer:
                norm = model.transformer.h[1].ln_1
                if fill:
                    norm.input[:] = 0.0
                else:
                    norm.input = norm.input * 2.0
                model.transformer.h[1].output.save("h")
            return tracer

        return act

    asked = [made.ask(block(False)), made.ask(block(True)), made.ask(block(False))]
    for one, found in zip(asked, made.together(asked), strict=True):
        bounded(saved(found), one.alone)
