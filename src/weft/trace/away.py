"""Tensors that are elsewhere: a session on a server keeps them, and here is only their name.

    away = Away(space, 3, "<kept 0", aval)      # what request 3 of the session has left there
    stand_in(away)                              # a tensor on meta that stands for it in a graph
    away.fetch()                                # its numbers: a round trip

Where the last `Away` of a value goes, its space is told, so that the value goes there, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from weft.errors import FailedRunError, NotReachedError
from weft.kernels.aval import Aval, contiguous

if TYPE_CHECKING:
    from .value import Value

_NAME = "_weft_away"  # of a plain tensor: operations give tensors without it


class Space(Protocol):
    """Where values are kept: the part of a session that one model of one server has."""

    def fetch(self, *aways: Away) -> list[torch.Tensor]:
        """Their numbers. Raises what has become of them."""
        ...

    def dropped(self, number: int, name: str) -> None:
        """Nobody here has it any more. Called from anywhere, at any time."""
        ...


class Away:
    """A tensor in a space, by the number of the request that made it, and the name of the save."""

    __slots__ = ("__weakref__", "aval", "name", "number", "space")

    def __init__(self, space: Space, number: int, name: str, aval: Aval) -> None:
        self.space = space
        self.number = number
        self.name = name
        self.aval = contiguous(tuple(aval.shape), aval.dtype)

    def fetch(self) -> torch.Tensor:
        """Its numbers."""
        return self.space.fetch(self)[0]

    def __del__(self) -> None:
        self.space.dropped(self.number, self.name)


def stand_in(away: Away) -> torch.Tensor:
    """A tensor without numbers that stands for it among the constants of a graph."""
    with torch._C.DisableTorchFunction():
        tensor = torch.empty(away.aval.shape, dtype=away.aval.dtype, device="meta")
    setattr(tensor, _NAME, away)
    return tensor


def away_of(tensor: torch.Tensor) -> Away | None:
    """What a tensor stands for; None for one that has numbers."""
    return getattr(tensor, _NAME, None)


def parted(
    constants: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, Away]]:
    """Constants with numbers, and those that are away."""
    found = {key: away_of(tensor) for key, tensor in constants.items()}
    here = {key: constants[key] for key, away in found.items() if away is None}
    return here, {key: away for key, away in found.items() if away is not None}


def fetched(constants: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All constants with their numbers."""
    _, aways = parted(constants)
    return {**constants, **{key: away.fetch() for key, away in aways.items()}}


def filled(value: Value) -> torch.Tensor | None:
    """The tensor of a handle whose block has ended, fetched where it is away; None: there is none.

    From then on the handle has it here, and it is not kept there any more.
    """
    if value._real is None and value._away is not None:
        tensor = _fetched(value)
        if tensor is None:
            return None
        value._real, value._away, value._stands = tensor, None, None
        _marked(tensor, value)
    return value._real


def _fetched(value: Value) -> torch.Tensor | None:
    """The tensor of a handle that is away; None, and the handle knows why, where there is none."""
    assert value._away is not None
    try:
        return value._away.fetch()
    except NotReachedError:
        value._missed = True
    except FailedRunError as error:
        value._rec.fail(error.message)
    value._away = value._stands = None
    return None


def standing(value: Value) -> torch.Tensor:
    """The tensor that stands for a handle that is away: always the same one."""
    assert value._away is not None
    if value._stands is None:
        value._stands = stand_in(value._away)
        _marked(value._stands, value)
    return value._stands


def _marked(tensor: torch.Tensor, value: Value) -> None:
    for name, known in (value._marks or {}).items():
        setattr(tensor, name, known)


def leave(value: Value, away: Away, marks: Mapping[str, Any] | None = None) -> None:
    """The handle's tensor is there from now on. `marks` are attributes that its tensor has."""
    value._real, value._away, value._stands, value._marks = None, away, None, marks
