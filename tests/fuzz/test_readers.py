"""Readers of strangers' bytes: whatever comes in, out comes a value or a `WeftError`.

By hypothesis, which changes good bytes, and by libFuzzer, which looks at what runs
(`python -m tests.fuzz.cover`); both for seconds here, and for as long as wanted by hand.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.checker import by_hand
from tests.fuzz.entries import ENTRIES, WORDS, Entry
from tests.fuzz.mutate import mutated
from weft.errors import MessageError, WeftError

FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
RUNS = {"readers": 2_000, "checker": 300}
"""Inputs that are tried."""

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris (the extra `fuzz`) has wheels for Linux on x86-64 only",
)


def tried(entry: Entry, data: bytes) -> bool:
    """Whether the bytes were good. Raises what is no `WeftError`."""
    try:
        entry.read(data)
    except WeftError as error:
        assert error.message
        return False
    return True


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_good_is_read(name: str) -> None:
    seeds = list(ENTRIES[name].seeds())
    assert seeds
    for seed in seeds:
        ENTRIES[name].read(seed)


@pytest.mark.parametrize("name", ENTRIES)
def test_bytes_that_were_changed(name: str) -> None:
    entry = ENTRIES[name]
    counts = {True: 0, False: 0}

    @settings(FUZZ, max_examples=120)
    @given(st.sampled_from(sorted(entry.seeds())), st.data())
    def fuzz(seed: bytes, data: Any) -> None:
        changed = bytearray(seed)
        for _ in range(data.draw(st.integers(1, 4))):
            _change(changed, data)
        counts[tried(entry, bytes(changed) or b"\0")] += 1

    fuzz()
    assert counts[False] > 20 or name == "events"  # a stream has no wrong bytes, only odd ones


def _change(data: bytearray, drawn: Any) -> None:
    at = drawn.draw(st.integers(0, max(0, len(data) - 1)))
    kind = drawn.draw(st.sampled_from(["byte", "cut", "word", "twice", "noise"]))
    if kind == "byte" and data:
        data[at] = drawn.draw(st.integers(0, 255))
    elif kind == "cut":
        del data[at : at + drawn.draw(st.integers(1, 40))]
    elif kind == "word":
        data[at:at] = drawn.draw(st.sampled_from(WORDS))
    elif kind == "twice":
        data[at:at] = data[at : at + 60]
    else:
        data[at:at] = drawn.draw(st.binary(max_size=20))


def test_graphs_that_were_changed_are_admitted_or_refused() -> None:
    counts = {True: 0, False: 0}
    entry = by_hand()
    seeds = list(entry.seeds())
    assert all(tried(entry, seed) for seed in seeds)
    for number in range(300):
        chance = random.Random(number)
        changed = mutated(chance.choice(seeds), chance)
        if changed is not None:
            counts[tried(entry, changed)] += 1
    assert counts[True] > 20 and counts[False] > 100, counts


FOUND = {
    "half a character as the name of a field of a tensor": (
        "file",
        b"\x4a\0\0\0\0\0\0\0"
        b'{"x":{"dtype":"U8","shap\\ud800e":[1],"shape":[1],"data_offsets":[0,1]}}    x',
    ),
    "a number of an event without end": ("events", b"\xffid: " + b"9" * 5_000 + b"\ndata: x\n\n"),
}
"""What fuzzing has found, once each: it raised something else."""


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once(name: str) -> None:
    entry, data = FOUND[name]
    tried(ENTRIES[entry], data)


@needs_atheris
@pytest.mark.parametrize("what", RUNS)
def test_fuzzing_that_looks_at_what_runs(what: str, tmp_path: Path) -> None:
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.fuzz.cover",
            what,
            "-seed=1",
            f"-runs={RUNS[what]}",
        ],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=200,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    runs, found = (re.search(rf"stat::{name}: +(\d+)", child.stderr) for name in _STATS)
    assert runs and found, child.stderr[-2000:]
    assert int(runs[1]) > 100
    assert int(found[1]) > 10  # else it sees nothing of what runs


_STATS = ("number_of_executed_units", "new_units_added")


@needs_atheris
def test_an_error_that_is_none_of_ours_ends_it(tmp_path: Path) -> None:
    """Or the test above could not fail."""
    code = (
        "import tests.fuzz.cover as cover\n"
        "def broken(data):\n"
        "    if data[:1] > b'x': raise KeyError(data)\n"
        "cover.ENTRIES['file'] = cover.Entry(broken, lambda: [b'abc'])\n"
        "cover.main('file', '-seed=1', '-max_total_time=100')\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=200,
        check=False,
    )
    assert child.returncode != 0
    assert "KeyError" in child.stderr + child.stdout
    assert list(tmp_path.glob("weft-crash-*"))


def test_an_event_of_many_lines_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.client import events

    monkeypatch.setattr(events, "LONGEST", 1_000)
    parser = events.Parser()
    with pytest.raises(MessageError, match="too long"):
        for _ in range(1_000):
            parser.feed(b"data: xxxxxxxxxx\n")
