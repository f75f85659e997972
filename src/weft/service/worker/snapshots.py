"""Snapshots: all values of a room as one object, so that its log is short when it is gone through.

    write(objects, session, 40, values)         # after request 40; the one before it goes
    number, values = latest(objects, session, 57)   # the last one before request 57; (0, {}): none

An object is written once and whole, so a snapshot is there or it is not.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

import torch
from msgspec import json

from weft.errors import MessageError
from weft.kernels.frames import to_frame, to_tensor
from weft.service.store.interface import Objects
from weft.wire import frames
from weft.wire.messages import Kept

FOLDER = "rooms"
IN_MEMORY = 8 << 20
LOG = logging.getLogger("weft.worker")


def write(objects: Objects, session: str, number: int, values: Mapping[Kept, torch.Tensor]) -> None:
    """Writes what a room holds after a request, and removes what was written before."""
    before = _numbers(objects, session)
    names = json.encode([(one.number, one.name) for one in values]).decode()
    held: dict[str, Any] = {str(n): to_frame(value) for n, value in enumerate(values.values())}
    with tempfile.SpooledTemporaryFile(IN_MEMORY) as file:
        frames.write_to(cast(BinaryIO, file), held, {"names": names})
        file.seek(0)
        objects.put(_name(session, number), cast(BinaryIO, file))
    for one in before:
        if one != number:
            objects.delete(_name(session, one))


def latest(
    objects: Objects, session: str, before: int, device: torch.device | None = None
) -> tuple[int, dict[Kept, torch.Tensor]]:
    """The last snapshot that was made before a request: after which one, and the values."""
    for number in sorted(_numbers(objects, session), reverse=True):
        if number < before:
            try:
                return number, _read(objects.get(_name(session, number)), device)
            except (KeyError, ValueError, MessageError):
                LOG.exception("the snapshot of session %s cannot be read", session)
    return 0, {}


def _read(data: bytes, device: torch.device | None) -> dict[Kept, torch.Tensor]:
    found, metadata = frames.read(data)
    names = json.decode(metadata["names"], type=list[tuple[int, str]])
    return {
        Kept(number=number, name=name): to_tensor(found[str(n)]).to(device or "cpu")
        for n, (number, name) in enumerate(names)
    }


def _numbers(objects: Objects, session: str) -> list[int]:
    return [int(name.rpartition("/")[2]) for name in objects.names(f"{FOLDER}/{session}/")]


def _name(session: str, number: int) -> str:
    return f"{FOLDER}/{session}/{number}"
