"""What a block costs a GPU: nothing is kept that was not saved, and nobody waits for a hook."""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import weft
from tests.gpu import place
from tests.gpu.place import DEVICE, IS_CUDA
from tests.language.hooks import hook_count
from weft.testing.same import bitwise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not IS_CUDA, reason="counts what only CUDA counts"),
]

ROWS, LENGTH, WIDTH = 100, 64, 256
HIDDEN = ROWS * LENGTH * WIDTH * 4
"""Bytes of the hidden states of one layer."""


@pytest.fixture(scope="module")
def net():
    return place.larger("llama", num_hidden_layers=8)


@pytest.fixture
def model(net):
    return weft.LanguageModel(net)


@pytest.fixture(scope="module")
def ids():
    return place.tokens(*[LENGTH] * ROWS).to(DEVICE)


def peak(work: Callable[[], Any]) -> int:
    """Bytes above what was there, at the most; the second time."""
    for _ in range(2):
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = work()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated() - before
        del found
    return most


def by_hand(net, ids, hooks):
    handles = [net.get_submodule(path).register_forward_hook(hook) for path, hook in hooks]
    try:
        with torch.no_grad():
            net(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def test_memory_of_a_read_and_an_edit(model, net, ids):
    v = torch.linspace(-1, 1, WIDTH, device=DEVICE)

    def hooks():
        kept = []

        def add(module, args, output):
            output[:, -1] += v

        def read(module, args, output):
            kept.append(output[:, -1].clone())

        by_hand(net, ids, [("model.layers.1", add), ("model.layers.7", read), ("lm_head", read)])
        return kept

    def traced():
        with model.trace(ids):
            model.model.layers[1].output[:, -1] += v
            h = model.model.layers[7].output[:, -1].save()
            logits = model.lm_head.output[:, -1].save()
        return [h, logits]

    bitwise(traced(), hooks())
    mine, plain = peak(traced), peak(hooks)
    print(f"\npeak {mine / 2**20:.1f} MiB, by hand {plain / 2**20:.1f} MiB")
    assert mine < plain + HIDDEN // 2


def test_memory_of_many_layers_read_and_only_their_norms_kept(model, net, ids):
    def hooks():
        kept = []
        read = lambda module, args, output: kept.append(output.norm(dim=-1))
        by_hand(net, ids, [(f"model.layers.{n}", read) for n in range(8)])
        return kept

    def traced():
        with model.trace(ids):
            kept = weft.save([layer.output.norm(dim=-1) for layer in model.model.layers])
        return list(kept)

    bitwise(traced(), hooks())
    mine, plain = peak(traced), peak(hooks)
    print(f"\npeak {mine / 2**20:.1f} MiB, by hand {plain / 2**20:.1f} MiB")
    assert mine < plain + HIDDEN // 2


def test_memory_afterwards_is_what_was_saved(model, ids):
    def once():
        with model.trace(ids):
            kept = model.model.layers[3].output[:, -1].save()
            model.lm_head.output.argmax(-1)
        return kept

    once()
    gc.collect()
    before = torch.cuda.memory_allocated()
    kept = once()
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2 * kept.nbytes


def waits(work: Callable[[], Any]) -> list[str]:
    """Where the host waited for the device: a line for each time."""
    work()
    torch.cuda.synchronize()
    found: list[str] = []

    def note(message: Any, *rest: Any, **named: Any) -> None:
        if "called a synchronizing" in str(message):
            lines = traceback.extract_stack()
            found.append(f"{lines[-2].filename.rsplit('/', 1)[-1]}:{lines[-2].lineno}")

    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = before
    return found


def test_no_hook_waits_for_the_device(model, net, ids):
    """As often for sixteen sites as for none."""
    v = torch.linspace(-1, 1, WIDTH, device=DEVICE)
    bare = waits(lambda: by_hand(net, ids, []))

    def traced(layers):
        with model.trace(ids):
            kept = []
            for layer in layers:
                layer.output[:, -1] += v
                kept.append(layer.mlp.output[:, -1])
            kept = weft.save(kept)
            logits = model.lm_head.output[:, -1].save()
        return kept, logits

    one = waits(lambda: traced(model.model.layers[:1]))
    all_ = waits(lambda: traced(model.model.layers))
    print(f"\nbare {len(bare)}, one site {one}, all {all_}")
    assert len(all_) == len(one)
    assert len(one) <= len(bare) + 2


def test_no_shared_row_waits_for_the_device(model, net):
    prompts = [place.tokens(n, seed=n).to(DEVICE) for n in (9, 12, 30, 7, 22, 5)]

    def traced(count):
        with model.trace() as tracer:
            kept = []
            for ids in prompts[:count]:
                with tracer.invoke(ids):
                    model.model.layers[1].output[:, -1] *= 2
                    kept.append(model.model.layers[5].output.save())
        return kept

    few, many = waits(lambda: traced(2)), waits(lambda: traced(6))
    print(f"\ntwo invokes {few}, six {many}")
    assert len(many) <= len(few) + 3 * 4  # the ids of each are looked at, and no more


def test_memory_that_runs_out_inside_a_block(model, net):
    ids = place.tokens(9)
    with model.trace(ids):
        expected = model.lm_head.output.save()
    gc.collect()
    torch.cuda.empty_cache()
    hooks, before = hook_count(net), torch.cuda.memory_allocated()
    whole = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / whole)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught, model.trace(ids):
            h = model.model.layers[1].output
            big = h.new_zeros((1 << 15, 1 << 15))  # here: 4 GiB
            model.model.layers[1].output = h + big.sum()
            model.lm_head.output.save()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = "".join(traceback.format_exception(caught.value))
    assert "# here" in said and __file__ in said
    del caught, said
    gc.collect()
    assert hook_count(net) == hooks
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    with model.trace(ids):
        again = model.lm_head.output.save()
    bitwise(again, expected)


def test_memory_that_runs_out_in_a_sweep(model, net):
    """It goes on with fewer points at a time."""
    ids = place.tokens(200)

    def point(tracer, layer, strength):
        model.model.layers[layer].output[:, -1] *= strength
        return model.model.layers[7].output.norm(dim=-1)[0]

    grid = {"layer": range(8), "strength": [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]}
    expected = model.sweep(ids, point, **grid, batch=4).values
    gc.collect()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(DEVICE).total_memory
    room = torch.cuda.memory_reserved() + (48 << 20)
    rows = place.forwards(net)
    torch.cuda.set_per_process_memory_fraction(room / whole)
    try:
        found = model.sweep(ids, point, **grid, batch=64).values
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        said = rows()
    print(f"\nforwards of {said}")
    assert len(said) > 1
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
