"""The source code of a module class as a hash: what a `forward` says, not how it is written down.

    source_of(type(net.model.layers[0]))        # 64 hex digits, or "module:name" without a source

Comments, blank lines, layout and docstrings do not count: what is hashed is the syntax tree. What
counts is the class, its base classes, and all that they name in the same file, so that a changed
`apply_rotary_pos_emb` is seen. PyTorch's own classes and the loading machinery of `transformers`
count by name: their text changes between releases and no `forward` of a model is in it.

Not seen: methods that were replaced at run time, and functions of other files.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import sys
import weakref
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn

from weft.sources.parse import parsed

_BY_NAME = ("torch", "transformers.modeling_utils")
_SAID: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()

# Fields of syntax trees that come and go with Python's version, or say nothing.
_SILENT = frozenset({"type_comment", "type_params", "type_ignores", "kind", "ctx"})
_SCOPES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def source_of(cls: type[nn.Module]) -> str:
    """A hash of what the class does by its text; its qualified name where there is no text."""
    found = _SAID.get(cls)
    if found is None:
        parts = [_own(base) for base in cls.__mro__ if _counts(base)]
        found = _SAID[cls] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return found


def _counts(base: type) -> bool:
    return issubclass(base, nn.Module) and base is not nn.Module


def _own(cls: type) -> str:
    """What one class says itself, without its bases."""
    name = f"{cls.__module__}:{cls.__qualname__}"
    if any(cls.__module__ == home or cls.__module__.startswith(f"{home}.") for home in _BY_NAME):
        return name
    file = next((file for file in map(_file, _places(cls)) if file is not None), None)
    node = None if file is None else file.find(cls)
    return name if file is None or node is None else file.said(node)


def _places(cls: type) -> Iterator[str]:
    """Names of files in which the class may have been written, the likeliest first."""
    for function in _functions(cls):
        yield function.__code__.co_filename
    home = sys.modules.get(cls.__module__)
    yield getattr(home, "__file__", None) or ""


def _functions(cls: type) -> Iterator[FunctionType]:
    """The functions that were written in the class."""
    for member in vars(cls).values():
        one: Any = member.fget if isinstance(member, property) else member
        one = getattr(one, "__func__", one)
        while hasattr(one, "__wrapped__"):
            one = one.__wrapped__
        if isinstance(one, FunctionType) and one.__qualname__.startswith(f"{cls.__qualname__}."):
            yield one


class _File:
    """The definitions of one file."""

    def __init__(self, tree: ast.Module) -> None:
        self._named: dict[str, ast.AST] = dict(_top_level(tree))
        self._classes: dict[str, list[ast.ClassDef]] = {}
        self._note(tree, "")

    def _note(self, scope: ast.AST, prefix: str) -> None:
        for node in ast.iter_child_nodes(scope):
            if not isinstance(node, _SCOPES):
                self._note(node, prefix)
                continue
            name = f"{prefix}{node.name}"
            if isinstance(node, ast.ClassDef):
                self._classes.setdefault(name, []).append(node)
                self._note(node, f"{name}.")
            else:
                self._note(node, f"{name}.<locals>.")

    def find(self, cls: type) -> ast.ClassDef | None:
        """Where the class is written; of several of one name the one with its functions."""
        nodes = self._classes.get(cls.__qualname__, [])
        lines = {function.__code__.co_firstlineno for function in _functions(cls)}
        holds = [n for n in nodes if any(n.lineno <= at <= (n.end_lineno or 0) for at in lines)]
        return next(iter([*holds, *reversed(nodes)]), None)

    def said(self, node: ast.ClassDef) -> str:
        """The class, and all of the file that it names, directly or not."""
        found: dict[str, ast.AST] = {}
        todo: list[ast.AST] = [node]
        while todo:
            for name in sorted(_names(todo.pop())):
                if name in self._named and name not in found and self._named[name] is not node:
                    found[name] = self._named[name]
                    todo.append(found[name])
        return repr([_told(node), *[_told(found[name]) for name in sorted(found)]])


@lru_cache(maxsize=8)
def _file(name: str) -> _File | None:
    lines = linecache.getlines(name)
    try:
        return _File(parsed("".join(lines))) if lines else None
    except SyntaxError:  # a notebook's cell with commands that are not Python
        return None


def _top_level(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    for node in tree.body:
        if isinstance(node, _SCOPES):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node


def _names(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def _told(node: Any) -> Any:
    """A syntax tree as plain data, the same for every version of Python."""
    if isinstance(node, list):
        return [_told(item) for item in node if not _is_remark(item)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _SILENT]
    kept = [(name, _told(value)) for name, value in fields if value is not None and value != []]
    return type(node).__name__, kept


def _is_remark(node: Any) -> bool:
    """A docstring, or any other text that stands for itself."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
