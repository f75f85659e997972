"""A last linear map is computed where somebody asks, and only where that is certain.

Oracles: torch's own indexing, and each invoke in a forward of its own (`alone=True`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weft
from tests.families import zoo
from weft.graph.node import Name, Ref, Seq, Slice
from weft.run.narrow import _places
from weft.testing.same import bounded

A, B = [torch.tensor([row]) for row in zoo.tokens(9, 4, seed=1)]
SHAPE = (2, 5, 3)

NUMBER = st.integers(-7, 7)
PART = st.none() | NUMBER
SLICES = st.builds(slice, PART, PART, st.none() | st.integers(1, 3))


def lowered(item: Any) -> Any:
    if isinstance(item, slice):
        return Slice(item.start, item.stop, item.step)
    return Name("ellipsis") if item is ... else item


@settings(deadline=None, derandomize=True)
@given(st.lists(NUMBER | SLICES | st.just(...), min_size=1, max_size=4))
def test_places_are_what_an_index_takes(items):
    """Rows and positions, told from a tensor in which each place holds its own number."""
    numbers = torch.arange(10).reshape(2, 5, 1).expand(SHAPE)
    found = _places(Seq("tuple", tuple([lowered(item) for item in items])), SHAPE)
    try:
        taken = numbers[tuple(items)]
    except IndexError:
        return  # refused while recording
    if items.count(...) > 1:
        return
    expected = set(taken.reshape(-1).tolist())
    assert found is not None
    assert {row * 5 + position for row, position in found} >= expected
    if taken.numel():
        assert {row * 5 + position for row, position in found} == expected


@pytest.mark.parametrize(
    "index",
    [
        Ref(3),
        Seq("list", (0, 1)),
        Seq("tuple", (0, Ref(3))),
        Seq("tuple", (None, 0, -1)),
        Seq("tuple", (True, 1)),
        Seq("tuple", (0, Seq("list", (1, 2)))),
        Seq("tuple", (0, Slice(Ref(1), None, None))),
        Seq("tuple", (Slice(), 9)),
    ],
)
def test_what_numbers_do_not_say_is_taken_whole(index):
    assert _places(index, SHAPE) is None


@pytest.fixture
def rows(monkeypatch):
    """How many rows each linear map to the vocabulary is given."""
    seen: list[int] = []
    forward = torch.nn.Linear.forward

    def counting(self, x):
        if self.out_features == zoo.VOCAB:
            seen.append(x.numel() // x.shape[-1])
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counting)
    return seen


def last(logits):
    return logits[:, -1]


def run(model, take, **options):
    found = []
    with model.trace(**options) as tracer:
        for number, ids in enumerate((A, B, A, A)):
            with tracer.invoke(ids):
                model.get("model.layers.1").output[:, number] *= 1.5
                found.append(weft.save(take(model.lm_head.output)))
    return found


TAKES = {
    "the last position": (last, 4),
    "of the first row": (lambda y: y[0, -1], 4),
    "one number": (lambda y: y[0, -1, 7], 4),
    "some numbers": (lambda y: y[:, -1, [7, 3]], 4),
    "dots": (lambda y: y[..., -2, :], 4),
    "in two steps": (lambda y: [y[0, -1].softmax(-1), y[0, 0, 5] - y[0, -1, 5]], 8),
    "nothing": (lambda y: y[:, 9:], 0),
    "two": (lambda y: y[0, -2:], 8),
}


@pytest.mark.parametrize("name", TAKES)
def test_what_is_asked_for_is_what_it_is_alone(rows, name):
    take, count = TAKES[name]
    model = weft.LanguageModel(zoo.build("llama"))
    expected = run(model, take, alone=True)
    run(model, take)  # tries the model
    rows.clear()
    bounded(run(model, take), expected)
    assert rows == [count]


WHOLE = {
    "a row": lambda y: y[0],
    "all": lambda y: y,
    "a sum": lambda y: y.sum(),
    "both": lambda y: [y[:, -1], y.amax()],
    "a shape": lambda y: [y[:, -1], torch.zeros(y.shape)],
    "an index that is computed": lambda y: y[0, (y[0, 0, :2] * 0).long()],
    "an edit": lambda y: y[:, -1].mul_(2),
    "most of it": lambda y: y[:, 1:],
}


@pytest.mark.parametrize("name", WHOLE)
def test_all_else_takes_it_whole(rows, name):
    model = weft.LanguageModel(zoo.build("llama"))
    expected = run(model, WHOLE[name], alone=True)
    run(model, WHOLE[name])
    rows.clear()
    bounded(run(model, WHOLE[name]), expected)
    assert rows == [4 * 9]


def test_what_comes_after_it_needs_all_of_it(rows):
    """The model's own result is read too, or its arguments."""
    model = weft.LanguageModel(zoo.build("llama"))

    def both(logits):
        return [logits[:, -1], model.output.logits]

    def before(logits):
        return [logits[:, -1], model.lm_head.input]

    for take in (both, before):
        expected = run(model, take, alone=True)
        run(model, take)
        rows.clear()
        bounded(run(model, take), expected)
        assert rows == [4 * 9]


def test_a_module_with_somebodys_hook_is_given_all(rows):
    net: Any = zoo.build("llama")
    model = weft.LanguageModel(net)
    run(model, last)
    seen = []
    handle = net.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    rows.clear()
    run(model, last)
    handle.remove()
    assert rows == [36] and seen[-1].shape == (4, 9, zoo.VOCAB)


def test_a_module_that_is_more_than_a_linear_map_is_given_all(rows):
    class Shifted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    net: Any = zoo.build("llama")
    net.lm_head.__class__ = Shifted
    model = weft.LanguageModel(net)
    expected = run(model, last, alone=True)
    run(model, last)
    rows.clear()
    bounded(run(model, last), expected)
    assert rows == [36]
