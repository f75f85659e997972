"""What a graph names in a model: sites, weights, modules. As they are, not as the graph says.

places = Places(tree_of(known), {0: signature}, strict)
places.check(graph)                # raises where the graph names something else
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from weft.errors import (
    GraphError,
    NotReachedError,
    SiteMismatchError,
    UnknownPathError,
    WriteMismatchError,
)
from weft.graph.node import Apply, Backward, Fill, Graph, Param, Read, Write
from weft.graph.site import RESULT, Leaf, Site, Where, is_inside, leaf_text
from weft.kernels.aval import Aval, aval_of, dtype_name
from weft.kernels.cost import module_flops
from weft.signatures.signature import Signature, SiteSignature

from .known import Known
from .refusals import text_of
from .skips import check_skips

if TYPE_CHECKING:
    from .steps import Steps

_NEAR = 256  # a longer name is no slip of the pen


class Tree:
    """The modules and weights of a model, by path. One module or weight may have several."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.weights = {name: aval_of(tensor.detach()) for name, tensor in _weights(root)}
        self._sizes: dict[str, int] = {}

    def size(self, path: str) -> int:
        """How many parameters a module has."""
        found = self._sizes.get(path)
        if found is None:
            found = sum([p.numel() for p in self.modules[path].parameters()])
            self._sizes[path] = found
        return found


def _weights(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


_TREES: WeakKeyDictionary[Known, Tree] = WeakKeyDictionary()


_SIZES: WeakKeyDictionary[Signature, list[int]] = WeakKeyDictionary()


def tree_of(known: Known) -> Tree:
    """The tree of a model, walked once."""
    found = _TREES.get(known)
    if found is None:
        found = _TREES[known] = Tree(known.skeleton)
    return found


class Places:
    """The places of a block: the sites of each invoke, and what all of them share."""

    def __init__(
        self,
        tree: Tree,
        signatures: Mapping[int, Signature],
        strict: bool,
        steps: Steps | None = None,
    ) -> None:
        self._tree = tree
        self.signatures = signatures
        self._signature = next(iter(signatures.values()))
        self._strict = strict
        self._steps = steps  # of a generation
        self._sites: dict[Site, SiteSignature] = {}
        self._leaves: dict[tuple[Site, Leaf], Aval] = {}

    def check(self, graph: Graph) -> None:
        """Raises where a node names what this pass does not have, or has otherwise."""
        for node in graph.nodes:
            line = graph.where[node.at] if node.at < len(graph.where) else None
            if isinstance(node, Read) and node.site.port == RESULT:
                self._leaves[node.site, node.leaf] = self._steps.ids(node.site.invoke)  # type: ignore[union-attr]
            elif isinstance(node, (Read, Write, Fill)):
                self._check_leaf(node, line)
            elif isinstance(node, Param):
                self._check_weight(node, line)
            elif isinstance(node, Apply) and node.path not in self._tree.modules:
                raise self._unknown("module", node.path, self._tree.modules, line)
            elif isinstance(node, Backward):
                for site in node.since:
                    self.find(site, line)
        check_skips(graph, self)

    # Sites

    def index(self, site: Site) -> int:
        """When a site fires, among those of its step."""
        return 0 if site.port == RESULT else self._sites[site].index

    def leaf(self, node: Read | Write | Fill) -> Aval:
        """The tensor at a leaf of a site."""
        return self._leaves[node.site, node.leaf]

    def _check_leaf(self, node: Read | Write | Fill, line: Where | None) -> None:
        key = node.site, node.leaf
        aval = self._leaves.get(key)
        if aval is None:
            aval = self._leaves[key] = self._find(node, line)
        if isinstance(node, Read) and not self.is_as_said(aval, node.dtype, node.shape):
            raise SiteMismatchError(
                f"{node.site}{leaf_text(node.leaf)} is {aval!r} here, "
                f"but the graph says {node.dtype}{list(node.shape)}",
                line=line,
                fix="record the experiment on an input like this one",
            )

    def is_as_said(self, aval: Aval, dtype: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is what a graph says; if not strict, whether it is of the same kind."""
        if dtype_name(aval.dtype) == dtype and tuple(aval.shape) == shape:
            return True
        same_kind = _kind(getattr(torch, dtype)) == _kind(aval.dtype)
        return same_kind and len(shape) == len(aval.shape) and not self._strict

    def _find(self, node: Read | Write | Fill, line: Where | None) -> Aval:
        found = self.find(node.site, line)
        for leaf, aval in found.tensors:
            if leaf == node.leaf:
                return aval
        leaves = ", ".join([leaf_text(leaf) or "the whole" for leaf, _ in found.tensors[:6]])
        raise SiteMismatchError(
            f"{node.site} has no tensor at {leaf_text(node.leaf[:8]) or 'the whole'}",
            line=line,
            fix=f"its tensors are {leaves}" if leaves else "it holds no tensor",
        )

    def find(self, site: Site, line: Where | None) -> SiteSignature:
        """What a site looks like. Raises where this pass does not have it."""
        found = self._sites.get(site)
        if found is None:
            found = self._sites[site] = self._site(site, line)
        return found

    def _site(self, site: Site, line: Where | None) -> SiteSignature:
        if site.path not in self._tree.modules:
            raise self._unknown("module", site.path, self._tree.modules, line)
        try:
            there = self.signatures[site.invoke]
            if self._steps is not None:
                there = self._steps.signature(site)
            return there.site(site.path, site.port, site.call)
        except LookupError:
            calls = there.calls(site.path, site.port)
            raise NotReachedError(
                f"{site} does not fire: {_what(site)} is called {calls} times in this pass",
                line=line,
                fix="use a module that runs, and a call that happens",
            ) from None

    def largest(self, last: Site) -> int:
        """Bytes of the largest tensor at any site, up to this one."""
        signature = self.signatures[last.invoke]
        sizes = _SIZES.get(signature)
        if sizes is None:
            rows = signature.exact().rows
            each = [max([_nbytes(what) for what in row.what], default=0) for row in rows]
            sizes = _SIZES[signature] = list(itertools.accumulate(each, max))
        return sizes[math.floor(self.index(last))]

    def check_write(self, node: Write, value: Aval, line: Where | None) -> None:
        """Raises unless a value fits a leaf: its shape exactly, its dtype if not both floating."""
        own = self.leaf(node)
        floating = own.dtype.is_floating_point and value.dtype.is_floating_point
        if value.shape != own.shape or (value.dtype != own.dtype and not floating):
            raise WriteMismatchError(
                f"{node.site}{leaf_text(node.leaf)} is {own!r}, but {value!r} is written to it",
                line=line,
                fix="write a tensor of the site's own shape and kind",
            )

    # Weights and modules

    def weight(self, path: str) -> Aval:
        return self._tree.weights[path]

    def _check_weight(self, node: Param, line: Where | None) -> None:
        aval = self._tree.weights.get(node.path)
        if aval is None:
            raise self._unknown("weight", node.path, self._tree.weights, line)
        if dtype_name(aval.dtype) != node.dtype or tuple(aval.shape) != node.shape:
            raise GraphError(
                f"the weight {node.path!r} is {aval!r}, "
                f"but the graph says {node.dtype}{list(node.shape)}",
                line=line,
                fix="record the experiment on this model",
            )

    def applied(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Aval]:
        """What a module gives for arguments with `Aval`s as tensors."""
        module = self._tree.modules[path]
        found = self._signature.apply(module, path, args, kwargs)
        return [what for _, what in found.leaves if isinstance(what, Aval)]

    def flops_of(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """What applying a module costs, nearly."""
        return module_flops(self._tree.size(path), args, kwargs)

    def _unknown(
        self, what: str, path: str, paths: dict[str, Any], line: Where | None
    ) -> UnknownPathError:
        near = difflib.get_close_matches(path, paths, 3, 0.5) if len(path) <= _NEAR else []
        fix = f"the nearest are {', '.join(near)}" if near else "print(model) shows the tree"
        return UnknownPathError(f"the model has no {what} {text_of(path)}", line=line, fix=fix)


def _what(site: Site) -> str:
    return "the operation" if is_inside(site.port) else "the module"


def _nbytes(what: Any) -> int:
    return what.nbytes if isinstance(what, Aval) else 0


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating"
    if dtype.is_complex:
        return "complex"
    return "bool" if dtype is torch.bool else "integer"
