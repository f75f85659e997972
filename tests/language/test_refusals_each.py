"""Each refusal says what, where, what was expected, and the way out; and none is left untried."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import weft
from tests.language import (
    refusals_edits,
    refusals_flow,
    refusals_opening,
    refusals_own,
    refusals_running,
    refusals_steps,
)
from tests.language.refusals import CASES, Case, Things
from weft import errors
from weft.errors import WeftError


def message_of(case: Case, on: Things) -> WeftError:
    with pytest.raises(case.error) as caught:
        case.block(on)
    error = caught.value
    assert isinstance(error, WeftError)
    return error


assert (
    refusals_edits
    and refusals_flow
    and refusals_opening
    and refusals_own
    and refusals_running
    and refusals_steps
)  # they have added their cases


@pytest.fixture
def on(model, net, ids, place):
    return Things(model, net, ids, str(place) == "here")


@pytest.mark.parametrize("name", CASES)
def test_a_refusal_names_line_site_expectation_and_way_out(on, name):
    case = CASES[name]
    error = message_of(case, on)
    file = Path(inspect.getfile(case.block)).name
    assert f"{file}:{case.line}: " in str(error.line)
    for part in case.says:
        assert part in error.message
    assert error.fix and case.fix in error.fix
    assert str(error) == f"{error.message}\n  at {error.line}\n  fix: {error.fix}"


# -- none is left untried --------------------------------------------------------------------------

SRC = Path(weft.__file__).parent
ERRORS = [
    name
    for name, one in vars(errors).items()
    if isinstance(one, type) and issubclass(one, errors.WeftError)
]


def texts(node: ast.expr) -> list[str]:
    """A message with `{}` for what is filled in; of an alternative both."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join([p.value if isinstance(p, ast.Constant) else "{}" for p in node.values])]  # type: ignore[misc]
    return []


def refusals(*folders: str) -> Iterator[tuple[str, ast.Call, str]]:
    """(file:line, call, message) of each error that the files in these folders make."""
    for folder in folders:
        for file in sorted((SRC / folder).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in ERRORS or name == "refusal":
                    for text in texts(node.args[0]):
                        yield f"{folder}/{file.name}:{node.lineno}", node, text


def test_every_refusal_of_a_recording_is_brought_about(on, place):
    met = []
    for case in CASES.values():
        met.append(message_of(case, on).message)
        place.tidy()  # the models of cases look alike
    for where, _, text in refusals("trace"):
        if text == "{}":
            continue
        pattern = re.compile(re.escape(text).replace(r"\{\}", ".*"), re.DOTALL)
        assert any(pattern.fullmatch(message) for message in met), f"{where}: {text}"


def test_every_refusal_has_a_line_and_a_way_out():
    """In `families` and `handles` lines are added where the user's call comes in."""
    for where, node, text in refusals("trace", "run", "handles", "families"):
        given = {keyword.arg for keyword in node.keywords}
        if getattr(node.func, "attr", "") == "refusal":
            assert len(node.args) == 2, where
            continue
        assert "fix" in given, f"{where}: {text}"
        if where.startswith("trace/"):
            assert "line" in given, f"{where}: {text}"
