"""Lines that do not depend on each other may stand in any order."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

import weft
from weft.errors import LateEditError, StaleHandleError
from weft.testing.same import bitwise

from .programs import Line, Refused, by_hooks, constants, may_swap, programs, reordered, source
from .tower import prompt, remember, tower, unchanged

NET = tower()
MODEL = weft.Model(NET)
IDS = prompt()


def run(lines: list[Line]) -> dict[str, torch.Tensor] | type[Exception]:
    """What the block saves, by name, or the class of its refusal."""
    text = source(lines)
    remember("<program>", text)
    scope: dict[str, Any] = {"torch": torch, "model": MODEL, "ids": IDS, **constants()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", weft.UnusedEditWarning)
            exec(compile(text, "<program>", "exec"), scope)
    except (LateEditError, StaleHandleError) as refusal:
        return type(refusal)
    return dict(sorted(scope["tracer"].results.items()))


@settings(max_examples=500, derandomize=True, deadline=None)
@given(programs(), st.data())
def test_every_order_of_independent_lines_gives_the_same_as_plain_hooks(
    lines: list[Line], data: Any
) -> None:
    note(source(lines))
    got = run(lines)
    try:
        expected = by_hooks(NET, IDS, lines, constants())
    except Refused as reason:
        assert isinstance(got, type), f"not refused: {reason}"
    else:
        assert not isinstance(got, type), "refused"
        bitwise(got, dict(sorted(expected.items())))
    draw = data.draw(st.randoms(use_true_random=False))
    for _ in range(2):
        other = reordered(lines, draw.randrange)
        note(source(other))
        again = run(other)
        assert isinstance(got, type) == isinstance(again, type), "only one order is refused"
        if not isinstance(got, type):
            bitwise(again, got)


def test_nothing_is_left_of_many_programs() -> None:
    @settings(max_examples=20, derandomize=True, deadline=None)
    @given(programs())
    def check(lines: list[Line]) -> None:
        run(lines)

    with unchanged(NET, IDS):
        check()


# The drawing itself: that it draws what it is meant to.


def test_lines_that_touch_the_same_thing_keep_their_order() -> None:
    read = Line("read", "r0 = a", makes="r0", site=3)
    use = Line("derive", "d1 = r0", makes="d1", uses=("r0",))
    edit = Line("write", "a = c0", uses=("c0",), site=3)
    change = Line("change", "r0 *= c0", uses=("c0",), changes="r0", site=3)
    assert not may_swap(read, use)
    assert not may_swap(read, edit)
    assert not may_swap(use, change)
    assert may_swap(use, edit)
    assert may_swap(read, Line("read", "r9 = a", makes="r9", site=3))


def test_the_draw_meets_every_kind_of_program() -> None:
    seen = Counter()

    @settings(max_examples=100, derandomize=True, deadline=None, database=None)
    @given(programs(), st.randoms(use_true_random=False))
    def count(lines: list[Line], draw: Any) -> None:
        try:
            by_hooks(NET, IDS, lines, constants())
        except Refused as reason:
            seen[str(reason).split()[0]] += 1
        seen.update({line.kind for line in lines})
        seen["moved"] += reordered(lines, draw.randrange) != lines

    count()
    assert seen["late"] > 2 and seen["stale"] and seen["moved"] > 50, seen
    assert all(seen[kind] > 15 for kind in ("read", "derive", "write", "fill", "change")), seen
