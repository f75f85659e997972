"""What a job asks, out of the objects that it names: the request, and its constants.

submit = submit_of(objects, job)
frame = constant(objects, job.owner, digest)          # with its numbers
frame = constant_type(objects, job.owner, digest)     # without: dtype and shape only
"""

from __future__ import annotations

from weft.graph.frame import Frame
from weft.service.jobs.life import Job
from weft.service.jobs.usage import settings_for
from weft.service.store.interface import Objects
from weft.settings import Settings
from weft.wire import frames
from weft.wire.messages import Limits, Submit, decode

NAME = "x"
"""What the one tensor in a constant's file is called."""


def submit_of(objects: Objects, job: Job) -> Submit:
    """Raises KeyError."""
    return decode(objects.get(f"submits/{job.id}"), Submit)


def limits_of(settings: Settings, job: Job) -> Limits:
    """What one job may ask for: the settings, as they are for the key that it came with."""
    mine = settings_for(settings, job.limits)
    return Limits(**{name: getattr(mine, name) for name in Limits.__struct_fields__})


def constant(objects: Objects, owner: str, digest: str) -> Frame:
    """Raises KeyError."""
    found, _ = frames.read(objects.get(f"constants/{owner}/{digest}"))
    return found[NAME]


def constant_type(objects: Objects, owner: str, digest: str) -> Frame:
    """The constant with no bytes, however large it is. Raises KeyError."""
    name = f"constants/{owner}/{digest}"
    begin = frames.body_at(_part(objects, name, 0, 8))
    (slot,), _ = frames.parse(_part(objects, name, 8, begin))
    return Frame(slot.dtype, slot.shape, b"")


def _part(objects: Objects, name: str, start: int, end: int) -> bytes:
    return b"".join(objects.stream(name, start, end))
