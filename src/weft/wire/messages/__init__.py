"""Everything that crosses between a client and a server, in one place. No torch.

Messages are frozen, tagged structs. A client's messages refuse unknown fields (`Ask`): an option
that nobody understands must not be dropped in silence. A server's messages allow them (`Tell`): a
newer server may say more within one protocol version. Both have a binary form (msgpack) and one for
people (JSON); bytes stand in JSON as base64.

Tensors travel as safetensors frames (`wire.frames`): `tensors: bytes` is one such file.

    data = encode(Submit(...))             # bytes, msgpack
    decode(data, Submit)                   # raises MessageError
"""

from __future__ import annotations

from msgspec import Struct

from .asks import (
    ApplyQuery,
    ChatMessage,
    Deploy,
    Evict,
    Keep,
    Kept,
    Layout,
    MissingQuery,
    OpenSession,
    Operations,
    Seat,
    SignatureQuery,
    SourceQuery,
    Submit,
    TokensQuery,
    owner_of,
)
from .base import PROTOCOL, Ask, Count, Digest, Id, ModelId, Seconds, Tell, TokenId
from .inputs import (
    Generation,
    Ids,
    Inputs,
    LanguageInputs,
    LanguageOptions,
    Number,
    Part,
    PlainInputs,
    Text,
    Whole,
)
from .jobs import (
    FINAL,
    VALUE_BYTES,
    EndEvent,
    ErrorReport,
    Event,
    JobInfo,
    JobList,
    LogEvent,
    Manifest,
    PriceInfo,
    ProgressEvent,
    ResultInfo,
    SessionInfo,
    StateEvent,
    ValueEvent,
)
from .models import (
    Applied,
    EditInfo,
    EditList,
    Health,
    Hello,
    Limits,
    Missing,
    ModelCard,
    ModelInfo,
    ModelList,
    ModelStatus,
    ModuleCard,
    ServerStatus,
    SourceText,
    Tables,
    TensorCard,
    TokenizerCard,
    Tokens,
    UsageList,
    UsageRow,
)
from .written import decode, encode

__all__ = [
    "Applied",
    "ApplyQuery",
    "Ask",
    "ChatMessage",
    "Count",
    "Deploy",
    "Digest",
    "EditInfo",
    "EditList",
    "EndEvent",
    "ErrorReport",
    "Event",
    "Evict",
    "FINAL",
    "Generation",
    "Health",
    "Hello",
    "Id",
    "Ids",
    "Inputs",
    "JobInfo",
    "JobList",
    "Keep",
    "Kept",
    "LanguageInputs",
    "LanguageOptions",
    "Layout",
    "Limits",
    "LogEvent",
    "MESSAGES",
    "Manifest",
    "Missing",
    "MissingQuery",
    "ModelCard",
    "ModelId",
    "ModelInfo",
    "ModelList",
    "ModelStatus",
    "ModuleCard",
    "Number",
    "OpenSession",
    "Operations",
    "PROTOCOL",
    "Part",
    "PlainInputs",
    "PriceInfo",
    "ProgressEvent",
    "ResultInfo",
    "Seat",
    "Seconds",
    "ServerStatus",
    "SessionInfo",
    "SignatureQuery",
    "SourceQuery",
    "SourceText",
    "StateEvent",
    "Submit",
    "Tables",
    "Tell",
    "TensorCard",
    "Text",
    "TokenId",
    "TokenizerCard",
    "Tokens",
    "TokensQuery",
    "UsageList",
    "UsageRow",
    "VALUE_BYTES",
    "ValueEvent",
    "Whole",
    "decode",
    "encode",
    "owner_of",
]

MESSAGES: dict[str, type[Struct]] = {
    kind.__name__: kind for base in (Ask, Tell) for kind in base.__subclasses__()
}
"""Every type of message, by name. Each has golden files: what was once sent keeps decoding."""
