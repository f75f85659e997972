"""Whatever goes wrong, wherever: everything is as before, and the error says where.

The fixture `net` checks after every test that hooks, weights, answers, modes, grad mode and random
state are what they were; `goes_on` that the model can be traced again.
"""

from __future__ import annotations

import io
import sys
import traceback
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.errors import (
    FailedRunError,
    GraphError,
    LateEditError,
    NotSavedError,
    RecordingError,
    UnknownOptionError,
    UnknownPathError,
    WeftError,
    WriteMismatchError,
)
from weft.run.hooks import _RUNNING
from weft.testing.same import bitwise
from weft.trace.current import CURRENT

from .tower import WIDTH, Tower, by_hand, hooks, prompt, unchanged

IDS = prompt()
OUT = "out of (range|bounds)"


def goes_on(net: Tower, model: Any) -> None:
    """The next experiment is right."""
    with model.trace(IDS):
        model.blocks[1].output[:, 0] = 0
        logits = model.head.output.save()

    def zero(out: torch.Tensor) -> None:
        out[:, 0] = 0

    bitwise(logits, by_hand(net, IDS, {"blocks.1": zero})["head"])


def line_of(text: str) -> str:
    """`test_exceptions.py:<line>: <text>` of the line of this file that ends in `# <text>`."""
    lines = Path(__file__).read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if line.endswith(f"  # {text}"))
    return f"{__file__}:{number}:"


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


# --- in the block ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_in_the_block_is_the_users_own(
    net: Tower, model: Any, kind: type[BaseException]
) -> None:
    mine = kind("mine")
    with pytest.raises(kind) as caught, model.trace(IDS) as tracer:
        hidden = model.blocks[0].output.save()
        model.blocks[1].output[:] = 0
        raise mine
    assert caught.value is mine and not notes(mine)
    with pytest.raises(FailedRunError, match=f"{kind.__name__}: mine"):
        hidden + 1
    assert tracer.results == {}
    goes_on(net, model)


def test_the_model_does_not_run_when_the_block_fails(net: Tower, model: Any) -> None:
    ran = []
    model.dispatch()
    with model.trace(IDS):
        model.head.output.save()  # the signature is known now
    handle = net.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ZeroDivisionError), model.trace(IDS):
        model.head.output.save()
        1 / 0
    handle.remove()
    assert ran == []


def test_leaving_a_block_by_return_break_and_continue_runs_it(net: Tower, model: Any) -> None:
    def returns() -> Any:
        with model.trace(IDS):
            return model.head.output.save()

    got = [returns()]
    for _ in range(3):
        with model.trace(IDS):
            got.append(model.head.output.save())
            break
    for _ in range(1):
        with model.trace(IDS):
            got.append(model.head.output.save())
            continue
    bitwise(got, [by_hand(net, IDS, {})["head"]] * 3)


def test_a_value_that_was_not_saved_says_so_with_its_line(net: Tower, model: Any) -> None:
    with model.trace(IDS):
        hidden = model.blocks[0].output  # made here
        model.head.output.save()
    with pytest.raises(NotSavedError) as caught:
        hidden.sum()
    assert line_of("made here") in str(caught.value)
    assert ".save()" in str(caught.value)


# --- while recording ------------------------------------------------------------------------------


def late(model: Any) -> None:
    model.blocks[0].output = model.blocks[1].output  # late edit


def wrong_shape(model: Any) -> None:
    model.blocks[0].output = torch.zeros(1, 2, 3)  # wrong shape


def torch_says_no(model: Any) -> None:
    model.blocks[0].output @ torch.zeros(3, 3)  # torch says no


def unknown_path(model: Any) -> None:
    model.blocks[0].attn.output.save()  # unknown path


def no_such_layer(model: Any) -> None:
    model.blocks[7].output.save()  # no such layer


def into_a_weight(model: Any) -> None:
    model.head.weight[0] = 0  # into a weight


def changed_constant(model: Any) -> None:
    constant = torch.ones(WIDTH)
    first = model.blocks[0].output + constant
    constant += 1
    (first + constant).save()  # changed constant


def not_in_the_table(model: Any) -> None:
    torch.save(model.blocks[0].output, io.BytesIO())  # not in the table


REFUSED = [late, wrong_shape, unknown_path, into_a_weight, changed_constant, not_in_the_table]


@pytest.mark.parametrize("body", REFUSED, ids=[body.__name__ for body in REFUSED])
def test_a_refusal_names_the_users_line_and_leaves_nothing(
    net: Tower, model: Any, body: Any
) -> None:
    with pytest.raises(WeftError) as caught, model.trace(IDS):
        body(model)
    assert line_of(body.__name__.replace("_", " ").replace("late", "late edit")) in str(
        caught.value
    )
    assert "fix:" in str(caught.value)
    goes_on(net, model)


@pytest.mark.parametrize("body", [torch_says_no, no_such_layer])
def test_errors_of_torch_and_python_come_from_the_users_line(
    net: Tower, model: Any, body: Any
) -> None:
    with pytest.raises((RuntimeError, IndexError)) as caught, model.trace(IDS):
        body(model)
    frames = traceback.extract_tb(caught.tb)
    assert any(frame.name == body.__name__ for frame in frames)
    goes_on(net, model)


def test_a_refusal_that_the_user_catches_does_not_end_the_block(net: Tower, model: Any) -> None:
    with model.trace(IDS):
        with pytest.raises(LateEditError):
            model.blocks[0].output = model.blocks[1].output
        with pytest.raises(WriteMismatchError):
            model.blocks[0].output = torch.zeros(1)
        with pytest.raises(RuntimeError):
            model.blocks[0].output @ torch.zeros(3, 3)
        with pytest.raises(UnknownPathError):
            model.nothing
        logits = model.head.output.save()
    bitwise(logits, by_hand(net, IDS, {})["head"])


# --- before the block, and around it --------------------------------------------------------------


def test_bad_options_and_inputs_open_nothing(net: Tower, model: Any) -> None:
    with pytest.raises(UnknownOptionError):
        model.trace(IDS, seed="many")
    with pytest.raises((RecordingError, TypeError)), model.trace(IDS, nonsense=3):
        pass
    with pytest.raises(WeftError), model.trace("a text"):
        pass
    goes_on(net, model)


def test_a_block_in_a_block_is_refused_and_the_outer_one_goes_on(net: Tower, model: Any) -> None:
    with model.trace(IDS):
        with pytest.raises(RecordingError, match="inside another"), model.trace(IDS):
            pass
        logits = model.head.output.save()
    bitwise(logits, by_hand(net, IDS, {})["head"])


def test_a_tracer_is_entered_once(net: Tower, model: Any) -> None:
    tracer = model.trace(IDS)
    with tracer:
        logits = model.head.output.save()
    with pytest.raises(RecordingError), tracer:
        pass
    bitwise(logits, by_hand(net, IDS, {})["head"])
    bitwise(tracer.results, {next(iter(tracer.results)): logits})


# --- at run time, in the graph --------------------------------------------------------------------


def test_an_index_that_only_numbers_show_to_be_wrong(net: Tower, model: Any) -> None:
    with pytest.raises(IndexError, match=OUT) as caught, model.trace(IDS):
        far = model.embed.input[0] + 99
        hidden = model.blocks[0].output.save()
        model.blocks[1].output[:, far] = 0  # out of range
        logits = model.head.output.save()
    assert line_of("out of range") in notes(caught.value)
    for handle in (hidden, logits):
        with pytest.raises(FailedRunError, match=OUT):
            handle.sum()
    goes_on(net, model)


def test_an_error_in_a_node_after_the_pass(net: Tower, model: Any) -> None:
    """The whole forward has run; what is left of the graph fails."""
    with pytest.raises(RuntimeError) as caught, model.trace(IDS):
        model.blocks[0].output[:] *= 2
        square = model.head.output[0, :, :5].double() * 0
        torch.linalg.inv(square).save()  # singular
    assert line_of("singular") in notes(caught.value)
    goes_on(net, model)


def test_an_error_in_a_module_that_the_graph_applies(net: Tower, model: Any) -> None:
    with pytest.raises(IndexError) as caught, model.trace(IDS):
        model.embed(model.embed.input + 99).save()  # applied
    assert line_of("applied") in notes(caught.value)
    goes_on(net, model)


def test_keyboard_interrupt_in_the_middle_of_a_pass(net: Tower, model: Any) -> None:
    def press(*_: Any) -> None:
        raise KeyboardInterrupt("pressed")

    with model.trace(IDS):
        model.head.output.save()
    handle = net.blocks[1].register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt, match="pressed") as caught, model.trace(IDS):
        hidden = model.blocks[0].output.save()
        model.blocks[2].output[:] = 0
        model.head.output.save()
    handle.remove()
    assert type(caught.value) is KeyboardInterrupt
    with pytest.raises(FailedRunError):
        hidden.sum()
    goes_on(net, model)


def test_a_look_that_fails_ends_the_block_with_its_error(net: Tower, model: Any) -> None:
    with pytest.raises(IndexError, match=OUT) as caught, model.trace(IDS):
        far = model.embed.input[0] + 99
        if model.blocks[0].output[:, far].sum() > 0:  # looked at
            raise AssertionError("not reached")
    assert line_of("looked at") in notes(caught.value)
    goes_on(net, model)


def test_a_graph_on_an_input_that_does_not_fit_it(net: Tower, model: Any) -> None:
    with model.trace(IDS) as tracer:
        hidden = model.blocks[0].output
        (hidden * hidden.shape[1]).save("scaled")  # a size
    with pytest.raises(GraphError) as caught:
        tracer.graph.run(model, prompt(7))
    assert line_of("a size") in str(caught.value)
    goes_on(net, model)


def test_a_warning_that_is_an_error_leaves_nothing(net: Tower, model: Any) -> None:
    with pytest.raises(weft.UnusedEditWarning, match="no effect"), model.trace(IDS):
        hidden = model.blocks[0].output.save()
        model.blocks[1].output[:] = 0
    with pytest.raises(FailedRunError):
        hidden.sum()
    goes_on(net, model)


def test_text_of_a_log_that_cannot_be_printed(
    net: Tower, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("no screen")

    with pytest.raises(OSError, match="no screen"), model.trace(IDS) as tracer:
        tracer.log("sum", model.blocks[0].output.sum())
        model.head.output.save()
        monkeypatch.setattr("builtins.print", broken)
    monkeypatch.undo()
    goes_on(net, model)


def test_ctrl_c_at_any_line_of_ours(net: Tower, model: Any) -> None:
    """The next experiment is right, wherever the last one was interrupted.

    Not between the lines that clean up themselves, where Python offers no hold.
    """

    def body() -> None:
        with model.trace(IDS):
            model.blocks[0].output.save()
            model.blocks[1].mlp.output[:, -1] += 1
            model.head.output.save()

    def watched(act: Any) -> None:
        def tracer(frame: FrameType, event: str, arg: Any) -> Any:
            if "/weft/" not in frame.f_code.co_filename:
                return None
            if event == "line":
                act(frame)
            return tracer

        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            body()
        finally:
            sys.settrace(before)

    body()
    places: dict[tuple[CodeType, int], None] = {}
    watched(lambda frame: places.setdefault((frame.f_code, frame.f_lineno)))
    assert len(places) > 200

    for place in places:

        def interrupt(frame: FrameType, place: Any = place) -> None:
            if (frame.f_code, frame.f_lineno) == place:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            watched(interrupt)
        where = f"{place[0].co_qualname}, line {place[1]}"
        stuck = CURRENT.get()
        clean = hooks(net) == 0 and _RUNNING.get() is None and not (stuck and stuck.open)
        assert clean or place[0].co_name in CLEANING_UP, where
        if stuck is not None and stuck.open:
            stuck.__exit__()
        _RUNNING.set(None)
        body()
        assert CURRENT.get() is None, where
        assert torch._C._len_torch_function_stack() == 0, where
        for module in net.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()
    goes_on(net, model)


CLEANING_UP = ("__enter__", "__exit__", "forward", "remove", "unhook")


# --- in the model ---------------------------------------------------------------------------------


class Moody(nn.Module):
    """Raises `error` in the middle of its pass, if there is one; may catch it as well."""

    def __init__(self, swallow: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.inner = Fails()
        self.last = nn.Linear(3, 3)
        self.swallow = swallow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        try:
            x = self.inner(x)
        except Exception:
            if not self.swallow:
                raise
        return self.last(x)


class Fails(nn.Module):
    error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return x * 2


X = torch.ones(2, 3)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyboardInterrupt, StopIteration])
def test_the_models_own_error_is_its_own_object(kind: type[BaseException]) -> None:
    net = Moody()
    model = weft.Model(net)
    with unchanged(net, X):
        with model.trace(X):
            model.last.output.save()
        mine = net.inner.error = kind("mine")
        with pytest.raises(kind) as caught, model.trace(X):  # the block
            hidden = model.first.output.save()
            model.last.output.save()
        net.inner.error = None
        del net.inner.error
        assert caught.value is mine
        assert line_of("the block") in notes(mine)
        assert any(frame.name == "forward" for frame in traceback.extract_tb(caught.tb))
        with pytest.raises(FailedRunError, match="mine"):
            hidden.sum()


def test_a_model_that_fails_on_its_very_first_pass_says_why() -> None:
    net = Moody()
    model = weft.Model(net)
    net.inner.error = ValueError("cannot be learnt")
    with pytest.raises(WeftError, match="cannot be learnt") as caught:
        model.trace(X)
    assert isinstance(caught.value.__cause__, ValueError)
    del net.inner.error
    with unchanged(net, X), model.trace(X):
        model.last.output.save()


def test_a_model_may_swallow_its_own_errors() -> None:
    net = Moody(swallow=True)
    model = weft.Model(net)
    with unchanged(net, X):
        with model.trace(X):
            model.last.output.save()
        net.inner.error = ValueError("swallowed")
        with torch.no_grad():
            wanted = net(X)
        with model.trace(X):
            model.first.output[:] *= 1
            logits = model.last.output.save()
        del net.inner.error
        bitwise(logits, wanted)


def test_a_model_that_swallows_errors_cannot_swallow_the_graphs() -> None:
    net = Moody(swallow=True)
    model = weft.Model(net)
    with unchanged(net, X):
        with pytest.raises(IndexError, match=OUT) as caught, model.trace(X):
            far = (model.first.output[0] * 0).long() + 99
            model.inner.output[:, far] = 0  # swallowed
            model.last.output.save()
        assert line_of("swallowed") in notes(caught.value)


def test_a_model_that_swallows_everything_cannot_keep_the_pass_going() -> None:
    """`except BaseException` in the model, around a module at which the pass may stop."""

    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.last = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                x = self.inner(x)
            except BaseException:  # noqa: BLE001
                x = x + 1
            return self.last(x)

    net = Greedy()
    model = weft.Model(net)
    with unchanged(net, X):
        with model.trace(X):
            inner = model.inner.output.save()
        with torch.no_grad():
            bitwise(inner, net.inner(X))


def test_a_site_that_does_not_fire_this_time_is_named() -> None:
    class Fickle(nn.Module):
        lazy = False

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.lazy else self.inner(x)

    net = Fickle()
    model = weft.Model(net)
    with unchanged(net, X):
        with model.trace(X):
            model.inner.output.save()
        net.lazy = True
        with pytest.raises(WeftError) as caught, model.trace(X):
            model.inner.output.save()  # not fired
        del net.lazy
        assert line_of("not fired") in str(caught.value)
