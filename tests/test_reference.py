"""`docs/tracing.md` has every name of the language: what a block, a handle and a module can say."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import weft
from weft import errors
from weft.families.forward import OPTION_NAMES, TENSOR_NAMES
from weft.handles.block import UnusedEditWarning
from weft.handles.generate import Generator
from weft.handles.options import ROOT_OPTIONS, Own
from weft.trace.tree import Module

PAGE = (Path(__file__).parent.parent / "docs" / "tracing.md").read_text()
WORDS = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", PAGE))))
"""All that stands in code on the page."""

INSTANCE = ("ended", "results", "job", "stages", "traffic", "stream")
"""What a tracer has by itself, and not by its class."""

OF_BLOCKS = [
    error
    for error in vars(errors).values()
    if isinstance(error, type)
    and issubclass(error, errors.WeftError)
    and not issubclass(error, (errors.RemoteError, errors.SettingError))
    and error is not errors.WeftError
]


@pytest.mark.parametrize("kind", [Generator, weft.LanguageModel, weft.Model, Module])
def test_every_public_name_is_on_the_page(kind):
    names = {name for name in dir(kind) if not name.startswith("_")}
    assert sorted(names - WORDS) == []


def test_every_option_is_on_the_page():
    own = {field.name for field in fields(Own)}
    assert sorted({*own, *ROOT_OPTIONS, *OPTION_NAMES, *TENSOR_NAMES} - WORDS) == []


def test_every_error_of_a_block_is_in_the_table():
    assert OF_BLOCKS
    rows = " ".join(re.findall(r"^\| (`\w*Error.*?) \|", PAGE, re.MULTILINE))
    assert [error.__name__ for error in OF_BLOCKS if f"`{error.__name__}`" not in rows] == []
    assert UnusedEditWarning.__name__ in WORDS


def test_what_is_in_the_tables_is_there():
    """The names before a `(` or a `.` that a table gives to the tracer, the model and a module."""
    tables = " ".join(line for line in PAGE.splitlines() if line.startswith("|"))
    for owner, kind in (("tracer", Generator), ("model", weft.LanguageModel), ("module", Module)):
        for name in re.findall(rf"`{owner}\.(\w+)", tables):
            known = hasattr(kind, name) or name in INSTANCE
            assert known or name == "weight", f"{owner}.{name}"
