"""A submission, opened: its graph, its constants and its call, each checked against the others.

    opened = open_submit(submit, constants.fetch, known)
    opened.graph, opened.constants["c0"], opened.call

What only a model in shape space can tell (shapes, cost) is not looked at here: that is `admit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weft.errors import MessageError, OtherModelError
from weft.families.call import ModelCall
from weft.graph.check import check
from weft.graph.frame import Frame, frame_bytes
from weft.graph.node import Const, Graph, Ref, Save
from weft.graph.passes import invokes_of
from weft.wire.frames import digest, read
from weft.wire.messages import Submit, owner_of

from .generation import Samplings, sampling_from
from .inputs import call_of
from .known import Known

Fetch = Callable[[str], Frame]


@dataclass(frozen=True, eq=False)
class Opened:
    """What a worker draws. `constants` are by `Const.key`.

    `further` are the calls of the invokes after the first; with `alone` none shares a forward. With
    `sampling` (of each call) a call is the prompt of a generation. In a session `keeps` are the
    names of saves that stay on the worker; constants that are values of it are not among
    `constants`.
    """

    graph: Graph
    constants: Mapping[str, Frame]
    call: ModelCall
    further: tuple[ModelCall, ...] = ()
    alone: bool = False
    sampling: Samplings = None
    keeps: frozenset[str] = frozenset()

    @property
    def calls(self) -> tuple[ModelCall, ...]:
        """The call of each invoke."""
        return (self.call, *self.further)


def open_submit(submit: Submit, fetch: Fetch, known: Known, *, numbers: bool = True) -> Opened:
    """Opens a submission. `fetch(digest)` gives a constant that was uploaded before.

    Who needs no numbers (the checker) says so with `numbers=False`: then constants that `fetch`
    gives may be without their bytes. Those that came inside the message are always verified.

    Raises `OtherModelError` for a graph that was recorded on another model, `GraphError` for one
    that breaks the grammar, `MessageError` for constants that are not exactly those of the graph,
    and what `call_of` and `fetch` raise.
    """
    if submit.fingerprint != known.fingerprint:
        raise OtherModelError(
            "the experiment was recorded on another version of this model",
            fix="open the model anew, so that its description is fetched again",
        )
    check(submit.graph)
    inside, _ = read(submit.tensors) if submit.tensors else ({}, {})
    constants = _constants(submit, inside, fetch, numbers)
    wanted = set(submit.constants.values())
    inputs = {name: frame for name, frame in inside.items() if name not in wanted}
    call, *further = _calls(submit, inputs, known)
    sampling = sampling_from(submit, known, (call, *further))
    keeps = _keeps(submit)
    return Opened(submit.graph, constants, call, tuple(further), submit.alone, sampling, keeps)


def _keeps(submit: Submit) -> frozenset[str]:
    """The saves that stay in the session: each is one tensor."""
    names = frozenset(submit.seat.keeps if submit.seat is not None else ())
    single = {
        node.name
        for node in submit.graph.nodes
        if isinstance(node, Save) and isinstance(node.value, Ref)
    }
    if names - single:
        name = min(names - single)
        raise MessageError(f"{name[:80]!r} is to stay in the session, and is no save of a tensor")
    return names


def _calls(submit: Submit, inputs: Mapping[str, Frame], known: Known) -> list[ModelCall]:
    """The call of each invoke. Those after the first find their tensors under their number."""
    each = (submit.inputs, *submit.further)
    given: list[dict[str, Frame]] = [{} for _ in each]
    for name, frame in inputs.items():
        number, own = owner_of(name)
        if number >= len(each):
            raise MessageError(f"the tensor {name[:80]!r} is of no invoke")
        given[number][own] = frame
    if any(invoke >= len(each) for invoke in invokes_of(submit.graph)):
        raise MessageError("the graph has more invokes than the message has inputs")
    return [call_of(one, mine, known) for one, mine in zip(each, given, strict=True)]


def _constants(
    submit: Submit, inside: Mapping[str, Frame], fetch: Fetch, numbers: bool
) -> dict[str, Frame]:
    nodes = {node.key: node for node in submit.graph.nodes if isinstance(node, Const)}
    uses = submit.seat.uses.keys() if submit.seat is not None else frozenset[str]()
    odd = sorted((nodes.keys() ^ uses) ^ submit.constants.keys())
    if odd:
        raise MessageError(f"constant {odd[0][:80]!r} is not both in the graph and in the message")
    found: dict[str, Frame] = {}  # by digest: two constants may be one tensor
    for name in submit.constants.values():
        if name not in found:
            found[name] = _verified(inside[name], name) if name in inside else fetch(name)
    constants = {key: found[name] for key, name in submit.constants.items()}
    for key, frame in constants.items():
        _check_type(nodes[key], frame, numbers or submit.constants[key] in inside)
    return constants


def _verified(frame: Frame, name: str) -> Frame:
    if digest(frame) != name:
        raise MessageError("a constant is not what its digest says")
    return frame


def _check_type(node: Const, frame: Frame, whole: bool) -> None:
    same = (frame.dtype, tuple(frame.shape)) == (node.dtype, node.shape)
    if not same or (whole and len(frame.data) != frame_bytes(node.dtype, node.shape)):
        raise MessageError(f"constant {node.key[:80]!r} is not the tensor that the graph says")
