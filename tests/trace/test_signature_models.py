"""Signatures of real architectures, learnt on meta, against real passes with real weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.families import zoo
from tests.trace.oracle import check
from weft.signatures.signature import Signatures

INPUTS = ("plain", "full", "padded", "positions")


def skeleton(name: str, **changes: object) -> nn.Module:
    """The architecture on meta."""
    import transformers

    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(zoo.config(name, **changes))
    return made.eval()


def inputs(kind: str, batch: int, length: int, seed: int = 0) -> tuple[tuple, dict]:
    """(args, kwargs) of a call."""
    ids = torch.tensor(zoo.tokens(*[length] * batch, seed=seed + length))
    mask = torch.ones_like(ids)
    if kind in ("padded", "positions"):
        mask[0, : min(3, length - 1)] = 0
    if kind == "plain":
        return (ids,), {}
    if kind == "positions":
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        return (ids,), {"attention_mask": mask, "position_ids": places}
    return (), {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_exact_layouts(name: str) -> None:
    net, bare = zoo.build(name), skeleton(name)
    for kind in INPUTS:
        args, kwargs = inputs(kind, 2, 9)
        check(Signatures(lambda: bare).for_call(args, kwargs), net, args, kwargs)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_derived_layouts(name: str) -> None:
    """Lengths and batches that were never run, below and above the windows."""
    net, bare = zoo.build(name), skeleton(name)
    signatures = Signatures(lambda: bare)
    for batch, length in ((1, 9), (1, 20), (3, 9), (3, 20), (4, 31)):
        signatures.for_call(*inputs("padded", batch, length))
    before = signatures.passes
    for batch, length in ((1, 33), (1, 13), (5, 17), (3, 40), (3, 31)):
        args, kwargs = inputs("padded", batch, length)
        check(signatures.for_call(args, kwargs), net, args, kwargs)
    assert signatures.passes <= before + 1


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3"])
@pytest.mark.parametrize("kind", INPUTS)
def test_all_sizes_in_any_order(name: str, kind: str) -> None:
    """Also sizes 1, and lengths around the window of 6: never silently wrong."""
    net, bare = zoo.build(name), skeleton(name)
    signatures = Signatures(lambda: bare)
    sizes = [(1, 5), (1, 4), (1, 12), (1, 7), (1, 6), (1, 2), (1, 1), (1, 30), (2, 1), (3, 1)]
    for batch, length in [*sizes, (5, 1), (2, 2), (2, 12), (4, 6), (4, 5), (7, 60), (6, 33)]:
        args, kwargs = inputs(kind, batch, length)
        check(signatures.for_call(args, kwargs), net, args, kwargs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
def test_eager_attention_in_half_precision_without_cache(name: str) -> None:
    how = {"attn_implementation": "eager", "dtype": torch.bfloat16}
    net = zoo.build(name, **how)  # type: ignore[arg-type]
    signatures = Signatures(lambda: net)
    for length in (9, 20, 31):
        args, kwargs = inputs("padded", 2, length)
        kwargs |= {"use_cache": False, "output_attentions": True, "output_hidden_states": True}
        check(signatures.for_call(args, kwargs), net, args, kwargs)
    assert signatures.passes <= 4


def test_a_new_prompt_of_a_known_size_costs_no_pass() -> None:
    """GPT-2 looks at the ids, to warn of padding; that must not make every prompt a new one."""
    bare = skeleton("gpt2")
    signatures = Signatures(lambda: bare)
    for length in (9, 20):
        signatures.for_call(*inputs("plain", 1, length))
    before = signatures.passes
    for length in range(9, 60):
        signatures.for_call(*inputs("plain", 1, length, seed=7))
    assert signatures.passes == before
    assert before <= 5


def test_masks_are_told_apart_by_what_the_model_asks_of_them() -> None:
    """No mask reaches the layers of Llama where all tokens count; one of 4 dimensions where not."""
    bare = skeleton("llama")
    signatures = Signatures(lambda: bare)
    ids = torch.tensor(zoo.tokens(9, 9))
    mask = torch.ones_like(ids)
    full = signatures.for_call((ids,), {"attention_mask": mask})
    mask[0, 0] = 0
    holes = signatures.for_call((ids,), {"attention_mask": mask})
    leaf = (1, "attention_mask")
    path = zoo.paths("llama").layer(0)
    assert dict(full.site(path, "inputs").leaves)[leaf].value is None
    assert dict(holes.site(path, "inputs").leaves)[leaf].shape == (2, 1, 9, 9)


def test_real_weights_give_the_same_and_stay_as_they_are() -> None:
    net = zoo.build("phi3")
    before = copy.deepcopy(net.state_dict())
    buffers = {name: (buffer, buffer.clone()) for name, buffer in net.named_buffers()}
    args, kwargs = inputs("padded", 2, 9)
    check(Signatures(lambda: net).for_call(args, kwargs), net, args, kwargs)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    for name, buffer in net.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])


def test_dynamic_rope_state_is_put_back() -> None:
    changes = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    net = zoo.build("llama", max_position_embeddings=8, **changes)
    rotary = net.model.rotary_emb
    before = dict(vars(rotary)), dict(rotary._buffers)
    args, kwargs = inputs("plain", 1, 20)
    sig = Signatures(lambda: net).for_call(args, kwargs)
    after = dict(vars(rotary)), dict(rotary._buffers)
    assert all(a.keys() == b.keys() for a, b in zip(before, after, strict=True))
    assert all(b[key] is a[key] for a, b in zip(before, after, strict=True) for key in a)
    check(sig, net, args, kwargs)


def test_long_rope_switches_with_the_length() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 16}
    net = zoo.build("phi3", **changes)
    signatures = Signatures(lambda: net)
    for length in (5, 9, 12, 17, 30, 16):
        args, kwargs = inputs("padded", 1, length)
        check(signatures.for_call(args, kwargs), net, args, kwargs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_a_decoding_step_leaves_the_cache_as_it_is(name: str) -> None:
    net = zoo.build(name)
    signatures = Signatures(lambda: net)
    for length in (4, 9, 10):
        args, kwargs = inputs("padded", 2, length)
        with torch.no_grad():
            cache = net(*args, **kwargs).past_key_values
        before = cache.get_seq_length(), cache.layers[0].keys
        ids, mask = torch.full((2, 1), 5), torch.ones(2, length + 1, dtype=torch.long)
        step = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        sig = signatures.for_call((), step)
        assert cache.get_seq_length() == before[0]
        assert cache.layers[0].keys is before[1]
        assert type(before[1]) is torch.Tensor
        check(sig, net, (), step)
