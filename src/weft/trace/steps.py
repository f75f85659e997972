"""The steps of a generation as a block sees them.

    for step in tracer.iter[1:4]:          # the body is recorded once for each step, `step` an int
        model.h[5].output[:] += v

A step is one forward of the root: step 0 is the prompt's. Sites in the body of a loop are those of
its step. Outside of loops sites are those of step 0, and edits, skips, logs and stops are a
template: they act at every step (`templates`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from weft.errors import GradientError, NotReachedError, RecordingError
from weft.graph.inside import own_place
from weft.graph.loops import odd_result
from weft.graph.node import STEP_DRAWS, AnyNode, Arg, Bound, Read, Ref, refs
from weft.graph.site import RESULT, Leaf, Site, is_inside
from weft.kernels.aval import Aval, dtype_name

from .lines import user_line, where
from .sites import Sites
from .templates import Template
from .times import FIRINGS, TURN
from .value import Family, Value, make

if TYPE_CHECKING:
    from weft.signatures.signature import Signature
    from weft.signatures.structure import Plain

    from .recorder import Recorder

Chosen = int | slice | Sequence[int]


class Steps:
    """The steps of one recording: `count(invoke)` of them, unless the generation ends before.

    `cached`: each step runs one position. `signature(invoke, step, sources)` tells what the sites
    of a step look like, with the operations of some sources, `ids(invoke)` what the result does
    when no row ends early; a fourth argument asks for a step with a cache, whether there is one or
    not. `forward(invoke, step)` is for whoever asks what is called in it.
    """

    def __init__(
        self,
        recorder: Recorder,
        count: Callable[[int], int],
        signature: Callable[..., Signature],
        ids: Callable[[int], Aval],
        cached: bool = True,
        forward: Callable[[int, int], Any] | None = None,
    ) -> None:
        self.recorder = recorder
        self.count = count
        self.signature = signature
        self._forward = forward
        self._ids = ids
        self.cached = cached
        self.now: int | None = None
        """The step whose sites are meant; None outside of loops."""
        self.plain: list[tuple[Site, Leaf, Plain, int]] = []
        """Numbers that operations gave outside of loops: where, what, and on which line."""
        self._sites: dict[tuple[int, int], Sites] = {}
        if recorder.invokes is None:
            self._sites[0, 0] = recorder.sites  # type: ignore[assignment]
        self._pinned: list[tuple[int, int]] = []  # nodes recorded in loops
        self._moved: int | None = None  # where a step began that `next` has gone to
        self._mover: str | None = None  # the module whose `next` it was
        self._template: Template | None = None

    # -- loops -------------------------------------------------------------------------------

    @property
    def counts(self) -> tuple[int, ...]:
        """How many steps each invoke has."""
        invokes = self.recorder.invokes
        several = 1 if invokes is None else len(invokes.signatures)
        return tuple([self.count(invoke) for invoke in range(several)])

    def each(self, chosen: Chosen) -> Iterator[int]:
        """Goes through steps: while one is given, its sites are meant."""
        for step in self.numbers(chosen):
            with self.at(step):
                yield step

    @contextmanager
    def at(self, step: int) -> Iterator[int]:
        """Inside, the sites of this step are meant."""
        recorder = self.recorder
        before = self.now, recorder.sites, recorder.signature
        start = len(recorder.nodes)
        self._go(step)
        try:
            yield step
        finally:
            self._pinned.append((start, len(recorder.nodes)))
            self.now, recorder.sites, recorder.signature = before

    def move(self, by: int, path: str | None = None) -> None:
        """From here on, outside of loops, the sites of a later step are meant, of all modules.

        `path` is the module that says so. A second one may not: it is also read as if each module
        had a step of its own, and then another step is meant.
        """
        if path is not None and self._mover not in (None, path):
            raise self.recorder.refusal(
                f"{self._mover} has gone on to step {self.now} already, and all modules with it; "
                f"whether next() of {path or 'the model'} means that step or a further one is not "
                "clear",
                f"use tracer.next(), or name the step: with tracer.iter[{self.now}]:",
            )
        if type(by) is not int or by < 1:
            raise self.recorder.refusal(f"next({by!r}) goes nowhere", "give a whole number from 1")
        step = (self.now or 0) + by
        self._check(step)
        if self._moved is None:
            self._moved = len(self.recorder.nodes)
        self._mover = path
        self._go(step)

    def leave(self) -> None:
        """At the end of an invoke: what `next` has begun ends."""
        if self._moved is not None:
            self._pinned.append((self._moved, len(self.recorder.nodes)))
            self.now = self._moved = self._mover = None

    def time(self, site: Site) -> int:
        """When a site fires."""
        if site.port == RESULT:
            return site.invoke * FIRINGS + self.count(site.invoke) * TURN
        found = self.site(site)
        return site.invoke * FIRINGS + site.step * TURN + found.index

    def site(self, site: Site, step: int | None = None) -> Any:
        """What a site looks like, in its own step or another. Raises LookupError where it does not
        fire."""
        step = site.step if step is None else step
        there = self.signature(site.invoke, step, own_place(site))
        return there.site(site.path, site.port, site.call)

    def gave(self, site: Site, leaf: Leaf, what: Plain) -> None:
        """The block was given something that is no tensor, as it is in the step that is meant."""
        if self.now is None and is_inside(site.port) and type(what.value) in (int, float):
            self.plain.append((site, leaf, what, self.recorder.here()))

    def with_cache(self, node: Read) -> Aval | None:
        """What an operation's tensor is like at a step that runs one position, if it is there."""
        site = node.site
        try:
            there = self.signature(site.invoke, 1, own_place(site), True)
            return dict(there.site(site.path, site.port, site.call).tensors).get(node.leaf)
        except LookupError:
            return None

    def forward(self) -> Any:
        """The forward whose sites are meant now."""
        assert self._forward is not None and self.recorder.invoke is not None
        return self._forward(self.recorder.invoke, self.now or 0)

    def learn(self, path: str, way: tuple[str, ...]) -> None:
        """From here on what is known of the step that is meant knows the operations of a source."""
        recorder = self.recorder
        assert recorder.invoke is not None
        recorder.signature = self.signature(recorder.invoke, self.now or 0, ((path, way),))

    def _go(self, step: int) -> None:
        recorder, invoke = self.recorder, self._invoke("a step")
        if step and (invoke, step) not in self._sites:
            self._sites[invoke, step] = Sites(recorder, step)
        self.now = step
        recorder.sites = self._sites[invoke, step] if step else self.first(invoke)
        recorder.signature = self.signature(invoke, step)

    def first(self, invoke: int) -> Sites:
        """The sites of step 0."""
        invokes = self.recorder.invokes
        if invokes is not None:
            return invokes.sites[invoke]
        return self._sites[0, 0]

    def _invoke(self, what: str) -> int:
        recorder = self.recorder
        if recorder.invoke is None:
            raise recorder.refusal(
                f"{what} was named outside of an invoke: this block has several inputs, and it is "
                "not said whose generation is meant",
                "use it inside `with tracer.invoke(prompt):`",
            )
        return recorder.invoke

    def numbers(self, chosen: Chosen) -> Sequence[int]:
        count = self.count(self._invoke("a loop over steps"))
        if isinstance(chosen, slice):
            parts = (chosen.start, chosen.stop, chosen.step)
            for part in parts:
                self._check_int(part, none=True)
            return range(count)[chosen]
        several = isinstance(chosen, (list, tuple, range))
        numbers: list[Any] = list(chosen) if several else [chosen]
        for number in numbers:
            self._check_int(number)
            self._check(number)
        return numbers

    def _check_int(self, number: Any, none: bool = False) -> None:
        if number is None and none:
            return
        if type(number) is not int:
            raise self.recorder.refusal(
                f"a step is a whole number, not {number!r}",
                "tracer.iter[2], tracer.iter[1:4], tracer.iter[[0, 3]] or tracer.iter[:]",
            )
        if number < 0:
            raise self.recorder.refusal(
                f"step {number} counts from the end, which is not known: a generation may end "
                "before its last step",
                f"count from the front: the steps are 0 to {self._last()}, if none is left out",
            )

    def _check(self, step: int) -> None:
        last = self._last()
        if step > last:
            steps = f"0 to {last}" if last else "0 alone"
            raise self.recorder.refusal(
                f"there is no step {step}: max_new_tokens is {last + 1}, so the steps are "
                f"{steps}, one for each new token",
                "name an earlier step, or let more tokens be generated",
            )

    def _last(self) -> int:
        """The last step of the invoke that is meant."""
        return self.count(self._invoke("a step")) - 1

    @staticmethod
    def first_draw(step: int) -> int:
        """The number of the first draw in a loop's body; below are those of the template."""
        return step * STEP_DRAWS + STEP_DRAWS // 2

    def moment(self, parts: tuple[Arg, ...]) -> Ref | None:
        """What a log of these parts waits for, so that text belongs to the step it stands in, and
        outside of loops to step 0; None where it has values of its own to wait for."""
        recorder = self.recorder
        if refs(parts) or recorder.invoke is None:
            return None
        self._pinned.append((len(recorder.nodes), len(recorder.nodes) + 2))  # this, and the log
        return recorder.sites.read_leaf(recorder.first_input("", "inputs", None))._ref

    # -- the result --------------------------------------------------------------------------

    def result(self) -> Value:
        """The generated ids: there when all steps are over, and only to be saved."""
        recorder, invoke = self.recorder, self._invoke("the result")
        aval, at = self._ids(invoke), recorder.here()
        site = Site("", RESULT, invoke=invoke)
        node = Read(site=site, shape=tuple(aval.shape), dtype=dtype_name(aval.dtype), at=at)
        ref = recorder.append(node)
        time = invoke * FIRINGS + self.count(invoke) * TURN
        return make(recorder, ref, aval, Family(ref, time, at), time, at)

    # -- the end -----------------------------------------------------------------------------

    def finished(
        self, nodes: tuple[AnyNode, ...], bounds: tuple[Bound, ...]
    ) -> tuple[tuple[AnyNode, ...], tuple[Bound, ...]]:
        """The nodes, with what the template does at later steps.

        Raises where it is not valid there, or where the result is more than saved.
        """
        self._check_result(nodes, bounds)
        pinned = bytearray(len(nodes))
        spans = list(self._pinned)
        if self._moved is not None:
            spans.append((self._moved, len(nodes)))
        for start, stop in spans:
            pinned[start:stop] = b"\1" * (min(stop, len(nodes)) - start)
        if self._template is None:
            self._template = Template(self)
        return self._template.spread(nodes, bounds, pinned)

    def _check_result(self, nodes: tuple[AnyNode, ...], bounds: tuple[Bound, ...]) -> None:
        wrong = odd_result(nodes)
        at = None if wrong is None else nodes[wrong[0]].at
        for bound in bounds:
            site = getattr(nodes[bound.value.node], "site", None)
            if site is not None and site.port == RESULT and bound.dim:
                at = bound.at
        if at is not None:
            raise RecordingError(
                "the generated ids exist only when the generation is over, and how many there "
                "will be is not known before: in the block they can be saved, and nothing else",
                line=where(self.recorder.line_of(at)),
                fix="save tracer.result, and compute after the block",
            )

    def no_gradients(self) -> GradientError:
        """The error for a gradient in a generation."""
        return GradientError(
            "there are no gradients in a generation: tokens are chosen between its steps, and a "
            "choice has none",
            line=where(user_line()),
            fix="generate first, and ask for gradients in model.trace(ids) of what came out",
        )

    def not_reached(self, what: str, line: Any) -> NotReachedError:
        """The error for a value of a step that never happened."""
        return NotReachedError(
            f"{what}: the generation ended before its step, which is one of {max(self.counts)} "
            "that there could have been",
            line=line,
            fix="a list given to weft.save keeps what was reached; eos_token_id=None never ends "
            "a generation early",
        )
