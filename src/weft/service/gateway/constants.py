"""Constants: tensors uploaded once, each under its digest and its owner's name.

An upload goes to a temporary file while it is hashed, and into the store only when its digest is
the one it was sent under; it is never held whole.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from typing import BinaryIO, cast

from starlette.responses import Response

from weft.errors import MessageError
from weft.wire import frames
from weft.wire.messages import Missing, MissingQuery

from .accept import constant_name, missing
from .bodies import Bound, answer, pieces, read, taken
from .errors import Refused
from .limits import check_stored, too_much
from .state import Gateway, Visit, limits_for

MEDIA = "application/octet-stream"
HEADER_BYTES = 1 << 20
"""The header of a file with one tensor is far shorter."""
IN_MEMORY = 1 << 20
BATCH = 1 << 20
"""Bytes that are written and hashed at once."""
_DIGEST = re.compile("[0-9a-f]{64}")


async def missing_ones(gateway: Gateway, visit: Visit) -> Response:
    absent = await taken(gateway, visit, _missing_ones)
    return answer(visit.request, Missing(digests=absent))


def _missing_ones(gateway: Gateway, owner: str, data: bytes, form: str) -> tuple[str, ...]:
    query: MissingQuery = read(data, MissingQuery, form)
    return missing(gateway, owner, set(query.digests))


async def upload(gateway: Gateway, visit: Visit) -> Response:
    digest = visit.request.path_params["digest"]
    if not _DIGEST.fullmatch(digest):
        raise Refused(MessageError("a digest is 64 hexadecimal digits"), 400)
    given = visit.request.headers.getlist("content-type")
    if [media.partition(";")[0].strip().lower() for media in given] != [MEDIA]:
        raise Refused(MessageError(f"a constant is sent as {MEDIA}"), 415)
    name = constant_name(visit.owner, digest)
    if await gateway.off(gateway.objects.touch, name):
        return answer(visit.request, Missing(digests=()))
    new = await _receive(gateway, visit, name, digest)
    return answer(visit.request, Missing(digests=()), 201 if new else 200)


async def _receive(gateway: Gateway, visit: Visit, name: str, digest: str) -> bool:
    """Takes the body in; False where somebody else was faster."""
    limit = limits_for(gateway, visit.key).constant_bytes
    bound = Bound(limit + HEADER_BYTES, "constant_bytes")
    with tempfile.SpooledTemporaryFile(IN_MEMORY, dir=gateway.scratch) as spooled:
        taker = Upload(cast(BinaryIO, spooled))
        batch, size = [], 0
        async for piece in pieces(visit.request, bound):
            batch.append(piece)
            size += len(piece)
            if size >= BATCH:
                await gateway.off(taker.take, b"".join(batch))
                batch, size = [], 0
        await gateway.off(taker.take, b"".join(batch))
        return await gateway.off(_keep, gateway, visit, taker, name, digest)


def _keep(gateway: Gateway, visit: Visit, upload: Upload, name: str, digest: str) -> bool:
    found = upload.digest(limits_for(gateway, visit.key).constant_bytes)
    if found != digest:
        raise MessageError(f"the tensor sent as {digest} has another digest")
    check_stored(gateway, visit.key, upload.file.tell())
    upload.file.seek(0)
    return gateway.objects.put(name, upload.file)


class Upload:
    """A file with one tensor, `x`, that comes in pieces. Blocks."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._head = b""
        self._slot: frames.Slot | None = None
        self._seen = 0
        self._sha = hashlib.sha256()

    def take(self, piece: bytes) -> None:
        """The next bytes. Raises `MessageError` as soon as they cannot be such a file."""
        self.file.write(piece)
        if self._slot is None:
            self._head += piece
            piece = self._begin()
        self._sha.update(piece)
        self._seen += len(piece)

    def _begin(self) -> bytes:
        """Reads the header when it is whole; what follows it."""
        if len(self._head) < 8:
            return b""
        body = frames.body_at(self._head[:8], HEADER_BYTES)
        if len(self._head) < body:
            return b""
        slots, metadata = frames.parse(self._head[8:body])
        if [slot.name for slot in slots] != ["x"] or metadata:
            raise MessageError("a constant is a file with one tensor, called x, and nothing else")
        self._slot = slots[0]
        self._sha.update(f"{self._slot.dtype}{list(self._slot.shape)}".encode())
        rest, self._head = self._head[body:], b""
        return rest

    def digest(self, limit: int) -> str:
        """The digest, when all is there. Raises `MessageError` for too little or too much."""
        slot = self._slot
        if slot is None or self._seen != slot.end:
            raise MessageError("this is not the whole file of a tensor")
        if slot.end > limit:
            raise too_much("constant_bytes", limit, f"the constant has {slot.end} bytes")
        return self._sha.hexdigest()
