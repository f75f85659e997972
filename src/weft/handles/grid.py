"""`Grid`: the points of a sweep, from its coordinates.

grid = Grid({"layer": range(12), "position": [0, 4]})
grid.points[1]                       # {"layer": 0, "position": 4}
grid.name(1)                         # "layer=0, position=4"
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from weft.errors import InputError, UnknownOptionError

SEQUENCES = (list, tuple, range, np.ndarray, torch.Tensor)
"""What the values of a coordinate may be."""


class Grid:
    """All points, the last coordinate running fastest. `coords` are the values by name."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        if not given:
            raise InputError(
                "a sweep needs coordinates", fix="name some: model.sweep(prompt, f, layer=range(3))"
            )
        self.coords = {name: _values(name, values) for name, values in given.items()}
        self.points = [
            dict(zip(self.coords, values, strict=True))
            for values in itertools.product(*self.coords.values())
        ]

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(self.coords)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple([len(values) for values in self.coords.values()])

    def __len__(self) -> int:
        return math.prod(self.shape)

    def name(self, number: int) -> str:
        """A point as people write it."""
        return ", ".join([f"{name}={value!r}" for name, value in self.points[number].items()])

    def check(self, function: Callable[..., Any]) -> None:
        """Raises `InputError` where the function does not take the tracer and the coordinates."""
        if not callable(function):
            raise InputError(
                f"a sweep needs a function of its points, not {type(function).__name__}",
                fix="give it last: model.sweep(prompt, f, layer=range(3)), with "
                "def f(tracer, layer): ...",
            )
        try:
            shape = inspect.signature(function)
        except (TypeError, ValueError):  # some builtins have none
            return
        try:
            shape.bind(None, **self.points[0])
        except TypeError as error:
            names = ", ".join(["tracer", *self.coords])
            raise InputError(
                f"{getattr(function, '__name__', function)!s}{shape} is called with ({names}): "
                f"{error}",
                fix=f"let it take them, def f({names}): ...; or mend the name of the option",
            ) from None


def refuse_single(function: Any, options: Mapping[str, Any]) -> None:
    """Raises `UnknownOptionError` where a keyword is an argument of the function, and one value."""
    try:
        taken = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return
    for name, value in options.items():
        if name in taken:
            raise UnknownOptionError(
                f"{name}={value!r} is one value, and a coordinate of a sweep has several",
                fix=f"give a list or a range: {name}=[{value!r}]",
            )


def _values(name: str, given: Any) -> tuple[Any, ...]:
    if isinstance(given, (np.ndarray, torch.Tensor)):
        if given.ndim != 1:
            raise InputError(
                f"{name} has {given.ndim} dimensions; a coordinate has one",
                fix="give a row of values",
            )
        given = given.tolist()
    values = tuple(given)
    if not values:
        raise InputError(f"the coordinate {name} has no values", fix="give one, or leave it out")
    for place, value in enumerate(values):
        if value in values[:place]:
            raise InputError(f"the coordinate {name} has {value!r} twice", fix="give it once")
    return values
