"""Saved means frozen, and nothing is kept alive longer than it is needed."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn

from tests.leftovers import fewest, growth, objects, set_older_aside
from tests.run.graphs import Builder
from tests.run.nets import Chain, Does, example, same
from weft.errors import OverwrittenError, SiteMismatchError
from weft.run import run
from weft.run.taken import SMALL


def storage(tensor):
    return tensor.untyped_storage()._cdata


def large():
    """An example whose tensors are not copied where they could be shared."""
    x = example(1000)
    assert x.nbytes > SMALL
    return x


def owns(tensor):
    return tensor.untyped_storage().nbytes() == tensor.nbytes


# Who owns a save


def test_a_save_is_not_copied_without_need():
    seen = []
    model = Chain()
    model.blocks[1].register_forward_hook(lambda m, a, out: seen.append(out))
    g, x = Builder(), large()
    g.save("h", g.read("blocks.1", x))
    saved = run(g.graph(), {}, model, (x,)).saved
    assert storage(saved["h"]) == storage(seen[0])
    assert saved["h"] is not seen[0] and type(saved["h"]) is torch.Tensor


def test_a_saved_slice_does_not_hold_the_whole():
    g, x = Builder(), example(4)
    h = g.read("blocks.1", x)
    g.save("row", g.item(h, 1))
    g.save("column", g.item(h, slice(None), -1))
    saved = run(g.graph(), {}, Chain(), (x,)).saved
    assert owns(saved["row"]) and owns(saved["column"])


def test_two_saves_never_share():
    g, x = Builder(), example()
    h = g.read("blocks.1", x)
    for name in ("one", "two"):
        g.save(name, h)
    g.save("view", g.view("Tensor.view", h, -1))
    saved = run(g.graph(), {}, Chain(), (x,)).saved
    assert len({storage(t) for t in saved.values()}) == 3
    saved["one"].zero_()
    same(saved["two"].reshape(-1), saved["view"])
    assert saved["two"].abs().max() > 0


def test_a_save_never_shares_with_weights_inputs_constants_or_the_result():
    model = Does(lambda m, x: m.inner(x) + m.weight, inner=nn.Identity())
    model.weight = nn.Parameter(torch.ones(8))
    model.register_buffer("table", torch.ones(8))
    model.give = Does(lambda m, x: x + model.table)
    model.buffer = Does(lambda m: model.table)
    model.function = lambda m, x: m.give(m.inner(x) + m.weight) + m.buffer()
    g, x, c = Builder(), example(), torch.ones(3)
    g.save("input", g.read("inner", x))
    g.save("param", g.param("weight", torch.ones(8)))
    g.save("const", g.const(c))
    g.save("const_view", g.view("Tensor.view", g.const(c), 1, 3))
    g.save("buffer", g.read("buffer", (8,)))
    g.save("root", g.read("", x))
    found = run(g.graph(), g.constants, model, (x,), want_result=True)
    others = [model.weight, model.table, x, c, found.result]
    taken = {storage(t) for t in others}
    for name, tensor in found.saved.items():
        assert storage(tensor) not in taken, name
        assert not tensor.requires_grad and not isinstance(tensor, nn.Parameter)
        tensor.zero_()
    same(model.weight.detach(), torch.ones(8))
    same(model.get_buffer("table"), torch.ones(8))
    same(c, torch.ones(3))
    assert x.abs().max() > 0 and found.result.abs().max() > 0


def test_a_save_before_an_edit_keeps_the_old_numbers():
    model, x = Chain(), example()
    g = Builder()
    h = g.read("blocks.1", x)
    g.save("before", h)
    g.mul_(h, 3.0)
    g.fill("blocks.1", h)
    g.save("after", h)
    saved = run(g.graph(), {}, model, (x,)).saved
    same(saved["after"], 3 * saved["before"])


def test_saves_are_detached_from_an_input_that_wants_gradients():
    g, x = Builder(), example().requires_grad_()
    g.save("x", g.read("", x, leaf=(0, 0), port="inputs"))
    g.save("h", g.read("blocks.0", x))
    saved = run(g.graph(), {}, Chain(), (x,)).saved
    assert not saved["x"].requires_grad and not saved["h"].requires_grad


def test_results_go_to_the_device_asked_for():
    g, x = Builder(), example()
    g.save("all", {"h": [g.read("blocks.0", x)]})
    saved = run(g.graph(), {}, Chain(), (x,), device="meta").saved
    assert saved["all"]["h"][0].device.type == "meta"


# When the model overwrites what it handed out


def overwriting():
    """`inner` hands out a tensor; the model adds 100 to it before `last` comes."""

    def forward(m, x):
        y = m.inner(x * 1)
        y += 100
        return m.last(y)

    return Does(forward, inner=nn.Identity(), last=nn.Identity())


def test_an_overwritten_save_is_not_silent():
    g, x = Builder(), large()
    g.save("h", g.read("inner", x))
    with pytest.raises(OverwrittenError, match=r"inner\.output") as caught:
        run(g.graph(), {}, overwriting(), (x,), want_result=True)
    assert caught.value.line == "user.py:100"
    saved = run(g.graph(), {}, overwriting(), (x,)).saved  # stopped before that happens
    same(saved["h"], x)


def test_a_small_save_is_a_copy_that_nobody_overwrites():
    g, x = Builder(), example()
    g.save("h", g.read("inner", x))
    same(run(g.graph(), {}, overwriting(), (x,), want_result=True).saved["h"], x)


@pytest.mark.parametrize("rows", [2, 1000])
def test_what_is_read_and_saved_must_be_what_was_recorded(rows):
    """Also where the site is not scheduled, as it is with small tensors."""
    g, x = Builder(), example(rows)
    g.save("h", g.read("inner", x[:1]))
    with pytest.raises(SiteMismatchError, match=r"inner\.output should be") as caught:
        run(g.graph(), {}, overwriting(), (x,))
    assert caught.value.line == "user.py:100"


@pytest.mark.parametrize("view", [False, True])
def test_an_overwritten_value_is_not_used(view):
    g, x = Builder(), example()
    h = g.read("inner", x)
    used = g.item(h, slice(None)) if view else h
    g.save("sum", g.add2(used, g.read("last", x)))
    with pytest.raises(OverwrittenError):
        run(g.graph(), {}, overwriting(), (x,))


def test_a_clone_is_safe():
    g, x = Builder(), example()
    h = g.call("clone", g.read("inner", x))
    g.save("sum", g.add2(h, g.read("last", x)))
    same(run(g.graph(), {}, overwriting(), (x,)).saved["sum"], 2 * x + 100)


def test_a_hint_makes_the_copy():
    g, x = Builder(), example()
    h = g.read("inner", x)
    g.save("h", h)
    g.save("sum", g.add2(h, g.read("last", x)))
    asked = []

    def overwritten(site, leaf):
        asked.append((str(site), leaf))
        return site.path == "inner"

    saved = run(g.graph(), {}, overwriting(), (x,), want_result=True, overwritten=overwritten).saved
    same(saved["h"], x)
    same(saved["sum"], 2 * x + 100)
    assert ("inner.output", ()) in asked


def test_a_hint_makes_the_copy_of_an_edit_too():
    g, x = Builder(), example()
    h = g.read("inner", x)
    g.mul_(h, 2.0)
    g.fill("inner", h)
    g.save("h", h)
    found = run(
        g.graph(), {}, overwriting(), (x,), want_result=True, overwritten=lambda s, leaf: True
    )
    same(found.saved["h"], 2 * x)
    same(found.result, 2 * x + 100)


def test_our_own_fill_is_not_taken_for_the_models():
    model = Does(lambda m, x: m.second(m.first(x * 1)), first=nn.Identity(), second=nn.Identity())
    g, x = Builder(), example()
    early = g.read("first", x)
    g.save("early", early)
    h = g.read("second", x)
    g.mul_(h, 2.0)
    g.fill("second", h)
    g.save("sum", g.add2(early, g.read("", x)))
    saved = run(g.graph(), {}, model, (x,), want_result=True).saved
    same(saved["early"], x)
    same(saved["sum"], 3 * x)


# How long values live


def test_every_value_is_dropped_at_its_last_use():
    model, x = Chain(), example()
    alive = []
    held = []
    mul = torch.mul

    def spy(a, b):
        result = mul(a, b)
        held.append(weakref.ref(result))
        return result

    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda m, a: alive.append(sum(ref() is not None for ref in held))
        )
    from weft.run import plan

    g = Builder()
    for number in range(3):
        g.save(f"{number}", g.call("sum", g.mul(g.mul(g.read(f"blocks.{number}", x), 2.0), 3.0)))
    functions = dict(plan.CALLED)
    plan.CALLED["mul"] = spy
    plan._PLANS.clear()
    try:
        run(g.graph(), {}, model, (x,), want_result=True)
    finally:
        plan.CALLED.update(functions)
        plan._PLANS.clear()
    assert len(held) == 6
    assert alive == [0, 0, 0, 0]


def test_a_read_is_not_held_while_the_model_goes_on():
    model, x = Chain(), example()
    held, alive = [], []
    model.blocks[0].register_forward_hook(lambda m, a, out: held.append(weakref.ref(out)))
    model.head.register_forward_pre_hook(lambda m, a: alive.append(held[0]() is not None))
    g = Builder()
    g.save("sum", g.call("sum", g.read("blocks.0", x)))
    run(g.graph(), {}, model, (x,), want_result=True)
    assert alive == [False]


def test_a_thousand_runs_leave_nothing():
    model, x = Chain(2), example()
    g = Builder()
    h = g.read("blocks.0", x)
    g.add_(g.item(h, 0), g.const(torch.ones(8)))
    g.fill("blocks.0", h)
    g.save("h", g.read("head", (2, 3, 5)))
    bad = Builder()
    bad.save("h", bad.call("mm", bad.read("blocks.0", x), bad.read("blocks.0", x)))
    graph, failing = g.graph(), bad.graph()

    def once():
        run(graph, g.constants, model, (x,))
        with contextlib.suppress(RuntimeError):
            run(failing, {}, model, (x,))

    def thousand():
        for _ in range(1000):
            once()

    for _ in range(20):
        once()
    set_older_aside()
    assert growth(objects, thousand, bound=50) < 50


def test_a_run_leaves_no_cycle_that_holds_tensors():
    model, x = Chain(2), example()
    g = Builder()
    h = g.read("blocks.0", x)
    g.mul_(h, 2.0)
    g.fill("blocks.0", h)
    g.save("h", h)
    run(g.graph(), {}, model, (x,))
    gc.collect()
    gc.disable()
    try:
        found = run(g.graph(), {}, model, (x,))
        held = weakref.ref(found.saved["h"])
        del found
        assert held() is None
        gc.collect()

        def garbage():
            run(g.graph(), {}, model, (x,))
            return gc.collect()

        assert fewest(garbage) == 0
    finally:
        gc.enable()
