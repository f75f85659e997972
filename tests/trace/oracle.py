"""What a real forward pass shows, by plain hooks: the truth that signatures are held against.

Nothing here comes from the code under test: storages are told apart by address, overwriting is
seen in the numbers, structures are walked by key.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from weft.kernels.aval import Aval, aval_of
from weft.signatures.signature import Opaque, Plain, Signature, SiteSignature


class Seen:
    """One site of a real pass. Holds its tensors, so that no storage is used twice."""

    def __init__(self, path: str, port: str, call: int, structure: Any) -> None:
        self.name = (path, port, call)
        self.structure = structure
        self.avals = {key: aval_of(t) for key, t in tensors(structure)}
        self.numbers = {key: t.clone() for key, t in tensors(structure)}


def tensors(structure: Any, at: tuple = ()) -> list[tuple[tuple, torch.Tensor]]:
    """(key path, tensor) for the tensors of nested tuples, lists, dicts and dataclasses."""
    if isinstance(structure, torch.Tensor):
        return [(at, structure)]
    if isinstance(structure, dict):
        items = list(structure.items())
    elif isinstance(structure, (tuple, list)):
        items = list(enumerate(structure))
    elif hasattr(structure, "__dataclass_fields__"):
        items = [(name, getattr(structure, name)) for name in structure.__dataclass_fields__]
    else:
        return []
    return [pair for key, item in items for pair in tensors(item, (*at, key))]


def run(net: nn.Module, args: tuple, kwargs: dict) -> list[Seen]:
    """A real pass with hooks on every module."""
    seen: list[Seen] = []
    counts: dict[str, int] = {}
    open_calls: list[tuple[str, int]] = []
    handles = []

    def enter(path: str, args: tuple, kwargs: dict) -> None:
        call = counts.get(path, 0)
        counts[path] = call + 1
        open_calls.append((path, call))
        seen.append(Seen(path, "inputs", call, (args, kwargs)))

    def leave(output: Any) -> None:
        path, call = open_calls.pop()
        seen.append(Seen(path, "output", call, output))

    for path, module in net.named_modules():
        pre = lambda m, a, k, path=path: enter(path, a, k)
        handles.append(module.register_forward_pre_hook(pre, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda m, a, out: leave(out)))
    try:
        with torch.no_grad():
            net(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def check(sig: Signature, net: nn.Module, args: tuple, kwargs: dict) -> None:
    """Fails unless the signature says of every site what a real pass shows."""
    args, kwargs = _copied((args, kwargs), {})
    seen = run(net, args, kwargs)
    assert list(sig.order) == [site.name for site in seen]
    tied = {_address(t) for t in [*net.parameters(), *net.buffers()]}
    tied |= {_address(t) for _, t in tensors((args, kwargs))}
    groups: dict[int, int] = {}
    for index, real in enumerate(seen):
        site = sig.site(*real.name)
        assert site.index == index
        check_site(site, real)
        for key, tensor in tensors(real.structure):
            facts = dict(zip(dict(site.leaves), site.facts, strict=True))[key]
            assert facts is not None
            where = (*real.name, key)
            assert groups.setdefault(_address(tensor), facts.group) == facts.group, where
            same = torch.equal(tensor, real.numbers[key])
            assert facts.overwritten is not same, where
            assert facts.tied is (_address(tensor) in tied), where
    assert len(set(groups.values())) == len(groups), "two storages in one group"
    for path, _ in net.named_modules():
        assert sig.calls(path) == sum(s.name[:2] == (path, "output") for s in seen)


def check_site(site: SiteSignature, real: Seen) -> None:
    """Structure, layouts and plain values of one site."""
    leaves = []
    for key, what in site.leaves:
        item = _at(real.structure, key)
        leaves.append(item)
        if isinstance(what, Aval):
            assert same_layout(what, real.avals[key]), (real.name, key, what, real.avals[key])
        elif isinstance(what, Plain):
            assert type(item) is type(what.value), (real.name, key)
            assert item == what.value, (real.name, key)
        else:
            assert isinstance(what, Opaque)
            assert str(what) == type(item).__qualname__
    assert same_structure(site.rebuild(leaves), real.structure), real.name


def same_layout(one: Aval, other: Aval) -> bool:
    """Equal dtype, shape, offset and strides, but for strides that are never used (of size 1)."""
    steps = zip(one.shape, one.stride, other.stride, strict=False)
    same = one.dtype == other.dtype and one.shape == other.shape and one.offset == other.offset
    return same and all(n == 1 or a == b for n, a, b in steps)


def same_structure(one: Any, other: Any) -> bool:
    """Containers of the same classes around the very same objects."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_structure(one[k], other[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same_structure, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return same_structure(vars(one), vars(other))
    return one is other


def _at(structure: Any, key: tuple) -> Any:
    for step in key:
        by_name = hasattr(structure, "__dataclass_fields__") and not isinstance(structure, dict)
        structure = getattr(structure, step) if by_name else structure[step]
    return structure


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _copied(inputs: Any, made: dict[int, torch.Tensor]) -> Any:
    """Inputs of one's own, for models that write into them; one tensor twice stays one."""
    if isinstance(inputs, torch.Tensor):
        if id(inputs) not in made:
            made[id(inputs)] = inputs.clone(memory_format=torch.preserve_format)
        return made[id(inputs)]
    if isinstance(inputs, dict):
        return {key: _copied(value, made) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple([_copied(value, made) for value in inputs])
    return copy.deepcopy(inputs)
