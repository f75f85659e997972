"""What a server says of itself and of its models."""

from __future__ import annotations

from typing import Any, Literal

from .base import Digest, Tell


class Limits(Tell, frozen=True):
    """What one request may ask for: the limits of `weft.settings`, as the server has them."""

    body_bytes: int
    constant_bytes: int
    result_bytes: int
    memory_bytes: int
    flops: int
    nodes: int
    price_seconds: float
    run_seconds: float
    log_bytes: int
    queued_jobs: int
    new_tokens: int = 4096
    stream_bytes: int = 16 << 20
    session_bytes: int = 4 << 30


class Hello(Tell, frozen=True):
    """The handshake."""

    protocols: tuple[int, ...]
    version: str
    capabilities: tuple[str, ...]
    limits: Limits


class ModelInfo(Tell, frozen=True):
    """One model of a server.

    `state` is `ready` (its weights are where it runs), `loading`, `warm` (they are not, but the
    system has their files in memory), `cold` (they are on the disk), or `failed`. Jobs may be sent
    in all but the last: they wait for it. Bytes are measured: `host_bytes` and `device_bytes` are
    what its worker takes now, `need_bytes` and `need_device_bytes` what the last load took,
    `loaded_bytes` how much of `weight_bytes` is there. `used` is when a job began or ended last, in
    seconds since 1970.
    """

    id: str
    family: str
    class_name: str
    fingerprint: str
    dtype: str
    parameters: int
    state: str = "ready"
    reason: str | None = None
    pinned: bool = True
    host_bytes: int = 0
    device_bytes: int = 0
    need_bytes: int = 0
    need_device_bytes: int = 0
    weight_bytes: int = 0
    loaded_bytes: int = 0
    used: float | None = None


class ModelList(Tell, frozen=True):
    models: tuple[ModelInfo, ...]


class TensorCard(Tell, frozen=True):
    """A parameter or buffer. `of` is the first path of the same tensor, where it stands twice."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    of: str | None = None


class ModuleCard(Tell, frozen=True):
    """One module of a tree. `kind` is its class; `base` the plain container it is, if it is one.

    `rule` says how its result follows from its one argument (`signatures.rules`): `linear`,
    `transposed`, `embedding`, `same` (shape and dtype of the argument), or nothing is known. `of`
    is the first path of the same module. `details` is what `print` shows between its brackets.
    """

    path: str
    kind: str
    base: Literal["", "list", "sequential", "dict"] = ""
    parameters: tuple[TensorCard, ...] = ()
    buffers: tuple[TensorCard, ...] = ()
    plain: dict[str, bool | int | float | str | None] = {}
    rule: str | None = None
    of: str | None = None
    details: str = ""


class TokenizerCard(Tell, frozen=True):
    """A tokenizer: the file of `tokenizers`, where it gives the same ids as the model's own.

    Without it (`json` is None) the server makes the ids. `decodes` says whether the file also gives
    the same texts; `chat` whether there is a template. `special` are its marks and their ids.
    """

    json: str | None = None
    decodes: bool = False
    chat: bool = False
    special: dict[str, tuple[str, int]] = {}


class ModelCard(Tell, frozen=True):
    """A model as data: all that a client needs to record on it without having it."""

    info: ModelInfo
    modules: tuple[ModuleCard, ...]
    config: dict[str, Any] = {}
    takes: tuple[str, ...] = ()
    takes_any: bool = False
    model_type: str = ""
    vocab: int = 0
    positions: int | None = None
    pad: int = 0
    attention: str | None = None
    tokenizer: TokenizerCard | None = None
    source: str = ""
    generation: dict[str, Any] = {}


class Tables(Tell, frozen=True):
    """Signatures as bytes of `signatures.tables`."""

    data: bytes


class SourceText(Tell, frozen=True):
    """A source: the SHA-256 of its text, the text, and its operations: name, line from 0, and the
    end of the name by which it may be called, too. `kin` are the modules for which it is the same.
    `data` is as in `Tables`, with the sites of operations among the others."""

    digest: Digest
    text: str
    operations: tuple[tuple[str, int, str], ...]
    kin: tuple[str, ...] = ()
    data: bytes = b""


class Applied(Tell, frozen=True):
    """What a module gives, as bytes of `signatures.tables`."""

    data: bytes


class Missing(Tell, frozen=True):
    digests: tuple[str, ...]


class Tokens(Tell, frozen=True):
    """Ids of the texts and chats that were asked about; texts of the rows."""

    rows: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...] = ()


class ModelStatus(Tell, frozen=True):
    """`waiting` jobs are priced or about to be, `running` ones have a worker."""

    id: str
    state: str
    waiting: int
    running: int
    host_bytes: int = 0
    device_bytes: int = 0
    used: float | None = None


class UsageRow(Tell, frozen=True):
    """What one owner used on one day (UTC), of one model or, as "", of none in particular.

    `cost` is in floating point operations, as priced; `seconds` those of the accelerator.
    """

    owner: str
    day: str
    model: str = ""
    jobs: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    up: int = 0
    down: int = 0
    requests: int = 0
    refusals: int = 0
    weights: int = 0


class UsageList(Tell, frozen=True):
    """What was used, and what the key that asked may use. A limit of 0 is none where it says so."""

    usage: tuple[UsageRow, ...]
    limits: dict[str, float] = {}
    weight: float = 1.0
    expires: float | None = None


class EditInfo(Tell, frozen=True):
    """A saved edit: its name, and the size of its file."""

    name: str
    bytes: int


class EditList(Tell, frozen=True):
    edits: tuple[EditInfo, ...]


class ServerStatus(Tell, frozen=True):
    version: str
    seconds: float
    models: tuple[ModelStatus, ...]


class Health(Tell, frozen=True):
    """`live`: this process answers. `ready`: all parts are there, and every model that the server's
    own configuration pins is loaded. Others are told of among the parts."""

    live: bool
    ready: bool
    parts: dict[str, str] = {}
