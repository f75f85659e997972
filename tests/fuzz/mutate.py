"""Changes of JSON that leave it JSON: one place has another value, a part of elsewhere, or goes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from weft.graph.ops import IN_GRAPHS, OPS

LEAVES: list[Any] = [
    *(0, 1, 2, 3, 5, 8, -1, -2, 64, 2**31, 2**63 - 1, -(2**63), 2**64, 10**6, 10**30),
    *(0.0, -0.0, 1.5, 1e300, 1e999, None, True, False, "", "mean", "head", "blocks.0", "scale"),
    *("inputs", "output", "value", "shape", "tuple", "list", "size", "ref", "int64", "dim", "out"),
    *("a,b->", "__class__", "\x1b[2J", "x" * 300, "words.weight", "\ud800", "../..", "0"),
    *([], {}, [1], ["seq", "tuple", []], ["slice"], ["shape", ["ref", 0]], ["ref", 0, 0]),
    *(["name", "dtype", "int64"], ["name", "ellipsis", ""], ["complex", 1.0, 2.0], ["ref", 1, 0]),
    *({"kind": "stop"}, {"kind": "loop", "start": 0, "stop": 10**9, "body": []}),
]
NAMES = sorted(name for name, op in OPS.items() if op.kind in IN_GRAPHS)


def mutated(data: bytes, chance: random.Random) -> bytes | None:
    """Other JSON. None where these bytes are none, or have no place in them."""
    try:
        value = json.loads(data)
        there = _places(value)
        for _ in range(chance.randint(1, 3)):
            _change(there, chance)
        return json.dumps(value, ensure_ascii=chance.random() < 0.5).encode()
    except (ValueError, RecursionError, IndexError):
        return None


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place, as (container, key)."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (dict, list)):
            keys = part.keys() if isinstance(part, dict) else range(len(part))
            found += [(part, key) for key in keys]
            waiting += [part[key] for key in keys]
    return found


def _change(there: list[tuple[Any, Any]], chance: random.Random) -> None:
    container, key = chance.choice(there)
    if (key not in container) if isinstance(container, dict) else key >= len(container):
        return  # an earlier change has taken it away
    kind = chance.choice(["leaf", "leaf", "name", "part", "drop", "twice"])
    if kind == "leaf":
        same = [leaf for leaf in LEAVES if type(leaf) is type(container[key])]
        wrong = not same or chance.random() < 0.1
        container[key] = copy.deepcopy(chance.choice(LEAVES if wrong else same))
    elif kind == "name":
        calls = [(part, at) for part, at in there if at == "op"]
        part, at = chance.choice(calls or there)
        part[at] = chance.choice(NAMES)
    elif kind == "part":
        other, at = chance.choice(there)
        if (at in other) if isinstance(other, dict) else at < len(other):
            container[key] = copy.deepcopy(other[at])
    elif kind == "drop":
        container.pop(key, None) if isinstance(container, dict) else container.pop(key)
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
