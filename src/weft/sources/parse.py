"""Reading a function's text: its calls by name, and the same function with each call told.

Nothing is run here, and nothing but the text of a function that is installed here is ever parsed.

Not among the operations: calls inside a nested `def`, `class` or `lambda` (who calls those, and
when, is not the function's own business), and functions that look at the frame they are called
from, such as `super`.
"""

from __future__ import annotations

import ast
import threading
from collections import Counter

from .listing import Operation

HOOK = "__weft_operation__"
"""What is called in the place of each operation, with its name and what it would call."""

_FRAMES = frozenset(
    ("super", "locals", "globals", "vars", "dir", "eval", "exec", "breakpoint", "__import__")
)
_MOST = 200
"""Characters of a name; a longer one is not offered."""


_PARSING = threading.Lock()


def parsed(text: str) -> ast.Module:
    """As `ast.parse`, one thread at a time: CPython 3.11 counts the depth of all of them together,
    and raises a `SystemError` where that does not come out even. Raises `SyntaxError`."""
    with _PARSING:
        return ast.parse(text)


def function_in(text: str) -> ast.FunctionDef:
    """The function that a text defines. Raises `ValueError` where it defines none."""
    body = parsed(f"if True:\n{text}" if text[:1].isspace() else text).body
    first = body[0].body[0] if isinstance(body[0], ast.If) else body[0]
    if not isinstance(first, ast.FunctionDef):
        raise ValueError("it is no plain function")
    if text[:1].isspace():
        ast.increment_lineno(first, -1)
    return first


def told(function: ast.FunctionDef) -> tuple[ast.FunctionDef, tuple[Operation, ...]]:
    """The function with every call through `HOOK`, and its operations in order."""
    teller = _Teller()
    function.body = [teller.visit(statement) for statement in function.body]
    ast.fix_missing_locations(function)
    return function, tuple(teller.found)


class _Teller(ast.NodeTransformer):
    def __init__(self) -> None:
        self.found: list[Operation] = []
        self._counts: Counter[str] = Counter()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        parts = _parts(node.func)
        name = "_".join(parts)
        if not parts or parts == ["super"] or (len(parts) == 1 and name in _FRAMES):
            return self.generic_visit(node)
        full = f"{name}_{self._counts[name]}"
        self._counts[name] += 1
        offered = name.isascii() and len(full) <= _MOST
        if offered:
            line = (node.func.end_lineno or node.func.lineno) - 1
            self.found.append(Operation(full, line, parts[-1] if len(parts) > 1 else ""))
        self.generic_visit(node)
        if not offered:
            return node
        hook = ast.copy_location(ast.Name(HOOK, ast.Load()), node.func)
        called = [ast.copy_location(ast.Constant(full), node.func), node.func, *node.args]
        return ast.copy_location(ast.Call(hook, called, node.keywords), node)

    def _leave(self, node: ast.AST) -> ast.AST:
        return node

    visit_Lambda = visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _leave


def _parts(called: ast.expr) -> list[str]:
    """`["self", "c_proj"]`; of what is called on another result only the attributes."""
    parts: list[str] = []
    while isinstance(called, ast.Attribute):
        parts.append(called.attr)
        called = called.value
    if isinstance(called, ast.Name):
        parts.append(called.id)
    return parts[::-1] or ["call"]
