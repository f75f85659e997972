"""The load test at its smallest: whether it measures what it says; never how fast anything is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks.__main__ import PAGE, PARTS
from benchmarks.crowd import PARTS as PROCESSES
from benchmarks.crowd import jain, p95
from benchmarks.line import head_of
from benchmarks.load import TINY, Found, measured, report
from benchmarks.mix import KINDS, Work, all_at_once
from weft.client.travel import Parcel
from weft.graph.node import Graph
from weft.wire.messages import PlainInputs

WORKING = ("gateway", "checker", "worker", "users")


@pytest.fixture(scope="module")
def found() -> Found:
    """Measured for so long that a busy machine comes to something, too."""
    for seconds in (0.7, 4.0, 16.0):
        found = measured(TINY, seconds=seconds, users=(1, 2), variants=1)
        if enough(found):
            break
    return found


def enough(found: Found) -> bool:
    """Whether all had something to do, for more than a tick of the processors' clocks."""
    spent = [sum(spell.spent[part] for spell in found.spells) for part in WORKING]
    done = [count for spell in found.spells for count in spell.each]
    waits = found.waits
    loaded = len(waits.wait) > 2 and max(waits.depth) > 0 and len(waits.passes) > 0
    return loaded and min(*spent, *done) > 0


@pytest.mark.slow
def test_each_row_has_its_users_and_their_jobs(found: Found) -> None:
    assert [spell.users for spell in found.spells] == [1, 2]
    for spell in found.spells:
        assert len(spell.each) == spell.users
        assert sum(spell.each) == len(spell.done) > 0
        assert spell.seconds >= 0.7
        assert spell.done[-1].at - spell.done[0].at <= spell.seconds
        assert spell.rate == len(spell.done) / spell.seconds
        assert 0 < spell.latencies[0] <= spell.latencies[-1]
        assert 0 < jain(spell.each) <= 1
        assert 0 <= spell.worst <= 1
    alone = found.spells[0]
    assert (alone.merged, alone.batch) == (0, 1)
    assert 1 <= found.spells[1].batch <= 2


@pytest.mark.slow
def test_every_answer_is_that_of_the_model_here_and_another_one_is_noticed(found: Found) -> None:
    done = [one for spell in found.spells for one in spell.done]
    for one in done:
        one.work.check(one.result)
    one = done[0]
    for other in found.bare.seconds:
        if other is not one.work:
            with pytest.raises(AssertionError):
                other.check(one.result)
    for name, right in one.work.expected.items():
        step = 1e-3 * right.abs().max() if right.is_floating_point() else 1
        wrong = {**one.work.expected, name: right + step}
        with pytest.raises(AssertionError):
            replace(one.work, expected=wrong).check(one.result)


@pytest.mark.slow
def test_the_bare_model_had_the_same_work(found: Found) -> None:
    assert sorted(work.kind for work in found.bare.seconds) == sorted(KINDS)
    assert min(found.bare.at_once, *found.bare.seconds.values()) > 0
    total = sum(found.bare.seconds.values())
    assert found.bare.rate == pytest.approx(len(KINDS) / total)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processor time of others is read from /proc")
def test_the_time_of_every_process_is_counted(found: Found) -> None:
    spent = [sum(spell.spent[part] for spell in found.spells) for part in PROCESSES]
    assert all(seconds >= 0 for seconds in spent)
    named = dict(zip(PROCESSES, spent, strict=True))
    assert min(named[part] for part in WORKING) > 0


@pytest.mark.slow
def test_the_light_user_meets_the_heavy_one(found: Found) -> None:
    waits = found.waits
    assert len(waits.wait) == len(waits.price) == len(waits.whole) == len(waits.depth) > 2
    assert max(waits.depth) > 0
    assert waits.passes
    assert all(a <= b for a, b in zip(waits.price, waits.wait, strict=True))
    assert waits.in_passes == p95(waits.wait) / median(waits.passes)


@pytest.mark.slow
def test_the_report_has_all_tables_and_plots(found: Found) -> None:
    lines = report([found])
    for table in _tables(lines):
        assert len({line.count("|") for line in table}) == 1
    assert [len(table) for table in _tables(lines)] == [4, 6, 4, 3]
    text = "\n".join(lines)
    assert text.count("```mermaid\nxychart-beta\n") == 2
    assert text.count('x-axis "users" ["1", "2"]') == 2
    rates = ", ".join(f"{spell.rate:.1f}" for spell in found.spells)
    assert f"    line [{rates}]" in lines
    assert not re.search(r"\bnan\b|\binf\b", text)


def _tables(lines: list[str]) -> Iterator[list[str]]:
    table: list[str] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            table.append(line)
        elif table:
            yield table
            table = []


def test_all_jobs_at_once_are_the_rows_of_all_of_them() -> None:
    class Net:
        device = torch.device("cpu")

        def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> None:
            calls.append((input_ids, attention_mask))

        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> None:
            calls.append((input_ids, attention_mask))

    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    rows = {"read": [[5, 6]], "sweep": [[1, 2, 3], [1, 2, 3]], "generate": [[7, 8]]}
    works = [
        Work(
            kind, torch.tensor(ids), b"", b"", Parcel(Graph(()), PlainInputs(), {}, {}, {}), {}, int
        )
        for kind, ids in rows.items()
    ]
    longer = replace(works[2], rows=torch.tensor([[9, 9, 9]]))
    all_at_once([*works, longer], Net())
    (plain, plain_mask), (generated, generated_mask) = [
        [x.tolist() for x in call] for call in calls
    ]
    assert plain == [[5, 6, 0], [1, 2, 3], [1, 2, 3]]
    assert plain_mask == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert generated == [[0, 7, 8], [9, 9, 9]]
    assert generated_mask == [[0, 1, 1], [1, 1, 1]]


def test_an_index_of_fairness() -> None:
    assert jain([3, 3, 3]) == 1
    assert jain([5, 0, 0, 0]) == 0.25
    assert jain([0, 0]) == 0


def test_the_head_of_an_answer() -> None:
    head = b'HTTP/1.1 201 Created\r\nContent-Type: x/y\r\nETag: "a:b"\r\n\r\n'
    assert head_of(head) == (201, {"content-type": "x/y", "etag": '"a:b"'})


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_a_place_on_the_page(part: str) -> None:
    _, begun, rest = PAGE.read_text().partition(f"<!-- {part} -->\n")
    _, ended, _ = rest.partition(f"\n<!-- end of {part} -->")  # as `_keep` looks for it
    assert begun
    assert ended
