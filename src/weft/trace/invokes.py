"""Invokes: several inputs in one block, each with sites of its own.

    invokes = recorder.invokes
    with invokes.opened(signature):          # from here on `model.h[5].output` is this input's
        ...

All of them fill one graph, so values flow between them as they do anywhere. A site knows its
invoke by number; whatever stands outside of all invokes may use values, and has no sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weft.errors import OutsideTraceError
from weft.graph.check import MAX_INVOKES
from weft.graph.site import Site

from .lines import user_line, where
from .sites import LeafState, Sites, SiteState
from .times import FIRINGS

if TYPE_CHECKING:
    from weft.signatures.signature import Signature

    from .recorder import Recorder


class Outside(Sites):
    """The sites outside of all invokes: there are none, except where a module takes no input."""

    alone: Callable[[], None] | None = None
    """Makes the whole block one call without an input, where there can be one."""

    def state(self, path: str, port: str, call: int | None) -> SiteState:
        recorder = self.recorder
        if self.alone is not None and not recorder.invokes.signatures:  # type: ignore[union-attr]
            self.alone()
            return recorder.sites.state(path, port, call)
        raise OutsideTraceError(
            f"{path or 'the root'}.{port} was used outside of an invoke: this block has several "
            "inputs, and it is not said which is meant",
            line=where(user_line()),
            fix="use it inside `with tracer.invoke(prompt):`",
        )


class Invokes:
    """The invokes of one recording."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.signatures: list[Signature] = []
        self.sites: list[Sites] = []
        self.shown: int | None = None
        """The invoke that shows what the others have changed, once it does."""

    def add(self, signature: Signature) -> int:
        """A new invoke; its number."""
        recorder = self.recorder
        number = len(self.signatures)
        if number >= MAX_INVOKES:
            raise recorder.refusal(
                f"more than {MAX_INVOKES} invokes in one block", "use several blocks"
            )
        self.signatures.append(signature)
        before, recorder.invoke = recorder.invoke, number
        self.sites.append(Sites(recorder))
        recorder.invoke = before
        return number

    def stay(self, number: int) -> None:
        """From here on this invoke's sites are meant."""
        recorder = self.recorder
        recorder.invoke = number
        recorder.signature = self.signatures[number]
        recorder.sites = self.sites[number]

    @contextmanager
    def opened(self, number: int) -> Iterator[None]:
        """Inside, this invoke's sites are meant."""
        recorder = self.recorder
        before = recorder.sites
        if recorder.invoke is not None:
            raise recorder.refusal(
                "an invoke was opened inside another one",
                "close the outer one first: values of one can be used in the other",
            )
        self.stay(number)
        try:
            yield
        finally:
            if recorder.steps is not None:
                recorder.steps.leave()
            recorder.invoke, recorder.sites = None, before

    def time(self, site: Site) -> int:
        """When a site fires."""
        steps = self.recorder.steps
        if steps is not None:
            return steps.time(site)
        signature = self.signatures[site.invoke]
        return site.invoke * FIRINGS + signature.site(site.path, site.port, site.call).index

    def edited(self) -> Iterator[LeafState]:
        """Every leaf of a site that the block has changed so far, by invoke."""
        for sites in self.sites:
            for state in {id(one): one for one in sites.states.values()}.values():
                yield from [leaf for leaf in state.tensors.values() if leaf.version]
