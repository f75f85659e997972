"""What operations make of layouts, remembered: never another answer than without a memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.families import zoo
from weft.kernels.abstract import OutcomeCache
from weft.kernels.aval import aval_of
from weft.signatures import remembered, shapes
from weft.signatures.learn import Table, learn
from weft.signatures.remembered import asked_of
from weft.signatures.shapes import Shapes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> OutcomeCache:
    """An empty memory of the test's own."""
    own: OutcomeCache = OutcomeCache(2**10)
    monkeypatch.setattr(remembered, "REMEMBERED", own)
    monkeypatch.setattr(shapes, "REMEMBERED", own)
    return own


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs something as if there were no memory."""

    def run(act: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(shapes, "asked_of", lambda *rest: None)
            return act()

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that had to be found out."""
    found: list[str] = []
    whole = Shapes._on_layouts

    def noting(self: Shapes, func: Any, *rest: Any) -> Any:
        found.append(str(func))
        return whole(self, func, *rest)

    monkeypatch.setattr(Shapes, "_on_layouts", noting)
    return found


def table(net: nn.Module, *args: Any, **kwargs: Any) -> Table:
    return learn(net, args, kwargs, CPU)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_model_looks_the_same(name: str, without: Any, asked: list[str]) -> None:
    net = zoo.build(name)
    for ids in (torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]]), torch.tensor([[5, 6], [7, 8]])):
        mask = torch.ones_like(ids)
        expected = without(lambda ids=ids, mask=mask: table(net, ids, attention_mask=mask))
        first = len(asked)
        assert table(net, ids, attention_mask=mask).rows == expected.rows
        again = len(asked)
        assert table(net, ids, attention_mask=mask).rows == expected.rows
        assert (len(asked) - again) < first / 4  # the rest was remembered


def test_all_of_a_layer_is_remembered(asked: list[str]) -> None:
    net = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    for length in (7, 8):
        table(net, torch.zeros(1, length, 64))
        assert "aten.native_layer_norm.default" in asked and "aten.addmm.default" in asked
        asked.clear()
        table(net, torch.zeros(1, length, 64))
        assert not asked


class Views(nn.Module):
    """Views of its input and of each other, some written into, and results that are arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        h = self.one(x * 2.0)
        part = self.two(h[:, 1:].transpose(0, 1))
        part += 1.0
        halves = self.one(torch.split(h, 2, dim=1))
        other = self.two(torch.cat([part, part]))
        other.copy_(other * 1.0)
        return halves, other, torch.add(other, other, out=other), h.to(torch.float32), h


def test_storages_are_shared_and_written_into_alike(without: Any) -> None:
    net = Views()
    expected = without(lambda: table(net, torch.zeros(3, 4)))
    assert any(fact.overwritten for row in expected.rows for fact in row.facts if fact)
    for _ in range(2):
        assert table(net, torch.zeros(3, 4)).rows == expected.rows


class Say(nn.Module):
    """Gives what a function makes of its arguments."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, *args: Any) -> Any:
        return self.act(*args)


def layout_of(act: Any, *args: Any) -> Any:
    return table(Say(act), *args).rows[-1]


def row_of_run(act: Any, *args: Any) -> Any:
    """What comes of a real run."""
    return (aval_of(act(*args)),)


CALLS = {
    "a number's type": [lambda x, n=n: x.to(torch.int32).pow(n) for n in (2, 2.0, True)],
    "a number": [lambda x, n=n: x.to(torch.int32) * n for n in (2, 2.0, True)],
    "a dtype": [lambda x, d=d: x.to(d) for d in (torch.float64, torch.float16)],
    "a size": [lambda x, n=n: x.reshape(n, -1) for n in (2, 3)],
    "a list": [lambda x, n=n: x.sum(n) for n in ([0], [0, 1], [1])],
    "a keyword": [lambda x, k=k: x.sum(0, keepdim=k) for k in (False, True)],
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_differ_are_told_apart(name: str, without: Any) -> None:
    x = torch.ones(6, 6)
    expected = without(lambda: [layout_of(act, x) for act in CALLS[name]])
    assert [row.what for row in expected] == [row_of_run(act, x) for act in CALLS[name]]
    assert [layout_of(act, x) for act in CALLS[name]] == expected
    assert [layout_of(act, x) for act in CALLS[name]] == expected


@pytest.mark.parametrize(
    "others",
    [
        torch.ones(6, 4),
        torch.ones(4, 6).t(),
        torch.ones(6, 4, dtype=torch.float64),
        torch.ones(8, 4)[2:],
        torch.ones(6, 1).expand(6, 4),
    ],
)
def test_layouts_that_differ_are_told_apart(others: torch.Tensor, without: Any) -> None:
    def act(x: torch.Tensor) -> Any:
        return x * 1.0, x.view_as(x)[1:], x.contiguous(), x.flatten()

    layout_of(act, torch.ones(4, 6).t().contiguous())
    layout_of(act, torch.ones(6, 4))
    expected = without(lambda: layout_of(act, others))
    assert layout_of(act, others) == expected
    assert layout_of(act, others) == expected


ADD, OUT = torch.ops.aten.add.Tensor, torch.ops.aten.add.out
X, Y, SHARED = torch.ones(6)[:3], torch.ones(6)[:3], torch.ones(6)
HALVES = SHARED[:3], SHARED[:3]
KEYS: list[Any] = [
    (ADD, (X, 1), {}),
    (ADD, (X, 1.0), {}),
    (ADD, (X, True), {}),
    (ADD, (X, Y), {}),
    (ADD, (X, X), {}),
    (ADD, HALVES, {}),
    (ADD, (X, Y), {"alpha": 2}),
    (OUT, (X, Y), {"alpha": 2, "out": X}),
    (OUT, (X, Y), {"alpha": 2, "out": Y}),
    (ADD, (X, torch.ones(3, dtype=torch.int64)), {}),
    (ADD, (X, SHARED[3:]), {}),
    (ADD, (X, torch.ones(1).expand(3)), {}),
    (torch.ops.aten.cat.default, ([X, Y],), {}),
    (torch.ops.aten.cat.default, ([X, Y, Y],), {}),
    (torch.ops.aten.mv.default, (torch.ones(3, 3), Y), {}),
    (torch.ops.aten.addmv.default, (X, torch.ones(3, 3), Y), {"alpha": 2}),
    (torch.ops.aten.addmv.default, (X, torch.ones(3, 3), Y), {"beta": 2}),
]


def test_keys_of_calls_that_differ_differ() -> None:
    mode = Shapes([], CPU, integers=False)
    keys = [key_of(call, mode) for call in KEYS]
    assert len(set(keys)) == len(KEYS)
    again = Shapes([], CPU, integers=False)
    assert [key_of(call, again) for call in KEYS] == keys


def key_of(call: Any, mode: Shapes) -> Any:
    func, args, kwargs = call
    asked = asked_of(func, args, kwargs, mode._faked)
    assert asked is not None
    return asked.key


def test_a_tensor_of_another_kind_is_not_remembered() -> None:
    mode = Shapes([], CPU, integers=False)
    for odd in (slice(3), torch.Generator(), [X] * 65):
        assert asked_of(ADD, (X, odd), {}, mode._faked) is None
    plain, able = mode.fake(torch.ones(3)), mode.fake(torch.ones(3)).requires_grad_()
    first, second = [asked_of(ADD, (one, 1), {}, mode._faked) for one in (plain, able)]
    assert first is not None and second is not None and first.key != second.key


def test_one_tensor_twice_is_not_two(without: Any) -> None:
    def act(x: torch.Tensor, y: torch.Tensor) -> Any:
        return x, y, x.add_(y), torch.add(x, y, out=y)

    x, y = torch.ones(3), torch.ones(3)
    both = torch.ones(6)
    for pair in ((x, y), (x, x), (both[:3], both[3:]), (x, y)):
        expected = without(lambda pair=pair: layout_of(act, *pair))
        assert layout_of(act, *pair) == expected


def test_the_default_dtype_counts(without: Any) -> None:
    def act(x: torch.Tensor) -> Any:
        return torch.true_divide(x.long(), 2)

    assert layout_of(act, torch.ones(3)).what[0].dtype is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert layout_of(act, torch.ones(3)).what[0].dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_hangs_on_numbers_fails_again_and_again(memory: OutcomeCache) -> None:
    for act in (torch.nonzero, lambda x: x[x > 0], torch.unique, lambda x: x.sum().item()):
        for _ in range(2):
            with pytest.raises(Exception):  # noqa: B017 (PyTorch has several for it)
                layout_of(act, torch.ones(3))
    ours = torch.tensor([[1, 0, 2]])  # numbers that are known are looked at, not remembered
    sizes = [layout_of(lambda x, n=n: x[x > n], ours).what[0].shape for n in (0, 1, -1)]
    assert [tuple(size) for size in sizes] == [(2,), (1,), (3,)]


def test_operations_of_others_are_not_remembered(asked: list[str]) -> None:
    sizes = iter((2, 3))

    @torch.library.custom_op("weft_tests::odd", mutates_args=())
    def odd(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    odd.register_fake(lambda x: x.new_empty(next(sizes)))
    shapes = [tuple(layout_of(odd, torch.ones(4)).what[0].shape) for _ in range(2)]
    assert shapes == [(2,), (3,)]


def test_a_change_of_sizes_is_not_remembered(without: Any) -> None:
    def act(x: torch.Tensor) -> Any:
        y = x * 1.0
        return y.t_(), y.unsqueeze_(0), y

    expected = without(lambda: layout_of(act, torch.ones(3, 4)))
    for _ in range(2):
        assert layout_of(act, torch.ones(3, 4)) == expected


def test_an_out_that_is_made_larger_is_not_remembered(without: Any) -> None:
    def act(x: torch.Tensor) -> Any:
        out, same = torch.empty(0), torch.empty(3, 4)
        return torch.add(x, x, out=out), out, torch.add(x, x, out=same), same

    expected = without(lambda: layout_of(act, torch.ones(3, 4)))
    assert [tuple(one.shape) for one in expected.what] == [(3, 4)] * 4
    for _ in range(3):
        assert layout_of(act, torch.ones(3, 4)) == expected


def test_no_tensor_is_held(memory: OutcomeCache) -> None:
    net = zoo.build("llama")
    table(net, torch.tensor([[1, 2, 3]]))
    assert len(memory) > 30
    found = [part for key, made in memory._found.items() for part in _inside((key, made))]
    assert len(found) > 300
    assert not [part for part in found if isinstance(part, (torch.Tensor, torch.UntypedStorage))]


def _inside(thing: Any) -> Iterator[Any]:
    yield thing
    if isinstance(thing, (tuple, list)):
        for part in thing:
            yield from _inside(part)


def test_it_forgets(monkeypatch: pytest.MonkeyPatch, without: Any) -> None:
    small: OutcomeCache = OutcomeCache(8)
    monkeypatch.setattr(remembered, "REMEMBERED", small)
    monkeypatch.setattr(shapes, "REMEMBERED", small)
    net = zoo.build("gpt2")
    expected = without(lambda: table(net, torch.tensor([[1, 2, 3]])))
    for _ in range(2):
        assert table(net, torch.tensor([[1, 2, 3]])).rows == expected.rows
        assert len(small) <= 8
