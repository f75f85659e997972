"""Templates: what a block does outside of its step loops happens at every step of a generation.

Edits, skips, logs and stops, with all that they are made of, are written once, at step 0. Here the
same is put into loops over the later steps, whose sites look different: one position instead of
those of the prompt. What is not valid there is refused, with the user's line.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec.structs import replace

from weft.errors import LateEditError, RecordingError, WeftError
from weft.graph.node import (
    AnyNode,
    Bound,
    Call,
    Const,
    Fill,
    Log,
    Loop,
    Param,
    Read,
    Ref,
    Skip,
    Stop,
    Write,
    inputs_of,
)
from weft.graph.passes import renumbered, roots
from weft.graph.site import leaf_text

from .lines import where
from .positions import Positions
from .replay import Replay

if TYPE_CHECKING:
    from .steps import Steps

Nodes = tuple[AnyNode, ...]
Bounds = tuple[Bound, ...]

_ACTS = (Write, Fill, Skip, Log, Stop)
_SHARED = (Const, Param)
_REMEMBERED = 256


class Template:
    """The template of one recording."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def spread(self, nodes: Nodes, bounds: Bounds, pinned: bytearray) -> tuple[Nodes, Bounds]:
        """The nodes with loops over the later steps. `pinned[n]`: node `n` belongs to a step."""
        if not self._steps.cached:
            self._refuse_pinned(nodes, pinned)
        counts = self._steps.counts
        if max(counts, default=1) == 1 or not any(
            isinstance(node, _ACTS) and not pinned[n] for n, node in enumerate(nodes)
        ):
            return nodes, bounds
        self._check_numbers()
        memo = self._steps.signature(0, 0).kept.setdefault("templates", {})
        key = (_ENCODER.encode((nodes, bounds)), bytes(pinned), counts)
        found = memo.get(key)
        if found is None:
            found = _Spreading(self._steps, nodes, bounds, pinned).spread()
            if len(memo) > _REMEMBERED:
                memo.clear()
            memo[key] = found
        return found

    def _check_numbers(self) -> None:
        """Raises where the block was given a number that is another one at later steps."""
        steps = self._steps
        for site, leaf, what, at in steps.plain:
            for step in range(1, steps.count(site.invoke)):
                try:
                    there = dict(steps.site(site, step).leaves).get(leaf)
                except LookupError:
                    there = None
                if there != what:
                    raise RecordingError(
                        f"{site}{leaf_text(leaf)} gave the number {what.value!r} outside of a step "
                        f"loop, and it is {getattr(there, 'value', 'not there')} at step {step}: "
                        "what acts at every step would go on with that of step 0",
                        line=where(steps.recorder.line_of(at)),
                        fix="ask for it at each step: for step in tracer.iter[:]; or make it of "
                        "sizes, which are checked",
                    )

    def _refuse_pinned(self, nodes: Nodes, pinned: bytearray) -> None:
        for number, node in enumerate(nodes):
            if pinned[number] and isinstance(node, (Write, Fill, Skip)):
                raise RecordingError(
                    "an edit of single steps means something else without a cache: there each "
                    "step runs all positions anew",
                    line=where(self._steps.recorder.line_of(node.at)),
                    fix="leave out use_cache=False",
                )


_ENCODER = msgspec.msgpack.Encoder()


class _Group(NamedTuple):
    """Steps at which the same nodes of the template act, and their sites look alike."""

    start: int
    stop: int
    acting: frozenset[int]


class _Spreading:
    def __init__(self, steps: Steps, nodes: Nodes, bounds: Bounds, pinned: bytearray) -> None:
        self._steps = steps
        self._nodes = nodes
        self._bounds = bounds
        self._pinned = pinned
        self._counts = steps.counts
        self._owner = roots(nodes)
        self._cone = self._find_cone()

    # What is evaluated anew

    def _find_cone(self) -> list[int]:
        """The nodes that act at every step, and those that they are made of."""
        nodes, pinned = self._nodes, self._pinned
        reading = self._reading()
        needed: set[int] = set()
        storages: set[Ref] = set()
        found: list[int] = []
        for number in range(len(nodes) - 1, -1, -1):
            node = nodes[number]
            if pinned[number]:
                continue
            wanted = number in needed or (isinstance(node, _ACTS) and number in reading)
            if isinstance(node, Call) and node.writes and not wanted:
                wanted = any(self._owner.get(ref, ref) in storages for ref in node.writes)
            if not wanted or isinstance(node, _SHARED):
                continue
            found.append(number)
            for ref in inputs_of(node):
                if not pinned[ref.node]:
                    needed.add(ref.node)
                storages.add(self._owner.get(ref, ref))
        found.reverse()
        self._refuse_shared_writes(found)
        return found

    def _reading(self) -> set[int]:
        """Nodes that stand at a site or depend on one: all others happen once."""
        found: set[int] = set()
        for number, node in enumerate(self._nodes):
            if self._pinned[number]:
                continue
            if isinstance(node, (Read, Write, Fill, Skip)):
                found.add(number)
            elif isinstance(node, Stop) and node.condition is None:
                continue
            elif any(ref.node in found for ref in inputs_of(node)):
                found.add(number)
        return found

    def _refuse_shared_writes(self, cone: list[int]) -> None:
        """What belongs to no step or to another one cannot be changed anew at each."""
        for number in cone:
            node = self._nodes[number]
            for ref in node.writes if isinstance(node, Call) else ():
                owner = self._owner.get(ref, ref).node
                if self._pinned[owner] or isinstance(self._nodes[owner], _SHARED):
                    raise self._refusal(
                        node,
                        "this changes, at every step of the generation, a tensor that all steps "
                        "share",
                        "change a copy, x.clone(), or pin it: `for step in tracer.iter[0]:`",
                    )

    # Later steps

    def spread(self) -> tuple[Nodes, Bounds]:
        groups = list(self._groups())
        new: list[AnyNode] = []
        place: list[int] = []  # of each old node: where it is now
        beside: dict[tuple[int, Ref], Ref] = {}  # (group, old ref) -> what its loop gives

        def outer(ref: Ref) -> Ref:
            return Ref(place[ref.node], ref.out)

        for segment in self._segments():
            for number in segment:
                place.append(len(new))
                new.append(renumbered(self._nodes[number], outer))
            for number, group in enumerate(groups):
                inside = [n for n in self._cone if n in segment and n in group.acting]
                if not inside:
                    continue
                given = self._wanted_later(inside, segment.stop, group)
                loop = self._loop(number, group, inside, given, outer, beside, len(new))
                new.append(loop)
        bounds = tuple([renumbered(bound, outer) for bound in self._bounds])
        return tuple(new), bounds

    def _segments(self) -> Iterator[range]:
        """Runs of nodes that are all pinned, or all not."""
        start = 0
        for _, run in groupby(self._pinned):
            stop = start + len(list(run))
            yield range(start, stop)
            start = stop

    def _wanted_later(self, inside: list[int], stop: int, group: _Group) -> list[Ref]:
        """Results of these nodes that nodes of the template from `stop` on use."""
        own = set(inside)
        found: dict[Ref, None] = {}
        for number in self._cone:
            if number >= stop and number in group.acting:
                node = self._nodes[number]
                refs = inputs_of(node)
                found.update(dict.fromkeys([ref for ref in refs if ref.node in own]))
        return list(found)

    def _loop(
        self,
        number: int,
        group: _Group,
        inside: list[int],
        given: list[Ref],
        outer: Any,
        beside: dict[tuple[int, Ref], Ref],
        index: int,
    ) -> Loop:
        own = {old: n for n, old in enumerate(inside)}
        takes: dict[Ref, None] = {}
        along: dict[Ref, None] = {}
        for old in inside:
            for ref in inputs_of(self._nodes[old]):
                if ref.node in own:
                    continue
                there = beside.get((number, ref))
                if there is None:
                    takes[ref] = None
                else:
                    along[ref] = None
        names = {ref: Ref(n) for n, ref in enumerate((*takes, *along))}
        first = len(names)

        def inner(ref: Ref) -> Ref:
            return Ref(first + own[ref.node], ref.out) if ref.node in own else names[ref]

        body = []
        for old in inside:
            node: Any = renumbered(self._at(self._nodes[old], group.start), inner)
            body.append(node)
        for n, ref in enumerate(given):
            beside[number, ref] = Ref(index, n)
        return Loop(
            start=group.start,
            stop=group.stop,
            body=tuple(body),
            takes=tuple([outer(ref) for ref in takes]),
            along=tuple([beside[number, ref] for ref in along]),
            gives=tuple([inner(ref) for ref in given]),
            at=self._nodes[inside[0]].at,
        )

    def _at(self, node: AnyNode, step: int) -> AnyNode:
        """A node as a loop over steps like this one has it."""
        if isinstance(node, Read):
            aval = self._replay(step).leaf(node)
            return replace(node, shape=tuple(aval.shape))
        return replace(node, step=None) if isinstance(node, Stop) else node

    def _acting(self, step: int) -> frozenset[int]:
        """The nodes that act at a step: not those of invokes that are over before it, nor what is
        told of their values. Raises where another invoke's edit needs one."""
        counts = self._counts
        if step < min(counts):
            return frozenset(self._cone)
        missing: set[int] = set()
        stale: set[Ref] = set()  # storages that such a node would have written into
        for number in self._cone:
            node: Any = self._nodes[number]
            site = getattr(node, "site", None)
            invoke = getattr(node, "invoke", None) if site is None else site.invoke
            refs = inputs_of(node)
            needs = any(r.node in missing or self._owner.get(r, r) in stale for r in refs)
            over = invoke is not None and step >= counts[invoke]
            if needs and invoke is not None and not over:
                raise self._too_few(node, step)
            if needs or over:
                missing.add(number)
                writes = node.writes if isinstance(node, Call) else ()
                stale.update([self._owner.get(ref, ref) for ref in writes])
        return frozenset(self._cone) - missing

    def _too_few(self, node: Any, step: int) -> WeftError:
        return self._refusal(
            node,
            "outside of a step loop this acts at every step of the generation, and at step "
            f"{step} it needs a value of another invoke, which has no such step",
            "let both have as many tokens, or do it in a loop over the steps that both have: "
            f"for step in tracer.iter[:{step}]",
        )

    # Whether it is valid there

    def _groups(self) -> Iterator[_Group]:
        """The later steps in runs in which all sites look alike, each checked once."""
        self._replays: dict[int, Replay] = {}
        start, last = 1, None
        most = max(self._counts)
        for step in range(1, most):
            looks = self._acting(step), self._replay(step).looks
            if last is not None and looks != last:
                yield self._checked(start, step)
                start = step
            last = looks
        yield self._checked(start, most)

    def _replay(self, step: int) -> Replay:
        found = self._replays.get(step)
        if found is None:
            acting = self._acting(step)
            nodes = [self._nodes[number] for number in self._cone if number in acting]
            found = self._replays[step] = Replay(self._steps, step, nodes, self._refusal_at(step))
        return found

    def _checked(self, start: int, stop: int) -> _Group:
        replay, acting = self._replay(start), self._acting(start)
        cone = [number for number in self._cone if number in acting]
        replay.check(self._nodes, self._bounds, cone)
        if not self._steps.cached:
            self._refuse_unequal(replay, cone)
        return _Group(start, stop, acting)

    def _refuse_unequal(self, replay: Replay, cone: list[int]) -> None:
        """Without a cache an edit has to treat all positions alike."""
        prompt = Replay(self._steps, 0, [self._nodes[n] for n in cone], self._refusal_at(0))
        prompt.check(self._nodes, self._bounds, cone)
        positions = Positions(self._unequal, self._steps.with_cache, replay.step)
        for number in cone:
            node = self._nodes[number]
            if not isinstance(node, (Log, Stop)):
                positions.check(number, node, prompt.env, replay.env)

    def _unequal(self, node: AnyNode) -> RecordingError:
        return self._refusal(
            node,
            "this does not do the same to every position, so without a cache it would mean "
            "something else: there each step runs all positions anew",
            "leave out use_cache=False, or edit all positions alike: [:] and values without "
            "positions of their own",
        )

    def _refusal_at(self, step: int) -> Any:
        def refusal(node: AnyNode, message: str, late: bool = False) -> WeftError:
            kind = LateEditError if late else RecordingError
            return kind(
                "outside of a step loop this acts at every step of the generation, and it is not "
                f"valid at step {step}: {message}",
                line=where(self._steps.recorder.line_of(node.at)),
                fix="pin it to the prompt, `for step in tracer.iter[0]:`, or write it so that it "
                "fits a single position too ([:, -1] is the last one)",
            )

        return refusal

    def _refusal(self, node: AnyNode, message: str, fix: str) -> RecordingError:
        line = where(self._steps.recorder.line_of(node.at))
        return RecordingError(message, line=line, fix=fix)
