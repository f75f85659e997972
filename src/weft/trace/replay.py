"""A template at another step: the shapes that its nodes have there, and whether they fit.

It believes nothing of what was recorded at step 0 but the operations: each is evaluated anew on
what the step's sites look like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from msgspec.structs import replace

from weft.errors import WeftError
from weft.graph.node import (
    AnyNode,
    Apply,
    Bound,
    Call,
    Const,
    Fill,
    Param,
    Read,
    Ref,
    Skip,
    Stop,
    Write,
    inputs_of,
)
from weft.graph.site import begin_port, leaf_text, split_port
from weft.kernels.abstract import DataDependentError
from weft.kernels.aval import Aval, contiguous
from weft.kernels.replay import outcome_again, tensor_refs, value_of

from .lines import where
from .value import short

if TYPE_CHECKING:
    from .steps import Steps

Refusal = Callable[..., WeftError]


class Replay:
    """The template's nodes at one step. `looks`: what its sites are like there."""

    def __init__(self, steps: Steps, step: int, nodes: list[AnyNode], refusal: Refusal) -> None:
        self._steps = steps
        self.step = step
        self._refusal = refusal
        self.looks = tuple([self._look(node) for node in nodes if hasattr(node, "site")])

    def _look(self, node: Any) -> Any:
        tensors = self._signature(node, self.step).tensors
        return tensors if isinstance(node, Skip) else dict(tensors).get(node.leaf)

    def leaf(self, node: Any) -> Aval:
        """The tensor at a leaf of a site."""
        found = dict(self._signature(node, self.step).tensors).get(node.leaf)
        if found is None:
            raise self._refusal(
                node, f"{node.site.path}.{node.site.port}{leaf_text(node.leaf)} is no tensor there"
            )
        return found

    def _signature(self, node: Any, step: int) -> Any:
        site = node.site
        try:
            return self._steps.site(site, step)
        except LookupError:
            inside = split_port(site.port)[0].removesuffix(".")
            name = f"{site.path}.{inside}".strip(".") or "the root"
            raise self._refusal(node, f"{name} does not run there") from None

    # -- checking ----------------------------------------------------------------------------

    def check(self, nodes: tuple[AnyNode, ...], bounds: tuple[Bound, ...], cone: list[int]) -> None:
        """Raises where a node of the template does not fit this step."""
        self._nodes = nodes
        self.env: dict[Ref, Aval] = {}
        """What its values are like."""
        self._times: dict[int, int] = {}  # of nodes of the template: when in the step
        sizes: dict[int, list[Bound]] = {}
        for bound in bounds:
            sizes.setdefault(bound.value.node, []).append(bound)
        for number in cone:
            node = nodes[number]
            for ref in inputs_of(node):
                if ref not in self.env:
                    self.env[ref] = self._outside(ref)
            self._times[number] = max(
                [self._times.get(ref.node, -1) for ref in inputs_of(node)], default=-1
            )
            for out, aval in enumerate(self._results(number, node)):
                self.env[Ref(number, out)] = aval
            for bound in sizes.get(number, ()):
                self._check_bound(node, bound)

    def _check_bound(self, node: AnyNode, bound: Bound) -> None:
        size = self.env[bound.value].shape[bound.dim]
        if size != bound.size:
            line = where(self._steps.recorder.line_of(bound.at)).line
            raise self._refusal(
                node, f"line {line} reads the size {bound.size} as a number; there it is {size}"
            )

    def _results(self, number: int, node: Any) -> list[Aval]:
        match node:
            case Read():
                index = self._signature(node, self.step).index
                self._times[number] = index
                return [self.leaf(node)]
            case Call():
                found = self._called(node, self.env)
                self._touch(number, node)
                return found
            case Apply():
                return self._applied(node, self.env)
            case Write() | Fill():
                self._check_time(number, node, self._signature(node, self.step).index)
                self._check_fit(node, self.leaf(node), self.env[node.value])
            case Skip():
                self._check_skip(number, node)
            case Stop(condition=Ref() as ref) if self.env[ref].meta.numel() != 1:
                raise self._refusal(node, "the condition is not one number")
        return []

    def _check_time(self, number: int, node: Any, index: int) -> None:
        if self._times[number] > index:
            raise self._refusal(node, "its value comes only later than the site", late=True)

    def _check_fit(self, node: Any, own: Aval, given: Aval) -> None:
        floats = own.dtype.is_floating_point and given.dtype.is_floating_point
        if own.shape != given.shape or (own.dtype != given.dtype and not floats):
            place = f"{node.site.path or '<root>'}.{node.site.port}"
            raise self._refusal(node, f"{place} holds {short(own)}, and {short(given)} is given")

    def _check_skip(self, number: int, node: Skip) -> None:
        begin = replace(node.site, port=begin_port(node.site.port))
        self._check_time(number, node, self._steps.site(begin, self.step).index)
        tensors = self._signature(node, self.step).tensors
        if tuple([leaf for leaf, _ in tensors]) != node.leaves:
            raise self._refusal(node, "the module gives another structure")
        for (_, own), ref in zip(tensors, node.values, strict=True):
            self._check_fit(node, own, self.env[ref])

    def _called(self, node: Call, env: dict[Ref, Aval]) -> list[Aval]:
        try:
            found = outcome_again(node, env)
        except DataDependentError:
            raise self._refusal(node, "the shape of its result depends on numbers") from None
        except Exception as error:  # noqa: BLE001 (torch may raise anything)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise self._refusal(node, f"torch.{node.op}: {reason}") from None
        refs = tensor_refs(node)
        alias = [None if leaf.alias is None else refs[leaf.alias] for leaf in found.leaves]
        writes = [refs[index] for index in found.writes]
        same = alias == list(node.alias or (None,) * node.outs) and writes == list(node.writes)
        if len(found.leaves) != node.outs or not same:
            raise self._refusal(node, f"torch.{node.op} gives another kind of result")
        return [leaf.aval for leaf in found.leaves]

    def _touch(self, number: int, node: Call) -> None:
        """What is written into a tensor counts where it is used."""
        for ref in node.writes:
            time = max(self._times.get(ref.node, -1), self._times[number])
            self._times[ref.node] = time

    def _applied(self, node: Apply, env: dict[Ref, Aval]) -> list[Aval]:
        args = tuple([value_of(arg, env) for arg in node.args])
        kwargs = {name: value_of(arg, env) for name, arg in node.kwargs}
        steps = self._steps
        module = steps.recorder.owner.skeleton().get_submodule(node.path)  # type: ignore[union-attr]
        try:
            found = steps.signature(0, self.step).apply(module, node.path, args, kwargs)
        except Exception as error:  # noqa: BLE001 (a module may raise anything)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise self._refusal(node, f"{node.path}: {reason}") from None
        return [what for _, what in found.leaves if isinstance(what, Aval)]

    # -- what belongs to no step, or to another one ------------------------------------------

    def _outside(self, ref: Ref) -> Aval:
        """The shape of a value that is the same at every step, as it was recorded."""
        known: dict[Ref, Aval] = {}
        todo = [ref]
        while todo:
            one = todo[-1]
            node: Any = self._nodes[one.node]
            missing = [r for r in inputs_of(node) if r not in known and r not in self.env]
            if missing and one not in known:
                todo += missing
                continue
            todo.pop()
            for out, aval in enumerate(self._recorded(node, {**self.env, **known})):
                known[Ref(one.node, out)] = aval
        return known[ref]

    def _recorded(self, node: Any, env: dict[Ref, Aval]) -> list[Aval]:
        if isinstance(node, Read):
            return [dict(self._signature(node, node.site.step).tensors)[node.leaf]]
        if isinstance(node, (Const, Param)):
            return [contiguous(node.shape, getattr(torch, node.dtype))]
        if isinstance(node, Call):
            return self._called(node, env)
        return self._applied(node, env)
