"""From the inputs of a message to the call of the model's forward.

    call = call_of(submit.inputs, {"input_ids": Frame(...)}, known)
    net(*call.args, **call.kwargs)

Nothing that the message says is believed: language inputs go through `families.prepare` again, so
that the call is the one that the same inputs give on the user's machine; arguments for any other
module are built from data and hold tensors and plain values only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from weft.errors import InputError, MessageError
from weft.families.any_module import prepare_any
from weft.families.call import ModelCall
from weft.families.forward import ForwardOptions
from weft.families.prepare import prepare_language
from weft.graph.frame import Frame
from weft.graph.node import Ref
from weft.kernels.frames import to_tensor
from weft.wire.messages import Inputs, LanguageInputs, PlainInputs
from weft.wire.structures import build

from .known import Known

_MAX_NAME = 256


def call_of(inputs: Inputs, tensors: Mapping[str, Frame], known: Known) -> ModelCall:
    """The call that `inputs` mean. `tensors` are theirs alone, each of them used.

    Raises `InputError` for inputs that the model cannot take, `UnknownOptionError` for options that
    it has no use for, `MessageError` for a message that does not hold together.
    """
    if isinstance(inputs, LanguageInputs):
        _check_family(known, "language")
        return _language(inputs, tensors, known)
    if known.facts is None or not known.facts.encoder:  # that may be opened either way
        _check_family(known, "plain")
    return _plain(inputs, tensors)


def _check_family(known: Known, family: str) -> None:
    if known.family != family:
        raise InputError(
            f"this model takes {known.family} inputs, not {family} ones",
            fix="open the model with the class that fits it: LanguageModel or Model",
        )


def _language(inputs: LanguageInputs, tensors: Mapping[str, Frame], known: Known) -> ModelCall:
    if len(set(inputs.given)) != len(inputs.given):
        raise MessageError("an input is given twice")
    _check_names(set(inputs.given), tensors)
    options = ForwardOptions(**{name: getattr(inputs.options, name) for name in _OPTIONS})
    for name in inputs.given:
        _check_kind(name, tensors[name])
    given = {name: to_tensor(tensors[name]) for name in inputs.given}
    assert known.facts is not None  # of the language family
    return prepare_language(None, None, known.facts, options=options, tensors=given)


_OPTIONS = ForwardOptions.__dataclass_fields__
_WHOLE = ("int64", "int32", "int16", "int8", "uint8")
_KINDS = {
    "inputs_embeds": ("float32", "bfloat16", "float16", "float64"),
    "attention_mask": ("bool", *_WHOLE, "float32", "bfloat16", "float16", "float64"),
}


def _check_kind(name: str, frame: Frame) -> None:
    if frame.dtype not in _KINDS.get(name, _WHOLE):
        raise InputError(f"{name} cannot be {frame.dtype}")
    if len(frame.shape) > 3 or 0 in frame.shape:
        raise InputError(f"{name} cannot have the shape {list(frame.shape)[:8]}")


def _plain(inputs: PlainInputs, tensors: Mapping[str, Frame]) -> ModelCall:
    names = [name for name, _ in inputs.kwargs]
    if len(set(names)) != len(names) or any(len(name) > _MAX_NAME for name in names):
        raise MessageError("a keyword of the inputs stands twice, or is too long")
    used: dict[str, Tensor] = {}
    value_of = _tensor_of(tensors, used)
    args = tuple([build(arg, value_of) for arg in inputs.args])
    kwargs = {name: build(arg, value_of) for name, arg in inputs.kwargs}
    _check_names(used.keys(), tensors)
    return prepare_any(args, kwargs)


def _tensor_of(tensors: Mapping[str, Frame], used: dict[str, Tensor]) -> Callable[[Ref], Any]:
    """What a `Ref` in the inputs stands for; the same one is the same tensor."""

    def value_of(ref: Ref) -> Tensor:
        name = f"in.{ref.node}"
        if name not in used:
            if ref.out or name not in tensors:
                raise MessageError(f"the inputs name the tensor {name}, which is not there")
            used[name] = to_tensor(tensors[name])
        return used[name]

    return value_of


def _check_names(wanted: Any, tensors: Mapping[str, Frame]) -> None:
    odd = sorted(wanted ^ tensors.keys())
    if odd:
        raise MessageError(f"{odd[0][:80]!r} is not both in the inputs and among their tensors")
