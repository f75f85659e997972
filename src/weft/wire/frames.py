"""Tensors as bytes: a strict reader and writer of the safetensors format. No torch, no numpy.

A file is eight bytes (the size of the header), the header (JSON: for each tensor its dtype, its
shape, and where its bytes lie; and text as `__metadata__`), and the bytes. The reader believes no
size before it has looked: tensors must follow one another without overlap or hole, each as long as
its shape says, to the last byte. What the format has no dtype for (complex128) stands in it as
bytes, with one dimension more, and its true dtype in the metadata under `dtypes`.

    data = write({"x": Frame("float32", (2,), b"...")}, {"format": "mine"})
    frames, metadata = read(data)          # raises MessageError for anything else

Frames that were read are views of `data`: nothing is copied, and they keep it alive.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, BinaryIO

import msgspec
from msgspec import Meta, Struct

from weft.errors import MessageError
from weft.graph.frame import ITEM_SIZES, Frame, frame_bytes

MAX_HEADER = 16 << 20
"""Bytes of a header, where the caller does not allow more."""
MAX_DIMS = 64
MAX_BYTES = 2**63 - 1

CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
"""What the format calls our dtypes."""
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_RAW = frozenset(ITEM_SIZES.keys() - CODES.keys())
_METADATA = "__metadata__"
_TRUE_DTYPES = "dtypes"


class Slot(Struct, frozen=True):
    """Where the bytes of a tensor lie, counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def write(tensors: Mapping[str, Frame], metadata: Mapping[str, str] = {}) -> bytes:
    """The bytes of a file."""
    slots = layout(tensors)
    return b"".join([head(slots, metadata), *(tensors[slot.name].data for slot in slots)])


def write_to(
    file: BinaryIO, tensors: Mapping[str, Frame], metadata: Mapping[str, str] = {}
) -> tuple[int, str]:
    """Writes a file without building it in memory; returns its size and its SHA-256."""
    slots = layout(tensors)
    size, sha = 0, hashlib.sha256()
    for part in (head(slots, metadata), *(tensors[slot.name].data for slot in slots)):
        file.write(part)
        sha.update(part)
        size += len(part)
    return size, sha.hexdigest()


def read(
    data: bytes | memoryview, header_bytes: int = MAX_HEADER
) -> tuple[dict[str, Frame], dict[str, str]]:
    """The tensors and the metadata of a file. Raises `MessageError`."""
    view = memoryview(data).toreadonly()
    begin = body_at(view[:8], header_bytes)
    if begin > len(view):
        raise _bad("its header is cut off")
    slots, metadata = parse(bytes(view[8:begin]))
    end = slots[-1].end if slots else 0
    if end != len(view) - begin:
        raise _bad(f"its header speaks of {end} bytes, there are {len(view) - begin}")
    return {slot.name: _frame(slot, view[begin:]) for slot in slots}, metadata


def digest(frame: Frame) -> str:
    """SHA-256 of dtype, shape and bytes: the name of a constant."""
    sha = hashlib.sha256(f"{frame.dtype}{list(frame.shape)}".encode())
    sha.update(frame.data)
    return sha.hexdigest()


# -- writing -------------------------------------------------------------------------------------


def layout(tensors: Mapping[str, Frame]) -> list[Slot]:
    """Where each tensor will lie: the widest dtypes first, so that all of them are aligned."""
    end = 0
    slots = []
    for name, frame in sorted(tensors.items(), key=lambda it: (-ITEM_SIZES[it[1].dtype], it[0])):
        size = len(frame.data)
        if size != frame_bytes(frame.dtype, frame.shape) or name == _METADATA:
            raise ValueError(f"{name!r}: {size} bytes are no {frame.dtype}{list(frame.shape)}")
        slots.append(Slot(name, frame.dtype, frame.shape, end, end + size))
        end += size
    return slots


def head(slots: Iterable[Slot], metadata: Mapping[str, str] = {}) -> bytes:
    """The beginning of a file: all but the tensors' bytes."""
    slots = list(slots)
    if _TRUE_DTYPES in metadata:
        raise ValueError(f"{_TRUE_DTYPES!r} in the metadata is the format's own")
    raw = {slot.name: slot.dtype for slot in slots if slot.dtype in _RAW}
    texts = dict(metadata) | ({_TRUE_DTYPES: _json(raw).decode()} if raw else {})
    entries = ({_METADATA: texts} if texts else {}) | {slot.name: _entry(slot) for slot in slots}
    text = _json(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry(slot: Slot) -> dict[str, Any]:
    code, shape = CODES.get(slot.dtype), slot.shape
    if code is None:
        code, shape = "U8", (*shape, ITEM_SIZES[slot.dtype])
    return {"dtype": code, "shape": shape, "data_offsets": (slot.start, slot.end)}


_json = msgspec.json.encode


# -- reading -------------------------------------------------------------------------------------

_Size = Annotated[int, Meta(ge=0, le=MAX_BYTES)]
_Texts = dict[str, str]


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Size, ...], Meta(max_length=MAX_DIMS)]
    data_offsets: tuple[_Size, _Size]


def body_at(first: bytes | memoryview, header_bytes: int = MAX_HEADER) -> int:
    """Where the tensors' bytes begin, by the first eight bytes of a file."""
    size = int.from_bytes(first, "little")
    if len(first) < 8:
        raise _bad("it is too short")
    if size > header_bytes:
        raise _bad(f"a header of {size} bytes is longer than {header_bytes}")
    return 8 + size


def parse(header: bytes) -> tuple[list[Slot], dict[str, str]]:
    """The tensors in the order in which they lie, and the metadata, from a header's JSON."""
    found = _object(header)
    metadata = _convert(found.pop(_METADATA, {}), _Texts, "its metadata")
    true = _true_dtypes(metadata)
    slots = [_slot(name, entry, true.pop(name, None)) for name, entry in found.items()]
    if true:
        raise _bad(f"it gives a dtype for {_short(next(iter(true)))}, which is not there")
    slots.sort(key=lambda slot: (slot.start, slot.end))
    _check_order(slots)
    for text in (*found, *metadata, *metadata.values()):
        _check_text(text)
    return slots, metadata


def _object(header: bytes) -> dict[str, Any]:
    if header[:1] != b"{":
        raise _bad("its header is no JSON object")
    try:
        return json.loads(header.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise _bad("its header is nested too deeply") from None
    except ValueError as error:
        raise _bad(f"its header cannot be read: {str(error)[:200]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ on which of two equal keys counts: none does."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _convert(value: Any, kind: Any, what: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _bad(f"{what}: {str(error)[:200]}") from None
    except UnicodeError:
        raise _bad(f"{what} has half a character") from None


def _true_dtypes(metadata: dict[str, str]) -> dict[str, str]:
    """What stands in the file as bytes only, by name; taken out of the metadata."""
    text = metadata.pop(_TRUE_DTYPES, None)
    if text is None:
        return {}
    try:
        found = msgspec.json.decode(text, type=_Texts)
    except (ValueError, RecursionError):
        raise _bad(f"its {_TRUE_DTYPES!r} cannot be read") from None
    if not _RAW.issuperset(found.values()):
        raise _bad(f"its {_TRUE_DTYPES!r} name a dtype that is not one of {sorted(_RAW)}")
    return found


def _slot(name: str, value: Any, true: str | None) -> Slot:
    entry: _Entry = _convert(value, _Entry, f"tensor {_short(name)}")
    dtype = _DTYPES.get(entry.dtype)
    shape = entry.shape
    if dtype is None:
        raise _bad(f"tensor {_short(name)} has dtype {_short(entry.dtype)}, which is not known")
    if true is not None:
        if dtype != "uint8" or shape[-1:] != (ITEM_SIZES[true],):
            raise _bad(f"tensor {_short(name)} is no {true} as bytes")
        dtype, shape = true, shape[:-1]
    _check_size(name, dtype, shape, entry.data_offsets)
    return Slot(name, dtype, shape, *entry.data_offsets)


def _check_size(name: str, dtype: str, shape: tuple[int, ...], offsets: tuple[int, int]) -> None:
    if ITEM_SIZES[dtype] * math.prod(size or 1 for size in shape) > MAX_BYTES:
        raise _bad(f"tensor {_short(name)} has an impossible shape")  # also beside a zero
    start, end = offsets
    if end - start != frame_bytes(dtype, shape):
        raise _bad(f"tensor {_short(name)} is not as long as its shape says")


def _check_order(slots: list[Slot]) -> None:
    end = 0
    for slot in slots:
        if slot.start != end:
            how = "overlaps another" if slot.start < end else "leaves a hole before it"
            raise _bad(f"tensor {_short(slot.name)} {how}")
        end = slot.end


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _bad("its header has half a character") from None


def _frame(slot: Slot, body: memoryview) -> Frame:
    data = body[slot.start : slot.end]
    # torch takes the other 254 values of a byte for undefined
    if slot.dtype == "bool" and bytes(data).translate(None, b"\0\1"):
        raise _bad(f"tensor {_short(slot.name)} holds bytes that are no bool")
    return Frame(slot.dtype, slot.shape, data)


def _bad(why: str) -> MessageError:
    return MessageError(f"this is not a file of tensors: {why}")


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:80] + "...")
