"""The tensors of one run: which are alive, and who else can see their storage.

Three promises are kept here:

- a value is dropped at its last use;
- saved means frozen: a save owns its tensor, or shares it only with whoever will not change it;
- an edit changes nothing but what it edits: whatever else shares a tensor that is about to be
  changed is copied first (`protect`).

The model may change a tensor that it handed out. Such values are remembered with their version
counter, and used only while it stands (`OverwrittenError`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch

from weft.errors import OverwrittenError
from weft.graph.node import Call, Graph, Read
from weft.graph.site import leaf_text

from .host import Host
from .lower import Env
from .steps import Plan, Step, line_of


def storage(tensor: torch.Tensor) -> int:
    """A number that two live tensors share exactly when they share storage."""
    return tensor.untyped_storage()._cdata


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place (inference tensors do not count)."""
    return 0 if tensor.is_inference() else tensor._version


_Shared = tuple[Env, int, int]  # what a save keeps, its slot, the tensor's version then


class Memory:
    """See the module's text."""

    __slots__ = (
        "_fresh",
        "_frozen",
        "_graph",
        "_host",
        "_left",
        "_plan",
        "_shared",
        "_versions",
        "clients",
        "detached",
        "env",
        "taken",
    )

    def __init__(self, graph: Graph, plan: Plan, host: Host) -> None:
        self._graph = graph
        self._plan = plan
        self._host = host
        self._left = plan.left.copy()
        self.env: Env = {}
        self.detached = True  # whether a save forgets how it was made
        self.clients: set[int] = set()  # storages of constants
        self.taken: Collection[int] = ()  # slots that hold a copy for the one save that uses them
        self._fresh: list[int] = []  # slots of this firing that may be the model's own tensors
        self._versions: dict[int, int] = {}  # slots of earlier firings, with their versions
        self._frozen: dict[int, Env] = {}  # step -> older versions of what it uses
        self._shared: dict[int, _Shared] = {}  # storage -> the save that shares it

    # Values

    def put(self, step: Step, slot: int, tensor: torch.Tensor) -> None:
        """A result of a step; what nobody uses is not kept."""
        if self._left[slot]:
            self.env[slot] = tensor
            if step.watch:
                self._fresh.append(slot)

    def inputs(self, step: Step) -> Env:
        """The slots as this step means them."""
        if not (self._versions or self._frozen):
            return self.env
        older = self._frozen.pop(step.index, None)
        self._check(step.uses, older or {})
        return self.env if older is None else {**self.env, **older}

    def release(self, step: Step) -> None:
        """Drops what nobody else will use."""
        left = self._left
        for slot in step.uses:
            left[slot] -= 1
            if not left[slot]:
                del self.env[slot]

    def is_needed(self, slots: Iterable[int]) -> bool:
        """Whether any of the slots will be used again."""
        return any(slot in self.env for slot in slots)

    def is_last_use(self, slot: int) -> bool:
        """Whether nobody notices when the step that runs now changes this slot's tensor."""
        if self._left[slot] > 1 or type(self._plan.source(slot)) is not Call:
            return False
        where = storage(self.env[slot])
        shared = where in self._shared
        return not shared and all(s == slot or storage(t) != where for s, t in self.env.items())

    def is_foreign(self, where: int) -> bool:
        """Whether a storage holds a constant, an input or a weight."""
        return where in self.clients or self._host.is_anothers(where)

    # Before a write

    def freeze(self, uses: Iterable[tuple[int, int]]) -> None:
        """Copies, for steps that wait, the slots that are about to be changed."""
        copies: Env = {}
        for index, slot in uses:
            if slot not in copies:
                self._check((slot,), {})
                copies[slot] = self.env[slot].clone()
            self._frozen.setdefault(index, {})[slot] = copies[slot]

    def protect(self, tensor: torch.Tensor, family: int | None) -> None:
        """Copies all that shares this tensor's storage, except its family."""
        where = storage(tensor)
        if where in self._shared:
            self._unshare(where)
        for slot in self._sharing(where, family):
            self._check((slot,), {})
            self._versions.pop(slot, None)
            self.env[slot] = self.env[slot].clone()

    def _sharing(self, where: int, family: int | None) -> list[int]:
        families = self._plan.family
        return [s for s, t in self.env.items() if families[s] != family and storage(t) == where]

    def _unshare(self, where: int) -> None:
        shared = kept, slot, _ = self._shared.pop(where)
        self._check_shared(shared)
        kept[slot] = kept[slot].clone()

    # Saves

    def keep(self, step: Step, env: Env) -> Env:
        """The tensors that a save brings back, frozen."""
        kept: Env = {}
        taken = self.taken
        for slot in step.uses:
            if slot in taken:
                kept[slot] = env[slot]
                continue
            tensor = env[slot].detach() if self.detached else env[slot]
            whole = tensor.untyped_storage()
            where = whole._cdata
            if (
                slot in step.clones
                or where in self._shared
                or whole.nbytes() > tensor.nbytes  # a slice would hold all of it
                or self.is_foreign(where)
            ):
                kept[slot] = tensor.clone()
            else:
                kept[slot] = tensor
                self._shared[where] = (kept, slot, version(tensor))
        return kept

    def is_shared(self, tensor: torch.Tensor) -> bool:
        """Whether a save shares this tensor's storage."""
        return storage(tensor) in self._shared

    def unshare(self, tensors: Iterator[torch.Tensor]) -> None:
        """Copies saves that share storage with these tensors."""
        for tensor in tensors:
            if storage(tensor) in self._shared:
                self._unshare(storage(tensor))

    # What the model overwrites

    def end_firing(self) -> None:
        """From here on the model may change what it handed out."""
        for slot in self._fresh:
            if slot in self.env:
                self._versions[slot] = version(self.env[slot])
        self._fresh.clear()

    def _check(self, slots: Iterable[int], older: Env) -> None:
        for slot in slots:
            known = self._versions.get(slot)
            if known is not None and slot not in older and version(self.env[slot]) != known:
                raise self._overwritten(slot)

    def check_saves(self) -> None:
        """Raises `OverwrittenError` for a save that the model changed."""
        for shared in self._shared.values():
            self._check_shared(shared)

    def _check_shared(self, shared: _Shared) -> None:
        kept, slot, known = shared
        if version(kept[slot]) != known:
            raise self._overwritten(slot)

    def _overwritten(self, slot: int) -> OverwrittenError:
        node = self._plan.source(slot)
        name = f"{node.site}{leaf_text(node.leaf)}" if isinstance(node, Read) else "a value"
        return OverwrittenError(
            f"the model changed {name} in place after it was read, before it was used",
            line=line_of(self._graph, node),
            fix="take .clone() where it is read",
        )
