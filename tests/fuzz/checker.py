"""The checker's way in, for bytes: a graph's JSON, sent with good inputs, admitted or refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache

import msgspec

from tests.engine.enemy import Gate
from tests.engine.test_fuzzed_graphs import SMALL, VALID
from tests.fuzz.entries import Entry
from weft.graph.frame import Frame
from weft.graph.node import Graph
from weft.wire.messages import decode

MADE = 12
"""Random graphs to begin with, where there is time for them."""


def by_hand() -> Entry:
    """Begins with a few graphs, as they are: ready in no time."""

    @cache
    def gate() -> tuple[Gate, dict[str, Frame]]:
        given = {}
        for number, (_, frames) in enumerate(VALID):
            given |= {f"{number}.{key}": frame for key, frame in frames.items()}
        return Gate(), given

    def read(data: bytes) -> None:
        target, given = gate()
        message = target.submission({"nodes": []}, _used(data, given))
        message["graph"] = msgspec.Raw(data)
        target.arrive(msgspec.json.encode(message), "json", **SMALL)

    def seeds() -> Iterable[bytes]:
        for number, (graph, frames) in enumerate(VALID):
            yield _renamed(msgspec.json.encode(graph), frames, number)

    return Entry(read, seeds)


def at_random() -> Entry:
    """Begins with random graphs of many operations."""
    from tests.fuzz.graphs import Maker
    from tests.fuzz.targets import counting

    target, texts, given = counting(), [], {}
    for number in range(MADE):
        graph, frames = Maker(target, random.Random(f"check {number}")).make()
        texts.append(_renamed(msgspec.json.encode(graph), frames, number))
        given |= {f"{number}.{key}": frame for key, frame in frames.items()}
    return Entry(
        lambda data: _ignore(target.admitted_text(data, _used(data, given))), lambda: texts
    )


def _ignore(found: object) -> None:
    pass


def _renamed(text: bytes, frames: Iterable[str], number: int) -> bytes:
    """The constants of each graph have names of their own."""
    for key in frames:
        text = text.replace(f'"{key}"'.encode(), f'"{number}.{key}"'.encode())
    return text


def _used(data: bytes, given: dict[str, Frame]) -> dict[str, Frame]:
    """The constants that a graph names."""
    graph = decode(data, Graph, "json")
    named = {getattr(node, "key", None) for node in graph.nodes}
    return {key: frame for key, frame in given.items() if key in named}


CHECKERS: dict[str, Callable[[], Entry]] = {"checker": by_hand, "checker-random": at_random}
