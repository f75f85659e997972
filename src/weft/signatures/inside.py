"""What is inside the forwards of a model: the sources, and signatures of their operations.

    inside = signatures.inside
    inside.listing("h.0.attn")                               # text, hash and names
    inside.learn(signature, call, "h.0.attn", ())            # signature now knows their sites
    signature.site("h.0.attn", "source.self_c_proj_0.output")

Nothing is learnt before it is asked for. Then one pass tells of all modules that have this source,
and like the sites of modules, those of operations become formulas in batch and length: each source
has `Signatures` of its own for that. Where the model is elsewhere, its owner is asked.

An operation fires between two sites of modules, so its index is a fraction between theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from math import ceil, floor
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import nn

from weft.errors import OtherSourceError, SourceError, UnknownPathError
from weft.graph.inside import marks_of, places_of, sites_inside
from weft.graph.node import Graph
from weft.graph.site import Site, Where, begin_port, inside_of, operations_of, split_port
from weft.sources.listing import Listing
from weft.sources.source import source_of
from weft.sources.stand import forward_of

from .asking import Asker
from .telling import Telling, Way, digest_of, plain_function

if TYPE_CHECKING:
    from .signature import Signatures
    from .sites import Signature, SiteSignature

Call = tuple[tuple[Any, ...], dict[str, Any]]
_MODEL_CODE = "transformers"


class CallLike(Protocol):
    """A call of the model's forward."""

    @property
    def args(self) -> tuple[Any, ...]: ...

    @property
    def kwargs(self) -> Any: ...


@runtime_checkable
class Forward(Protocol):
    """One of several forwards, of which signatures tell in a way of its own (`engine.turns`)."""

    def seen(self, signatures: Signatures) -> Signature: ...


class Inside:
    """The sources of one model. `made(telling, asker)` makes `Signatures` that tell more.

    `state()` says how the model stands; when that changes, what is called may be something else.
    """

    def __init__(
        self,
        provider: Callable[[], nn.Module],
        made: Callable[[Telling | None, Asker | None], Signatures],
        state: Callable[[], object],
        asker: Asker | None,
    ) -> None:
        self._module = provider
        self._made = made
        self._state = state
        self._asker = asker
        self._lock = threading.RLock()
        self.example: Callable[[], CallLike] | None = None
        """A call of the model's forward, for who asks what is called outside of any block."""
        self.clear()

    def clear(self) -> None:
        """Forgets what was learnt."""
        self._known_in = self._state()
        self._signatures: dict[tuple[str, Way], Signatures] = {}
        self._called: dict[tuple[str, Way], Any] = {}
        self._listings: dict[tuple[str, Way], Listing] = {}

    def _now(self) -> None:
        if self._state() != self._known_in:
            self.clear()

    # -- sources -----------------------------------------------------------------------------------

    def listing(self, path: str, way: Way = (), call: CallLike | None = None) -> Listing:
        """The source of a module's forward, or of what is called there on the way.

        Raises `SourceError` where it cannot be had, `UnknownPathError` for what is not there.
        """
        if way and call is None and self.example is not None:
            call = self.example()
        with self._lock:
            self._now()
            if self._asker is not None:
                return self._asked(self._asker, path, way, call)
            if not way:
                return source_of(forward_of(self._find(path))).listing
            function = self._function(path, way, call)
            if isinstance(function, str):
                raise _no_source(path, way, function)
            home = type(self._find(path)).__module__.partition(".")[0]
            source = source_of(function)
            if source.home not in (home, _MODEL_CODE):
                raise _no_source(path, way, "it is not a part of the model's own code")
            return source.listing

    def kin(self, path: str, way: Way = ()) -> list[str]:
        """The modules for which the same listing holds, as far as is known."""
        own = self.listing(path, way).digest
        first = digest_of(self._find(path))
        found = [p for p, m in self._module().named_modules() if digest_of(m) == first]
        return [one for one in found if not way or self._digest_inside(one, way) == own]

    def _digest_inside(self, path: str, way: Way) -> str | None:
        function = self._called.get((path, way))
        try:
            return None if function is None else source_of(function).digest
        except SourceError:
            return None

    def _function(self, path: str, way: Way, call: CallLike | None) -> Any:
        """What the last operation of a way calls."""
        above = self.listing(path, way[:-1], call)
        name = _found(above, way[-1], path, way[:-1])
        key = self._canonical(path), (*way[:-1], name)
        if key not in self._called:
            if call is None:
                raise SourceError(
                    f"what {shown(path, way)} calls is known only where the model has an input",
                    fix="ask for it inside a block",
                )
            _seen(self.of(path, way[:-1]), call)
        function = self._called.get(key, "it does not run in this pass")
        return function

    def _note(self, path: str, names: Way, called: Any) -> None:
        self._called[path, names] = plain_function(called)

    def _find(self, path: str) -> nn.Module:
        found = dict(self._module().named_modules(remove_duplicate=False)).get(path)
        if found is None:
            raise UnknownPathError(f"the model has no module {path[:200]!r}")
        return found

    def _canonical(self, path: str) -> str:
        own = self._find(path)
        return next(p for p, module in self._module().named_modules() if module is own)

    # -- signatures of operations ------------------------------------------------------------------

    def learn(self, signature: Signature, call: CallLike, path: str, way: Way) -> None:
        """From here on a signature knows the operations of a source."""
        key = "inside", path, way
        if key in signature.kept:
            return
        with self._lock:
            self._now()
            self.listing(path, way, call)
            signature.kept[key] = Inner(_seen(self.of(path, way), call), signature)

    def answer(self, path: str, way: Way, call: CallLike) -> bytes:
        """For a client that asks: `Signatures.answer`, of the operations of a source."""
        with self._lock:
            self.listing(path, way, call)
            return self.of(path, way).answer(call.args, dict(call.kwargs))

    def of(self, path: str, way: Way) -> Signatures:
        """The signatures that tell of the operations of a source, too."""
        digest = self._digest(path)
        found = self._signatures.get((digest, way))
        if found is None:
            telling = None if self._asker else Telling(digest, way, self._note)
            asker = None if self._asker is None else _Asking(self._asker, path, way)
            found = self._signatures[digest, way] = self._made(telling, asker)
            found.kept["inside"] = path, way  # for who asks for more of them
        return found

    def _digest(self, path: str) -> str:
        return self.listing(path).digest

    # -- where the model is elsewhere --------------------------------------------------------------

    def _asked(self, asker: Asker, path: str, way: Way, call: CallLike | None) -> Listing:
        found = self._listings.get((path, way))
        if found is None:
            self._find(path)
            found, kin = asker.source(path, way, call)
            for one in (path, *kin):
                self._listings.setdefault((one, way), found)
        return found

    # -- graphs ------------------------------------------------------------------------------------

    def check(
        self,
        graph: Graph,
        calls: Sequence[CallLike],
        forward: Callable[[Site], CallLike] | None = None,
    ) -> None:
        """Raises where a graph means other sources, or operations that are not there. `forward`
        tells, if there are several, in which of them a site is."""
        marks = marks_of(graph)
        seen = set()
        for site, at in sites_inside(graph):
            line = graph.where[at] if at < len(graph.where) else None
            names = operations_of(site.port)
            for path, way in places_of(site):
                if (path, way, names[len(way)]) in seen or site.invoke >= len(calls):
                    continue
                seen.add((path, way, names[len(way)]))
                call = calls[site.invoke] if forward is None else forward(site)
                listing = self._listing_for(path, way, call, line)
                if listing.digest != marks.get((path, way)):
                    raise OtherSourceError(
                        f"the graph names operations of {shown(path, way)}, which is another "
                        "source here",
                        line=line,
                        fix="open the model anew, and record the experiment on what is there",
                    )
                if names[len(way)] not in listing.by_name:
                    raise _unknown(listing, names[len(way)], path, way, line)

    def _listing_for(self, path: str, way: Way, call: CallLike, line: Where | None) -> Listing:
        try:
            return self.listing(path, way, call)
        except (SourceError, UnknownPathError) as error:
            raise type(error)(error.message, line=line, fix=error.fix) from None

    def seen(
        self, signatures: Signatures, graph: Graph | None, calls: Sequence[CallLike]
    ) -> list[Signature]:
        """The signature of each call, with all that a graph names inside forwards."""
        found = [signatures.for_call(one.args, dict(one.kwargs)) for one in calls]
        inside = sites_inside(graph) if graph is not None and graph.sources else ()
        for site, _ in inside:
            way = operations_of(site.port)[:-1]
            self.learn(found[site.invoke], calls[site.invoke], site.path, way)
        return found


class _Asking:
    """An `Asker` about the operations of one source."""

    def __init__(self, asker: Asker, path: str, way: Way) -> None:
        self._asker = asker
        self._path, self._way = path, way

    def signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        return self._asker.inside(self._path, self._way, args, kwargs)

    def inside(self, path: str, way: Way, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        return self._asker.inside(path, way, args, kwargs)

    def source(self, path: str, way: Way, call: Any) -> tuple[Listing, tuple[str, ...]]:
        return self._asker.source(path, way, call)

    def apply(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        return self._asker.apply(path, args, kwargs)


class Inner:
    """The sites of operations in one pass, and when they fire among those of modules."""

    def __init__(self, found: Signature, whole: Signature) -> None:
        self.signature = found
        self._times = found.times
        if floor(self._times[-1]) + 1 != whole.count:
            raise SourceError("a pass with operations told visits other modules than one without")

    def site(self, path: str, port: str, call: int) -> SiteSignature:
        """The site. Raises `LookupError` where it does not fire."""
        found = self.signature.site(path, port, call)
        return found.at(self._times[found.index])

    def calls(self, path: str, port: str) -> int:
        return self.signature.calls(path, port)

    def between(self, begin: Any, end: Any, path: str, way: Way) -> dict[str, int]:
        """How often each operation of a source runs between two moments, by `path.source.name.`"""
        found: dict[str, int] = {}
        for (own, port, _), time in zip(self.signature.order, self._times, strict=True):
            names = operations_of(port)
            inside, last = split_port(port)
            if own == path and names[:-1] == way and last == "inputs" and begin < time < end:
                found[inside] = found.get(inside, 0) + 1
        return found


def _seen(signatures: Signatures, call: CallLike) -> Signature:
    """What signatures tell of a call."""
    if isinstance(call, Forward):
        return call.seen(signatures)
    return signatures.for_call(call.args, dict(call.kwargs))


def inner_of(signature: Signature, path: str, port: str) -> Inner | None:
    """What a signature knows of the source of a site."""
    names = operations_of(port)
    return signature.kept.get(("inside", path, names[:-1])) if names else None


def counts_between(signature: Signature, path: str, port: str, call: int) -> dict[str, int]:
    """How often each module and operation runs inside a call of a module, or of an operation."""
    begin = signature.site(path, begin_port(port), call).index
    end = signature.site(path, port, call).index
    found: dict[str, int] = {}
    for one, its, _ in signature.order[floor(begin) + 1 : ceil(end)]:
        if its == "inputs":
            found[one] = found.get(one, 0) + 1
    for key, inner in list(signature.kept.items()):
        if isinstance(inner, Inner):
            _, own, way = key
            canonical = signature.canonical(own)
            for inside, count in inner.between(begin, end, canonical, way).items():
                found[f"{own}.{inside}"] = count
    return found


# -- words -----------------------------------------------------------------------------------------


def shown(path: str, way: Way) -> str:
    """`h.0.attn.source.attention_interface_0.source`."""
    return f"{path}.{inside_of(way)}source" if path else f"{inside_of(way)}source"


def _found(listing: Listing, name: str, path: str, way: Way) -> str:
    try:
        return listing.find(name).name
    except LookupError:
        raise _unknown(listing, name, path, way, None) from None


def _unknown(listing: Listing, name: str, path: str, way: Way, line: object) -> UnknownPathError:
    return unknown_operation(listing, name, shown(path, way), line)


def unknown_operation(listing: Listing, name: str, where: str, line: object) -> UnknownPathError:
    """The error for an operation that is not there, with the nearest names."""
    try:
        listing.find(name)
        near: list[str] = []
    except LookupError as error:
        near = error.args[0]
    fix = f"the nearest are {', '.join(near)}" if near else f"print({where}) shows them"
    return UnknownPathError(f"{where} has no operation {name[:200]!r}", line=line, fix=fix)


def _no_source(path: str, way: Way, why: str) -> SourceError:
    where = shown(path, way).removesuffix(".source")
    return SourceError(
        f"the source of what {where} calls is not shown: {why}",
        fix="use the operation's own .input and .output",
    )
