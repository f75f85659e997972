"""What each refusal of a run says: the line, the site, what was expected, what came, the way out.

Those of whole blocks stand in `tests/language/refusals_running`; here are graphs that no block of
this version would record, or that another model or another version of torch meets.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.run.graphs import Builder, site
from tests.run.nets import Chain, example
from tests.run.test_interpreter import NoModel
from weft.errors import (
    GraphError,
    NotReachedError,
    OverwrittenError,
    ReadOnlyError,
    SiteMismatchError,
    UnknownPathError,
    WeftError,
    WriteMismatchError,
)
from weft.graph.node import Skip
from weft.kernels.aval import contiguous
from weft.run import run
from weft.run.interpreter import Interpreter
from weft.run.plan import CALLED, plan

X = example()


def refused(kind: type[WeftError], call: Any) -> tuple[str, str]:
    """Message and way out of what `call` raises, which names a line."""
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert str(error.line).startswith("user.py:1")
    assert error.fix and f"fix: {error.fix}" in str(error)
    return error.message, error.fix


def on_chain(g: Builder, x: torch.Tensor = X, **options: Any) -> Any:
    return lambda: run(g.graph(), g.constants, Chain(), (x,), **options)


def without_model(g: Builder, constants: Any = None) -> Any:
    given = g.constants if constants is None else constants
    return lambda: Interpreter(g.graph(), given, NoModel()).begin()


# -- constants, weights, operations ----------------------------------------------------------------


def test_a_constant_that_is_missing():
    g = Builder()
    g.save("c", g.mul(g.const(torch.ones(3)), 2.0))
    said, fix = refused(GraphError, without_model(g, {}))
    assert said == "the constant 'c0' is missing"
    assert "with its constants" in fix


def test_a_constant_of_another_kind():
    g = Builder()
    g.save("c", g.mul(g.const(torch.ones(3)), 2.0))
    said, fix = refused(GraphError, without_model(g, {"c0": torch.ones(4)}))
    assert said == "the constant 'c0' should be float32[3], but is float32[4]"
    assert "the model it was recorded with" in fix


def test_a_weight_of_another_shape():
    g = Builder()
    g.save("w", g.param("head.weight", torch.ones(7, 8)))
    said, fix = refused(GraphError, on_chain(g))
    assert said.startswith("the weight 'head.weight' should be float32[7, 8], but is float32[")
    assert "it was recorded with" in fix


def test_a_weight_that_would_be_written():
    g = Builder()
    w = g.param("w", torch.ones(8))
    g.mul_(g.item(w, 0), 2.0)
    g.save("w", w)
    said, fix = refused(ReadOnlyError, lambda: plan(g.graph()))
    assert said == "torch.Tensor.mul_ would write into the weight 'w'"
    assert ".clone()" in fix


def test_an_operation_of_another_torch(monkeypatch):
    monkeypatch.delitem(CALLED, "sinc")
    g = Builder()
    g.save("y", g.call("sinc", g.const(torch.ones(3))))
    said, fix = refused(GraphError, lambda: plan(g.graph()))
    assert said == "there is no operation 'sinc' in this version of torch"
    assert "record it again" in fix


def test_a_module_that_gives_another_number_of_tensors():
    g = Builder()
    ref = g.apply("m", g.const(torch.ones(3)), outs=2)
    g.save("y", ref)
    said, fix = refused(GraphError, without_model(g))
    assert "gave 1 tensors where 2 were recorded" in said and "m" in said
    assert "on an input like this one" in fix


# -- sites -----------------------------------------------------------------------------------------


def test_a_site_of_another_shape():
    g = Builder()
    g.save("h", g.read("blocks.0", (2, 4, 8)))
    said, fix = refused(SiteMismatchError, on_chain(g))
    assert said == "blocks.0.output should be float32[2, 4, 8], but is float32[2, 3, 8]"
    assert "record the experiment on an input" in fix


def test_a_leaf_that_is_not_there():
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pair(x)[0]

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple:
            return x, 3

    for leaf, got in (((1,), "int"), ((2,), "nothing")):
        g = Builder()
        g.save("h", g.read("pair", X, leaf=leaf))

        def call(g: Builder = g) -> None:
            run(g.graph(), g.constants, Pairs(), (X,))

        said, fix = refused(SiteMismatchError, call)
        assert said == f"pair.output[{leaf[0]}] should be a tensor, but there is {got}"
        assert "its structure differs" in fix


def test_a_site_that_does_not_fire():
    g = Builder()
    g.save("h", g.read("blocks.0", X, call=3))
    with pytest.raises(NotReachedError) as caught:
        on_chain(g)()
    assert "these sites did not fire in this run:\n  blocks.0.output call 3, at user.py:100" in (
        caught.value.message
    )
    assert "did not call these modules" in str(caught.value.fix)


def test_names_that_the_model_does_not_have():
    g = Builder()
    g.save("h", g.read("blocks.9", X))
    with pytest.raises(UnknownPathError, match=r"the model has no module 'blocks\.9'") as caught:
        on_chain(g)()
    assert caught.value.fix
    g = Builder()
    g.save("w", g.param("blocks.0.nothing", torch.ones(3)))
    with pytest.raises(
        UnknownPathError, match=r"the model has no weight 'blocks\.0\.nothing'"
    ) as caught:
        on_chain(g)()
    assert caught.value.fix


# -- sizes that were read as numbers ---------------------------------------------------------------


def test_a_size_that_is_another_one():
    g = Builder()
    h = g.read("blocks.0", X)
    g.bound(h, 1, 4)
    g.save("h", h)
    said, fix = refused(GraphError, on_chain(g, strict=False))
    assert said == "the experiment read dimension 1 as the number 4; on this input it is 3"
    assert "an input of this size" in fix


def test_a_dimension_that_is_not_there():
    g = Builder()
    h = g.read("blocks.0", X)
    g.bound(h, 5, 4)
    g.save("h", h)
    said, fix = refused(GraphError, on_chain(g, strict=False))
    assert said == "the experiment read dimension 5 of a tensor with less of them"
    assert "on an input like this one" in fix


# -- skips -----------------------------------------------------------------------------------------


class Told:
    """A signature with a tensor, and something that no graph can make."""

    def __init__(self, *leaves: Any) -> None:
        self.leaves = leaves

    def site(self, site: Any) -> Any:
        return self

    def rebuild(self, found: list[Any]) -> Any:
        return tuple(found)

    def __call__(self, *_: Any) -> bool:
        return False


class Cache:
    def __repr__(self) -> str:
        return "DynamicCache"


def skipped(g: Builder, told: Any) -> Any:
    def call() -> None:
        loop = Interpreter(g.graph(), g.constants, NoModel(), overwritten=told)
        loop.begin()
        loop.fire(site("a", "inputs"), ((X,), {}))

    return call


def skip_with(*tensors: torch.Tensor) -> Builder:
    g = Builder()
    leaves = tuple([(number,) for number in range(len(tensors))])
    g.add(Skip, site=site("a"), values=tuple([g.const(one) for one in tensors]), leaves=leaves)
    return g


def test_a_skip_of_what_is_not_known():
    g = skip_with(X)
    said, fix = refused(GraphError, skipped(g, None))
    assert said == "the structure of a.output is not known"
    assert "on this model" in fix


def test_a_skip_with_other_tensors():
    aval = contiguous(tuple(X.shape), X.dtype)
    said, fix = refused(GraphError, skipped(skip_with(X), Told(((0,), aval), ((1,), aval))))
    assert said == "a skip gives other tensors than a.output has"
    assert "on this model" in fix


def test_a_skip_of_what_a_graph_cannot_make():
    aval = contiguous(tuple(X.shape), X.dtype)
    said, fix = refused(GraphError, skipped(skip_with(X), Told(((0,), aval), ((1,), Cache()))))
    assert said == "a.output[1] is a DynamicCache; a graph cannot make it"
    assert "skip the modules inside it" in fix


def test_a_skip_with_another_shape():
    aval = contiguous((2, 9, 8), X.dtype)
    said, fix = refused(WriteMismatchError, skipped(skip_with(X), Told(((0,), aval))))
    assert said.startswith("a.output[0] is ") and "float32[2, 3, 8] is given for it" in said
    assert "of its shape" in fix


# -- what the model changes later ------------------------------------------------------------------


def test_a_value_that_the_model_has_overwritten():
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.one(x * 2)
            h.add_(1)
            return self.two(h)

    g = Builder()
    h = g.read("one", X)
    g.save("sum", g.add2(h, g.read("two", X)))

    def call() -> None:
        run(g.graph(), g.constants, Overwriting(), (X,), can_stop=False)

    said, fix = refused(OverwrittenError, call)
    assert "one.output" in said and fix
