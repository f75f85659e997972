"""Drawing an admitted graph: what comes back, what ends it early, and a model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.bench import Bench, limits, state_of, values_of
from tests.run.graphs import Builder
from tests.run.nets import Chain, Does, example, hook_count, hooked, moved
from weft.client.values import opened_value
from weft.engine.draw import LostDeviceError, RunWatch, draw
from weft.engine.kept import SpoiltError
from weft.engine.opened import Opened
from weft.errors import (
    CancelledError,
    GuardError,
    LimitError,
    MessageError,
    ReadOnlyError,
    ResultTooLargeError,
    TimeLimitError,
    WeftError,
    WorkerMemoryError,
)
from weft.families.call import ModelCall
from weft.graph.frame import Frame
from weft.graph.node import Log
from weft.run.plan import plan
from weft.testing.same import bitwise
from weft.wire.messages import ValueEvent
from weft.wire.reports import error_of, report_of, run_error

X = example()


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Chain())


@pytest.fixture(autouse=True)
def _as_it_was(bench: Bench) -> Iterator[None]:
    """Whatever a test draws: no hook stays, and no weight changes."""
    before = state_of(bench.net)
    yield
    assert hook_count(bench.net) == 0
    bitwise(state_of(bench.net), before)


@pytest.fixture
def g() -> Builder:
    return Builder()


# Meaning: plain hooks say the same


def by_hand(bench: Bench, edit: Callable[[torch.Tensor], Any] | None = None) -> dict[str, Any]:
    """The second block and the end of the model, with the first block's output edited."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        return lambda out: seen.__setitem__(name, out.clone())

    net: Any = bench.net
    hooks = [(net.blocks[2], keep("h")), (net.head, keep("end"))]
    if edit is not None:
        hooks.insert(0, (net.blocks[1], edit))
    with hooked(*hooks):
        net(*bench.args)
    return seen


def _ends(g: Builder) -> None:
    g.save("h", g.read("blocks.2", X))
    g.save("end", g.read("head", (2, 3, 5)))


def test_a_read(bench, g):
    _ends(g)
    bitwise(bench.draw(g), by_hand(bench))


def test_an_edit_in_place(bench, g):
    h = g.read("blocks.1", X)
    g.mul_(g.item(h, slice(None), -1), -3.0)
    g.fill("blocks.1", h)
    _ends(g)

    def edit(out: torch.Tensor) -> None:
        out[:, -1] *= -3.0

    expected = by_hand(bench, edit)
    bitwise(bench.draw(g), expected)
    moved(expected["end"], by_hand(bench)["end"])


def test_a_write_of_a_constant(bench, g):
    c = torch.linspace(-2, 2, 48).reshape(2, 3, 8)
    g.write("blocks.1", g.const(c))
    _ends(g)
    expected = by_hand(bench, lambda out: c.clone())
    bitwise(bench.draw(g), expected)
    moved(expected["end"], by_hand(bench)["end"])


def test_a_module_applied_and_a_weight(bench, g):
    h = g.read("blocks.1", X)
    lens = g.apply("head", h)
    w = g.param("head.weight", torch.ones(5, 8))
    b = g.param("head.bias", torch.ones(5))
    g.save("both", [lens, g.call("nn.functional.linear", h, w, b)])
    with torch.no_grad():
        h = bench.net.blocks[1](bench.net.blocks[0](X))  # type: ignore[index]
        expected = bench.net.head(h)  # type: ignore[operator]
    bitwise(bench.draw(g)["both"], [expected, expected])


def _random(g: Builder) -> None:
    h = g.read("blocks.1", X)
    g.save("noise", g.call("randn_like", h, draw=0))
    g.save("more", g.call("nn.functional.dropout", h, 0.5, draw=1))


def test_structures_come_back_as_they_were_saved(bench, g):
    h = g.read("blocks.1", X)
    best = g.call("topk", h, 2, outs=2)
    g.save("tensors", {"a": (h, [g.out(best, 1)]), "e": h, "f": []})
    g.save("plain", [None, slice(1, None), "text", 1.5, True, ..., {"x": (1, 2)}, X.shape])
    found = bench.draw(g)
    bitwise(found["tensors"], bench.local(g)["tensors"])
    assert found["plain"] == bench.local(g)["plain"]
    assert type(found["plain"][-1]) is tuple  # a size arrives as the tuple that it is


def _twice(g: Builder) -> None:
    h = g.read("blocks.1", X)
    g.save("before", h)
    g.mul_(h, 0.0)
    g.fill("blocks.1", h)
    g.save("after", h)


def _inputs(g: Builder) -> None:
    h = g.read("blocks.1", X, port="inputs", leaf=(0, 0))
    g.add_(h, 1.0)
    g.fill("blocks.1", h, port="inputs", leaf=(0, 0))
    g.save("end", g.read("head", (2, 3, 5)))


@pytest.mark.parametrize("make", [_random, _twice, _inputs])
def test_as_on_the_users_machine(bench, make):
    g = Builder(seed=7)
    make(g)
    bitwise(bench.draw(g), bench.local(g))


def test_a_tensor_that_is_saved_twice_in_one_save_travels_once(bench, g):
    h = g.read("blocks.1", X)
    g.save("two", [h, h])
    g.save("again", h)
    assert len(bench.drawn(g).frames) == 2


def test_where_the_pass_could_stop(bench, g):
    net: Any = bench.net
    g.save("h", g.read("blocks.1", X))
    net.calls.clear()
    assert str(bench.drawn(g).manifest.ended) == "blocks.1.output"
    assert net.calls == [0, 1]


def test_constants_may_be_used_in_place(bench, g):
    c = g.const(torch.ones(3))
    g.mul_(c, 5.0)
    g.save("c", c)
    opened = bench.opened(g)
    before = bytes(opened.constants["c0"].data)
    for _ in range(2):
        drawn = draw(bench.net, opened, overwritten=None, limits=limits())
        bitwise(values_of(drawn)["c"], torch.full((3,), 5.0))
    assert bytes(opened.constants["c0"].data) == before


def test_inputs_in_containers_go_where_the_model_is():
    net = Does(lambda net, pair: net.head(pair["x"][0]), head=nn.Linear(8, 5)).to("meta")
    g = Builder()
    g.save("end", g.read("head", (2, 3, 5)))
    opened = Opened(g.graph(), {}, ModelCall(({"x": [X]},)))
    with pytest.raises(NotImplementedError, match="meta"):  # only its results cannot leave
        draw(net, opened, overwritten=None, limits=limits())


def test_a_guard_that_does_not_hold(bench, g):
    h = g.read("blocks.1", X)
    g.guard(g.call("sum", h), 12345.0)
    g.save("h", h)
    with pytest.raises(GuardError) as caught:
        bench.draw(g)
    assert caught.value.line == "user.py:102"


def test_a_constant_shorter_than_its_shape(bench, g):
    g.save("c", g.const(torch.ones(4)))
    opened = Opened(g.graph(), {"c0": Frame("float32", (4,), b"\0" * 15)}, bench.call)
    with pytest.raises(MessageError, match="not as long"):
        draw(bench.net, opened, overwritten=None, limits=limits())


def test_a_count_that_is_no_number_does_not_go_on_for_ever(bench, g):
    count = g.const(torch.tensor([float("nan"), 5.0]))
    g.save("n", g.call("binomial", count, g.const(torch.tensor([0.3, 1.0])), draw=0))
    bitwise(bench.draw(g)["n"], torch.tensor([float("nan"), 5.0]))


# Logs and progress


def test_logs_arrive_as_they_happen(bench, g):
    lines: list[str] = []
    h = g.read("blocks.1", X)
    g.log("sum", g.call("sum", h), [1, "two"])
    g.save("h", h)
    bench.draw(g, on_log=lines.append)
    h = by_hand_at_1(bench)
    assert lines == [f"sum {h.sum().item()} [1, two]"]


def by_hand_at_1(bench: Bench) -> torch.Tensor:
    net: Any = bench.net
    with torch.no_grad():
        return net.blocks[1](net.blocks[0](X))


def test_logs_beyond_the_limit_are_dropped_and_that_is_said(bench, g):
    lines: list[str] = []
    for number in range(10):
        g.log(f"line {number}")
    g.save("h", g.read("blocks.1", X))
    assert bench.draw(g, on_log=lines.append, log_bytes=20)
    assert lines == ["line 0", "line 1", "line 2", lines[3]] and "log_bytes is 20" in lines[3]


def test_the_text_of_a_log_does_not_grow_with_the_tensor(bench, g):
    """PyTorch would show six numbers along each dimension: 60 million."""
    lines: list[str] = []
    one = g.call("zeros", (1,) * 10)
    g.log(g.call("broadcast_to", one, (7,) * 10, alias=(one,)))
    g.save("h", g.read("blocks.1", X))
    bench.draw(g, on_log=lines.append)
    assert lines[0].startswith("[7, 7, 7, 7, 7, 7, 7, 7, 7, 7], at [0, 0, 0, 0, 0, 0]: tensor(")
    assert len(lines[0]) < 50_000


def test_progress_counts_sites(bench, g):
    seen: list[tuple[int, int]] = []
    for path in ("blocks.0", "blocks.1", "blocks.3"):
        g.save(path, g.read(path, X))
    bench.draw(g, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# What ends it early


class After:
    """True from the n-th question on."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_cancelled_at_any_moment(bench, g):
    net: Any = bench.net
    h = g.read("blocks.1", X)
    g.mul_(h, 0.0)
    g.fill("blocks.1", h)
    g.save("end", g.read("head", (2, 3, 5)))
    patient = After(1000)
    bench.draw(g, cancelled=patient)
    reached = []
    for looks in range(1000 - patient.left):
        net.calls.clear()
        with pytest.raises(CancelledError):
            bench.draw(g, cancelled=After(looks))
        assert hook_count(net) == 0
        reached.append(len(net.calls))
    assert reached == sorted(reached) and set(reached) == {0, 2, 4}  # before, at block 1, the end
    bitwise(bench.draw(g), bench.local(g))


def test_out_of_time_before_it_begins(bench, g):
    net: Any = bench.net
    net.calls.clear()
    g.save("h", g.read("blocks.1", X))
    with pytest.raises(TimeLimitError, match="run_seconds is 0 s"):
        bench.draw(g, run_seconds=0.0)
    assert not net.calls


def test_out_of_time_on_its_way(bench, g, monkeypatch):
    """A clock that goes on by a second at each look."""
    now = iter(range(1000))
    monkeypatch.setattr("weft.engine.draw.time.monotonic", lambda: float(next(now)))
    net: Any = bench.net
    net.calls.clear()
    for path in ("blocks.0", "blocks.1", "blocks.2", "blocks.3"):
        g.save(path, g.read(path, X))
    with pytest.raises(TimeLimitError):
        bench.draw(g, run_seconds=6.0)
    assert net.calls and net.calls[-1] < 3


def test_a_result_that_grows_too_large(bench, g):
    g.save("h", g.read("blocks.0", X))
    g.save("more", g.read("blocks.1", X))
    assert bench.draw(g, result_bytes=2 * X.nbytes)
    with pytest.raises(ResultTooLargeError, match="up to here 384 B are saved") as caught:
        bench.draw(g, result_bytes=2 * X.nbytes - 1)
    assert caught.value.line == "user.py:103" and "slice" in (caught.value.fix or "")


def test_numbers_that_ask_for_a_large_result(bench, g):
    where = g.const(torch.tensor([10**7]))
    counts = g.call("bincount", where)
    g.guard(counts, (10**7 + 1,), "shape")
    g.save("n", g.call("sum", counts))
    assert bench.draw(g)["n"] == 1
    with pytest.raises(WeftError, match="memory_bytes") as caught:
        bench.draw(g, memory_bytes=10**7)
    assert caught.value.line == "user.py:101"


# Out of memory

MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_no_memory_for_an_operation(bench, g, monkeypatch, error):
    def starved(*args: Any) -> Any:
        raise error

    h = g.read("blocks.1", X)
    g.save("y", g.mul(h, 3.0))
    step: Any = plan(g.graph()).steps[1]  # plans are found again
    monkeypatch.setattr(step, "function", starved)
    with pytest.raises(WorkerMemoryError) as caught:
        bench.draw(g)
    assert caught.value.line == "user.py:101"
    assert "DefaultCPUAllocator" not in str(caught.value)


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_no_memory_for_the_model(g, error):
    def starved(net: nn.Module, x: torch.Tensor) -> Any:
        raise error

    g.save("h", g.read("", (1,)))
    opened = Opened(g.graph(), {}, ModelCall((X,)))
    with pytest.raises(WorkerMemoryError, match="not enough memory"):
        draw(Does(starved), opened, overwritten=None, limits=limits())


def test_no_memory_for_the_result(bench, g, monkeypatch):
    def starved(tensor: torch.Tensor) -> Any:
        raise MemoryError

    monkeypatch.setattr("weft.engine.telling.to_frame", starved)
    g.save("h", g.read("blocks.1", X))
    with pytest.raises(WorkerMemoryError):
        bench.draw(g)


# Errors of others arrive as themselves


class TheirError(ValueError):
    pass


def test_the_models_own_exception(g):
    def broken(net: nn.Module, x: torch.Tensor) -> Any:
        raise TheirError("the model does not like this")

    net = Does(broken)
    g.save("h", g.read("", (1,)))
    with pytest.raises(TheirError, match="does not like") as caught:
        draw(net, Opened(g.graph(), {}, ModelCall((X,))), overwritten=None, limits=limits())
    assert hook_count(net) == 0
    sent = report_of(run_error(caught.value))
    assert (sent.code, sent.kind, sent.message) == ("run", "TheirError", str(caught.value))


def test_an_exception_of_an_operation_has_the_users_line(bench, g):
    where = g.const(torch.tensor([99]))
    g.save("row", g.call("index_select", g.read("blocks.1", X), 2, where))
    assert bench.price(g)
    with pytest.raises(IndexError) as caught:
        bench.draw(g)
    assert str(caught.value.weft_line) == "user.py:102"  # type: ignore[attr-defined]
    arrived = error_of(report_of(run_error(caught.value, line="user.py:102")))
    assert isinstance(arrived, IndexError) and arrived.line == "user.py:102"


@pytest.mark.parametrize("text", ["CUDA error: device-side assert triggered", "device-side assert"])
def test_an_accelerator_that_stopped_takes_its_process_along(g, text):
    def broken(net: nn.Module, x: torch.Tensor) -> Any:
        raise RuntimeError(text)

    g.save("h", g.read("", (1,)))
    with pytest.raises(LostDeviceError, match="index was out of range") as caught:
        draw(
            Does(broken), Opened(g.graph(), {}, ModelCall((X,))), overwritten=None, limits=limits()
        )
    assert caught.value.retire and report_of(caught.value).code == "run"


# The model stays as it was


class Rope(nn.Module):
    """As dynamic rope: a longer input than ever before gives it new frequencies, which stay."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.ones(8))
        self.longest = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > self.longest:
            self.longest = x.shape[1]
            self.register_buffer("frequencies", torch.ones(8) / self.longest)
        return x * self.frequencies


class Counter(nn.Module):
    """Writes into its buffer, and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.seen = x
        self.last = x.detach()  # an attribute that was not there before
        return x * self.count


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "dynamic rope": Rope,
    "a counter": Counter,
    "batch norm in training": lambda: nn.BatchNorm1d(5).train(),
}


def _reading(net: nn.Module, length: int = 5) -> tuple[Builder, Opened]:
    g = Builder()
    g.save("y", g.read("", example(length=length)))
    return g, Opened(g.graph(), {}, ModelCall((example(length=length),)))


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("fails", [False, True])
def test_a_job_leaves_no_trace_on_the_model(name, fails):
    net = STATEFUL[name]()
    state, attributes = state_of(net), dict(vars(net))
    results = []
    for _ in range(2):
        _, opened = _reading(net)
        try:
            drawn = draw(
                net, opened, overwritten=None, limits=limits(result_bytes=0 if fails else 1 << 20)
            )
            results.append(values_of(drawn)["y"])
        except ResultTooLargeError:
            assert fails
        bitwise(state_of(net), state)
        assert vars(net) == attributes
    if not fails:
        bitwise(results[0], results[1])


def test_without_us_it_would():
    """So that the test above is about something."""
    for name in ("dynamic rope", "a counter", "batch norm in training"):
        net = STATEFUL[name]()
        before = state_of(net)
        net(example(length=5))
        with pytest.raises(AssertionError):
            bitwise(state_of(net), before)


def test_a_module_that_writes_into_a_weight_spoils_the_model(g):
    def writes(net: Any, x: torch.Tensor) -> torch.Tensor:
        net.head.weight.data.mul_(1.0)
        net.head.weight.mul_(2.0)
        return net.head(x)

    net = Does(writes, head=nn.Linear(8, 5))
    g.save("y", g.read("", (2, 3, 5)))
    with pytest.raises(SpoiltError, match="changed a weight") as caught:
        draw(net, Opened(g.graph(), {}, ModelCall((X,))), overwritten=None, limits=limits())
    assert caught.value.retire and report_of(caught.value).code == "server"


class Table(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def _view(g: Builder, w: Any) -> Any:
    return g.call("Tensor.view", w, 40)  # says that it shares nothing


def _detached(g: Builder, w: Any) -> Any:
    return g.call("detach", w)


@pytest.mark.parametrize("make", [_view, _detached])
def test_a_weight_under_another_name_is_not_written(make):
    """Not where the graph lies about what shares its memory, and nobody has checked it."""
    net = Does(lambda net, x: net.head(x), head=nn.Linear(8, 5))
    g = Builder()
    w = make(g, g.param("head.weight", torch.ones(5, 8)))
    g.call("Tensor.mul_", w, 0.0, alias=(w,), writes=(w,))
    g.save("w", w)
    before = state_of(net)
    opened = Opened(g.graph(), {}, ModelCall((X,)))
    drawn = draw(net, opened, overwritten=None, limits=limits(), strict=False)
    assert not values_of(drawn)["w"].any()  # a copy was edited
    bitwise(state_of(net), before)


@pytest.mark.parametrize("edit", ["fill", "in place"])
def test_a_site_that_is_a_weight_is_not_written(edit):
    table, head = Table(), nn.Linear(8, 5)
    net = Does(lambda net, x: net.table(net.head.weight).sum() + x, head=head, table=table)
    g = Builder()
    w = g.read("table", (5, 8))
    g.mul_(w, 0.0)
    if edit == "fill":
        g.fill("table", w)
    g.save("w", w)
    before = state_of(net)
    opened = Opened(g.graph(), {}, ModelCall((X,)))
    if edit == "fill":
        with pytest.raises(ReadOnlyError, match="is a weight of the model"):
            draw(net, opened, overwritten=None, limits=limits())
    else:
        drawn = draw(net, opened, overwritten=None, limits=limits())
        assert not values_of(drawn)["w"].any()  # a copy was edited
    bitwise(state_of(net), before)


def test_a_module_in_place_gets_a_copy_of_a_weight():
    net = Does(lambda net, x: net.head(x), head=nn.Linear(8, 5), act=nn.ReLU(inplace=True))
    g = Builder()
    g.save("w", g.apply("act", g.param("head.weight", torch.ones(5, 8))))
    before = state_of(net)
    drawn = draw(net, Opened(g.graph(), {}, ModelCall((X,))), overwritten=None, limits=limits())
    bitwise(values_of(drawn)["w"], before["head.weight"].relu())
    bitwise(state_of(net), before)


def test_what_is_streamed_is_told_as_events_within_the_limits(bench, g):
    told: list[ValueEvent] = []
    h = g.read("blocks.1", X)
    for _ in range(3):
        g.add(Log, parts=("h", h, 2.5), stream=1)
    assert bench.draw(g, on_value=told.append) == {}
    assert [(event.number, event.stream) for event in told] == [(0, 1), (1, 1), (2, 1)]
    for event in told:
        text, value, number = opened_value(event)
        assert (text, number) == ("h", 2.5)
        bitwise(value, by_hand_at_1(bench))
    room = 2 * len(told[0].tensors) + 100  # beside the tensors: text, a number
    with pytest.raises(LimitError, match="stream_bytes"):
        bench.draw(g, on_value=told.append, stream_bytes=room)
    assert len(told) == 5
    with pytest.raises(LimitError, match="stream_bytes"):
        bench.price(g, stream_bytes=2 * X.nbytes)


def test_the_time_of_others_counts_only_where_time_seems_over(g):
    watch = RunWatch(g.graph(), limits(run_seconds=30.0), None, None)
    asked: list[float] = []
    watch.others = lambda: asked.append(60.0) or 60.0
    watch.look()
    assert not asked
    watch._until -= 60.0
    watch.look()
    assert asked == [60.0]
    watch._until -= 60.0
    with pytest.raises(TimeLimitError):
        watch.look()
