"""`trace(eager=True)`: errors at their line, what is refused, what it costs, and what it leaves."""

from __future__ import annotations

import contextlib
import gc
import traceback
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from tests.language.hooks import hook_count
from tests.language.shown import shown
from tests.leftovers import running, threads_started
from weft.errors import (
    GradientError,
    LateEditError,
    RecordingError,
    StaleHandleError,
    UnknownOptionError,
)
from weft.testing.same import bitwise

A, B = ([zoo.tokens(n, seed=n)[0]] for n in (9, 5))
LAYER = "transformer.h.1.output"


@contextlib.contextmanager
def counted(net: nn.Module) -> Any:
    """Counts how often a module begins."""
    calls: list[None] = []
    hook = net.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


class Broken(nn.Module):
    """Its second half raises, where there are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        if type(x) is torch.Tensor and not x.is_meta:
            raise KeyError("the model's own")
        return self.two(x)


# -- errors at their line --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["read", "in place", "client"])
def test_an_operation_that_fails_raises_at_its_line(model, net, ids, kind):
    far, rows = torch.tensor([99]), torch.zeros(9, 32)
    reached = []
    with pytest.raises(IndexError) as caught, model.trace(ids, eager=True):
        h = model.transformer.h[1].output
        reached.append("read")
        if kind == "in place":
            h[:, far] = 0
        elif kind == "client":
            rows[far] = h[0, :1]
        else:
            h[:, far]
        reached.append("never")
    assert reached == ["read"]
    here = [frame for frame in traceback.extract_tb(caught.tb) if frame.filename == __file__]
    lines = {"in place": "h[:, far] = 0", "client": "rows[far] = h[0, :1]", "read": "h[:, far]"}
    assert here[-1].line == lines[kind]
    assert hook_count(net) == 0


def test_an_operation_on_what_has_numbers_fails_at_its_line_too(model, ids):
    with pytest.raises(IndexError), model.trace(ids, eager=True):
        h = model.transformer.h[1].output
        assert repr(h)
        h[:, torch.tensor([99])]
        pytest.fail("it went on")


def test_a_models_own_error_is_raised_where_the_pass_gets_there():
    net = Broken()
    model = weft.Model(net)
    reached = []
    with (
        pytest.raises(KeyError, match="the model's own") as caught,
        model.trace(torch.ones(1, 3), eager=True),
    ):
        one = model.one.output * 2
        reached.append(str(one))
        reached.append(model.two.output + 1)
        reached.append("two")
    assert len(reached) == 1 and reached[0].startswith("tensor(")
    (note,) = caught.value.__notes__
    assert "test_eager_ends.py" in note and "model.two.output + 1" in note
    assert hook_count(net) == 0


@pytest.mark.parametrize("shows", [False, True])
def test_a_models_own_error_after_all_that_was_asked_for(shows):
    """What fails below the last site that is needed fails nobody, as in a trace."""
    model = weft.Model(Broken())
    with model.trace(torch.ones(1, 3), eager=shows):
        kept = (model.one.output * 2).save()
    assert kept.shape == (1, 3)


def test_refusals_are_those_of_a_trace(model, ids):
    def late():
        model.transformer.h[0].output = model.transformer.h[2].output

    def no_backward():
        assert repr(model.transformer.h[0].output.grad)
        model.transformer.h[0].output.grad.save()

    def stale():
        old = model.transformer.h[0].output
        model.transformer.h[0].output = old * 2
        assert repr(old)
        old[:] = 0

    def after_a_look():
        if model.transformer.h[1].output.sum() < 1e9:
            model.transformer.h[0].output[:] = 0

    for block, error in [
        (late, LateEditError),
        (no_backward, GradientError),
        (stale, StaleHandleError),
        (after_a_look, RecordingError),
    ]:
        texts = []
        for eager in (False, True):
            with pytest.raises(error) as caught, model.trace(ids, eager=eager):
                block()
            texts.append(str(caught.value))
        assert texts[0] == texts[1]


def test_edits_that_need_each_other_are_refused_where_numbers_are_needed(model):
    def block(**options: Any) -> str:
        with pytest.raises(RecordingError) as caught, model.trace(**options) as tracer:
            with tracer.invoke(A):
                one, early = model.transformer.h[2].output[:, -1], model.transformer.h[0].output
            with tracer.invoke(B):
                two = model.transformer.h[2].output[:, -1]
                model.transformer.h[0].output[:, 0] = one
            early[:, 0] = two
            two.sum().save()
        return str(caught.value)

    assert block(eager=True) == block()


def test_an_error_that_was_caught_lets_the_block_go_on(model, ids, gpt2):
    with model.trace(ids, eager=True):
        with pytest.raises(IndexError):
            model.transformer.h[1].output[:, torch.tensor([99])]
        shape = repr(model.lm_head.output)
        logits = model.lm_head.output.save()
    bitwise(logits, gpt2.baseline)
    assert shape == repr(logits)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", ["local", "http://localhost:1"])
@pytest.mark.parametrize("opened", ["trace", "generate"])
def test_elsewhere_it_is_refused(model, ids, remote, opened):
    with pytest.raises(UnknownOptionError, match="eager=True: this block runs") as caught:
        getattr(model, opened)(ids, eager=True, remote=remote)
    assert "float(h" in str(caught.value.fix)


def test_what_has_no_lines_to_stand_at_refuses_it(model, ids):
    with pytest.raises(UnknownOptionError, match="a scan has no numbers"):
        model.scan(ids, eager=True)
    with pytest.raises(UnknownOptionError, match="True or False") as caught:
        model.trace(ids, eager=1)
    assert "test_eager_ends.py" in str(caught.value.line)
    with model.trace(ids) as tracer:
        model.lm_head.output.save()
    with pytest.raises(UnknownOptionError, match="no lines"):
        tracer.graph.run(model, ids, eager=True)
    with pytest.raises(UnknownOptionError, match="eager=True: a sweep waits"):
        model.sweep(ids, lambda tracer, a: model.lm_head.output, a=[1], eager=True)
    with pytest.raises(UnknownOptionError, match="eager is an option of traces"):
        model.edit(eager=True)
    with (
        pytest.raises(UnknownOptionError, match="eager is an option of the whole block"),
        model.trace() as tracer,
    ):
        tracer.invoke(A, eager=True)


def test_edits_that_only_a_print_has_seen_are_not_told_to_be_useless(model, ids):
    with model.trace(ids, eager=True):
        model.transformer.h[0].output[:] = 0
        assert repr(model.transformer.h[1].output)
    with (
        pytest.warns(weft.UnusedEditWarning, match="no effect"),
        model.trace(ids, eager=True),
    ):
        assert repr(model.transformer.h[0].output)
        model.transformer.h[1].output[:] = 0


# -- what it costs, and what it leaves -------------------------------------------------------------


def test_operations_do_not_call_the_model_again(model, net, ids):
    w = torch.ones(32)
    with counted(net) as calls, model.trace(ids, eager=True):
        h = model.transformer.h[1].output
        for _ in range(20):
            h = torch.tanh(h) * w + 1
        assert repr(h) and repr(h.sum())
        assert len(calls) == 1
        early = model.transformer.h[0].output
        assert repr(early) and repr(early * h)
        assert len(calls) == 2
        weft.save(h.sum())
    assert len(calls) == 3  # the real run


def test_an_edit_costs_a_pass_when_numbers_below_it_are_needed(model, net, ids):
    with counted(net) as calls, model.trace(ids, eager=True):
        model.transformer.h[0].output = torch.ones(1, 9, 32)
        model.transformer.h[1].output.save()
        assert not calls
        h = model.transformer.h[2].output
        assert repr(h) and repr(h * 2)
        assert len(calls) == 1
        h[:, 0] = 1
        assert repr(h)
        assert len(calls) == 2
    assert len(calls) == 3


def test_a_pass_ends_where_nothing_more_is_needed(model, net, ids):
    with counted(net.transformer.h[2]) as calls, model.trace(ids, eager=True):
        model.lm_head.output.save()
        assert repr(model.transformer.h[1].output)
        assert not calls
    assert len(calls) == 1


def test_no_thread_is_made(model, ids):
    with threads_started() as threads:
        with model.trace(ids, eager=True):
            assert repr(model.transformer.h[0].output)
            assert running(threads) == []
            model.lm_head.output.save()
        assert running(threads) == []


def test_nothing_is_kept_when_the_block_is_over(model, net, ids):
    made: list[weakref.ref] = []
    hook = net.transformer.h[1].register_forward_hook(
        lambda m, a, out: made.append(weakref.ref(out)) or None
    )
    seen: list[weakref.ref] = []
    try:
        for fails in (False, True):
            with contextlib.suppress(ZeroDivisionError), model.trace(ids, eager=True):
                h = model.transformer.h[1].output
                twice = h * 2
                seen.append(weakref.ref(twice._rec.shown(twice)))
                total = h.sum().save()
                _ = 1 / (1 - fails)
            gc.collect()
            assert made and [ref() for ref in (*made, *seen)] == [None] * (len(made) + len(seen))
            assert total is not None and twice is not None
    finally:
        hook.remove()


def test_ctrl_c_while_numbers_are_made_ends_the_block(model, net, ids, gpt2):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = net.transformer.h[0].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), model.trace(ids, eager=True):
            assert model.transformer.h[1].output * 2 is None
            pytest.fail("it went on")
    finally:
        hook.remove()
    assert hook_count(net) == 0
    with model.trace(ids, eager=True):
        logits = model.lm_head.output.save()
    bitwise(logits, gpt2.baseline)


def test_grad_modes_are_the_users(model, ids):
    w = torch.ones(32, requires_grad=True)
    with model.trace(ids, eager=True):
        with torch.no_grad():
            assert repr(model.transformer.h[0].output * w)
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        product = model.transformer.h[1].output * w
        assert not shown(product).requires_grad
        product.sum().backward()
        assert repr(w.grad)
    assert w.grad is not None and w.grad.abs().sum() > 0


# -- looks of any block ----------------------------------------------------------------------------


def test_a_look_leaves_the_models_own_state_and_the_random_numbers_alone():
    """Only the real run counts, and it draws what it draws without the look."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(self.norm(self.inner(x)))

    def run(looks: bool) -> list[Any]:
        torch.manual_seed(0)
        net = Counting().train()
        model = weft.Model(net)
        with model.trace(torch.ones(3, 4) + torch.arange(4)):
            if looks:
                assert model.drop.output.sum() > -1e9
            kept = model.drop.output.save()
        return [kept, net.norm.running_mean, net.norm.num_batches_tracked, torch.rand(3)]

    bitwise(run(True), run(False))


def test_a_models_own_error_in_a_look_has_the_users_line():
    model = weft.Model(Broken())
    with pytest.raises(KeyError, match="the model's own") as caught, model.trace(torch.ones(1, 3)):
        float(model.two.output.sum())
    (note,) = caught.value.__notes__
    assert "float(model.two.output.sum())" in note
