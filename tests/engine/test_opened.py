"""Opening a submission: graph, constants and inputs have to belong together, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from tests.run.graphs import Builder
from tests.run.nets import Chain, example
from weft.engine.known import Known
from weft.engine.opened import Opened, open_submit
from weft.engine.publish import know
from weft.errors import GraphError, MessageError, NoSuchError, OtherModelError
from weft.graph.frame import Frame
from weft.graph.node import Graph, Ref, Save
from weft.kernels.frames import to_frame, to_tensor
from weft.testing.same import bitwise
from weft.wire.frames import digest, write
from weft.wire.messages import PlainInputs, Submit, decode, encode

X = example()


@pytest.fixture(scope="module")
def known() -> Known:
    return know(Chain())


@dataclass
class Parts:
    """A submission of a graph with two constants, to be spoilt."""

    known: Known
    inside: dict[str, Frame] = field(default_factory=dict)
    uploaded: dict[str, Frame] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def submit(self) -> Submit:
        g = Builder()
        h = g.read("blocks.1", X)
        total = g.add2(g.mul(h, g.const(torch.ones(8))), g.const(torch.zeros(2, 3, 8)))
        g.save("total", total)
        message = Submit(
            protocol=1,
            request_id="one",
            model="m",
            fingerprint=self.known.fingerprint,
            graph=g.graph(),
            inputs=PlainInputs(args=(Ref(0),)),
            constants=self.constants,
            tensors=write(self.inside),
        )
        return decode(encode(replace(message, **self.changes)), Submit)

    def fetch(self, name: str) -> Frame:
        if name not in self.uploaded:
            raise NoSuchError("there is no such constant")
        return self.uploaded[name]

    def open(self, **options: Any) -> Opened:
        return open_submit(self.submit(), self.fetch, self.known, **options)


ONES, ZEROS = to_frame(torch.ones(8)), to_frame(torch.zeros(2, 3, 8))


@pytest.fixture
def parts(known: Known) -> Parts:
    names = {"c0": digest(ONES), "c1": digest(ZEROS)}
    inside = {"in.0": to_frame(X), names["c0"]: ONES}
    return Parts(known, inside, {names["c1"]: ZEROS}, names)


def test_what_belongs_together(parts):
    opened = parts.open()
    assert opened.graph == parts.submit().graph
    bitwise(to_tensor(opened.constants["c0"]), torch.ones(8))
    bitwise(to_tensor(opened.constants["c1"]), torch.zeros(2, 3, 8))
    bitwise(opened.call.args[0], X)


def test_two_constants_may_be_one_tensor(known):
    g = Builder()
    g.save("sum", g.add2(g.const(torch.ones(8)), g.const(torch.ones(8))))
    name = digest(ONES)
    parts = Parts(known, {"in.0": to_frame(X), name: ONES}, {}, {"c0": name, "c1": name})
    parts.changes["graph"] = g.graph()
    assert parts.open().constants == {"c0": ONES, "c1": ONES}


def test_a_model_that_has_changed(parts):
    parts.changes["fingerprint"] = "0" * 64
    with pytest.raises(OtherModelError) as caught:
        parts.open()
    assert caught.value.fix


def _lie(parts: Parts) -> None:
    parts.inside[parts.constants["c0"]] = to_frame(torch.zeros(8))


def _forge(parts: Parts) -> None:
    parts.inside["0" * 64] = parts.inside.pop(parts.constants["c0"])
    parts.constants["c0"] = "0" * 64


def _swap(parts: Parts) -> None:
    parts.constants = {"c0": parts.constants["c1"], "c1": parts.constants["c0"]}


def _other(parts: Parts, tensor: torch.Tensor) -> None:
    frame = to_frame(tensor)
    parts.constants["c0"] = digest(frame)
    parts.inside = {"in.0": to_frame(X), digest(frame): frame}


def _cut(parts: Parts) -> None:
    name = parts.constants["c1"]
    parts.uploaded[name] = Frame("float32", (2, 3, 8), b"\0" * 100)


SPOILT: dict[str, Any] = {
    "other numbers under a digest": _lie,
    "a digest of nothing": _forge,
    "constants exchanged": _swap,
    "another dtype": lambda p: _other(p, torch.ones(8, dtype=torch.int32)),
    "another shape": lambda p: _other(p, torch.ones(4, 2)),
    "another size": lambda p: _other(p, torch.ones(9)),
    "an uploaded one that was cut": _cut,
    "a constant that the graph has not": lambda p: p.constants.update(c2=p.constants["c1"]),
    "a constant of the graph that is not named": lambda p: p.constants.pop("c1"),
    "a tensor that nobody names": lambda p: p.inside.update(extra=ONES),
    "no input": lambda p: p.inside.pop("in.0"),
    "tensors that are no file": lambda p: p.changes.update(tensors=b"\x80\x04N."),
    "tensors that are cut": lambda p: p.changes.update(tensors=write(p.inside)[:-1]),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_does_not(parts, name):
    SPOILT[name](parts)
    with pytest.raises(MessageError):
        parts.open()


def test_a_constant_that_was_never_uploaded(parts):
    parts.uploaded.clear()
    with pytest.raises(NoSuchError):
        parts.open()


def test_a_graph_that_breaks_the_grammar(parts):
    parts.changes["graph"] = Graph((Save(name="x", value=Ref(0)),))
    with pytest.raises(GraphError):
        parts.open()


def test_who_needs_no_numbers_gets_none(parts):
    """The checker looks at the types of uploaded constants alone; those inside are verified."""
    name = parts.constants["c1"]
    parts.uploaded[name] = Frame("float32", (2, 3, 8), b"")
    assert parts.open(numbers=False).constants["c1"].data == b""
    with pytest.raises(MessageError):
        parts.open()
    parts.uploaded[name] = Frame("float32", (2, 3, 9), b"")
    with pytest.raises(MessageError):
        parts.open(numbers=False)
    _lie(parts)
    with pytest.raises(MessageError):
        parts.open(numbers=False)
