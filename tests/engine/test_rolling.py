"""Generations of many users in one decode loop: whoever comes and goes, each is as alone."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

from tests.engine.strangers import Asked, Generations, Requests, ids, saved
from tests.families import zoo
from weft.engine.draw import Drawn
from weft.engine.kept import Kept
from weft.engine.rolling import Decode, LoopLostError, Ticket
from weft.errors import CancelledError, TimeLimitError
from weft.graph.node import Call
from weft.run.interpreter import Interpreter
from weft.testing.same import bitwise, bounded

POOL = 48
SCHEDULES = int(os.environ.get("WEFT_TEST_SCHEDULES", "500"))
"""For each of two families: a thousand in all."""
FAMILIES = ("llama", "gpt2")


@pytest.fixture(scope="module")
def patching():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(family: str, patching) -> Requests:
    found = Requests(zoo.build(family), patching)
    Kept.of(found.net).stays = True  # as in a worker
    return found


@pytest.fixture(scope="module")
def pool(family: str, made: Requests) -> list[Asked]:
    tried = Generations(family)
    return [made.ask(lambda model, n=n: tried.block(model, n)) for n in range(POOL)]


def check(ticket: Ticket, asked: Asked) -> None:
    assert isinstance(ticket.found, Drawn), ticket.found
    got = saved(ticket.found)
    assert asked.alone is not None
    assert {name for name in got if not name.endswith("+")} == asked.alone.keys()
    for name, expected in asked.alone.items():
        value = got.get(f"{name}+", got[name])  # what a list was given in later steps
        if isinstance(expected, torch.Tensor) and not expected.is_floating_point():
            assert torch.equal(value, expected), name
        else:
            bounded(value, expected)


def test_random_schedules(made, pool):
    """Who joins when, who is cancelled when: at random, but the same each time."""
    draw = random.Random(5)
    shared = 0
    for _ in range(SCHEDULES):
        shared += schedule(made, pool, draw)
    assert shared > SCHEDULES  # jobs that had company


def schedule(made: Requests, pool: list[Asked], draw: random.Random) -> int:
    """One loop, from its first joiner to its last leaver; how many were not alone in it."""
    decode = made.decode()
    waiting = draw.sample(range(len(pool)), draw.randint(2, 5))
    gone: set[int] = set()
    here: dict[Ticket, int] = {}
    shared = 0
    try:
        while waiting or len(decode):
            while waiting and (not len(decode) or draw.random() < 0.5):
                number = waiting.pop()
                cancelled = (lambda n=number: n in gone) if draw.random() < 0.2 else None
                ticket = decode.join(made.entry(pool[number], cancelled=cancelled))
                assert ticket is not None
                here[ticket] = number
                if cancelled is not None and draw.random() < 0.5:
                    gone.add(number)
            decode.turn()
            for ticket in decode.left():
                number = here.pop(ticket)
                shared += ticket.batch > 1
                if isinstance(ticket.found, CancelledError):
                    assert number in gone
                else:
                    check(ticket, pool[number])
    finally:
        decode.close()
    assert not here
    return shared


def drawn(made: Requests, asked: list[Asked], **options: Any) -> list[Any]:
    """What becomes of requests that all join at once."""
    decode = made.decode()
    tickets = [decode.join(made.entry(one, **options)) for one in asked]
    assert all(ticket is not None for ticket in tickets)
    try:
        while decode.turn():
            pass
        return [ticket.found for ticket in tickets if ticket is not None]
    finally:
        decode.close()


def test_a_module_that_a_graph_calls_while_it_joins_leaves_nothing(made, family, monkeypatch):
    """Before any forward: nobody else puts back what that leaves on the model."""
    name = zoo.paths(family).norm
    norm = made.net.get_submodule(name)

    def block(model: Any) -> Any:
        module = model.get(name)
        with model.generate(ids(4, 1), max_new_tokens=2, do_sample=False) as tracer:
            module(module.weight[None, None]).save("n")
            tracer.result.save("ids")
        return tracer

    asked = made.ask(block)
    drawn(made, [asked])  # the model has had its trials
    called: list[int] = []
    forward = type(norm).forward

    def notes(module: Any, x: torch.Tensor) -> Any:
        called.append(x.dim())
        module.left = torch.ones(1)
        return forward(module, x)

    monkeypatch.setattr(type(norm), "forward", notes)
    decode = made.decode()
    ticket = decode.join(made.entry(asked))
    assert called == [3] and not hasattr(norm, "left")
    while decode.turn():
        pass
    (left,) = decode.left()
    assert left is ticket and not hasattr(norm, "left")
    check(left, asked)


def test_nothing_of_the_model_has_changed(made, pool):
    before = {name: tensor.clone() for name, tensor in made.net.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in made.net.modules())
    drawn(made, pool[:5])
    bitwise(dict(made.net.state_dict()), before)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in made.net.modules())
    assert after == hooks


# -- hostile neighbours ----------------------------------------------------------------------------


def enemy(made: Requests, family: str, act: Any) -> Asked:
    """A generation of four tokens that does something to its hidden states at every step."""
    tried = Generations(family)

    def block(model: Any) -> Any:
        with model.generate(ids(5, 77), max_new_tokens=4) as tracer:
            act(tried.layer(model, 0))
            tracer.result.save("ids")
        return tracer

    return made.ask(block)


def harmless(layer: Any) -> None:
    layer.output[:] = layer.output * 1.0


@pytest.fixture(scope="module")
def beside_a_harmless_one(made, family, pool) -> list[dict[str, Any]]:
    neighbour = enemy(made, family, harmless)
    return [saved(one) for one in drawn(made, [*pool[:5], neighbour])[:5]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_of_a_neighbour_reach_nobody(made, family, pool, value, beside_a_harmless_one):
    def act(layer: Any) -> None:
        layer.output[:] = value

    found = drawn(made, [*pool[:5], enemy(made, family, act)])
    for one, expected in zip(found[:5], beside_a_harmless_one, strict=True):
        bitwise(saved(one), expected)


@pytest.mark.parametrize(
    "error", [RuntimeError("a kernel fails"), IndexError("9"), TimeLimitError("too slow")]
)
def test_faults_of_a_neighbour_reach_nobody(
    made, family, pool, error, beside_a_harmless_one, monkeypatch
):
    """Its rows leave at once, so shapes are others from then on: within the bound."""

    def act(layer: Any) -> None:
        layer.output[:] = float("nan")
        layer.output[:] = layer.output.erfinv()

    neighbour = enemy(made, family, act)
    run = Interpreter.table[Call]

    def fails(self: Any, step: Any) -> None:
        if step.node.op == "erfinv":
            raise error
        run(self, step)

    monkeypatch.setitem(Interpreter.table, Call, fails)
    found = drawn(made, [*pool[:5], neighbour])
    assert found[5] is error
    for one, expected in zip(found[:5], beside_a_harmless_one, strict=True):
        bounded(saved(one), expected)


def test_a_step_that_fails_in_the_model_ends_the_loop(made, pool, family):
    calls = []

    def before(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("out of memory")

    handle = made.net.get_submodule(zoo.paths(family).layer(-1)).register_forward_pre_hook(before)
    decode = made.decode()
    try:
        for one in pool[1:4]:
            decode.join(made.entry(one))
        with pytest.raises(LoopLostError):
            while decode.turn():
                pass
        assert len(decode) == 0
    finally:
        handle.remove()
        decode.close()
    ticket = decode.join(made.entry(pool[1]))  # and it can be used again
    assert ticket is not None
    while decode.turn():
        pass
    decode.close()
    check(ticket, pool[1])


def test_what_cannot_share_is_not_let_in(made, family):
    paths = zoo.paths(family)

    def without_cache(model: Any) -> Any:
        with model.generate(ids(4, 1), max_new_tokens=2, use_cache=False) as tracer:
            tracer.result.save("ids")
        return tracer

    def single(model: Any) -> Any:
        with model.trace(ids(4, 1)) as tracer:
            model.get(paths.head).output.save("logits")
        return tracer

    decode: Decode = made.decode()
    for block in (without_cache, single):
        assert decode.join(made.entry(made.ask(block))) is None
    assert len(decode) == 0 and not decode.turn()
