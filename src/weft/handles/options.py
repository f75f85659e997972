"""Options of a block itself, as against those of a family: who wants what, where, and how."""

from __future__ import annotations

from dataclasses import dataclass, fields
from dataclasses import replace as replaced
from typing import Any

import torch

from weft.client.remote import RemoteBackend
from weft.errors import UnknownOptionError

from .where import Place, Remote


@dataclass(frozen=True)
class Own:
    """The options of tracing itself; all others are the family's."""

    seed: int | None = None
    device: torch.device | None = None
    remote: Remote = None
    blocking: bool = True
    alone: bool = False
    grad: bool = False
    eager: bool = False
    keep_seconds: float | None = None


ROOT_OPTIONS = ("fn", "trace")
"""What is called, and whether there is a block at all."""
OWN_OPTIONS = tuple(field.name for field in fields(Own))
_NO_OPTIONS = Own()


def split(options: dict[str, Any]) -> tuple[Own, dict[str, Any]]:
    """Options of tracing, and those of the family."""
    if not options:
        return _NO_OPTIONS, options
    for name in ROOT_OPTIONS:
        if name in options:
            raise UnknownOptionError(
                f"{name} belongs to model.trace(...)" + (" and scan" if name == "fn" else ""),
                fix="leave it out here",
            )
    rest = {key: value for key, value in options.items() if key not in OWN_OPTIONS}
    own = Own(**{key: value for key, value in options.items() if key in OWN_OPTIONS})
    device = own.device
    check_seed(own.seed)
    for name in ("blocking", "alone", "grad", "eager"):
        if not isinstance(getattr(own, name), bool):
            given = getattr(own, name)
            raise UnknownOptionError(
                f"{name} is True or False, not {given!r}", fix=f"{name}={bool(given)}"
            )
    return replaced(own, device=None if device is None else torch.device(device)), rest


def check_seed(seed: Any) -> None:
    """Raises `UnknownOptionError` for what keys no draws."""
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise UnknownOptionError(
            f"seed is a whole number from 0, not {seed!r}", fix="seed=0, or any below 2**63"
        )


def check_place(own: Own, place: Place, runs: bool = True) -> None:
    """Raises `UnknownOptionError` where a block cannot be what is asked for in this place."""
    if not own.blocking and place.kind != "server":
        raise UnknownOptionError(
            f"blocking=False: this block runs {place.text}, and is over when it closes",
            fix="leave it out, or run the block on a server with remote=True",
        )
    if own.eager and not runs:
        raise UnknownOptionError(
            "eager=True: a scan has no numbers", fix="use model.trace(..., eager=True)"
        )
    if own.eager and place.kind != "here":
        raise UnknownOptionError(
            f"eager=True: this block runs {place.text}, and numbers are shown line by line only "
            "where the model is in this process",
            fix="remote=False, or look at single numbers: float(h[0, -1, 3])",
        )
    if own.grad and runs and place.kind != "here":
        raise UnknownOptionError(
            f"grad=True: this block runs {place.text}, and what autograd knows stays there",
            fix="call loss.backward() inside the block, and save the gradients; or remote=False",
        )


def kept(own: Own, place: Place) -> Place:
    """The place, where jobs are kept for as long as the block asks. Raises `UnknownOptionError`."""
    seconds = own.keep_seconds
    if seconds is None:
        return place
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise UnknownOptionError(
            f"keep_seconds is a number of seconds above 0, not {seconds!r}", fix="keep_seconds=3600"
        )
    if not isinstance(place.backend, RemoteBackend):
        raise UnknownOptionError(
            f"keep_seconds: this block runs {place.text}, and leaves no job to be kept",
            fix="leave it out, or run the block on a server with remote=True",
        )
    return replaced(place, backend=place.backend.keeping(float(seconds)))


def check_rerun(own: Own) -> None:
    """Raises for options that `Experiment.run` does not have."""
    if own.keep_seconds is not None:
        raise UnknownOptionError(
            "keep_seconds: Experiment.run leaves no job to be fetched later", fix="leave it out"
        )
    if not own.blocking:
        raise UnknownOptionError(
            "blocking=False: Experiment.run waits for what it returns", fix="leave it out"
        )
    if own.eager:
        raise UnknownOptionError(
            "eager=True: an experiment has no lines to stand at", fix="leave it out"
        )
