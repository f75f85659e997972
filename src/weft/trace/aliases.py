"""Other names for modules: `rename={"transformer.h": "layers", "mlp": "ffn", "lm_head": "head"}`.

A key is a module's name, wherever it occurs, or a path, below any module from which it leads to
one. Its value, a name or several, is one more name for that module, beside the first part of the
key. Aliases are for people: a graph has the true paths, so it runs on handles with other names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from weft.errors import UnknownOptionError, UnknownPathError

from .lines import user_line, where
from .tree import Module

Rename = Mapping[str, str | Iterable[str]]


def rename_tree(tree: Module, rename: Rename) -> None:
    """Gives modules of a tree further names.

    Raises `UnknownPathError` for a key that leads nowhere, `UnknownOptionError` for a name that is
    taken, or none.
    """
    if not isinstance(rename, Mapping):
        raise _refusal(f"rename takes a dict, not a {type(rename).__name__}", "{'h': 'layers'}")
    for key, value in rename.items():
        names = [value] if isinstance(value, str) else value
        targets = _targets(tree, key)
        if not targets:
            raise _unknown(tree, key)
        for name in _checked(key, names):
            for parent, target in targets:
                _name(parent, name, target)


def _targets(tree: Module, key: Any) -> list[tuple[Module, Module]]:
    """Every module to which the key leads, and from which one."""
    parts = key.split(".") if isinstance(key, str) else [""]
    found = []
    for parent in tree.modules():
        target: Any = parent
        for part in parts:
            target = target._children.get(part) if target is not None else None
        if target is not None:
            found.append((parent, target))
    return found


def _checked(key: str, names: Any) -> list[str]:
    if not isinstance(names, Iterable):
        raise _refusal(f"rename: {key!r} is given {names!r}", "give a name, or a list of names")
    found = list(names)
    for name in found:
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise _refusal(f"rename: {name!r} is no name for {key!r}", "use a plain name: 'layers'")
    return found


def _name(parent: Module, name: str, target: Module) -> None:
    there = parent._aliases.get(name)
    if there is target:
        return
    taken = there is not None or name in parent._children
    taken = taken or hasattr(type(parent), name) or hasattr(parent._skeleton(), name)
    if taken:
        raise _refusal(
            f"rename: {target._path!r} cannot be called {name!r}: "
            f"{parent._path or 'the model'} has something of that name already",
            "choose another name",
        )
    parent._aliases[name] = target
    parent.__dict__[name] = target


def _unknown(tree: Module, key: Any) -> UnknownPathError:
    names = {part for path in tree._root.paths for part in (path, path.rpartition(".")[2])}
    near = difflib.get_close_matches(str(key), sorted(names), 3, 0.5)
    return UnknownPathError(
        f"rename: the model has no module {key!r}",
        line=where(user_line()),
        fix=f"the nearest are {', '.join(near)}" if near else "print(model) shows the tree",
    )


def _refusal(message: str, fix: str) -> UnknownOptionError:
    return UnknownOptionError(message, line=where(user_line()), fix=fix)
