"""Fuzzing that is guided by which lines run, by libFuzzer through `atheris` (the extra `fuzz`).

    python -m tests.fuzz.cover readers -max_total_time=60
    python -m tests.fuzz.cover checker-random -max_total_time=600 CORPUS

What follows the name are libFuzzer's options and folders. An input that raises anything but a
`WeftError`, takes 20 s or 4 GiB ends the process with status 77 or 70 and is written to a file.
"""

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path

import atheris

from tests.fuzz.mutate import mutated

CODE = ["weft.wire", "weft.graph", "weft.service.gateway.bodies", "weft.client.events"]
CHECKING = ["weft.engine.admit", "weft.engine.bounds", "weft.engine.places"]

with atheris.instrument_imports(include=[*CODE, *CHECKING], enable_loader_override=False):
    from tests.fuzz.entries import ENTRIES, WORDS, Entry
    from weft.errors import WeftError

LARGE = ("torch", "transformers", "hypothesis")
BOUNDS = ["-timeout=100", "-rss_limit_mb=4096", "-max_len=8192", "-print_final_stats=1"]


def entries(what: str) -> list[Entry]:
    """What is fuzzed under this name; several share a run, told apart by a first byte."""
    if what == "readers":
        return list(ENTRIES.values())
    if what.startswith("checker"):
        for large in LARGE:
            import_module(large)  # before anybody looks at each of its files
        with atheris.instrument_imports(include=CHECKING, enable_loader_override=False):
            from tests.fuzz.checker import CHECKERS
        return [CHECKERS[what]()]
    return [ENTRIES[what]]


def main(what: str, *options: str) -> None:
    """Fuzzes until libFuzzer's options say that it is enough; it ends the process itself."""
    warnings.simplefilter("ignore")
    chosen = entries(what)

    def one(data: bytes) -> None:
        if len(data) < 2:
            return
        try:
            chosen[data[0] % len(chosen)].read(data[1:])
        except WeftError as error:
            assert error.message

    with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as folder:
        seeds, words = Path(folder, "seeds"), Path(folder, "words")
        seeds.mkdir()
        for number, entry in enumerate(chosen):
            for place, seed in enumerate(entry.seeds()):
                (seeds / f"{number}-{place}").write_bytes(bytes([number]) + seed)
        words.write_text("".join([f'"{_escaped(word)}"\n' for word in WORDS]))
        bounds = [*BOUNDS, f"-dict={words}", f"-artifact_prefix={tempfile.gettempdir()}/weft-"]
        folders = [option for option in options if not option.startswith("-")]
        flags = [option for option in options if option.startswith("-")]
        given = [sys.argv[0], *bounds, *flags, *folders, str(seeds)]
        if what.startswith("checker") or what in ("graph", "grammar"):
            atheris.Setup(given, one, custom_mutator=_as_json)
        else:
            atheris.Setup(given, one)
        atheris.Fuzz()


def _as_json(data: bytes, most: int, seed: int) -> bytes:
    """A change that leaves it a graph, mostly: bytes at random hardly ever get past a parser."""
    chance = random.Random(seed)
    changed = mutated(data[1:], chance) if chance.random() < 0.85 else None
    if changed is None or len(changed) >= most:
        return atheris.Mutate(data, most)
    return data[:1] + changed


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    main(*sys.argv[1:])
