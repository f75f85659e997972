"""Which models' generations may share forwards: facts, and a trial of the steps themselves."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from tests.families import zoo
from tests.families.decoded import build
from weft.engine import sharing
from weft.engine.sharing import shares_steps
from weft.families.forward import language_facts


def _shares(net: Any) -> bool:
    return shares_steps(net, language_facts(net.config, type(net)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma3"])
def test_verified_models_pass_the_trial(name: str, dtype: torch.dtype) -> None:
    assert _shares(build(name).to(dtype))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_are_chosen_alike_in_single_precision_only(name: str) -> None:
    assert _shares(build(name))
    assert not _shares(build(name).to(torch.bfloat16))
    assert not _shares(build(name).to(torch.float16))


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_ropes_that_follow_the_length_speak_against_it(name: str) -> None:
    assert not _shares(build(name))


def test_a_model_in_training_mode_and_one_of_a_type_not_verified_do_not_share() -> None:
    net = zoo.build("gpt2")
    facts = language_facts(net.config, type(net))
    assert shares_steps(net, facts)
    net.train()  # type: ignore[attr-defined]
    assert not shares_steps(net, facts)
    assert not shares_steps(net, None)
    other: Any = zoo.build("llama")
    other.config.model_type = "of_nobody"
    assert not _shares(other)


class Leaking(nn.Module):
    """Adds to each row a little of another one's, where there is another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        return out + 1e-3 * out.roll(1, 0) if len(out) > 1 else out


class Counting(nn.Module):
    """Reads how wide the step is: a row is then something else beside longer ones."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        return out if mask is None else (out[0] * (1 + mask.shape[-1] / 100), *out[1:])


def test_a_model_that_mixes_rows_fails_the_trial() -> None:
    net: Any = zoo.build("llama")
    net.model.layers[1].mlp = Leaking(net.model.layers[1].mlp)
    assert not _shares(net)


def test_a_model_that_sees_the_width_fails_the_trial() -> None:
    net: Any = zoo.build("llama")
    net.model.layers[1].self_attn = Counting(net.model.layers[1].self_attn)
    assert not _shares(net)


def test_a_model_that_cannot_take_a_batch_fails_the_trial() -> None:
    net: Any = zoo.build("llama")

    def refuse(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if len(output) > 1:
            raise ValueError("one row only")

    hook = net.model.embed_tokens.register_forward_hook(refuse)
    assert not _shares(net)
    hook.remove()


def test_the_trial_runs_once_for_a_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    net: Any = zoo.build("gpt2")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    count = 0
    trial = sharing._trial

    def counted(*args: Any) -> bool:
        nonlocal count
        count += 1
        return trial(*args)

    monkeypatch.setattr(sharing, "_trial", counted)
    assert _shares(net)
    assert _shares(net)
    assert count == 1
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert _shares(net.to(torch.bfloat16))
    assert count == 2


def test_nobody_remembers_a_model_that_is_gone() -> None:
    net: Any = zoo.build("gpt2")
    assert _shares(net)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
