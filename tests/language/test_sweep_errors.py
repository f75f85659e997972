"""Sweeps in which points fail: the point and the user's line are named, the others are kept."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.families import zoo
from weft.errors import (
    ResultTooLargeError,
    ServerAwayError,
    ServerError,
    SweepError,
    WorkerLostError,
    WorkerMemoryError,
)
from weft.handles import budget
from weft.testing.same import bounded

IDS = torch.tensor(zoo.tokens(7, seed=3))
LAYERS = range(zoo.LAYERS)


def naive(model, function, **point):
    with model.trace(IDS) as tracer:
        return function(tracer, **point).save()


def test_a_point_that_cannot_be_recorded(model):
    layers = model.transformer.h

    def point(tracer, layer, position):
        layers[layer].output[:, position] = 0  # here
        return model.lm_head.output[:, -1]

    grid = {"layer": LAYERS, "position": [1, 12]}
    with pytest.raises(SweepError) as caught:
        model.sweep(IDS, point, **grid)
    error = caught.value
    text = str(error)
    assert "at the point layer=0, position=12 of the sweep: IndexError: index 12" in text
    assert "so did 2 further: layer=1, position=12; layer=2, position=12" in text
    assert "output[:, position] = 0  # here" in text and __file__ in text
    assert isinstance(error.__cause__, IndexError)
    assert list(error.failed) == [f"layer={layer}, position=12" for layer in LAYERS]
    assert error.result is not None
    for layer in LAYERS:
        got = error.result.sel(layer=layer)
        bounded(got.sel(position=1).values, naive(model, point, layer=layer, position=1))
        assert got.sel(position=12).values.isnan().all()


@pytest.mark.parametrize("bad", [0, 3, 6])
def test_a_point_that_fails_while_it_runs(model, bad):
    """The index is only known then: the block of all points fails, and is divided."""
    layers = model.transformer.h

    def point(tracer, index):
        h = layers[1].output
        row = h[0, torch.tensor([index]) + (h[0, 0, 0] * 0).long()]  # there
        layers[1].output[:, -1] = row
        return model.lm_head.output[:, -1]

    indices = [0, 1, 2, 3, 4, 5, 6]
    indices[bad] = 7
    with pytest.raises(SweepError, match=r"at the point index=7 of the sweep") as caught:
        model.sweep(IDS, point, index=indices)
    error = caught.value
    assert "# there" in str(error)
    assert list(error.failed) == ["index=7"]
    for index in indices:
        got = error.result.sel(index=index).values
        if index == 7:
            assert got.isnan().all()
        else:
            bounded(got, naive(model, point, index=index))


def test_an_error_of_the_users_own(model):
    def point(tracer, n):
        if n == 2:
            raise KeyError("no such head")
        return {"n": n, "logits": model.lm_head.output[:, -1]}

    with pytest.raises(SweepError, match="n=2 of the sweep: KeyError: 'no such head'") as caught:
        model.sweep(IDS, point, n=[1, 2, 3])
    found = caught.value.result["n"].values
    assert found.dtype == torch.float64 and found.isnan().tolist() == [False, True, False]
    assert set(caught.value.points) == {"n=1", "n=3"}


def test_where_all_points_fail_not_all_are_tried(model):
    tried = []

    def point(tracer, n):
        tried.append(n)
        raise ValueError("never")

    with pytest.raises(SweepError, match="90 points were not tried") as caught:
        model.sweep(IDS, point, n=range(100))
    assert len(tried) == 10 and caught.value.result is None


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (None, "returned NoneType for 'value'"),
        ([], "returned list for 'value'"),
        ({}, r"returned a dict with the names \[\]"),
        ({1: 2}, r"names \[1\]"),
        ({"a": "x"}, "returned str for 'a'"),
    ],
)
def test_what_a_function_may_not_return(model, returned, text):
    with pytest.raises(SweepError, match=text):
        model.sweep(IDS, lambda tracer, n: returned, n=[1])


def test_points_have_the_same_names(model):
    with pytest.raises(SweepError, match=r"returned \['b'\], but \['a'\] at the first point"):
        model.sweep(IDS, lambda tracer, n: {"b" if n else "a": n}, n=[0, 1])


def test_points_of_different_shapes_are_kept(model):
    def point(tracer, upto):
        return model.lm_head.output[0, :upto, 0]

    with pytest.raises(SweepError, match=r"float32\[1\] at upto=1, but float32\[2\] at") as caught:
        model.sweep(IDS, point, upto=[1, 2])
    assert caught.value.points["upto=2"]["value"].shape == (2,)


def test_ctrl_c_ends_it_and_leaves_the_model_as_it_was(model):
    """The fixtures find no hook afterwards, and the same logits."""

    def point(tracer, n):
        if n == 5:
            raise KeyboardInterrupt
        model.transformer.h[0].output[:] = 0
        return model.lm_head.output[:, -1]

    with pytest.raises(KeyboardInterrupt):
        model.sweep(IDS, point, n=range(9), batch=2)
    with model.trace(IDS):
        model.lm_head.output.save()


# -- memory --------------------------------------------------------------------------------------


def scaled(model):
    def point(tracer, layer, scale):
        model.transformer.h[layer].output[:, 1] *= scale
        return model.lm_head.output[:, -1]

    return point


GRID = {"layer": list(LAYERS), "scale": [0.0, 2.0, 3.0]}


def blocks_of(monkeypatch):
    """How many points each block has that runs, or tries to."""
    counts = []
    closed = weft.Tracer._closed

    def noted(tracer, error):
        counts.append(len(tracer._calls))
        return closed(tracer, error)

    monkeypatch.setattr(weft.Tracer, "_closed", noted)
    return counts


def expect(model, found):
    for layer in GRID["layer"]:
        for scale in GRID["scale"]:
            expected = naive(model, scaled(model), layer=layer, scale=scale)
            bounded(found.sel(layer=layer, scale=scale).values, expected)


def test_a_pass_takes_no_more_than_the_budget(model, monkeypatch):
    counts = blocks_of(monkeypatch)
    largest = 7 * zoo.VOCAB * 4  # the logits
    monkeypatch.setenv("WEFT_SWEEP_BYTES", str(4 * 4 * largest + 4000))
    found = model.sweep(IDS, scaled(model), **GRID)
    assert counts == [4, 4, 1]
    expect(model, found)
    monkeypatch.setenv("WEFT_SWEEP_BYTES", "1")  # less than one point takes: one at a time
    counts.clear()
    model.sweep(IDS, scaled(model), **GRID)
    assert counts == [1] * 9


TOO_MUCH = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
    "worker": WorkerMemoryError("the worker had not enough memory"),
    "limit": ResultTooLargeError("it saves 3 GiB, and a job may bring back 1 GiB"),
}


@pytest.mark.parametrize("error", TOO_MUCH.values(), ids=TOO_MUCH)
def test_where_memory_runs_out_points_are_tried_again_fewer_at_a_time(model, monkeypatch, error):
    """A pass of more than two points fails as an allocator fails, or as a server refuses it."""
    counts = blocks_of(monkeypatch)
    backend = model._places.pick(None).backend
    run = type(backend).run

    def scarce(self, request):
        if len(request.calls) > 2:
            raise error
        return run(self, request)

    monkeypatch.setattr(type(backend), "run", scarce)
    found = model.sweep(IDS, scaled(model), **GRID)
    assert counts == [9, 4, 2, 2, 2, 2, 1]
    expect(model, found)


@pytest.mark.parametrize("kind", [ServerAwayError, WorkerLostError, ServerError])
def test_what_is_no_points_own_is_raised_at_once(model, monkeypatch, kind):
    counts = blocks_of(monkeypatch)
    error = kind("it is gone")

    def gone(self, request):
        raise error

    monkeypatch.setattr(type(model._places.pick(None).backend), "run", gone)
    with pytest.raises(kind) as caught:
        model.sweep(IDS, scaled(model), **GRID)
    assert caught.value is error and counts == [9]


def test_where_one_point_does_not_fit_it_is_named(model, monkeypatch):
    backend = model._places.pick(None).backend

    def scarce(self, request):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(backend), "run", scarce)
    with pytest.raises(SweepError, match=r"layer=0, scale=0\.0 of the sweep: OutOfMemoryError"):
        model.sweep(IDS, scaled(model), **GRID)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_memory(error, memory):
    assert budget.is_memory(error) is memory
