"""Driving by hooks: early exit, calls, whose forward it is, other people's hooks."""

from __future__ import annotations

import contextlib
import sys
import threading

import pytest
import torch
from torch import nn

from tests.run.graphs import Builder
from tests.run.nets import Chain, Does, example, hook_count, hooked, moved, same
from weft.errors import NotReachedError
from weft.run import run


def reading(path, like, **options):
    g = Builder()
    g.save("h", g.read(path, like, **options))
    return g.graph()


# Early exit


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_reading_a_layer_runs_that_many_layers(layer):
    model, x = Chain(), example()
    found = run(reading(f"blocks.{layer}", x), {}, model, (x,))
    assert model.calls == list(range(layer + 1))
    assert str(found.ended) == f"blocks.{layer}.output"
    assert found.result is None


def test_the_inputs_of_a_layer_do_not_run_it():
    model, x = Chain(), example()
    ran = []
    model.blocks[1].linear.register_forward_hook(lambda *_: ran.append(1))
    found = run(reading("blocks.1", x, leaf=(0, 0), port="inputs"), {}, model, (x,))
    assert str(found.ended) == "blocks.1.inputs" and not ran


def test_the_result_wanted_means_to_the_end():
    model, x = Chain(), example()
    found = run(reading("blocks.0", x), {}, model, (x,), want_result=True)
    assert model.calls == [0, 1, 2, 3] and found.ended is None
    same(found.result, model(x).detach())


def test_a_driver_that_cannot_stop_does_not():
    model, x = Chain(), example()
    found = run(reading("blocks.0", x), {}, model, (x,), can_stop=False)
    assert model.calls == [0, 1, 2, 3] and found.ended is None and found.result is None


def test_an_empty_graph_does_not_run_the_model():
    model = Chain()
    found = run(Builder().graph(), {}, model, (example(),))
    assert found.saved == {} and model.calls == []


def test_a_graph_without_sites_does_not_run_the_model():
    model, g = Chain(), Builder()
    g.save("c", g.mul(g.param("head.weight", model.head.weight), 2.0))
    found = run(g.graph(), {}, model, (example(),))
    assert model.calls == []
    same(found.saved["c"], 2 * model.head.weight.detach())


def test_an_empty_graph_with_the_result():
    model, x = Chain(), example()
    same(run(Builder().graph(), {}, model, (x,), want_result=True).result, model(x).detach())


def test_the_root_is_a_site():
    model, x = Chain(), example()
    g = Builder()
    place = {"leaf": (0, 0), "port": "inputs"}
    g.write("", g.mul(g.read("", x, **place), 2.0), **place)
    g.write("", g.mul(g.read("", (2, 3, 5)), 3.0))
    found = run(g.graph(), {}, model, (x,), want_result=True)
    same(found.result, 3 * model(2 * x).detach())


def test_gradients_are_off_inside_and_untouched_outside():
    grad = []
    model, x = Chain(), example()
    model.head.register_forward_pre_hook(lambda m, a: grad.append(torch.is_grad_enabled()))
    run(reading("head", (2, 3, 5)), {}, model, (x,))
    assert grad == [False] and torch.is_grad_enabled()


def test_inside_inference_mode():
    model, x = Chain(), example()
    g = Builder()
    h = g.read("blocks.0", x)
    g.mul_(h, 2.0)
    g.fill("blocks.0", h)
    g.save("h", g.read("head", (2, 3, 5)))
    with torch.inference_mode():
        inside = run(g.graph(), {}, model, (x.clone(),)).saved["h"]
    assert not inside.is_inference()
    same(inside, run(g.graph(), {}, model, (x,)).saved["h"])


# Calls


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(torch.relu(self.inner(x)) + 1)


def test_calls_are_numbered():
    model, x = Twice(), example()
    g = Builder()
    place = {"leaf": (0, 0), "port": "inputs"}
    for call in (0, 1):
        g.save(f"in{call}", g.read("inner", x, call=call, **place))
        g.save(f"out{call}", g.read("inner", x, call=call))
    saved = run(g.graph(), {}, model, (x,)).saved
    with torch.no_grad():
        first = model.inner(x)
        same(saved["in0"], x)
        same(saved["out0"], first)
        same(saved["in1"], torch.relu(first) + 1)
        same(saved["out1"], model.inner(torch.relu(first) + 1))


def test_one_call_of_several_is_edited():
    model, x = Twice(), example()
    g = Builder()
    g.write("inner", g.mul(g.read("inner", x, call=1), 0.0), call=1)
    same(run(g.graph(), {}, model, (x,), want_result=True).result, torch.zeros_like(x))


def test_a_recursive_module_is_numbered_as_its_calls_begin():
    """The outer call is number 0 although the inner one returns first."""

    def forward(m, x, depth):
        return m(x, depth - 1) * 10 if depth else x + 1

    model = Does(lambda m, x: m.inner(x, 2), inner=Does(forward))
    g, x = Builder(), example()
    for call in range(3):
        g.save(f"out{call}", g.read("inner", x, call=call))
    saved = run(g.graph(), {}, model, (x,), want_result=True).saved
    for call, factor in enumerate((100, 10, 1)):
        same(saved[f"out{call}"], factor * (x + 1))


def test_a_call_that_raised_does_not_shift_the_numbers():
    def inner(m, x, fail):
        if fail:
            raise ValueError
        return x * 2

    def forward(m, x):
        with contextlib.suppress(ValueError):
            m.inner(x, True)
        return m.inner(x, False)

    model, x = Does(forward, inner=Does(inner)), example()
    same(run(reading("inner", x, call=1), {}, model, (x,)).saved["h"], 2 * x)
    with pytest.raises(NotReachedError):
        run(reading("inner", x, call=0), {}, model, (x,))


# Whose forward


def test_another_threads_forward_fires_nothing():
    model, x, other = Chain(), example(), []

    def elsewhere(module, args):
        thread = threading.Thread(target=lambda: other.append(model.blocks[2](x).detach()))
        thread.start()
        thread.join()

    model.blocks[1].register_forward_pre_hook(elsewhere)
    g = Builder()
    g.write("blocks.2", g.mul(g.read("blocks.2", x), 0.0))
    g.save("h", g.read("blocks.2", x))
    saved = run(g.graph(), {}, model, (x,)).saved
    same(other[0], model.blocks[2](x).detach())
    same(saved["h"], torch.zeros_like(x))


def test_a_run_inside_a_run():
    """The inner run's forward does not fire the outer run's hooks."""
    model, x, inner = Chain(), example(), []
    zero = Builder()
    zero.write("blocks.0", zero.mul(zero.read("blocks.0", x), 0.0))

    def nested(text):
        inner.append(run(reading("head", (2, 3, 5)), {}, model, (x,)).saved["h"])

    zero.log("now")
    h = zero.read("blocks.1", x)
    zero.log(zero.call("sum", h))
    zero.save("head", zero.read("head", (2, 3, 5)))
    outer = run(zero.graph(), {}, model, (x,), on_log=nested).saved["head"]
    for result in inner:
        same(result, model(x).detach())
    with hooked((model.blocks[0], lambda out: out * 0)):
        same(outer, model(x))
    moved(outer, inner[0])
    assert hook_count(model) == 0


def test_eight_threads_draw_their_own_graphs_through_one_model():
    model, x = Chain(), example()
    rounds, threads, failures = 50, 8, []

    def graph(thread, number):
        g = Builder()
        layer = (thread + number) % 4
        h = g.read(f"blocks.{layer}", x)
        g.add_(g.item(h, slice(None), number % 3), float(thread + 1))
        g.fill(f"blocks.{layer}", h)
        g.save("out", g.read("head", (2, 3, 5)))
        return g.graph()

    def expected(thread, number):
        def edit(out):
            out[:, number % 3] += thread + 1

        with hooked((model.blocks[(thread + number) % 4], edit)):
            return model(x)

    oracle = {(t, n): expected(t, n) for t in range(threads) for n in range(rounds)}

    def work(thread):
        try:
            for number in range(rounds):
                out = run(graph(thread, number), {}, model, (x,)).saved["out"]
                same(out, oracle[thread, number])
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    workers = [threading.Thread(target=work, args=(t,)) for t in range(threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert hook_count(model) == 0
    moved(oracle[0, 0], oracle[1, 0])


@pytest.mark.parametrize("arity", [0, 1])
def test_a_foreign_run_may_call_our_hooks_with_fewer_arguments(arity):
    """While a run removes its hooks, another thread may have copied the list but not the flags."""
    model, x = Chain(), example()
    seen = []

    def steal(module, args):
        pre = list(model.blocks[1]._forward_pre_hooks.values())[-1]
        post = list(model.blocks[1]._forward_hooks.values())[-1]

        def call():
            seen.append(pre(model.blocks[1], (x,), *[{}] * arity))
            seen.append(post(model.blocks[1], (x,), *[{}] * arity, x))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    model.blocks[0].register_forward_pre_hook(steal)
    run(reading("blocks.1", x), {}, model, (x,))
    assert seen == [None, None]


# Other people's hooks


def test_a_users_own_hooks_come_first_and_stay():
    model, x = Chain(), example()
    order = []
    model.blocks[0].register_forward_hook(lambda m, a, out: out * 2)
    model.blocks[0].register_forward_pre_hook(lambda m, a: (a[0] * 3,))
    model.head.register_forward_hook(lambda *_: order.append("user"))
    before = hook_count(model)
    g = Builder()
    g.save("in", g.read("blocks.0", x, leaf=(0, 0), port="inputs"))
    g.save("out", g.read("blocks.0", x))
    g.log(g.read("head", (2, 3, 5)))
    saved = run(g.graph(), {}, model, (x,), on_log=lambda text: order.append("graph")).saved
    same(saved["in"], 3 * x)
    with torch.no_grad():
        same(saved["out"], model.blocks[0](x))
    assert order == ["user", "graph"]
    assert hook_count(model) == before


def test_hooks_stand_only_on_the_modules_that_are_named():
    model, x, counts = Chain(), example(), []
    model.head.register_forward_pre_hook(lambda m, a: counts.append(hook_count(model)))
    run(reading("head", (2, 3, 5)), {}, model, (x,))
    assert counts == [1 + 3]
