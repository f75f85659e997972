"""Graphs by hand. Each node stands on a line of its own: node 3 is at `user.py:103`.

g = Builder()
h = g.read("layer", like=x)
g.mul_(h, 2.0)
g.fill("layer", h)
g.save("h", h)
run(g.graph(), g.constants, model, (x,))
"""

from __future__ import annotations

from typing import Any

import torch

from weft.graph.check import check
from weft.graph.node import (
    Apply,
    Backward,
    Bound,
    Call,
    Const,
    Fill,
    Grad,
    Graph,
    Guard,
    Log,
    Map,
    Name,
    Param,
    Read,
    Ref,
    Regrad,
    Save,
    Seq,
    Slice,
    Write,
)
from weft.graph.site import Leaf, Site, Where
from weft.kernels.aval import dtype_name


def site(path: str, port: str = "output", call: int = 0) -> Site:
    return Site(path, port, call)


class Builder:
    def __init__(self, seed: int | None = None) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.bounds: list[Bound] = []
        self.seed = seed

    def graph(self) -> Graph:
        where = tuple(Where("user.py", 100 + n) for n in range(len(self.nodes)))
        graph = Graph(tuple(self.nodes), where, tuple(self.bounds), self.seed)
        check(graph)
        return graph

    def add(self, kind: Any, **fields: Any) -> Ref:
        self.nodes.append(kind(at=len(self.nodes), **fields))
        return Ref(len(self.nodes) - 1)

    # Sites

    def read(
        self,
        path: str,
        like: Any = None,
        *,
        leaf: Leaf = (),
        port: str = "output",
        call: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Ref:
        if isinstance(like, torch.Tensor):
            like, dtype = tuple(like.shape), like.dtype
        name = dtype_name(dtype)
        return self.add(Read, site=site(path, port, call), leaf=leaf, shape=like, dtype=name)

    def write(self, path: str, value: Ref, *, leaf: Leaf = (), port="output", call=0) -> Ref:
        return self.add(Write, site=site(path, port, call), leaf=leaf, value=value)

    def fill(self, path: str, value: Ref, *, leaf: Leaf = (), port="output", call=0) -> Ref:
        return self.add(Fill, site=site(path, port, call), leaf=leaf, value=value)

    # Values

    def const(self, tensor: torch.Tensor) -> Ref:
        key = f"c{len(self.constants)}"
        self.constants[key] = tensor
        return self.add(Const, key=key, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype))

    def param(self, path: str, like: torch.Tensor) -> Ref:
        shape, dtype = tuple(like.shape), dtype_name(like.dtype)
        return self.add(Param, path=path, shape=shape, dtype=dtype)

    def apply(self, path: str, *args: Any, outs: int = 1, **kwargs: Any) -> Ref:
        return self.add(Apply, path=path, outs=outs, **_lowered(args, kwargs))

    def call(
        self,
        op: str,
        *args: Any,
        outs: int = 1,
        alias: tuple[Ref | None, ...] = (),
        writes: tuple[Ref, ...] = (),
        draw: int | None = None,
        grad: bool = True,
        **kwargs: Any,
    ) -> Ref:
        more = {"outs": outs, "alias": alias, "writes": writes, "draw": draw, "grad": grad}
        return self.add(Call, op=op, **_lowered(args, kwargs), **more)

    def view(self, op: str, x: Ref, *args: Any) -> Ref:
        return self.call(op, x, *args, alias=(x,))

    def item(self, x: Ref, *index: Any) -> Ref:
        return self.view("Tensor.__getitem__", x, index)

    def inplace(self, op: str, x: Ref, *args: Any) -> Ref:
        return self.call(op, x, *args, alias=(x,), writes=(x,))

    def mul_(self, x: Ref, y: Any) -> Ref:
        return self.inplace("Tensor.mul_", x, y)

    def add_(self, x: Ref, y: Any) -> Ref:
        return self.inplace("Tensor.add_", x, y)

    def set(self, x: Ref, index: Any, value: Any) -> Ref:
        return self.call("Tensor.__setitem__", x, index, value, outs=0, writes=(x,))

    def mul(self, x: Ref, y: Any) -> Ref:
        return self.call("mul", x, y)

    def add2(self, x: Ref, y: Any) -> Ref:
        return self.call("add", x, y)

    def out(self, x: Ref, number: int) -> Ref:
        return Ref(x.node, number)

    # Gradients

    def backward(self, *losses: Ref, since: tuple[Site, ...] = (), create: bool = False) -> int:
        return self.add(Backward, losses=losses, since=since, create=create).node

    def grad(self, backward: int, of: Ref, zeros: bool = False) -> Ref:
        return self.add(Grad, backward=backward, of=of, zeros=zeros)

    def regrad(self, backward: int, of: Ref, value: Ref) -> Ref:
        return self.add(Regrad, backward=backward, of=of, value=value)

    # Effects

    def save(self, name: str, value: Any) -> Ref:
        return self.add(Save, name=name, value=arg(value))

    def guard(self, value: Ref, expected: Any, look: str = "value") -> Ref:
        return self.add(Guard, value=value, expected=arg(expected), look=look)

    def log(self, *parts: Any) -> Ref:
        return self.add(Log, parts=tuple(map(arg, parts)))

    def bound(self, value: Ref, dim: int, size: int) -> None:
        self.bounds.append(Bound(value, dim, size, at=value.node))


def _lowered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    named = tuple((key, arg(value)) for key, value in kwargs.items())
    return {"args": tuple(map(arg, args)), "kwargs": named}


def arg(value: Any) -> Any:
    """A Python value as an `Arg`."""
    if isinstance(value, (torch.Size, tuple, list)):
        form = {torch.Size: "size", tuple: "tuple", list: "list"}[type(value)]
        return Seq(form, tuple(map(arg, value)))
    if isinstance(value, dict):
        return Map(tuple(value), tuple(map(arg, value.values())))
    if isinstance(value, slice):
        return Slice(arg(value.start), arg(value.stop), arg(value.step))
    if value is ...:
        return Name("ellipsis")
    if isinstance(value, torch.dtype):
        return Name("dtype", dtype_name(value))
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return Name("float", str(value))
    return value
