"""Whether edits treat all positions alike: only then do they mean the same without a cache.

With a cache each step runs one new position, and what an edit did to earlier ones stays in the
cache. Without one each step runs all positions anew, so an edit of "the last position" is undone in
the next step. Allowed without a cache are edits outside of step loops that do the same to every
position: elementwise operations with values that have no positions of their own, indexing of other
dimensions, and `linear`. What is not shown to be of that kind is refused.

Operations inside forwards may see more than the new position even with a cache: keys and values
that come out of it, and what is made of them. Such a site is none at which positions are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft.errors import WeftError
from weft.graph.node import AnyNode, Call, Fill, Name, Read, Ref, Seq, Skip, Slice, Write, inputs_of
from weft.graph.site import is_inside
from weft.kernels.aval import Aval

_FREE = -1
"""In place of a dimension: the value is the same whatever the positions are."""

_NAMES = """
    abs add cos exp expm1 log log1p mul neg nn.functional.gelu nn.functional.relu nn.functional.silu
    div maximum minimum reciprocal relu rsqrt rsub sigmoid sign sin sqrt square sub tanh where clamp
    clamp_max clamp_min pow lerp eq ge gt le lt ne clone zeros_like ones_like full_like Tensor.to
    Tensor.float Tensor.double Tensor.half Tensor.bfloat16 Tensor.type_as
    Tensor.add_ Tensor.sub_ Tensor.mul_ Tensor.div_ Tensor.copy_ Tensor.clamp_ Tensor.fill_
    Tensor.zero_ Tensor.neg_ Tensor.pow_ zero_ fill_ clamp_ neg_ relu_ copy_
"""
_ELEMENTWISE = frozenset(_NAMES.split())

Env = dict[Ref, Aval]
Refuse = Callable[[AnyNode], WeftError]


class Positions:
    """The dimension of positions in each value of a template.

    `refuse` makes the error; `cached` tells what an operation's tensor is like at a step that runs
    one position; `steps`: so many positions the longer sequence has more.
    """

    def __init__(self, refuse: Refuse, cached: Callable[[Read], Aval | None], steps: int) -> None:
        self._refuse = refuse
        self._cached = cached
        self._steps = steps
        self._dims: dict[Ref, int] = {}

    def check(self, number: int, node: Any, shape: Env, longer: Env) -> None:
        """Takes the next node; `shape` and `longer` are values at two lengths of the sequence."""
        refs = inputs_of(node)
        for ref in refs:
            if ref not in self._dims:  # of no step: the same everywhere
                self._dims[ref] = _FREE
        if isinstance(node, Read):
            self._dims[Ref(number, 0)] = self._of_site(
                node, shape[Ref(number)], longer[Ref(number)]
            )
        elif isinstance(node, Call):
            dim = self._of_call(node, refs, shape)
            self._dims.update({Ref(number, out): dim for out in range(node.outs)})
        elif isinstance(node, (Write, Fill, Skip)):
            if any(self._dims[ref] == _FREE for ref in refs):
                raise self._refuse(node)
        elif any(self._dims[ref] != _FREE for ref in refs):
            raise self._refuse(node)

    def _of_site(self, node: Read, shape: Aval, longer: Aval) -> int:
        if len(shape.shape) != len(longer.shape):
            raise self._refuse(node)
        pairs = zip(shape.shape, longer.shape, strict=True)
        moving = [dim for dim, (one, other) in enumerate(pairs) if one != other]
        if len(moving) != 1:
            raise self._refuse(node)
        if is_inside(node.site.port) and not self._is_of_one(node, shape, longer, moving[0]):
            raise self._refuse(node)
        return moving[0]

    def _is_of_one(self, node: Read, shape: Aval, longer: Aval, dim: int) -> bool:
        """Whether a step with a cache has there what one position more adds."""
        found = self._cached(node)
        if found is None or len(found.shape) != len(shape.shape):
            return False
        one, added = [*found.shape], [*longer.shape]
        one[dim] *= self._steps
        added[dim] -= shape.shape[dim]
        return one == added

    def _of_call(self, node: Call, refs: list[Ref], shape: Env) -> int:
        placed = [ref for ref in refs if self._dims[ref] != _FREE]
        if not placed:
            return _FREE
        if node.op in ("Tensor.__getitem__", "Tensor.__setitem__"):
            return self._indexed(node, shape)
        rank = max(len(shape[ref].shape) for ref in refs)
        if node.op == "nn.functional.linear":
            whole, *rest = refs
            apart = self._dims[whole] < len(shape[whole].shape) - 1
            if apart and all(self._dims[ref] == _FREE for ref in rest):
                return self._dims[whole]
        elif node.op in _ELEMENTWISE:
            places = {self._from_right(ref, shape) for ref in placed}
            free = [ref for ref in refs if self._dims[ref] == _FREE]
            if len(places) == 1 and all(_is_one(shape[ref], *places) for ref in free):
                return rank - places.pop()
        raise self._refuse(node)

    def _from_right(self, ref: Ref, shape: Env) -> int:
        return len(shape[ref].shape) - self._dims[ref]

    def _indexed(self, node: Call, shape: Env) -> int:
        target, index, *value = node.args
        if not isinstance(target, Ref) or self._dims[target] == _FREE:
            raise self._refuse(node)
        dim, rank = self._dims[target], len(shape[target].shape)
        items = list(index.items) if isinstance(index, Seq) else [index]
        hole = next((n for n, one in enumerate(items) if _is_ellipsis(one)), len(items))
        after = len(items) - hole - 1
        items = [*items[:hole], *[Slice()] * (rank - hole - max(after, 0)), *items[hole + 1 :]]
        kept = [one for one in items[:dim] if isinstance(one, Slice)]
        whole = items[dim] == Slice() and all(isinstance(one, (Slice, int)) for one in items)
        if not whole or any(isinstance(one, bool) for one in items):
            raise self._refuse(node)
        if value and isinstance(value[0], Ref):
            self._check_value(node, value[0], dim, items, shape)
        return len(kept) if node.op == "Tensor.__getitem__" else dim

    def _check_value(self, node: Call, value: Ref, dim: int, items: list, shape: Env) -> None:
        """What is put into a part has its positions where the part has them, or none."""
        right = sum([isinstance(one, Slice) for one in items[dim:]])
        own = self._dims[value]
        there = _is_one(shape[value], right) if own == _FREE else (
            len(shape[value].shape) - own == right
        )  # fmt: skip
        if not there:
            raise self._refuse(node)


def _is_one(aval: Aval, place: int) -> bool:
    """Whether a value has no positions of its own, where others have theirs, from the right."""
    return len(aval.shape) < place or aval.shape[-place] == 1


def _is_ellipsis(item: Any) -> bool:
    return isinstance(item, Name) and item.form == "ellipsis"
