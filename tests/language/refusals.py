"""Every refusal of a block, each with what it must say. `test_refusals_each` runs them.

A case is a block that is refused at the line marked `# here` of its source (or while the block
closes or runs, for a line of it that is marked). `says` are parts of the message: the site, what
was expected, what was got, another line; `fix` a part of the way out.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import weft
from tests.families import zoo
from weft import errors as e
from weft.trace.tree import Root


@dataclass(frozen=True)
class Case:
    """See the module's text."""

    block: Callable[[Any], Any]
    error: type[Exception]
    says: tuple[str, ...]
    fix: str

    @property
    def line(self) -> int:
        """The number of the marked line."""
        source, first = inspect.getsourcelines(self.block)
        (number,) = [first + n for n, text in enumerate(source) if text.endswith("# here\n")]
        return number


@dataclass(frozen=True)
class Things:
    """What blocks work on: a GPT-2 of three layers, 32 wide, and its 9 tokens."""

    model: Any
    net: nn.Module
    ids: torch.Tensor
    is_here: bool = True

    @property
    def h(self) -> Any:
        return self.model.transformer.h

    def trace(self, **options: Any) -> Any:
        return self.model.trace(self.ids, **options)


CASES: dict[str, Case] = {}
A, B = [zoo.tokens(9, seed=1)[0]], [zoo.tokens(5, seed=2)[0]]


def refused(error: type[Exception], *says: str, fix: str) -> Callable[[Any], Any]:
    """Adds a case."""

    def add(block: Any) -> Any:
        CASES[block.__name__] = Case(block, error, says, fix)
        return block

    return add


# -- writes ----------------------------------------------------------------------------------------


@refused(e.WriteMismatchError, "transformer.h.1.output holds float32[1, 9, 32]", "float32[3] is",
         fix="a tensor of shape [1, 9, 32]")  # fmt: skip
def write_of_another_shape(on):
    with on.trace():
        on.h[1].output = torch.ones(3)  # here


@refused(e.WriteMismatchError, "transformer.h.1.output", "int64[1, 9, 32]", fix="[1, 9, 32]")
def write_of_whole_numbers(on):
    with on.trace():
        on.h[1].output = torch.ones(1, 9, 32, dtype=torch.long)  # here


@refused(e.WriteMismatchError, "transformer.h.1.output holds", "a str is written",
         fix="a tensor of shape")  # fmt: skip
def write_of_text(on):
    with on.trace():
        on.h[1].output = "text"  # here


@refused(e.WriteMismatchError, "transformer.h.1.attn.output holds", "is written to it",
         fix="structure")  # fmt: skip
def write_of_another_structure(on):
    with on.trace():
        on.h[1].attn.output = (on.h[1].attn.output[0],) * 3  # here


@refused(
    e.WriteMismatchError, "transformer.h.1.attn.output[1] is not a tensor", fix="leave it as it is"
)
def write_of_a_tensor_where_none_is(on):
    with on.trace():
        on.h[1].attn.output = (on.h[1].attn.output[0], torch.ones(3))  # here


@refused(e.LateEditError, "transformer.h.0.output", "only later in the forward pass",
         "= on.h[2].output  # here", fix="edit a site that fires after")  # fmt: skip
def late_write(on):
    with on.trace():
        on.h[0].output = on.h[2].output  # here


@refused(e.RecordingError, "transformer.h.0.output", "looked at", "if on.h[1].output.sum()",
         fix="above the look")  # fmt: skip
def edit_after_a_look(on):
    with on.trace():
        if on.h[1].output.sum() < 1e9:
            on.h[0].output[:] = 0  # here


@refused(e.StaleHandleError, "transformer.h.0.output was read at", "old = on.h[0].output",
         "before the edit at", fix="read the site again")  # fmt: skip
def stale_handle(on):
    with on.trace():
        old = on.h[0].output
        on.h[0].output[:] = 0
        old[:, 0] = 1  # here


@refused(e.RecordingError, "an assignment to 1, which is not a tensor there",
         "transformer.h.1.attn.output", fix="assign a tensor to an existing item")  # fmt: skip
def container_item_that_is_no_tensor(on):
    with on.trace():
        on.h[1].attn.output[1] = torch.ones(3)  # here


@refused(e.ReadOnlyError, "transformer.h.0.ln_1.weight is a weight of the model",
         fix=".clone()")  # fmt: skip
def write_into_a_weight(on):
    with on.trace():
        on.h[0].ln_1.weight[:] = 0  # here


# -- sites -----------------------------------------------------------------------------------------


@refused(e.OutsideTraceError, "transformer.h.0.output was used", fix="with model.trace(...)")
def site_outside_a_block(on):
    on.h[0].output  # here


@refused(e.OutsideTraceError, "transformer.h.0.output", "another model", fix="model.trace")
def site_of_another_model(on):
    other = weft.Model(nn.Linear(3, 3))
    with other.trace(torch.ones(1, 3)):
        on.h[0].output  # here


@refused(e.OutsideTraceError, "the sources of this tree", fix="weft.LanguageModel")
def source_of_a_bare_tree(on):
    Root(lambda: on.net, lambda: on.net).listing("transformer")  # here


@refused(e.UnknownPathError, "transformer.h.0.atn", "GPT2Block has no attribute 'atn'",
         fix="transformer.h.0.attn")  # fmt: skip
def unknown_path(on):
    with on.trace():
        on.h[0].atn.output  # here


class Idle(nn.Module):
    """`twice` is called twice, `idle` never, `nothing` takes no tensor; `odd` gives an object."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.nothing, self.odd = Nothing(), Odd()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.odd(x + self.nothing())
        return self.twice(self.twice(found.x))


class Nothing(nn.Module):
    def forward(self) -> torch.Tensor:
        return torch.ones(4)


class Thing:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> Thing:
        return Thing(x)


X = torch.ones(2, 4)


@refused(e.RecordingError, "twice is called 2 times in this pass", ".output is ambiguous",
         fix=".calls[0].output to .calls[1].output")  # fmt: skip
def ambiguous_call(on):
    model = weft.Model(Idle())
    with model.trace(X):
        model.twice.output  # here


@refused(e.NotReachedError, "idle.output does not exist", "never called", fix="a module that runs")
def module_that_never_runs(on):
    model = weft.Model(Idle())
    with model.trace(X):
        model.idle.output  # here


@refused(e.RecordingError, "nothing has no tensor among its inputs", fix=".inputs")
def module_without_input(on):
    model = weft.Model(Idle())
    with model.trace(X):
        model.nothing.input  # here


@refused(e.RecordingError, "odd.output is a Thing", "cannot read inside it",
         fix="the sites of the modules")  # fmt: skip
def object_of_a_models_own(on):
    model = weft.Model(Idle())
    with model.trace(X):
        model.odd.output.x  # here


@refused(e.RecordingError, "odd.output is a Thing, which a block cannot make", "odd cannot be skip",
         fix="skip the modules inside it")  # fmt: skip
def skip_of_an_object(on):
    model = weft.Model(Idle())
    with model.trace(X):
        model.odd.skip(X)  # here


@refused(e.NotReachedError, "idle is never called", "cannot be cached", fix="modules that run")
def cache_of_what_never_runs(on):
    model = weft.Model(Idle())
    with model.trace(X) as tracer:
        tracer.cache(["idle"])  # here


# -- operations and arguments ----------------------------------------------------------------------


@refused(e.UnsupportedOperationError, "data_ptr cannot be recorded", fix="another operation")
def unsupported_operation(on):
    with on.trace():
        on.h[0].output.data_ptr()  # here


@refused(e.RecordingError, "an argument of type object cannot be part of a graph",
         fix="pass tensors, numbers")  # fmt: skip
def argument_of_a_strange_type(on):
    with on.trace():
        on.h[0].output.new_tensor(object())  # here


@refused(e.RecordingError, "out= cannot be recorded", fix="the result that is returned")
def result_into_a_tensor(on):
    with on.trace():
        torch.add(on.h[0].output, 1, out=torch.zeros(1, 9, 32))  # here


@refused(e.WriteMismatchError, "torch.Tensor.add_ cannot put its result into int64[1, 9]",
         "result type Float can't be cast", fix="when it is not in place")  # fmt: skip
def fractions_into_whole_numbers(on):
    with on.trace():
        ids = on.model.transformer.wte.input.clone()
        ids += 1.5  # here
        on.h[0].output.save()


@refused(e.WriteMismatchError, "torch.Tensor.mul_ cannot put its result into bool[1, 9, 32]",
         "result type Float can't be cast", fix="convert the tensor first")  # fmt: skip
def scaled_mask(on):
    with on.trace():
        (on.h[0].output > 0).mul_(2.5).save()  # here


@refused(e.WriteMismatchError, "cannot put its result into int64[1, 9]", "dtypes match",
         fix="convert the tensor first")  # fmt: skip
def floats_at_chosen_ids(on):
    with on.trace():
        ids = on.model.transformer.wte.input.clone()
        ids[0, torch.tensor([0, 3])] = on.h[0].output[0, :2, 0]  # here
        ids.save()


@refused(e.RecordingError, "torch.func", "act on the recording", fix="call the function directly")
def transform(on):
    with on.trace():
        torch.func.vmap(torch.sum)(on.h[0].output)  # here


@refused(e.RecordingError, "cannot be pickled", fix=".save()")
def pickled(on):
    with on.trace():
        pickle.dumps(on.h[0].output)  # here


@refused(e.RecordingError, "numpy's add (reduce) cannot be recorded", fix="torch function")
def numpy_reduction(on):
    with on.trace():
        on.h[0].output.__array_ufunc__(np.add, "reduce", on.h[0].output)  # here


@refused(e.RecordingError, "a meta tensor ([3]) was used", "no numbers", fix="torch.zeros(value.")
def meta_tensor(on):
    with on.trace():
        on.h[0].output[0, 0, :3] + torch.ones(3, device="meta")  # here


@refused(e.ChangedConstantError, "client tensor was changed", "on.h[0].output + mine",
         fix="")  # fmt: skip
def changed_constant(on):
    mine = torch.ones(32)
    with on.trace():
        on.h[0].output + mine
        mine[0] = 3
        on.h[0].output + mine  # here


@refused(e.RecordingError, "writes into the memory of this client tensor", "expanded",
         fix=".clone()")  # fmt: skip
def dirty_tensor_seen_otherwise(on):
    mine = torch.zeros(1, 9, 32)
    wide = mine[:, :1].expand(1, 9, 32)
    with on.trace():
        mine[0] = on.h[0].output.sum(0)
        wide + 1  # here


# -- saves, and values afterwards ------------------------------------------------------------------


@refused(e.RecordingError, "'<x' cannot name a save", fix="does not begin with")
def name_of_a_save(on):
    with on.trace():
        on.h[0].output.save("<x")  # here


@refused(e.RecordingError, "two saves are named 'h'", fix="its own name")
def two_saves_of_one_name(on):
    with on.trace():
        on.h[0].output.save("h")
        on.h[1].output.save("h")  # here


@refused(e.OutsideTraceError, "weft.save was called outside a block", fix="model.trace")
def save_outside_a_block(on):
    weft.save([torch.ones(3)])  # here


@refused(e.NotSavedError, "was not saved", fix="add .save()")
def unsaved_value(on):
    with on.trace():
        h = on.h[0].output  # here
        on.h[1].output.save()
    h + 1


@refused(e.FailedRunError, "did not finish", "KeyError: 'mine'", fix="mend the cause")
def value_of_a_failed_block(on):
    try:
        with on.trace():
            h = on.h[0].output.save()  # here
            {}["mine"]
    except KeyError:
        h + 1  # type: ignore[possibly-unbound]


@refused(e.FailedRunError, "only scanned", fix="model.trace(...)")
def value_of_a_scan(on):
    with on.model.scan(on.ids):
        h = on.h[0].output.save()  # here
    h + 1


@refused(e.NotReachedError, "was not reached", "tracer.stop()", fix="move the stop below")
def value_behind_a_stop(on):
    with on.trace() as tracer:
        on.h[0].output.save()
        tracer.stop()
        late = on.h[2].output.save()  # here
    late + 1


@refused(e.RecordingError, "a value of another open block was used", fix="save it there first")
def value_of_another_open_block(on):
    other = weft.Model(nn.Linear(4, 4))
    import contextvars

    with on.trace():
        h = on.h[0].output

        def inner():
            with other.trace(X):
                other.output + h[0, :2, :4]  # here

        contextvars.Context().run(inner)


@refused(e.RecordingError, "the cache 'cache' was read inside its block",
         fix="read it after the block")  # fmt: skip
def cache_read_inside(on):
    with on.trace() as tracer:
        cache = tracer.cache([on.h[0]])
        cache.transformer.h[0].output  # here


@refused(e.UnknownPathError, "3 is no module of this model", fix="model.get(path)")
def cache_of_no_module(on):
    with on.trace() as tracer:
        tracer.cache([3])  # here
