"""Whether a stranger's backwards may run, and what the model keeps for them: decided on shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor
from typing import Any

from weft.errors import GraphError, WriteMismatchError
from weft.families.call import ModelCall
from weft.graph.site import Site, Where
from weft.kernels.aval import Aval
from weft.run.steps import Plan, Step
from weft.run.structure import tensors
from weft.signatures.signature import Signature

from .places import Tree

_INSIDE = 2
"""What a module keeps inside, for each byte that it gives: norms, activations, patterns."""


def check_losses(step: Step, env: Mapping[int, Aval], line: Where | None) -> None:
    """Raises `GraphError` for losses that have no gradient, or not the one that is given."""
    for loss, seed in step.losses:
        aval = env[loss]
        _check_floating(aval, "a loss", line)
        if seed is None:
            if aval.shape.numel() != 1:
                raise GraphError(f"the loss {aval!r} is not one number", line=line)
        elif env[seed].shape != aval.shape or not _has_gradient(env[seed]):
            raise GraphError(f"the gradient of the loss {aval!r} is {env[seed]!r}", line=line)


def check_asked(step: Step, steps: Sequence[Any], env: Mapping[int, Aval], line: Any) -> None:
    """Raises `GraphError` where a gradient of whole numbers is asked for."""
    for index in step.arrivals:
        _check_floating(env[steps[index].of], "a value whose gradient is asked for", line)


def check_regrad(value: Aval, own: Aval, line: Where | None) -> None:
    """Raises unless a gradient fits the one that it replaces."""
    if value.shape != own.shape or not _has_gradient(value):
        raise WriteMismatchError(
            f"the gradient is {own!r}, but {value!r} is put in its place",
            line=line,
            fix="give a tensor of the value's own shape",
        )


def _check_floating(aval: Aval, what: str, line: Where | None) -> None:
    if not _has_gradient(aval):
        raise GraphError(
            f"{what} is {aval!r}, which has no gradient",
            line=line,
            fix="only floating tensors have gradients",
        )


def _has_gradient(aval: Aval) -> bool:
    return aval.dtype.is_floating_point or aval.dtype.is_complex


def pass_flops(tree: Tree, calls: Sequence[ModelCall]) -> int:
    """What the passes of a model take, nearly: each parameter meets each number of the input."""
    given = [tensors((call.args, dict(call.kwargs))) for call in calls]
    rows = [max([tensor.numel() for tensor in one], default=1) for one in given]
    return 2 * tree.size("") * sum(rows)


class KeptForBackward:
    """Bytes that the passes of a model leave behind for a backward, nearly.

    All that its modules give, from the first site that the graph names to the last that has fired,
    and as much again inside of them. With a weight's gradient it begins with the pass.
    """

    def __init__(self, signatures: Mapping[int, Signature], plan: Plan) -> None:
        self._signatures = signatures
        self._first: dict[int, int] = {}
        for site in plan.sites:
            index = 0 if plan.params else self._index(site)
            self._first[site.invoke] = min(index, self._first.get(site.invoke, index))
        self._known: dict[tuple[int, int], int] = {}

    def bytes(self, fired: Mapping[int, Site]) -> int:
        """With these sites of each invoke as the last that have fired."""
        return sum([self._of(site) for site in fired.values()])

    def _index(self, site: Site) -> int:
        index = self._signatures[site.invoke].site(site.path, site.port, site.call).index
        return floor(index)  # an operation inside a forward stands between two sites of modules

    def _of(self, last: Site) -> int:
        key = last.invoke, self._index(last)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = _INSIDE * sum(self._sizes(*key).values())
        return found

    def _sizes(self, invoke: int, end: int) -> dict[int, int]:
        """Storage -> bytes."""
        found: dict[int, int] = {}
        for row in self._signatures[invoke].exact().rows[self._first[invoke] : end + 1]:
            for what, fact in zip(row.what, row.facts, strict=True):
                if fact is not None and not fact.tied and _has_gradient(what):
                    found[fact.group] = max(what.nbytes, found.get(fact.group, 0))
        return found
