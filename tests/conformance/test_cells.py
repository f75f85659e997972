"""Some cells of the conformance suite, always the same; `./run conformance` runs all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from .cases import CASES
from .lanes import NAMES, Places
from .models import DTYPES, FAMILIES, make
from .suite import faults, must_work, run, served
from .table import page
from .verdicts import ABSENT, BITWISE, BOUNDED, FAILED, REFUSED, Cell, Judge

SINGLE, HALF = DTYPES
SUBSET = (
    ("gpt2", SINGLE, "local"),
    ("gpt2", SINGLE, "remote"),
    ("gpt2", SINGLE, "beside"),
    ("llama", HALF, "local"),
    ("llama", HALF, "beside"),
    ("mixtral", SINGLE, "local"),
    ("phi3_longrope", SINGLE, "local"),
    ("mamba", SINGLE, "local"),
    ("bert", HALF, "local"),
    ("t5", SINGLE, "local"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[object]:
    with served() as running:
        yield running


@pytest.mark.parametrize(
    ("family", "dtype", "lane"), SUBSET, ids=lambda one: str(one).removeprefix("torch.")
)
def test_cells(family, dtype, lane, request):
    places = Places(request.getfixturevalue("server") if lane == "remote" else None)
    cells = list(run(places, (family,), (dtype,), (lane,)))
    assert len(cells) == len(CASES)
    few_cells = "more than 5 %"  # a share is of all cells
    assert [one for one in faults(cells, must_work()) if few_cells not in one] == []


@pytest.mark.parametrize("lane", NAMES)
def test_a_model_that_gives_no_next_token_is_refused_by_name(lane, request):
    places = Places(request.getfixturevalue("server") if lane == "remote" else None)
    (cell,) = run(places, ("bert",), (SINGLE,), (lane,), [CASES[2]])
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
    assert "must work" in faults([CELL] * 19 + [refused], ["* 2 * *"])[0]
    assert faults([CELL] * 19 + [refused], ["* 1 * *", "gpt2 2 bfloat16 *"]) == []
    absent = replace(CELL, verdict=ABSENT)  # counts as nothing
    assert "more than 5 %" in faults([CELL] * 9 + [absent] * 90 + [refused], [])[0]


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
    assert judge.verdict == BITWISE
    judge.same(expected + 1e-6 * expected.abs().max(), oracle)
    assert judge.verdict == BOUNDED
    with pytest.raises(AssertionError):
        judge.same(expected * 1.001, oracle)
    with pytest.raises(AssertionError):
        judge.raises(ValueError, "text", lambda: None)


def test_a_library_that_loses_an_edit_fails_its_cells(monkeypatch):
    from weft.trace.sites import Sites

    monkeypatch.setattr(Sites, "filled", lambda self, family, at: None)
    cells = {one.case: one for one in run(Places(), ("gpt2",), (SINGLE,), ("local",))}
    assert cells[2].verdict == cells[7].verdict == FAILED


def test_the_page_has_every_cell_and_every_reason():
    cells = [
        Cell(family, case.number, str(dtype)[6:], lane, BITWISE)
        for family in FAMILIES
        for dtype in DTYPES
        for lane in NAMES
        for case in CASES
    ]
    cells[5] = replace(cells[5], verdict=REFUSED, reason="InputError: a | b")
    text = page(cells, "some versions")
    assert text.count("| = = |") >= len(FAMILIES) and r"a \| b" in text
    assert f"{len(cells)} cells, {len(cells) - 1} bitwise, 1 refused" in text
    for family in FAMILIES:
        assert text.count(f"| {family} |") == len(NAMES)
