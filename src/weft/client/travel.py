"""From a request in this process to what can travel: a graph, its inputs and constants as data.

    parcel = pack(request, "language")
    message = parcel.submit(request_id, model, fingerprint)
    body = fitting(message, limits)

Constants are named by their digest. Small ones go inside the message, each time; large ones are
uploaded once for each server and key, and only named afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from msgspec import ValidationError, convert

from weft.errors import LimitError, TravelError
from weft.graph.frame import ITEM_SIZES, Frame, frame_bytes
from weft.graph.node import Const, Graph, Ref
from weft.kernels.frames import to_frame
from weft.settings import TEXTS
from weft.wire import frames
from weft.wire.messages import (
    PROTOCOL,
    Generation,
    Inputs,
    LanguageInputs,
    LanguageOptions,
    Limits,
    PlainInputs,
    Submit,
    encode,
)
from weft.wire.structures import lower

from .backend import Request

SMALL = 64 << 10
"""Bytes of a constant below which it goes inside the message."""
INSIDE = 8 << 20
"""Bytes of all that go inside together; beyond, they are uploaded too."""

TENSOR_NAMES = (
    *("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids"),
    "decoder_input_ids",
)


@dataclass(frozen=True)
class Parcel:
    """A request, ready to travel. `large` holds tensors still: their bytes are made when needed."""

    graph: Graph
    inputs: Inputs
    constants: dict[str, str]
    inside: dict[str, Frame]
    large: dict[str, torch.Tensor]
    strict: bool = True
    look: bool = False
    further: tuple[Inputs, ...] = ()
    alone: bool = False
    generations: tuple[Generation, ...] = ()

    def submit(
        self, request_id: str, model: str, fingerprint: str, weights: str | None = None
    ) -> Submit:
        """The message."""
        alike = len(set(self.generations)) == 1
        return Submit(
            protocol=PROTOCOL,
            request_id=request_id,
            model=model,
            fingerprint=fingerprint,
            graph=self.graph,
            inputs=self.inputs,
            constants=self.constants,
            tensors=frames.write(self.inside) if self.inside else b"",
            strict=self.strict,
            look=self.look,
            weights=weights,
            further=self.further,
            alone=self.alone,
            generation=self.generations[0] if alike else None,
            generations=() if alike else self.generations,
        )


def fitting(message: Submit, limits: Limits) -> bytes:
    """The bytes of the message. Raises `LimitError` for what the server is sure to refuse.

    It says so itself, too; but to a client in the middle of a long body it can only hang up.
    """
    graph = message.graph
    for node in graph.nodes:
        if isinstance(node, Const):
            size = frame_bytes(node.dtype, node.shape)
            line = graph.where[node.at] if graph.where else None
            what = f"a constant, {node.dtype}{list(node.shape)}, has {size:,} bytes"
            _check_size("constant_bytes", size, limits.constant_bytes, what, line)
    body = encode(message)
    what = f"graph, inputs and small constants have {len(body):,} bytes"
    _check_size("body_bytes", len(body), limits.body_bytes, what)
    return body


def _check_size(name: str, size: int, limit: int, what: str, line: object = None) -> None:
    if size > limit:
        raise LimitError(
            f"{what}; the server's {name} is {limit:,} ({TEXTS[name]})",
            line=line,
            fix="give less at once, or make it from values of the block (h.new_zeros, x.expand)",
        )


def pack(request: Request, family: str, small: int = SMALL) -> Parcel:
    """The request as data. Raises `TravelError` for what has no form in which it could travel."""
    inputs, inside = pack_inputs(family, request.args, request.kwargs)
    further = []
    for number, (args, kwargs) in enumerate(request.further, 1):
        others, frames_of = pack_inputs(family, args, kwargs)
        further.append(others)
        inside |= {f"{number}.{name}": frame for name, frame in frames_of.items()}
    constants: dict[str, str] = {}
    large: dict[str, torch.Tensor] = {}
    left = INSIDE
    for key, tensor in request.constants.items():
        frame = frame_of(tensor, f"constant {key}")
        digest = constants[key] = frames.digest(frame)
        size = len(frame.data)
        if size < small and size <= left:
            inside[digest] = frame
            left -= size
        else:
            large[digest] = tensor
    return Parcel(
        request.graph,
        inputs,
        constants,
        inside,
        large,
        request.strict,
        request.look,
        tuple(further),
        request.alone,
        tuple([chosen_how(one) for one in request.sampling or ()]),
    )


def chosen_how(sampling: Any) -> Generation:
    """Options of a generation (`families.sampling.Sampling`) as data. Raises `TravelError`."""
    names = Generation.__struct_fields__
    try:
        return convert({name: getattr(sampling, name) for name in names}, Generation)
    except ValidationError as error:
        raise TravelError(
            f"an option of the generation does not travel: {error}",
            fix="give numbers, text and lists of them",
        ) from None


def pack_inputs(
    family: str, args: Iterable[Any], kwargs: Mapping[str, Any]
) -> tuple[Inputs, dict[str, Frame]]:
    """The arguments of a model's forward as data, and the tensors among them."""
    if family == "language":
        return _language(kwargs)
    return _plain(args, kwargs)


def constant_file(tensor: torch.Tensor) -> bytes:
    """What is uploaded for a constant."""
    return frames.write({"x": frame_of(tensor, "a constant")})


def frame_of(tensor: torch.Tensor, what: str) -> Frame:
    """The bytes of a tensor. Raises `TravelError` for one that has none of its own."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_meta or dtype not in ITEM_SIZES:
        kind = "a meta tensor" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
        raise TravelError(
            f"{what} does not travel to a server: it is {kind}",
            fix=f"use a dense tensor of {', '.join(ITEM_SIZES)}",
        )
    return to_frame(tensor.detach().resolve_conj().resolve_neg())


def _language(kwargs: Mapping[str, Any]) -> tuple[LanguageInputs, dict[str, Frame]]:
    tensors = {name: kwargs[name] for name in TENSOR_NAMES if name in kwargs}
    options = {name: value for name, value in kwargs.items() if name not in tensors}
    if odd := options.keys() - set(LanguageOptions.__struct_fields__):
        raise TravelError(
            f"the option {min(odd)!r} does not travel to a server",
            fix="leave it out, or run the block here: remote=False",
        )
    inputs = LanguageInputs(given=cast(Any, tuple(tensors)), options=LanguageOptions(**options))
    return inputs, {name: frame_of(tensor, name) for name, tensor in tensors.items()}


def _plain(args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[PlainInputs, dict[str, Frame]]:
    found: dict[int, int] = {}
    tensors: list[torch.Tensor] = []

    def ref_of(value: Any) -> Ref | None:
        if not isinstance(value, torch.Tensor):
            return None
        number = found.setdefault(id(value), len(found))
        if number == len(tensors):
            tensors.append(value)
        return Ref(number)

    inputs = PlainInputs(
        args=tuple([lower(arg, ref_of) for arg in args]),
        kwargs=tuple([(name, lower(arg, ref_of)) for name, arg in kwargs.items()]),
    )
    return inputs, {
        f"in.{n}": frame_of(t, f"an input {list(t.shape)}") for n, t in enumerate(tensors)
    }
