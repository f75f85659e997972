"""Some cells of the conformance suite, always the same; `./run conformance` runs all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from . import __main__ as command
from . import kept
from .cases import CASES
from .lanes import NAMES, Places
from .models import DTYPES, FAMILIES, make
from .suite import faults, must_work, run, served
from .table import page
from .verdicts import BITWISE, BOUNDED, FAILED, REFUSED, Cell, Judge

SINGLE, HALF = DTYPES
WITHOUT_STEERING = [case for case in CASES if case.number != 3]
"""Generations are dear: in the subset they are tried where they differ most."""
SUBSET = (
    ("gpt2", SINGLE, "local", WITHOUT_STEERING),
    ("gpt2", SINGLE, "remote", CASES),
    ("gpt2", SINGLE, "beside", WITHOUT_STEERING),
    ("llama", HALF, "beside", CASES),
    ("mixtral", SINGLE, "local", WITHOUT_STEERING),
    ("phi3_longrope", SINGLE, "local", WITHOUT_STEERING),
    ("mamba", SINGLE, "local", WITHOUT_STEERING),
    ("bert", HALF, "local", CASES),
    ("t5", SINGLE, "local", CASES),
)


@pytest.fixture(scope="module")
def server() -> Iterator[object]:
    with served() as running:
        yield running


@pytest.mark.parametrize(
    ("family", "dtype", "lane", "cases"),
    SUBSET,
    ids=lambda one: f"{len(one)}" if isinstance(one, (list, tuple)) else f"{one}".split(".")[-1],
)
def test_cells(family, dtype, lane, cases, request):
    places = Places(request.getfixturevalue("server") if lane == "remote" else None)
    cells = list(run(places, (family,), (dtype,), (lane,), cases))
    assert len(cells) == len(cases)
    assert faults(cells, must_work(), whole=False) == []


def test_a_model_that_gives_no_next_token_is_refused_by_name(server):
    (cell,) = run(Places(server), ("bert",), (SINGLE,), ("remote",), [CASES[2]])
    assert (cell.case, cell.verdict) == (3, REFUSED)
    assert "a model of type 'bert' cannot generate" in cell.reason


def test_a_library_that_steers_the_prompt_only_fails_case_3(monkeypatch):
    from weft.trace.templates import Template

    monkeypatch.setattr(Template, "spread", lambda self, nodes, bounds, pinned: (nodes, bounds))
    (cell,) = run(Places(), ("gpt2",), (SINGLE,), ("local",), [CASES[2]])
    assert cell.verdict == FAILED


# -- the suite itself ------------------------------------------------------------------------------

CELL = Cell("gpt2", 2, "float32", "local", BITWISE)


def test_what_is_failed_refused_too_often_or_must_work_is_a_fault():
    assert faults([CELL], []) == []
    assert "failed: why" in faults([replace(CELL, verdict=FAILED, reason="why")], [])[0]
    refused = replace(CELL, verdict=REFUSED, reason="why")
    assert faults([CELL] * 19 + [refused], []) == []
    assert "more than 5 %" in faults([CELL] * 18 + [refused], [])[0]
    assert faults([CELL] * 18 + [refused], [], whole=False) == []
    assert "must work" in faults([CELL] * 19 + [refused], ["* 2 * *"])[0]
    assert faults([CELL] * 19 + [refused], ["* 1 * *", "gpt2 2 bfloat16 *"]) == []


def test_every_line_of_must_work_fits_a_cell():
    from fnmatch import fnmatchcase

    keys = [
        f"{family} {case.number} {dtype} {lane}"
        for family in FAMILIES
        for case in CASES
        for dtype in ("float32", "bfloat16")
        for lane in NAMES
    ]
    for pattern in must_work():
        assert any(fnmatchcase(key, pattern) for key in keys), pattern


def test_a_judge_says_bitwise_bounded_or_raises():
    subject = make("gpt2", torch.float32)
    given = subject.give([5, 6, 7])

    def oracle(net):
        with torch.no_grad():
            return net(*given[0]).logits

    judge, expected = Judge(subject), oracle(subject.net)
    judge.same(expected, oracle)
    assert (judge.verdict, judge.reason, judge.share) == (BITWISE, "", 0)
    near = expected + 1e-6 * expected.abs().max()
    with pytest.raises(AssertionError, match="not bitwise"):  # with the same shapes: no bound
        judge.same(near, oracle)
    judge.same(near, oracle, "more rows")
    assert (judge.verdict, judge.reason) == (BOUNDED, "more rows")
    assert judge.share == pytest.approx(0.1, rel=0.2)
    with pytest.raises(AssertionError, match="beyond the bound"):
        judge.same(expected * 1.001, oracle, "more rows")
    with pytest.raises(AssertionError):
        judge.raises(ValueError, "text", lambda: None)


def test_a_library_that_loses_an_edit_fails_its_cells(monkeypatch):
    from weft.trace.sites import Sites

    monkeypatch.setattr(Sites, "filled", lambda self, family, at: None)
    cases = [CASES[1], CASES[6]]
    cells = list(run(Places(), ("gpt2",), (SINGLE,), ("local",), cases))
    assert [one.verdict for one in cells] == [FAILED, FAILED]


def test_the_page_has_every_cell_and_every_reason():
    cells = [
        Cell(family, case.number, str(dtype)[6:], lane, BITWISE)
        for family in FAMILIES
        for dtype in DTYPES
        for lane in NAMES
        for case in CASES
    ]
    cells[5] = replace(cells[5], verdict=REFUSED, reason="InputError: a | b")
    for at in (0, 100):
        cells[at] = replace(cells[at], verdict=BOUNDED, reason="more rows", share=(at + 1) / 200)
    text = page(cells, "some versions")
    assert text.count("| = = |") >= len(FAMILIES) and r"a \| b" in text
    assert f"| all | {len(cells)} | {len(cells) - 3} (99.7 %) | 2 (0.2 %) | 1 (0.1 %) | 0 |" in text
    assert "more rows (at most 50 % of the bound)" in text
    for family in FAMILIES:
        assert text.count(f"\n| {family} |") == len(NAMES)


def test_cells_are_kept_until_the_sources_change(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "cells")
    cells = [CELL, replace(CELL, verdict=REFUSED, reason="a | b"), replace(CELL, share=0.5)]
    assert kept.kept("gpt2") is None
    kept.keep("gpt2", cells, kept.sources())
    assert kept.kept("gpt2") == cells and kept.kept("bert") is None
    monkeypatch.setattr(kept, "versions", lambda: "others")
    assert kept.kept("gpt2") is None


def test_started_processes_find_what_the_command_gives_them():
    """A function of `__main__` they would not find: a spawned process does not import that."""
    assert command.of_family.__module__ == faults.__module__
