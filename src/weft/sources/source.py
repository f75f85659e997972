"""`Source`: a function that is installed here, and copies of it whose calls are told.

    source = source_of(forward_of(module))
    source.listing                            # text, hash, operations
    copy = source.copied(forward_of(module), hook)
    copy(x)                                   # calls hook("self_c_proj_0", module.c_proj, x)

The text is read once, compiled once, and the very function is made of it anew: with its own
globals, closure and defaults, so that what it does is what it did. Decorators are not run again: of
each that wraps the function a copy is made, whose closure holds the copy instead. Where that
cannot be (a C function, a text that is not what was loaded, a decorator that hides what it
wraps), `SourceError` says why. A copy is nobody's attribute: who makes it calls it.
"""

from __future__ import annotations
import __future__

import ast
import dis
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

from weft.errors import SourceError

from .listing import Listing
from .parse import HOOK, function_in, parsed, told

Hook = Callable[..., Any]
"""`hook(name, function, *args, **kwargs)`, in the place of `function(*args, **kwargs)`."""

_FLAGS = 0
for _name in __future__.all_feature_names:
    _FLAGS |= getattr(__future__, _name).compiler_flag


class Source:
    """The source of one function. `home` is the package that the function is of."""

    def __init__(self, function: FunctionType) -> None:
        lines, first = _lines(function)
        text = "".join(lines)
        digest = hashlib.sha256(textwrap.dedent(text).encode()).hexdigest()
        try:
            plain, (tree, operations) = function_in(text), told(function_in(text))
        except (SyntaxError, ValueError) as error:
            raise SourceError(f"{_name_of(function)} has no source of its own: {error}") from None
        code = function.__code__
        if not _is_same(_compiled(plain, function, first), code):
            raise SourceError(
                f"the file of {_name_of(function)} is not what was loaded from it",
                fix="start anew, so that the code that runs is the code in the file",
            )
        self.home = (function.__module__ or "").partition(".")[0]
        self.listing = Listing(digest, textwrap.dedent(text).rstrip(), operations)
        self._code = _compiled(tree, function, first)

    @property
    def digest(self) -> str:
        return self.listing.digest

    def copied(self, function: Any, hook: Hook) -> Any:
        """A copy of the function, wrappers and all, that calls through `hook`."""
        if isinstance(function, MethodType):
            return MethodType(self.copied(function.__func__, hook), function.__self__)
        inner = vars(function).get("__wrapped__")
        if inner is None:
            return self._remade(function, hook)
        copy = self.copied(inner, hook)
        cells = [CellType(copy) if _holds(cell, inner) else cell for cell in function.__closure__]
        made = _like(function, function.__code__, tuple(cells))
        made.__wrapped__ = copy
        return made

    def _remade(self, function: FunctionType, hook: Hook) -> FunctionType:
        own = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        own[HOOK] = CellType(hook)
        return _like(function, self._code, tuple([own[name] for name in self._code.co_freevars]))


_KNOWN: WeakKeyDictionary[FunctionType, Source | SourceError] = WeakKeyDictionary()


def source_of(function: Any) -> Source:
    """The source of a function or method. Raises `SourceError` for what has none."""
    inner = _innermost(function)
    found = _KNOWN.get(inner)
    if found is None:
        try:
            found = Source(inner)
        except SourceError as error:
            found = error
        _KNOWN[inner] = found
    if isinstance(found, SourceError):
        raise SourceError(found.message, fix=found.fix)
    return found


def _innermost(function: Any) -> FunctionType:
    """What is behind methods and wrappers."""
    while True:
        if isinstance(function, MethodType):
            function = function.__func__
        if not isinstance(function, FunctionType):
            raise SourceError(f"{_name_of(function)} is no function of Python")
        inner = vars(function).get("__wrapped__")
        if inner is None:
            return function
        if not any(_holds(cell, inner) for cell in function.__closure__ or ()):
            raise SourceError(f"a decorator of {_name_of(function)} hides what it wraps")
        function = inner


def _holds(cell: CellType, inner: Any) -> bool:
    try:
        return cell.cell_contents is inner
    except ValueError:  # it is empty
        return False


def _lines(function: FunctionType) -> tuple[list[str], int]:
    try:
        return inspect.getsourcelines(function)
    except (OSError, TypeError, IndexError, SyntaxError) as error:
        raise SourceError(
            f"the source of {_name_of(function)} cannot be read: {error}",
            fix="define it in a file",
        ) from None


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def _like(function: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> FunctionType:
    made = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    made.__module__ = function.__module__
    made.__dict__.update(function.__dict__)
    return made


# -- compiling -----------------------------------------------------------------------------------


def _compiled(tree: ast.FunctionDef, function: FunctionType, first: int) -> CodeType:
    """The code of a function of this tree, with the free variables that the function has.

    Annotations, defaults and decorators are left out: those of the function itself stay.
    """
    tree.decorator_list, tree.returns = [], None
    args = tree.args
    args.defaults, args.kw_defaults = [], [None] * len(args.kwonlyargs)
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if arg is not None:
            arg.annotation = None
    ast.increment_lineno(tree, first - 1)
    free = [name for name in function.__code__.co_freevars if name != "__class__"]
    around = parsed(f"def weft({', '.join([*free, HOOK])}):\n  class {_class_of(function)}: 0")
    around.body[0].body[0].body = [tree]  # type: ignore[attr-defined]
    flags = function.__code__.co_flags & _FLAGS
    made = compile(around, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    return _found(made, ("weft", _class_of(function), tree.name))


def _class_of(function: FunctionType) -> str:
    """The class that the function is written in: private names are spelled by it."""
    owner = function.__qualname__.rpartition(".")[0].rpartition(".")[2]
    return owner if owner.isidentifier() else "_"


def _found(code: CodeType, names: tuple[str, ...]) -> CodeType:
    for name in names:
        code = next(
            one for one in code.co_consts if isinstance(one, CodeType) and one.co_name == name
        )
    return code


def _is_same(made: CodeType, loaded: CodeType) -> bool:
    return _steps(made) == _steps(loaded)


_PLUMBING = frozenset(("CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL", "RESUME"))


def _steps(code: CodeType) -> list[Any]:
    """What the code does, without what depends on where it was compiled: a call of an imported
    name is spelled another way in its own file."""
    found = []
    for step in dis.get_instructions(code):
        if step.opname not in _PLUMBING:
            name = "LOAD_ATTR" if step.opname == "LOAD_METHOD" else step.opname
            target = step.opcode in dis.hasjrel or step.opcode in dis.hasjabs
            value = step.argval.co_name if isinstance(step.argval, CodeType) else step.argval
            found.append((name, None if target else (type(value), value)))
    return found
