"""Refusals of the run: what was recorded does not fit what the model does now, as `refusals`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import weft
from tests.language.refusals import B, refused
from weft import errors as e

X = torch.ones(2, 3)


class Moody(nn.Module):
    """What its middle does is for `mood` to say, once the shapes have been learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 3), Middle(), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.middle.mood == "silent":
            return self.last(x)
        found = self.middle(x)
        return self.last(x if found is None or found.shape != x.shape else found)


class Middle(nn.Module):
    mood = "good"

    def forward(self, x: torch.Tensor) -> Any:
        return {"wide": torch.cat([x, x], -1), "double": x.double(), "none": None}.get(self.mood, x)


def moody(mood: str) -> Any:
    """A model that was good when it was learnt."""
    net = Moody()
    model = weft.Model(net)
    with model.trace(X):
        model.middle.output.save()
    net.middle.mood = mood
    return model


# -- sites -----------------------------------------------------------------------------------------


@refused(e.SiteMismatchError, "middle.output should be float32[2, 3], but is float32[2, 6]",
         fix="on an input like this one")  # fmt: skip
def a_site_of_another_shape(on):
    model = moody("wide")
    with model.trace(X):
        model.middle.output.save()  # here


@refused(e.SiteMismatchError, "middle.output should be float32[2, 3], but is float64[2, 3]",
         fix="on an input like this one")  # fmt: skip
def a_site_of_another_dtype(on):
    model = moody("double")
    with model.trace(X):
        model.middle.output.save()  # here


@refused(e.SiteMismatchError, "middle.output should be a tensor, but there is NoneType",
         fix="its structure differs")  # fmt: skip
def a_site_without_a_tensor(on):
    model = moody("none")
    with model.trace(X):
        (model.middle.output * 2).save()  # here


@refused(e.NotReachedError, "these sites did not fire in this run", "middle.output, at",
         "model.middle.output.save()", fix="did not call these modules")  # fmt: skip
def a_module_that_is_not_called(on):
    model = moody("silent")
    with model.trace(X):  # here
        model.middle.output.save()


@refused(e.NotReachedError, "these sites did not fire in this run", "middle.output, at",
         fix="did not call these modules")  # fmt: skip
def a_module_that_is_not_called_in_a_look(on):
    model = moody("silent")
    with model.trace(X):
        float(model.middle.output.sum())  # here


# -- the same experiment on other inputs -----------------------------------------------------------


@refused(e.GuardError, "depended on this value being True, but it is False", fix="record the")
def a_look_that_comes_out_differently(on):
    model = weft.Model(nn.Sequential(nn.Identity(), nn.Linear(3, 3)))
    with model.trace(X) as tracer:
        if model[0].output.sum() > 0:  # here
            model[1].output.save()
    tracer.graph.run(model, -X)


@refused(e.GraphError, "read dimension 1 as the number 9; on this input it is 5",
         fix="on an input of this size")  # fmt: skip
def a_size_that_is_another_one(on):
    with on.trace() as tracer:
        h = on.h[1].output
        (h * h.shape[1]).save()  # here
    tracer.graph.run(on.model, B)


@refused(e.WriteMismatchError, "transformer.h.1.output is float32[1, 5, 32]", "float32[1, 9, 32]",
         fix="own shape and kind")  # fmt: skip
def a_skip_of_another_length(on):
    with on.trace() as tracer:
        on.h[1].skip(torch.ones(1, 9, 32))  # here
        on.model.lm_head.output.save()
    tracer.graph.run(on.model, B)


@refused(e.WriteMismatchError, "transformer.h.1.output", "float32[1, 9, 32]", fix="")
def a_write_of_another_length(on):
    with on.trace() as tracer:
        on.h[1].output = torch.ones(1, 9, 32)  # here
        on.model.lm_head.output.save()
    tracer.graph.run(on.model, B)


@refused(e.GraphError, "the graph is for another model: no 'transformer.h.1' here",
         fix="on the model that it was recorded on")  # fmt: skip
def an_experiment_of_another_model(on):
    with on.trace() as tracer:
        on.h[1].output.save()  # here
    tracer.graph.run(weft.Model(nn.Linear(3, 3)), X)
