"""A model's own exception arrives as itself, with the user's line, from every kind of block.

Here it is the very object that the model raised; from a server an error that is one of the same
Python class. Afterwards nothing is left on the model, and the next block is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from tests.language.hooks import hook_count
from weft.errors import FailedRunError, RunError, SweepError, WeftError
from weft.testing.same import bitwise

A, B = ([zoo.tokens(n, seed=n)[0]] for n in (9, 5))
CALM = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@contextmanager
def failing(module: nn.Module, error: Exception, call: int = 0) -> Iterator[None]:
    """Inside, a module raises `error` at one of its calls with real tensors."""
    calls = iter(range(1 << 20))

    def hook(module: nn.Module, args: tuple) -> None:
        if type(args[0]) is torch.Tensor and not args[0].is_meta and next(calls) == call:
            raise error

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def line_of(text: str) -> str:
    """`<file>:<number>:` of the line of this file that ends in `# <text>`."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if line.endswith(f"  # {text}")]
    return f"{__file__}:{number}:"


def check(caught: BaseException, mine: Exception, place: Any, line: str) -> None:
    """It is the model's own, and says which line of the user's it was."""
    if str(place) == "here":
        assert caught is mine
    else:
        assert isinstance(caught, RunError) and isinstance(caught, type(mine))
        assert caught.kind == type(mine).__name__
    assert str(mine.args[0]) in str(caught)
    told = "\n".join([str(caught), *getattr(caught, "__notes__", [])])
    assert line_of(line) in told


@pytest.fixture
def mine() -> Exception:
    return LookupError("the model's own")


@pytest.fixture(autouse=True)
def _goes_on(model, net, ids, gpt2) -> Iterator[None]:
    yield
    assert hook_count(net) == 0
    with model.trace(ids):
        logits = model.lm_head.output.save()
    bitwise(logits, gpt2.baseline)


@pytest.mark.parametrize("kind", [ValueError, KeyError, ZeroDivisionError, RuntimeError])
def test_in_a_trace(model, net, ids, place, kind):
    mine = kind("the model's own")
    with (  # trace
        failing(net.transformer.h[1], mine),
        pytest.raises(kind) as caught,
        model.trace(ids),
    ):
        h = model.transformer.h[0].output.save()
        model.lm_head.output.save()
    check(caught.value, mine, place, "trace")
    with pytest.raises(FailedRunError, match="the model's own") as later:
        h.sum()
    assert "h = model.transformer.h[0].output.save()" in str(later.value.line)


def test_in_a_look(model, net, ids, place, mine):
    with (
        failing(net.transformer.h[1], mine),
        pytest.raises(LookupError) as caught,
        model.trace(ids),
    ):
        h = model.transformer.h[2].output
        float(h.sum())  # look
    check(caught.value, mine, place, "look")


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("alone", [False, True])
def test_in_invokes(model, net, place, mine, call, alone):
    module = net.transformer.h[1]
    with model.trace(alone=alone) as tracer:  # the trial of shared forwards is over now
        for prompt in (A, B):
            with tracer.invoke(prompt):
                model.lm_head.output.save()
    with (  # invokes
        failing(module, mine, call if alone else 0),
        pytest.raises(LookupError) as caught,
        model.trace(alone=alone) as tracer,
    ):
        with tracer.invoke(A):
            model.lm_head.output.save()
        with tracer.invoke(B):
            model.transformer.h[0].output[:, 0] = 0
            model.lm_head.output.save()
    check(caught.value, mine, place, "invokes")


def test_in_invokes_that_take_turns(model, net, place, mine):
    with (  # turns
        failing(net.transformer.h[2], mine),
        pytest.raises(LookupError) as caught,
        model.trace() as tracer,
    ):
        with tracer.invoke(A):
            one, early = model.transformer.h[0].output[:, -1], model.transformer.h[1].output
        with tracer.invoke(B):
            two = model.transformer.h[0].output[:, -1]
            model.transformer.h[1].output[:, 0] = one
            model.lm_head.output.save()
        early[:, 0] = two
        with tracer.invoke():
            model.lm_head.output.save()
    check(caught.value, mine, place, "turns")


def test_in_a_block_with_gradients(model, net, ids, place, mine):
    with (  # gradients
        failing(net.transformer.h[1], mine),
        pytest.raises(LookupError) as caught,
        model.trace(ids),
    ):
        h = model.transformer.h[0].output
        model.lm_head.output.sum().backward()
        h.grad.save()
    check(caught.value, mine, place, "gradients")


class Stubborn(torch.autograd.Function):
    """Has no way back."""

    error: Exception | None = None

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if Stubborn.error is not None:
            raise Stubborn.error
        return grads[0] * 2


class OneWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(Stubborn.apply(self.first(x)))


def test_in_its_backward(place, mine):
    model = weft.Model(OneWay())
    try:
        with pytest.raises(LookupError) as caught, model.trace(torch.ones(1, 3)):
            h = model.first.output
            Stubborn.error = mine
            model.last.output.sum().backward()  # backward
            h.grad.save()
    finally:
        Stubborn.error = None
    check(caught.value, mine, place, "backward")


@pytest.mark.parametrize("step", [0, 2])
def test_in_a_generation(model, net, ids, place, mine, step):
    with (  # generate
        failing(net.transformer.h[1], mine, step),
        pytest.raises(LookupError) as caught,
        model.generate(ids, **CALM) as tracer,
    ):
        with tracer.iter[0]:
            model.transformer.h[0].output.save()
        tracer.result.save()
    check(caught.value, mine, place, "generate")


def test_in_a_generation_of_several_inputs(model, net, place, mine):
    def run() -> None:
        with model.generate(**CALM) as tracer:  # generations
            for prompt in (A, B):
                with tracer.invoke(prompt):
                    tracer.result.save()

    run()  # the trial of shared steps is over now
    with failing(net.transformer.h[1], mine, 2), pytest.raises(LookupError) as caught:
        run()
    check(caught.value, mine, place, "generations")


def test_in_an_edited_model_and_in_an_experiment_that_runs_again(model, net, ids, place, mine):
    with model.edit() as edited:
        model.transformer.h[0].output[:, -1] *= 2
    with edited.trace(ids) as tracer:
        edited.lm_head.output.save()
    with (  # edited
        failing(net.transformer.h[1], mine),
        pytest.raises(LookupError) as caught,
        edited.trace(ids),
    ):
        edited.lm_head.output.save()
    check(caught.value, mine, place, "edited")
    with failing(net.transformer.h[1], mine), pytest.raises(LookupError) as caught:
        tracer.graph.run(model, ids)  # again
    check(caught.value, mine, place, "again")


def test_in_a_sweep(model, net, ids, place, mine):
    def f(tracer: Any, layer: int) -> Any:
        model.transformer.h[layer].output[:, 0] = 0
        return model.lm_head.output[:, -1].sum()

    model.sweep(ids, f, layer=[0, 1])  # the trial of shared forwards is over now
    with failing(net.transformer.h[2], mine), pytest.raises(SweepError) as caught:
        model.sweep(ids, f, layer=[0, 1], batch=1)  # sweep
    error = caught.value
    assert error.failed and error.fix
    (cause,) = error.failed.values()
    if str(place) == "here":
        assert cause is mine is error.__cause__
    else:
        assert isinstance(cause, LookupError) and isinstance(cause, RunError)
    assert "the model's own" in error.message and "layer=0" in error.message
    assert "test_own_errors.py" in str(error.line)


def test_an_operation_of_the_block_that_fails_names_its_own_line(model, ids, place):
    for kind in ("trace", "invoke", "generate"):
        far = torch.tensor([99])
        with pytest.raises(IndexError) as caught:
            if kind == "trace":
                with model.trace(ids):
                    model.transformer.h[1].output[:, far].save()  # operation: trace
            elif kind == "invoke":
                with model.trace() as tracer, tracer.invoke(A):
                    model.transformer.h[1].output[:, far].save()  # operation: invoke
            else:
                with model.generate(ids, **CALM) as tracer, tracer.iter[1]:
                    model.transformer.h[1].output[:, far].save()  # operation: generate
        told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
        assert line_of(f"operation: {kind}") in told


def test_what_the_user_raises_in_a_block_is_his_own(model, ids, mine):
    with pytest.raises(LookupError) as caught, model.trace(ids):
        h = model.transformer.h[1].output.save()
        raise mine
    assert caught.value is mine and not isinstance(caught.value, WeftError)
    with pytest.raises(FailedRunError, match="the model's own"):
        h.sum()
