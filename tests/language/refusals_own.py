"""Refusals about modules of the user's own in the tree, as `refusals`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import weft
from tests.language.refusals import A, B, refused
from weft import errors as e


class Own(nn.Module):
    """Two layers. `way` chooses what else its forward does."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.one, self.two, self.way, self.runs = nn.Linear(32, 32), nn.Linear(32, 32), way, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        if self.way == "in place":
            x -= 1
        if self.way == "nothing":
            return x
        x = self.one(x)
        return x if self.way == "once" and self.runs > 1 else self.two(x)


@contextmanager
def own(on: Any, way: str = "") -> Iterator[Any]:
    """The first layer, which has an `Own` at `.own` for a while."""
    layer = on.h[0]
    layer.own = Own(way)
    try:
        yield layer
    finally:
        del layer.own


@refused(e.RecordingError, "transformer.h.0.mlp cannot be a module of your own", fix="another name")
def name_that_is_taken(on):
    on.h[0].mlp = Own()  # here


@refused(e.NotReachedError, "h.0.own.one.output does not exist", "not been called", fix="call it")
def inside_before_its_call(on):
    with own(on) as layer, on.trace():
        layer.own.one.output  # here


@refused(e.RecordingError, "own was called 2 times", "ambiguous", fix=".calls[1].output")
def inside_of_two_calls(on):
    with own(on) as layer, on.trace():
        layer.own(layer.own(layer.output))
        layer.own.output  # here


@refused(e.NotReachedError, "own.two.output does not exist since the inside", fix="before that")
def inside_that_an_edit_has_removed(on):
    with own(on, "once") as layer, on.trace():
        layer.own(layer.output)
        two = layer.own.two
        layer.own.one.output = layer.own.one.output * 2
        two.output  # here


@refused(e.WriteMismatchError, "another structure is written to", "own.output", fix="structure")
def inside_of_another_structure(on):
    with own(on) as layer, on.trace():
        layer.own(layer.output)
        layer.own.output = {"x": layer.output}  # here


@refused(e.RecordingError, "what its call gave without the edit is used at", "on.h[1].output = ",
         fix="between the call and the first use")  # fmt: skip
def inside_after_the_first_use(on):
    with own(on) as layer, on.trace():
        on.h[1].output = layer.own(layer.output)
        layer.own.one.output[:] = 0  # here


@refused(e.RecordingError, "gives something else than its call has given", fix="one after another")
def inside_whose_result_is_the_argument(on):
    with own(on, "nothing") as layer, on.trace():
        layer.own(layer.output)
        layer.own.input = layer.own.input * 2  # here


@refused(e.RecordingError, "outside of the invoke that called it", fix="edit it there")
def inside_of_another_invoke(on):
    with own(on) as layer, on.model.trace() as tracer:
        with tracer.invoke(A):
            layer.own(layer.output)
            one = layer.own.one.output
        with tracer.invoke(B):
            one[:] = 0  # here


@refused(e.RecordingError, "changes more than its own values", "x -= 1", fix="one after another")
def inside_of_what_changes_its_argument(on):
    with own(on, "in place") as layer, on.trace():
        layer.own(layer.output)
        layer.own.one.output[:] = 0  # here


@refused(e.RecordingError, "what its call was given has changed", "h[:] = 0", fix="right below")
def inside_after_the_argument_has_changed(on):
    with own(on) as layer, on.trace():
        h = layer.output
        layer.own(h)
        h[:] = 0
        layer.own.one.output[:] = 0  # here


@refused(e.LateEditError, "that its call makes later", "own", fix="edit what comes after it")
def inside_from_what_comes_later(on):
    with own(on) as layer, on.trace():
        layer.own(layer.output)
        layer.own.one.output = layer.own.two.output * 2  # here


@refused(e.RecordingError, "own.inputs is not made inside the call", fix="assign a new tensor")
def argument_in_place(on):
    with own(on) as layer, on.trace():
        layer.own(layer.output)
        layer.own.input[:] = 0  # here


@refused(e.RecordingError, "lm_head was called with hook=True", fix="leave it out")
def inside_of_a_module_of_the_model(on):
    with on.trace():
        on.model.lm_head(on.h[0].output, hook=True)  # here


# -- blocks of a method ----------------------------------------------------------------------------


class Coder(Own):
    """It has a method beside its forward."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x)


@refused(e.RecordingError, "called in a block of its method 'encode'", fix="without fn=")
def model_in_a_block_of_its_method(on):
    model: Any = weft.Model(Coder())
    with model.trace(torch.ones(2, 32), fn="encode", remote=False):
        model(model.one.output)  # here


@refused(e.RecordingError, "no sites of a call of 'encode'", fix="leave out fn=")
def source_in_a_block_of_a_method(on):
    model: Any = weft.Model(Coder())
    with model.trace(torch.ones(2, 32), fn="encode", remote=False):
        model.one.source.F_linear_0.output  # here
