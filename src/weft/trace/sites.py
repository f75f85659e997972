"""Sites as a block sees them: reading gives handles, assigning and editing give nodes.

Each access of a site gives fresh handles, frozen at the version that the site then has. An
in-place edit through a handle makes a new version of the site (`Fill`), an assignment too
(`Write`). An edit through a handle that is older than the site's last edit is refused, because
it would undo that edit or be lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from msgspec.structs import replace

from weft.errors import (
    LateEditError,
    NotReachedError,
    RecordingError,
    StaleHandleError,
    WriteMismatchError,
)
from weft.graph.node import Fill, Read, Ref, Write
from weft.graph.site import Leaf, Site, is_inside, leaf_text, operations_of, split_port
from weft.kernels.aval import Aval, dtype_name
from weft.signatures.structure import Opaque, Plain

from .containers import Unreadable, flatten, hand_out
from .lines import where
from .skips import Span, refuse_inside
from .sources import learn, runs_instead
from .times import FIRINGS, TURN
from .value import Family, Owner, Value, make, short

if TYPE_CHECKING:
    from weft.signatures.signature import SiteSignature

    from .recorder import Recorder


class LeafState:
    """One tensor of a site while recording: its version, and the line of its last edit."""

    __slots__ = ("aval", "edited", "leaf", "site", "version")

    def __init__(self, site: SiteState, leaf: Leaf, aval: Aval) -> None:
        self.site = site
        self.leaf = leaf
        self.aval = aval
        self.version = 0
        self.edited = 0

    def __str__(self) -> str:
        return self.site.shown(self.leaf)


class SiteState:
    """One site while recording."""

    def __init__(self, site: Site, signature: SiteSignature) -> None:
        self.site = site
        self.signature = signature
        self.index = site.invoke * FIRINGS + site.step * TURN + signature.index
        self.tensors: dict[Leaf, LeafState] = {
            leaf: LeafState(self, leaf, what) for leaf, what in signature.tensors
        }

    def shown(self, leaf: Leaf) -> str:
        """The leaf as the user writes it: `.input` for the first tensor of `inputs`."""
        inside, last = split_port(self.site.port)
        if last == "inputs" and leaf == self.first():
            return str(replace(self.site, port=f"{inside}input"))
        return f"{self.site}{leaf_text(leaf)}"

    def first(self) -> Leaf | None:
        """The leaf that `.input` means: the first tensor among arguments, then keywords."""
        return next(iter(self.tensors), None)


class Sites:
    """The sites that one recording has touched."""

    def __init__(self, recorder: Recorder, step: int = 0) -> None:
        self.recorder = recorder
        self.invoke = recorder.invoke or 0
        self.step = step
        self.base = self.invoke * FIRINGS + step * TURN
        self.states: dict[tuple[str, str, int | None], SiteState] = {}
        self.skips: list[Span] = []

    def state(self, path: str, port: str, call: int | None) -> SiteState:
        """The site; `call` None means the module's only call."""
        key = (path, port, call)
        found = self.states.get(key)
        if found is None:
            if is_inside(port):
                learn(self.recorder, path, operations_of(port)[:-1])
            number = self.only_call(path, port) if call is None else call
            found = self.states.get((path, port, number)) or self._open(path, port, number)
            self.states[key] = self.states[path, port, number] = found
        return found

    def read(self, state: SiteState) -> Any:
        """The structure at a site, with handles for its tensors."""
        leaves = state.signature.leaves
        if len(leaves) == 1 and leaves[0][0] == () and isinstance(leaves[0][1], Aval):
            return self.read_leaf(state.tensors[()])
        values = [self._leaf_value(state, leaf, what) for leaf, what in leaves]
        return hand_out(state.signature.rebuild(values), state, self)

    def read_leaf(self, state: LeafState) -> Value:
        """A fresh handle on one tensor of a site."""
        recorder, aval = self.recorder, state.aval
        at = recorder.here()
        node = Read(
            site=state.site.site,
            leaf=state.leaf,
            shape=tuple(aval.shape),
            dtype=dtype_name(aval.dtype),
            at=at,
        )
        ref = recorder.append(node)
        index = state.site.index
        family = Family(ref, index, at)
        family.leaf = state
        family.version = state.version
        return make(recorder, ref, aval, family, index, at)

    def _leaf_value(self, state: SiteState, leaf: Leaf, what: Any) -> Any:
        if isinstance(what, Aval):
            return self.read_leaf(state.tensors[leaf])
        if not isinstance(what, Plain):
            return Unreadable(state.shown(leaf), str(what))
        if self.recorder.steps is not None:
            self.recorder.steps.gave(state.site, leaf, what)
        return what.value

    def write(self, state: SiteState, value: Any) -> None:
        """`module.output = value`."""
        given = dict(flatten(value))
        expected = dict(state.signature.leaves)
        if given.keys() != expected.keys():
            raise self.other_structure(state, list(expected), list(given))
        for leaf, what in expected.items():
            if isinstance(what, Aval):
                self.write_leaf(state.tensors[leaf], given[leaf])
            else:
                self.check_plain(state, leaf, given[leaf], what)

    def check_plain(self, state: SiteState, leaf: Leaf, given: Any, what: Any) -> None:
        """Raises unless what is given for something that is no tensor is what stands there."""
        if not _same_plain(given, what):
            raise self._not_a_tensor(state, leaf, given)

    def write_leaf(self, state: LeafState, value: Any) -> None:
        """Rebinds one tensor of a site."""
        recorder = self.recorder
        if isinstance(value, Value):
            value = recorder.own(value)
            if isinstance(value, Value) and self._is_current(value, state):
                return
        if not isinstance(value, torch.Tensor):
            raise self.mismatch(state, f"a {type(value).__name__}")
        source = value if isinstance(value, Value) else recorder.clients.use(value)
        self.check_fit(state, source._aval)
        self.check_edit(state, max(source._time, source._family.time), source)
        at = recorder.here()
        ref: Ref = source._ref
        recorder.append(Write(site=state.site.site, leaf=state.leaf, value=ref, at=at))
        state.version += 1
        state.edited = at
        recorder.edits.append((state.site.index, at))

    def check_edit(self, state: LeafState, time: int, source: Any) -> None:
        """Raises if the edit would come too late, or before what a look has seen."""
        index, recorder = state.site.index, self.recorder
        shown = None if recorder.invokes is None else recorder.invokes.shown
        if shown is not None and state.site.site.invoke != shown:
            raise recorder.refusal(
                f"{state} is edited after an empty invoke has shown the whole batch",
                "move the edit above the empty invoke: it comes last",
            )
        if time > index and time // FIRINGS == index // FIRINGS:
            raise LateEditError(
                f"{state} is edited with a value that exists only later in the forward pass, "
                f"made at {where(recorder.line_of(source._at))}",
                line=where(recorder.line()),
                fix="edit a site that fires after it, or take the value from an earlier site",
            )
        seen = recorder.looks.seen.get(index // FIRINGS)
        if seen is not None and index < seen[0]:
            raise RecordingError(
                f"{state} is edited after a number that depends on it was looked at, "
                f"at {where(recorder.line_of(seen[1]))}",
                line=where(recorder.line()),
                fix="move the edit above the look, or keep the branch in the graph "
                "with torch.where",
            )

    def check_writable(self, family: Family, time: int, source: Any) -> None:
        """Raises unless an in-place operation may change `family`."""
        state = family.leaf
        if state is None:
            return
        if isinstance(state, Owner):
            state.check_writable(family)
            return
        if family.version != state.version:
            recorder = self.recorder
            raise StaleHandleError(
                f"this handle on {state} was read at {where(recorder.line_of(family.made))}, "
                f"before the edit at {where(recorder.line_of(state.edited))}",
                line=where(recorder.line()),
                fix="read the site again after the edit and change that handle",
            )
        self.check_edit(state, time, source)

    def filled(self, family: Family, at: int) -> None:
        """After an in-place operation on a handle: the site has a new version."""
        state = family.leaf
        if state is None or family.root is None:
            return
        if isinstance(state, Owner):
            state.filled(family, at)
            return
        site = state.site.site
        self.recorder.append(Fill(site=site, leaf=state.leaf, value=family.root, at=at))
        state.version += 1
        family.version = state.version
        state.edited = at
        self.recorder.edits.append((state.site.index, at))

    def _is_current(self, value: Value, state: LeafState) -> bool:
        """Whether `value` is what the site holds anyway (`site += x` ends in such a write)."""
        family = value._family
        whole = value._ref == family.root
        return family.leaf is state and family.version == state.version and whole

    def only_call(self, path: str, port: str) -> int:
        calls = self.recorder.signature.calls(path, port)
        if calls > 1:
            last = split_port(port)[1]
            raise self.recorder.refusal(
                f"{_named(path, port)} is called {calls} times in this pass, "
                f"so .{last} is ambiguous",
                f"choose one: .calls[0].{last} to .calls[{calls - 1}].{last}",
            )
        return 0

    def _open(self, path: str, port: str, call: int) -> SiteState:
        recorder = self.recorder
        site = Site(path, port, call, self.step, self.invoke)
        try:
            found = SiteState(site, recorder.signature.site(path, port, call))
        except LookupError:
            calls = recorder.signature.calls(path, port)
            times = "never called" if not calls else f"called {calls} times"
            raise NotReachedError(
                f"{site} does not exist: {_named(path, port)} is {times} in this forward pass",
                line=where(recorder.line()),
                fix=runs_instead(recorder, path, port)
                or "use a module that runs; print(model) shows the tree",
            ) from None
        if self.skips:
            refuse_inside(self, found)
        return found

    def check_fit(self, state: LeafState, aval: Aval) -> None:
        if tuple(aval.shape) != tuple(state.aval.shape):
            raise self.mismatch(state, short(aval))
        floats = aval.dtype.is_floating_point and state.aval.dtype.is_floating_point
        if aval.dtype != state.aval.dtype and not floats:
            raise self.mismatch(state, short(aval))

    def mismatch(self, state: LeafState, got: str) -> WriteMismatchError:
        return WriteMismatchError(
            f"{state} holds {short(state.aval)}, but {got} is written to it",
            line=where(self.recorder.line()),
            fix=f"give a tensor of shape {list(state.aval.shape)}; "
            "to change a part of it use site[...] = value",
        )

    def other_structure(self, state: SiteState, want: list, got: list) -> WriteMismatchError:
        return WriteMismatchError(
            f"{state.site} holds {_shape_of(want)}, but {_shape_of(got)} is written to it",
            line=where(self.recorder.line()),
            fix="write the same structure that the site has",
        )

    def _not_a_tensor(self, state: SiteState, leaf: Leaf, got: Any) -> WriteMismatchError:
        return WriteMismatchError(
            f"{state.shown(leaf)} is not a tensor, so it cannot become {got!r}",
            line=where(self.recorder.line()),
            fix="leave it as it is, and write only its tensors",
        )


def _named(path: str, port: str) -> str:
    """A module, or an operation inside one, for messages."""
    inside = split_port(port)[0].removesuffix(".")
    return f"{path}.{inside}".strip(".") if inside else path or "the root"


def _same_plain(given: Any, what: Any) -> bool:
    if isinstance(given, Unreadable):
        return isinstance(what, Opaque)
    return Plain(given) == what


def _shape_of(leaves: list[Leaf]) -> str:
    if leaves == [()]:
        return "a single object"
    return "a structure with " + ", ".join(leaf_text(leaf) for leaf in leaves[:6])
