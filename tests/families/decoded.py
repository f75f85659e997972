"""Generations for tests: the loop without graphs, what `generate` of transformers calls, and models
that the zoo does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.families import zoo
from weft.families.call import ModelCall
from weft.families.decoding import Decoding
from weft.families.forward import language_facts
from weft.families.prepare import prepare_language
from weft.families.sampling import sampling_of

_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 10,
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

MORE: dict[str, Callable[[], nn.Module]] = {
    # Frequencies switch after 10 positions, in the middle of the answers of these tests.
    "phi3 longrope": lambda: zoo.build(
        "phi3", rope_parameters=_LONG, original_max_position_embeddings=10
    ),
    "llama dynamic": lambda: zoo.build(
        "llama", rope_parameters=_DYNAMIC, max_position_embeddings=10
    ),
    "mamba": lambda: mamba(),
}
EVERY = (*zoo.FAMILIES, *MORE)


def build(name: str) -> Any:
    """A model of the zoo, or one of `MORE`."""
    return MORE[name]() if name in MORE else zoo.build(name)


def mamba() -> nn.Module:
    import transformers

    config = transformers.MambaConfig(
        vocab_size=zoo.VOCAB,
        hidden_size=32,
        num_hidden_layers=zoo.LAYERS,
        state_size=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        net = transformers.MambaForCausalLM(config)
    zoo.randomize(net, 0)
    return net.eval()


def prompt(net: Any, rows: Any, **tensors: Any) -> ModelCall:
    facts = language_facts(net.config, type(net))
    return prepare_language(rows, None, facts, tensors=tensors)


def decoding(net: Any, rows: Any, tokenizer: Any = None, **options: Any) -> Decoding:
    """A generation for rows of ids, or for a call."""
    call = rows if isinstance(rows, ModelCall) else prompt(net, rows)
    return Decoding(net, call, sampling_of(options, net.generation_config), tokenizer)


@torch.no_grad()
def run(net: Any, one: Decoding) -> torch.Tensor:
    """The loop: prompt and answer."""
    call = one.begin()
    while call is not None:
        call = one.next(net(*call[0], **call[1]))
    return one.result


def generated(net: Any, call: ModelCall, **options: Any) -> torch.Tensor:
    """What transformers' own `generate` returns."""
    given: dict[str, Any] = dict(call.kwargs)
    given.pop("use_cache", None)
    if "position_ids" in given and call.mask is not None:
        del given["position_ids"]  # it finds the same itself
    tensor = given["input_ids" if "input_ids" in given else "inputs_embeds"]
    ones = torch.ones(tensor.shape[:2], dtype=torch.int64)
    given.setdefault("attention_mask", ones)
    return net.generate(**given, **options)


def noting_calls(net: Any, act: Callable[[], Any]) -> tuple[list[dict[str, Any]], Any]:
    """(the keywords of each forward of the root, what `act` gave). Caches by what they hold."""
    seen: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        assert not args
        seen.append({name: _noted(value) for name, value in kwargs.items() if value is not None})

    hook = net.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return seen, act()
    finally:
        hook.remove()


def _noted(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if hasattr(value, "layers"):
        return [(type(one).__name__, [t.clone() for t in _tensors(one)]) for one in value.layers]
    return value


def _tensors(layer: Any) -> list[torch.Tensor]:
    """Keys and values of a cache's layer, or its states."""
    states = [getattr(layer, name, None) or {} for name in ("conv_states", "recurrent_states")]
    found = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    return [t for t in (*found, *states[0].values(), *states[1].values()) if t is not None]


def assert_same(got: Any, expected: Any, where: str = "") -> None:
    """Equal to the bit, through lists, tuples and dicts."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), where
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_same(got[name], value, f"{where} {name}")
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), where
        for number, value in enumerate(expected):
            assert_same(got[number], value, f"{where} {number}")
    else:
        assert got == expected, where
