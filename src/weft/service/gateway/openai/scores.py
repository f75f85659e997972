"""Log-probabilities of the tokens of a generation: the graph that gives them, and what it gave.

    graph = scoring(steps=8, tops=3, stream=0, begun=5)
    scores = scores_of(frames)              # from what it hands out, token by token

Those of the model as it is in this request, interventions and all: the logarithm of the softmax, in
float32, of the logits that it gives, before temperature, `top_p` and penalties. Which token a step
chose is seen where the next one takes it in; the last one, which nothing takes in, is looked up
among all of the vocabulary, which the graph saves for it alone.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from weft.graph.frame import Frame
from weft.graph.node import Call, Graph, Log, Name, Read, Ref, Save, Seq, Slice
from weft.graph.site import Site

LAST = "weft.last"
"""The log-probabilities of all tokens after the step that is the last one possible."""
INPUTS = Site("", "inputs")
LEAF = (1, "input_ids")
_FLOAT = (("dtype", Name("dtype", "float32")),)
_ALL = Slice()


class Score(NamedTuple):
    """A token, its log-probability, and the likeliest ones with theirs."""

    id: int
    value: float
    tops: tuple[tuple[int, float], ...] = ()


def scoring(steps: int, tops: int, stream: int, begun: int = 0) -> Graph:
    """Hands out the token of each step with its score when the step after it takes it in, and saves
    what the last one is found in. With `begun`, the length of the prompt, the scores of its own
    tokens come first, from the second on."""
    nodes: list[Any] = []

    def add(node: Any) -> Ref:
        nodes.append(node)
        return Ref(len(nodes) - 1)

    def logits(step: int, rows: int) -> Ref:
        # what is said here of the number of tokens is for people: it is known where it runs
        shape, site = (1, rows, 1), Site("", "output", step=step)
        return add(Read(site=site, leaf=("logits",), shape=shape))

    def scored(of: Ref, at: Any) -> Ref:
        row = Call(op="Tensor.__getitem__", args=(of, Seq("tuple", (_ALL, at))), alias=(of,))
        return add(Call(op="log_softmax", args=(add(row), -1), kwargs=_FLOAT))

    def told(row: Ref, ids: Ref) -> tuple[Ref, ...]:
        own = add(Call(op="gather", args=(row, -1, ids)))
        if not tops:
            return (own,)
        best = add(Call(op="topk", args=(row, tops), outs=2))
        return own, best, Ref(best.node, 1)

    first = logits(0, max(begun, 1))
    if begun > 1:
        ids = add(Read(site=INPUTS, leaf=LEAF, shape=(1, begun), dtype="int64"))
        later = Seq("tuple", (_ALL, Slice(1)))
        ids = add(Call(op="Tensor.__getitem__", args=(ids, later), alias=(ids,)))
        ids = add(Call(op="unsqueeze", args=(ids, -1), alias=(ids,)))
        found = told(scored(first, Slice(None, -1)), ids)
        add(Log(parts=(ids, *found), stream=stream))
    row = scored(first, -1)
    for step in range(1, steps):
        ids = add(Read(site=Site("", "inputs", step=step), leaf=LEAF, shape=(1, 1), dtype="int64"))
        add(Log(parts=(ids, *told(row, ids)), stream=stream))
        row = scored(logits(step, 1), -1)
    add(Save(name=LAST, value=row))
    return Graph(nodes=tuple(nodes))


def scores_of(parts: Sequence[Frame]) -> tuple[Score, ...]:
    """What was handed out at once: tokens, and their scores."""
    ids, own, *best = [numbers(part) for part in parts]
    pairs = list(zip(best[1], best[0], strict=True)) if best else []
    each = len(pairs) // len(ids)
    rows = [tuple(pairs[at * each : (at + 1) * each]) for at in range(len(ids))]
    return tuple([Score(*one) for one in zip(ids, own, rows, strict=True)])


def is_begun(parts: Sequence[Frame]) -> bool:
    """Whether they are the prompt's."""
    return len(parts[0].shape) == 3


def last_of(id: int, row: Frame, tops: int) -> Score:
    """The score of the last token, from those of all tokens."""
    found = numbers(row)
    best = heapq.nlargest(tops, range(len(found)), found.__getitem__)
    return Score(id, found[id], tuple([(one, found[one]) for one in best]))


def numbers(frame: Frame) -> tuple[Any, ...]:
    """The numbers of a tensor of int64 or float32."""
    form = {"int64": "q", "float32": "f"}[frame.dtype]
    return struct.unpack(f"<{len(frame.data) // struct.calcsize(form)}{form}", frame.data)
