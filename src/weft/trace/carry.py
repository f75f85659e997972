"""In a session: the values of a block that later blocks may use without having been saved.

When the block closes, every handle that somebody still holds is brought back with what was saved.
Nobody can use any other later. A carried handle forwards to its tensor, which lives as long as the
handle does, or until the session ends (`Kept.forget`).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from weft.graph.node import Ref, Save
from weft.kernels.aval import Aval, contiguous

from .away import Away, Space, away_of, leave
from .cut import Cut, cuts_of, mark, marks
from .trained import trained_here
from .value import Family, Value, make

if TYPE_CHECKING:
    from .recorder import Recorder


class Kept:
    """The handles of a session that have a tensor without having been saved."""

    def __init__(self) -> None:
        self._handles: dict[int, weakref.ref[Value]] = {}

    def __len__(self) -> int:
        return len(self._handles)

    def fill(self, handle: Value, tensor: torch.Tensor) -> None:
        """Gives a handle its tensor, for as long as the session lasts."""
        number = id(handle)
        handle._real = tensor
        handle._kept = self
        self._handles[number] = weakref.ref(handle, lambda _: self._handles.pop(number, None))

    def leave(self, handle: Value, away: Away, cut: Cut | None = None) -> None:
        """The handle's tensor stays where its block ran, for as long as the session lasts."""
        number = id(handle)
        leave(handle, away, marks(cut))
        handle._kept = self
        self._handles[number] = weakref.ref(handle, lambda _: self._handles.pop(number, None))

    def settle(self, handle: Value) -> None:
        """`handle.save()` after its block: it keeps its tensor for good."""
        self._handles.pop(id(handle), None)
        handle._kept = None

    def standing(self, tensor: torch.Tensor) -> Value | None:
        """The handle for which a tensor stands in graphs."""
        handles = [one() for one in self._handles.values()]
        return next((one for one in handles if one is not None and one._stands is tensor), None)

    def forget(self) -> None:
        """The session is over: handles have no numbers any more."""
        for one in list(self._handles.values()):
            handle = one()
            if handle is not None:
                handle._real = handle._kept = handle._away = handle._stands = None
        self._handles.clear()


def _aval(tensor: torch.Tensor) -> Aval:
    with torch._C.DisableTorchFunction():
        return contiguous(tuple(tensor.shape), tensor.dtype)


class Carry:
    """The handles of one block of a session."""

    def __init__(self, recorder: Recorder, kept: Kept) -> None:
        self._recorder = recorder
        self._kept = kept
        self._groups: dict[Ref, list[weakref.ref[Value]]] = {}
        self._cuts: list[Cut | None] = []  # of each group
        recorder.made = []

    def saves(self) -> tuple[Save, ...]:
        """At the end of the block: a save for each result on which somebody has a handle."""
        recorder = self._recorder
        made, recorder.made = recorder.made or [], None
        ours, cut = self._ours(), cuts_of(recorder)
        for one in made:
            handle = one()
            if handle is not None and id(handle) not in ours:
                if handle._ref not in self._groups:
                    self._groups[handle._ref] = []
                    self._cuts.append(cut(handle))
                self._groups[handle._ref].append(one)
                recorder.saves.seen(handle)
        del made  # a handle that is to be swapped with its tensor must not be known to anybody
        refs = enumerate(self._groups)
        recorder.carried = tuple([Save(name=f"<kept {number}", value=ref) for number, ref in refs])
        return recorder.carried

    def _ours(self) -> set[int]:
        """Handles that are filled anyway, or that nobody but the recorder has."""
        recorder = self._recorder
        found = {key for record in recorder.saves.records.values() for key in record.keys}
        gradients: Any = recorder._gradients
        if gradients is not None:
            found |= {id(value) for _, value in gradients.sums.values()}
        return found

    def stays(self) -> frozenset[str]:
        """The saves of the block that stay in its space, after `saves`."""
        recorder = self._recorder
        if recorder.space is None:
            return frozenset()
        names = [save.name for save in recorder.carried] + [*recorder.stays]
        backs = recorder.saves.backs.items()
        written = [name for name, client in backs if away_of(client.tensor) is not None]
        return frozenset((*names, *written))

    def left(self, space: Space, number: int) -> None:
        """The block was sent as request `number`: what stays has a name there."""
        recorder = self._recorder
        for group, (handles, cut) in enumerate(zip(self._groups.values(), self._cuts, strict=True)):
            away = None
            for one in handles:
                handle = one()
                if handle is not None:
                    away = away or Away(space, number, f"<kept {group}", handle._aval)
                    self._kept.leave(handle, away, cut)
        for name, client in recorder.saves.backs.items():
            if (before := away_of(client.tensor)) is not None:
                handle = self._kept.standing(client.tensor)
                if handle is not None:
                    self._kept.leave(handle, Away(space, number, name, before.aval))
        trained = trained_here()
        for name, tensor in recorder.stays.items():
            assert trained is not None
            trained.gave(tensor, self._gradient(tensor, Away(space, number, name, _aval(tensor))))
        self._groups.clear()
        self._cuts.clear()
        recorder.stays.clear()

    def _gradient(self, tensor: torch.Tensor, away: Away) -> Value:
        """A handle on the gradient of a client tensor, made at the line that used it first."""
        recorder = self._recorder
        at = recorder.clients.taken[id(tensor)]._at if id(tensor) in recorder.clients.taken else 0
        ref = Ref(0)
        handle = make(recorder, ref, away.aval, Family(ref, -1, at), -1, at)
        leave(handle, away)
        return handle

    def deliver(self, saved: dict[str, torch.Tensor]) -> None:
        """Gives the handles that are still there their tensors."""
        for number, (handles, cut) in enumerate(
            zip(self._groups.values(), self._cuts, strict=True)
        ):
            tensor = saved.pop(f"<kept {number}", None)
            if tensor is not None:
                mark(tensor, cut)
            for one in handles:
                handle = one()
                if handle is None:
                    continue
                if tensor is None:
                    handle._missed = True
                else:
                    self._kept.fill(handle, tensor)
        self._groups.clear()
        self._cuts.clear()
