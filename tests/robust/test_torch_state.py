"""Blocks inside whatever state a user's PyTorch is in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import weft
from weft.errors import WeftError
from weft.testing.same import bitwise, bounded

from .tower import Tower, by_hand, hooks, prompt, tower, unchanged

IDS = prompt()


def edit(model: Any) -> torch.Tensor:
    with model.trace(IDS):
        hidden = model.blocks[0].output
        model.blocks[1].output[:, 0] += hidden[:, -1] * 2
        return model.head.output.save()


@pytest.fixture
def edited(net: Tower) -> torch.Tensor:
    kept: list[torch.Tensor] = []

    def keep(out: torch.Tensor) -> None:
        kept.append(out.clone())

    def add(out: torch.Tensor) -> None:
        out[:, 0] += kept[0][:, -1] * 2

    return by_hand(net, IDS, {"blocks.0": keep, "blocks.1": add})["head"]


class Counting(TorchFunctionMode):
    """A mode of the user's own, which counts and passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", "?"))
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "device": lambda: torch.device("cpu"),
    "function mode": Counting,
    "dispatch mode": Dispatched,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "record_function": lambda: torch.autograd.profiler.record_function("mine"),
    "fork_rng": lambda: torch.random.fork_rng(devices=[]),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("name", AROUND)
def test_a_block_inside(net: Tower, model: Any, edited: torch.Tensor, name: str) -> None:
    with AROUND[name]():
        got = edit(model)
        again = edit(model)
    bitwise([got, again], [edited, edited])


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("name", AROUND)
def test_entered_and_left_within_a_block(
    net: Tower, model: Any, edited: torch.Tensor, name: str
) -> None:
    with model.trace(IDS):
        with AROUND[name]():
            hidden = model.blocks[0].output
            model.blocks[1].output[:, 0] += hidden[:, -1] * 2
        got = model.head.output.save()
    bitwise(got, edited)


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("name", AROUND)
def test_entered_within_a_block_and_left_after_it(
    net: Tower, model: Any, edited: torch.Tensor, name: str
) -> None:
    around = AROUND[name]()
    with model.trace(IDS):
        around.__enter__()
        hidden = model.blocks[0].output
        model.blocks[1].output[:, 0] += hidden[:, -1] * 2
        got = model.head.output.save()
    around.__exit__(None, None, None)
    bitwise(got, edited)


def test_saved_tensors_are_ordinary_ones_even_from_inference_mode(net: Tower, model: Any) -> None:
    with torch.inference_mode():
        got = edit(model)
    assert type(got) is torch.Tensor and not got.is_inference() and not got.requires_grad
    got += 1


def test_inputs_made_in_inference_mode(net: Tower, model: Any, edited: torch.Tensor) -> None:
    with torch.inference_mode():
        ids, zeros = IDS.clone(), torch.zeros(8)
    with model.trace(ids):
        hidden = model.blocks[0].output + zeros
        model.blocks[1].output[:, 0] += hidden[:, -1] * 2
        got = model.head.output.save()
    bitwise(got, edited)


def test_a_model_with_inference_weights() -> None:
    with torch.inference_mode():
        net = tower()
    model = weft.Model(net)
    wanted = by_hand(tower(), IDS, {"blocks.1": lambda out: out * 2})["head"]
    with model.trace(IDS):
        model.blocks[1].output = model.blocks[1].output * 2
        got = model.head.output.save()
    bitwise(got, wanted)


def test_a_default_dtype_of_the_users_own(net: Tower, model: Any) -> None:
    """It decides what a factory in the block makes, as it would outside."""
    torch.set_default_dtype(torch.float64)
    try:
        with model.trace(IDS):
            hidden = model.blocks[0].output
            made = torch.ones(hidden.shape).save()  # type: ignore[attr-defined]
            model.blocks[0].output = hidden * 2
            got = model.head.output.save()
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.dtype is torch.float64
    bounded(got, by_hand(net, IDS, {"blocks.0": lambda out: out * 2})["head"])


def test_a_default_device_of_the_users_own(net: Tower, model: Any, edited: torch.Tensor) -> None:
    torch.set_default_device("cpu")
    try:
        got = edit(model)
        with model.trace(IDS):
            made = torch.ones(model.blocks[0].output.shape).save()  # type: ignore[attr-defined]
    finally:
        torch.set_default_device(None)
    bitwise([got, made], [edited, torch.ones(2, 5, 8)])


def test_a_device_context_inside_a_block(net: Tower, model: Any) -> None:
    with model.trace(IDS), torch.device("cpu"):
        hidden = model.blocks[0].output
        made = (hidden + torch.ones(hidden.shape) + torch.ones(8)).save()
    bitwise(made, by_hand(net, IDS, {})["blocks.0"] + 1 + 1)


def test_a_mode_outside_sees_the_model_run_and_stays_where_it_was(
    net: Tower, model: Any, edited: torch.Tensor
) -> None:
    with Counting() as mode:
        got = edit(model)
        assert torch.overrides._get_current_function_mode() is mode
    bitwise(got, edited)
    assert "linear" in mode.seen


def test_a_mode_inside_sees_the_operations_of_the_block(
    net: Tower, model: Any, edited: torch.Tensor
) -> None:
    with model.trace(IDS):
        with Counting() as mode:
            hidden = model.blocks[0].output
            model.blocks[1].output[:, 0] += hidden[:, -1] * 2
        got = model.head.output.save()
    bitwise(got, edited)
    assert "mul" in mode.seen or "__mul__" in mode.seen


def test_a_mode_left_after_the_block_stays_on_the_stack(net: Tower, model: Any) -> None:
    mode = Counting()
    with model.trace(IDS):
        mode.__enter__()
        model.head.output.save()
    assert torch.overrides._get_current_function_mode() is mode
    mode.__exit__(None, None, None)
    assert torch._C._len_torch_function_stack() == 0


# --- the user's own hooks -------------------------------------------------------------------------


def test_hooks_of_the_user_fire_first_and_keep_firing(net: Tower, model: Any) -> None:
    """A block sees what the user's hooks leave; hooks put there before come first."""
    fired: list[torch.Tensor] = []

    def double(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
        fired.append(out.clone())
        return out * 2

    with model.trace(IDS):
        model.head.output.save()  # learnt without the hook
    plain = by_hand(net, IDS, {})
    handle = net.blocks[0].register_forward_hook(double)
    with model.trace(IDS):
        seen = model.blocks[0].output.clone().save()
        model.blocks[0].output[:, 0] = 0
        got = model.head.output.save()
    handle.remove()

    def both(out: torch.Tensor) -> torch.Tensor:
        out = out * 2
        out[:, 0] = 0
        return out

    assert len(fired) == 1
    bitwise(fired[0], plain["blocks.0"])
    bitwise(seen, plain["blocks.0"] * 2)
    bitwise(got, by_hand(net, IDS, {"blocks.0": both})["head"])


def test_pre_hooks_of_the_user_come_first_too(net: Tower, model: Any) -> None:
    with model.trace(IDS):
        model.head.output.save()
    plain = by_hand(net, IDS, {})["embed"]
    handle = net.blocks[0].register_forward_pre_hook(lambda _m, args: (args[0] * 3,))
    with model.trace(IDS):
        seen = model.blocks[0].input.save()
    handle.remove()
    bitwise(seen, plain * 3)


def test_hooks_of_the_user_may_be_removed_in_the_middle_of_a_pass(
    net: Tower, model: Any, edited: torch.Tensor
) -> None:
    handles: list[Any] = []

    def remove_all(*_: Any) -> None:
        for handle in handles:
            handle.remove()

    for block in net.blocks:
        handles.append(block.register_forward_hook(remove_all))
        handles.append(block.register_forward_pre_hook(lambda *_: None))
    bitwise(edit(model), edited)
    assert hooks(net) == 0


def test_hooks_that_the_user_adds_in_the_middle_of_a_pass_stay(net: Tower, model: Any) -> None:
    edit(model)
    added: list[Any] = []

    def add(*_: Any) -> None:
        if not added:
            added.append(net.head.register_forward_hook(lambda *_: None))

    first = net.embed.register_forward_hook(add)
    edit(model)
    first.remove()
    assert hooks(net) == 1
    added[0].remove()


def test_hooks_added_within_a_block(net: Tower, model: Any) -> None:
    """The block runs when it closes: a hook that is there then acts, one that is gone does not."""
    fired: list[str] = []
    with model.trace(IDS):
        gone = net.embed.register_forward_hook(lambda *_: fired.append("gone"))
        stays = net.embed.register_forward_hook(lambda *_: fired.append("stays"))
        model.head.output.save()
        gone.remove()
    stays.remove()
    assert fired == ["stays"]


def test_a_global_hook_of_the_user(net: Tower, model: Any, edited: torch.Tensor) -> None:
    fired: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: fired.append(type(module).__name__)
    )
    try:
        edit(model)
        fired.clear()
        got = edit(model)
    finally:
        handle.remove()
    bitwise(got, edited)
    assert fired.count("Block") == 3 and fired.count("LayerNorm") == 1


# --- states of the model --------------------------------------------------------------------------


class Noisy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.drop = torch.nn.Dropout(0.5)
        self.last = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


def test_a_model_in_train_mode_runs_as_it_would() -> None:
    """Dropout draws as it would, and batch statistics move once for one pass."""
    net, x = Noisy().train(), torch.randn(8, 4)
    model = weft.Model(net)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}

    def reset() -> None:
        torch.manual_seed(3)
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])

    reset()
    with torch.no_grad():
        wanted = net(x)
    moved = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for _ in range(2):
        reset()
        with model.trace(x):
            got = model.last.output.save()
        bitwise(got, wanted)
        bitwise(dict(net.named_buffers()), moved)
    assert net.training and net.drop.training


def test_switching_between_train_and_eval_needs_no_new_model() -> None:
    net, x = Noisy().train(), torch.randn(8, 4)
    model = weft.Model(net)
    with model.trace(x):
        model.last.output.save()
    net.eval()
    with unchanged(net, x):
        with model.trace(x):
            got = model.last.output.save()
        with torch.no_grad():
            bitwise(got, net(x))


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_and_trained_parameters(frozen: bool) -> None:
    net = tower().requires_grad_(not frozen)
    model = weft.Model(net)
    with unchanged(net, IDS):
        got = edit(model)
        assert not got.requires_grad and got.grad_fn is None
        assert all(p.requires_grad is not frozen and p.grad is None for p in net.parameters())


def test_a_constant_that_requires_grad_is_a_constant(net: Tower, model: Any) -> None:
    direction = torch.ones(8, requires_grad=True)
    with model.trace(IDS):
        model.blocks[0].output[:] += direction
        got = model.head.output.save()

    def add(out: torch.Tensor) -> None:
        out += direction.detach()

    bitwise(got, by_hand(net, IDS, {"blocks.0": add})["head"])
    assert direction.grad is None and direction.requires_grad


def test_weights_that_changed_between_two_blocks_are_used() -> None:
    net = tower()
    model = weft.Model(net)
    edit(model)
    with torch.no_grad():
        net.head.weight.mul_(2)
    net.norm.weight = torch.nn.Parameter(torch.full((8,), 0.5))
    with model.trace(IDS):
        got = model.head.output.save()
    with torch.no_grad():
        bitwise(got, net(IDS))


def test_a_model_that_was_cast_between_two_blocks() -> None:
    net = tower()
    model = weft.Model(net)
    edit(model)
    net.double()
    got = edit(model)
    assert got.dtype is torch.float64
    with unchanged(net, IDS), model.trace(IDS):
        model.blocks[0].output[:] *= 2
        assert model.head.output.save().dtype is torch.float64


def test_autocast_around_the_run_is_not_recorded_as_such(net: Tower, model: Any) -> None:
    """Autocast inside a block is refused; around a whole block it would act on the model."""
    with model.trace(IDS):
        hidden = model.blocks[0].output
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(WeftError, match="autocast"):
            hidden @ hidden.transpose(1, 2)
        got = model.head.output.save()
    bitwise(got, by_hand(net, IDS, {})["head"])
