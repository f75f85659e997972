"""Whether what a request brings back may tell of the model's weights, and how many bytes of it.

    leaving = Leaving(leave=False, most=1 << 28, used=0)
    admit(graph, call, known, limits, leaving=leaving)  # raises, with the user's line
    leaving.told                                        # bytes that count

Where weights may not leave, a rule decides about each save, log and stream by what it was computed
from. It follows values through the graph; a value that shares storage with another has its marks.

- **Refused**: what is computed from weights and from nothing that the model computed itself:
  `param`, `apply` on the client's own numbers (unembedding an identity matrix *is* the weight), and
  gradients of these.
- **Counted**: what has weights in it beside activations: `apply` on an activation (a logit lens),
  `param` with one (nobody can tell `h @ W` from `0 * h + W`), gradients; operations inside
  forwards, whose arguments may be the weights; kept values of a session; and every activation of a
  request that puts numbers of its own into the model, by an edit, a skip or a floating input: a
  module whose input is an identity matrix computes its weight.
- **Free**: activations and tokens of passes over token ids in which nothing was edited, constants.

Guards are judged as saves are: one that does not hold says what the value is. Counted are the bytes
of saves, streams and guards as they are, of logs as text. The rule bounds how much may leave, it
does not know what does. It does not cover what unedited passes tell: the embedding of each token is
an activation, and many logits give the last layer away. It does not cover how a job ends: whether a
stop came, and the number in the message of an index that was out of range. Nor modules that are
given weights as arguments (parametrizations).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from weft.errors import LimitError
from weft.graph.node import (
    AnyNode,
    Apply,
    Backward,
    Call,
    Const,
    Fill,
    Grad,
    Graph,
    Guard,
    Log,
    Param,
    Read,
    Ref,
    Regrad,
    Save,
    Skip,
    Write,
    inputs_of,
)
from weft.graph.passes import roots

from .refusals import over, text_of

SEEN, WEIGHTS, TOUCHED = 1, 2, 4
"""Marks of a value: the model computed it; weights are in it; they may be in it."""
_CHARACTERS = 4
"""Times its bytes that a number takes as text, at most."""
_HEAD = 64
_EDITS = (Write, Fill, Skip, Regrad)


@dataclass
class Leaving:
    """What may leave of a deployment, to one key: `most` bytes a day, of which `used` have."""

    leave: bool = True
    most: int = 0
    used: int = 0
    chosen: bool = False
    """The client has put numbers of its own into the model's inputs."""
    held: frozenset[str] = frozenset()
    """Keys of constants that are values which the server has kept."""
    stays: frozenset[str] = frozenset()
    """Names of saves that are kept there, and do not leave."""
    told: int = field(default=0, init=False)

    def check(self, graph: Graph, sizes: Iterable[tuple[int, int]], text: int) -> None:
        """Judges an unrolled graph. `sizes` are the bytes of saves, logs and guards by node; `text`
        is the most that logs may have.

        Raises `LimitError` with the user's line.
        """
        if self.leave:
            return
        marks = Marks(graph, self.chosen, self.held)
        for number, size in sizes:
            node = graph.nodes[number]
            if isinstance(node, Save) and node.name in self.stays:
                continue
            mark = marks.of(node)
            if mark & WEIGHTS and not mark & SEEN:
                raise self._refused(graph, node)
            if mark & (WEIGHTS | TOUCHED):
                self.told += min(_CHARACTERS * size + _HEAD, text) if _is_text(node) else size
                if self.used + self.told > self.most:
                    raise self._too_much(graph, node)

    def _refused(self, graph: Graph, node: AnyNode) -> LimitError:
        return over(
            "weights_leave",
            "false",
            f"{_called(node)} is made of the model's weights alone, and these stay on the server",
            line=_line(graph, node),
            fix="use weights inside the block and bring back what comes of them and activations",
        )

    def _too_much(self, graph: Graph, node: AnyNode) -> LimitError:
        left = max(0, self.most - self.used)
        again = "tomorrow (UTC) there is room again; " if self.told <= self.most else ""
        return over(
            "weights_bytes",
            f"{self.most} bytes a day",
            f"with {_called(node)} the block brings back {self.told} bytes that may tell of the "
            f"model's weights, and {left} are left today",
            line=_line(graph, node),
            fix=f"{again}save less of what is computed with weights or in an edited pass",
        )


class Marks:
    """What each value of an unrolled graph was computed from."""

    def __init__(self, graph: Graph, chosen: bool, held: frozenset[str]) -> None:
        edited = any(isinstance(node, _EDITS) for node in graph.nodes)
        self._read = SEEN | (TOUCHED if chosen or edited else 0)
        self._held = held
        self._owners = roots(graph.nodes)
        self._marks: dict[Ref, int] = {}
        self._whole: dict[int, int] = {}  # of nodes whose results all have the same
        for number, node in enumerate(graph.nodes):
            mark = self._whole[number] = self._made(node)
            if isinstance(node, Call):
                self._share(number, node, mark)

    def of(self, node: AnyNode) -> int:
        """What is in all that a node takes."""
        mark = 0
        for ref in inputs_of(node):
            owner = self._owners.get(ref, ref)
            mark |= self._whole[ref.node] | self._marks.get(owner, 0)
        return mark

    def _made(self, node: AnyNode) -> int:
        if isinstance(node, Read):
            inside = WEIGHTS if node.site.port.startswith("source.") else 0
            return self._read | inside
        if isinstance(node, Const):
            return SEEN | WEIGHTS if node.key in self._held else 0
        if isinstance(node, Grad):
            return WEIGHTS | self.of(node) | self._whole[node.backward]
        if isinstance(node, (Param, Apply)):
            return WEIGHTS | self.of(node)
        return self.of(node) if isinstance(node, (Call, Backward, Regrad)) else 0

    def _share(self, number: int, node: Call, mark: int) -> None:
        """What an operation writes, it writes into all that shares storage with it."""
        written = [*node.writes, *(Ref(number, out) for out in range(len(node.alias)))]
        for ref in written:
            owner = self._owners.get(ref, ref)
            self._marks[owner] = self._marks.get(owner, 0) | mark


def _is_text(node: AnyNode) -> bool:
    return isinstance(node, Log) and node.stream is None


def _called(node: AnyNode) -> str:
    if isinstance(node, Save):
        return f"the save {text_of(node.name)}"
    if isinstance(node, Guard):
        return "what the recording looked at"
    return "what is logged" if _is_text(node) else "what is streamed"


def _line(graph: Graph, node: AnyNode) -> object:
    return graph.where[node.at] if node.at < len(graph.where) else None
