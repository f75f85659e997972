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

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from weft.errors import MessageError, TravelError
from weft.graph.node import Arg, Graph
from weft.graph.site import Site

PROTOCOL = 1

# `$` alone would let a line break follow
Id = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+(?!\n)$")]
Seconds = Annotated[float, Meta(gt=0, le=10**10)]
ModelId = Annotated[str, Meta(min_length=1, max_length=200)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]
"""SHA-256 of a tensor: of `dtype`, the shape as a JSON list, and its bytes (`frames.digest`)."""
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Ask(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a client sends."""


class Tell(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a server sends."""


# -- inputs of a model ---------------------------------------------------------------------------


class LanguageOptions(Ask, frozen=True):
    """Options of one forward pass of a language model: `families.forward.ForwardOptions`."""

    use_cache: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    output_router_logits: bool = False
    logits_to_keep: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0


class LanguageInputs(Ask, frozen=True, tag="language"):
    """Tokens for a language model. `given` names the tensors in the request's `tensors`.

    A mask says which positions are real; position ids only where the user gave them.
    """

    given: Annotated[
        tuple[
            Literal[
                "input_ids",
                "attention_mask",
                "position_ids",
                "inputs_embeds",
                "token_type_ids",
                "decoder_input_ids",
            ],
            ...,
        ],
        Meta(min_length=1, max_length=6),
    ]
    options: LanguageOptions = LanguageOptions()


class PlainInputs(Ask, frozen=True, tag="plain"):
    """Arguments for any other module. `Ref(n)` in them is the tensor `"in.n"` of `tensors`."""

    args: Annotated[tuple[Arg, ...], Meta(max_length=1024)] = ()
    kwargs: Annotated[tuple[tuple[str, Arg], ...], Meta(max_length=1024)] = ()


Inputs = LanguageInputs | PlainInputs


Ids = Annotated[tuple[TokenId, ...], Meta(max_length=4096)]
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]
Part = Annotated[float, Meta(ge=0.0, le=1.0)]
Whole = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Text = Annotated[str, Meta(min_length=1, max_length=256)]


class Generation(Ask, frozen=True):
    """How a generation goes on, and when it ends: `families.sampling.Sampling`, complete.

    Null means that an option is off. `seed` keys the draws of tokens.
    """

    max_new_tokens: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    max_length: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    min_new_tokens: Whole | None = None
    min_length: Whole = 0
    do_sample: bool = False
    temperature: Number | None = 1.0
    top_k: Whole | None = 50
    top_p: Part | None = 1.0
    min_p: Part | None = None
    typical_p: Part | None = 1.0
    epsilon_cutoff: Part | None = 0.0
    eta_cutoff: Part | None = 0.0
    repetition_penalty: Number | None = 1.0
    no_repeat_ngram_size: Whole | None = 0
    bad_words_ids: Annotated[tuple[Ids, ...], Meta(max_length=1024)] | None = None
    suppress_tokens: Ids | None = None
    begin_suppress_tokens: Ids | None = None
    forced_bos_token_id: TokenId | None = None
    forced_eos_token_id: Ids | None = None
    exponential_decay_length_penalty: tuple[Whole, Number] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    eos_token_id: Ids | None = None
    pad_token_id: TokenId | None = None
    stop_strings: Annotated[tuple[Text, ...], Meta(max_length=64)] | None = None
    use_cache: bool = True
    logits_to_keep: Whole = 1
    output_attentions: bool = False
    output_hidden_states: bool = False
    seed: Count | None = None


# -- asks ----------------------------------------------------------------------------------------


class Kept(Ask, frozen=True):
    """A value that a request of a session has left there: the request's number, the save's name."""

    number: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    name: Annotated[str, Meta(min_length=1, max_length=256)]


class Seat(Ask, frozen=True):
    """What a request is within a session: number `number` of session `id`; they run in this order.

    `keeps` are the names of saves that stay there, `uses` gives the values that stand for constants
    of the graph, by `Const.key`, `drops` names those that nobody needs once this request has run.
    With `same`, the graph is the one with this hash, which the session has sent before, and
    `Submit.graph` is empty.
    """

    id: Id
    number: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    keeps: Annotated[tuple[str, ...], Meta(max_length=65_536)] = ()
    uses: dict[str, Kept] = {}
    drops: Annotated[tuple[Kept, ...], Meta(max_length=65_536)] = ()
    same: Digest | None = None


class OpenSession(Ask, frozen=True):
    """A session on the worker of a model. The same `request_id` is the same session."""

    request_id: Id
    model: ModelId
    fingerprint: Digest


class Submit(Ask, frozen=True):
    """A job: a graph, its constants, and the call of the model to draw it through.

    `constants` gives for each `Const.key` of the graph the digest of its tensor, which is in
    `tensors` under that digest, or was uploaded before. `fingerprint` is that of the model that the
    graph was recorded on; without `strict` the graph may meet sizes other than the recorded ones.
    `weights` is a mark of the client's own (`engine.weights`), where it has any: a server with
    others refuses. `further` are the inputs of the invokes after the first, whose tensors have
    names that begin with the invoke's number (`1.input_ids`); with `alone` each has a forward pass
    of its own. With `generation` each input is the prompt of one; `generations` stands in its place
    where they are not alike, and has one for each input. The same `request_id` from the same owner
    is the same job, however often it arrives. `seat` makes it part of a session; its `request_id`
    is then `<session>-<number>`.
    """

    protocol: int
    request_id: Id
    model: ModelId
    fingerprint: Digest
    graph: Graph
    inputs: Inputs
    constants: dict[str, Digest] = {}
    tensors: bytes = b""
    strict: bool = True
    look: bool = False
    weights: Digest | None = None
    further: Annotated[tuple[Inputs, ...], Meta(max_length=511)] = ()
    alone: bool = False
    generation: Generation | None = None
    generations: Annotated[tuple[Generation, ...], Meta(max_length=512)] = ()
    seat: Seat | None = None
    keep_seconds: Seconds | None = None


class MissingQuery(Ask, frozen=True):
    """Which of these constants has the server not got from this owner?"""

    digests: Annotated[tuple[Digest, ...], Meta(max_length=65_536)]


class SignatureQuery(Ask, frozen=True):
    """What do the sites look like for this call? Asked for layouts that no formula covers.

    `turn`: in a generation from such a prompt, at its `first` forward, or at the `next` one.
    """

    model: ModelId
    fingerprint: Digest
    inputs: Inputs
    tensors: bytes = b""
    turn: Literal["first", "next"] | None = None


Operations = Annotated[
    tuple[Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,255}(?!\n)$")], ...],
    Meta(max_length=7),
]


class SourceQuery(Ask, frozen=True):
    """What is the source of this module's forward, or of what is called `inside` it, operation by
    operation? What those call is known for a call of the model only: `inputs`. With `sites` it is
    also asked what the operations of the source look like for this call. `turn` is that of
    `SignatureQuery`."""

    model: ModelId
    fingerprint: Digest
    path: Annotated[str, Meta(max_length=4096)]
    inside: Operations = ()
    inputs: Inputs | None = None
    tensors: bytes = b""
    sites: bool = False
    turn: Literal["first", "next"] | None = None


class Deploy(Ask, frozen=True):
    """One more model for the server, or one that it has, pinned otherwise or tried again.

    `source` is a folder that the operator lets models be deployed from, or an id of the hub that he
    listed; `name` is what clients will call it (by default the folder's name, or the id). The rest
    has the meaning that it has in `from_pretrained`. A `pinned` model is loaded at once, and stays.
    """

    source: Annotated[str, Meta(min_length=1, max_length=1024)]
    name: ModelId | None = None
    pinned: bool = False
    dtype: Annotated[str, Meta(pattern=r"^[a-z0-9_]{1,32}(?!\n)$")] | None = None
    attn_implementation: Annotated[str, Meta(pattern=r"^[a-z0-9_]{1,64}(?!\n)$")] | None = None
    device: Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)(?!\n)$")] | None = None


class Evict(Ask, frozen=True):
    """A model out of memory; the next job loads it again. With `forget` a deployed one is no more
    of this server at all: its jobs that wait end by name."""

    model: ModelId
    forget: bool = False


class Keep(Ask, frozen=True):
    """Keeps a job and its result for so many seconds after its end."""

    seconds: Seconds


class Layout(Ask, frozen=True):
    """A tensor without its numbers."""

    dtype: str
    shape: tuple[Count, ...]
    stride: tuple[Count, ...]
    offset: Count = 0


class ApplyQuery(Ask, frozen=True):
    """What does this module give for such arguments? `Ref(n)` in them is `layouts[n]`."""

    model: ModelId
    fingerprint: Digest
    path: Annotated[str, Meta(max_length=4096)]
    layouts: Annotated[tuple[Layout, ...], Meta(max_length=1024)]
    args: tuple[Arg, ...] = ()
    kwargs: tuple[tuple[str, Arg], ...] = ()


class ChatMessage(Ask, frozen=True):
    role: str
    content: str


class TokensQuery(Ask, frozen=True):
    """Token ids of texts, or of chats through the model's own template, or the text of rows of
    ids, by the server. Texts come first in the answer, then chats."""

    model: ModelId
    texts: Annotated[tuple[str, ...], Meta(max_length=65_536)] = ()
    chats: Annotated[tuple[tuple[ChatMessage, ...], ...], Meta(max_length=4096)] = ()
    rows: Annotated[tuple[tuple[TokenId, ...], ...], Meta(max_length=65_536)] = ()
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    skip_special_tokens: bool = False


# -- the server and its models -------------------------------------------------------------------


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
    """`live`: this process answers. `ready`: all parts are there and every model is loaded."""

    live: bool
    ready: bool
    parts: dict[str, str] = {}


# -- jobs ----------------------------------------------------------------------------------------


class ErrorReport(Tell, frozen=True):
    """An error as data: `weft.errors` by `code`. Never a traceback, a path or another's data.

    `kind` is the class of an exception of PyTorch's or the model's own. `request_id` is what the
    server's log has it under.
    """

    code: str
    message: str
    line: str | None = None
    fix: str | None = None
    kind: str = ""
    request_id: str | None = None
    missing: tuple[str, ...] = ()


class PriceInfo(Tell, frozen=True):
    """What the server says a graph costs: `run.price.Price`."""

    sites: int
    operations: int
    flops: int
    constant_bytes: int
    saved_bytes: int
    peak_bytes: int
    ends: Site | None = None


class ResultInfo(Tell, frozen=True):
    """What a job brought back: the size and SHA-256 of its file, the names of what it saved."""

    bytes: int
    sha256: str
    names: tuple[str, ...] = ()


class JobInfo(Tell, frozen=True):
    """A job, as its owner sees it. Times are seconds since 1970.

    `state` is `received`, `queued`, `running`, `done`, `failed` or `cancelled`. `stages` tells how
    long each took, in seconds: `price`, `queue`, `run`. While it waits, `ahead` counts the jobs
    that come before it, `estimate` says in how many seconds it may begin (jobs ahead, at the rate
    at which the last ones of this model were done, and the rest of a load), and `model_state` how
    its model is where that is not ready. `expires` is when the server forgets one that is over.
    `merged`: its forward was shared with jobs of others.
    """

    id: str
    state: str
    model: str
    created: float
    look: bool = False
    attempts: int = 0
    ahead: int | None = None
    price: PriceInfo | None = None
    result: ResultInfo | None = None
    error: ErrorReport | None = None
    stages: dict[str, float] = {}
    expires: float | None = None
    merged: bool = False
    estimate: float | None = None
    model_state: str | None = None


class JobList(Tell, frozen=True):
    jobs: tuple[JobInfo, ...]


class SessionInfo(Tell, frozen=True):
    """A session, as its owner sees it. Times are seconds since 1970.

    `state` is `open`, `closed` (its owner said so) or `expired` (nobody was heard of for `seconds`
    after `until`). `last` is the number of its last request, `failed` are the jobs of those that
    failed, by number, where it was asked.
    """

    id: str
    state: str
    model: str
    created: float
    until: float
    seconds: float
    last: int = 0
    failed: tuple[tuple[int, JobInfo], ...] = ()


class StateEvent(Tell, frozen=True, tag="state"):
    """The job moved on."""

    state: str
    attempts: int = 0


class LogEvent(Tell, frozen=True, tag="log"):
    """`tracer.log(...)`, as it happens."""

    text: str


VALUE_BYTES = 32 << 20
"""Bytes that one streamed value may have: it is one event, which is one line."""


class ValueEvent(Tell, frozen=True, tag="value"):
    """What `tracer.stream(...)` hands out, as it comes to be: a tuple.

    `Ref(n)` in `value` is the tensor `"n"` of `tensors`. `number` counts the values of the job from
    0; a job that is begun anew (`attempts`) gives the same ones again, under the same numbers.
    """

    number: int
    stream: int
    value: Arg
    tensors: bytes = b""


class ProgressEvent(Tell, frozen=True, tag="progress"):
    """How far the job is. `kind` is `run`: sites that have fired, of those the graph waits for; or
    `load`: bytes of its model's weights that are in memory, of all, while it waits for them."""

    done: int
    total: int
    kind: str = "run"


class EndEvent(Tell, frozen=True, tag="end"):
    """The job is over; nothing follows.

    result: the result file, where it is small and was asked for (`Weft-Inline`).
    """

    job: JobInfo
    result: bytes = b""


Event = StateEvent | LogEvent | ValueEvent | ProgressEvent | EndEvent

FINAL = ("done", "failed", "cancelled")
"""States that a job stays in."""


# -- what a result file says of itself -----------------------------------------------------------


class Manifest(Tell, frozen=True):
    """The head of a result file: what was saved, by name. `Ref(n)` in it is the tensor `"n"`.

    `ended` is the site at which the forward pass could stop.
    """

    saved: tuple[tuple[str, Arg], ...]
    ended: Site | None = None
    protocol: int = PROTOCOL


MESSAGES: dict[str, type[Struct]] = {
    kind.__name__: kind for base in (Ask, Tell) for kind in base.__subclasses__()
}
"""Every type of message, by name. Each has golden files: what was once sent keeps decoding."""


def owner_of(name: str) -> tuple[int, str]:
    """Of an input's name in `Submit.tensors`: its invoke, and its name among that invoke's."""
    number, dot, own = name.partition(".")
    if dot and number.isascii() and number.isdecimal() and len(number) < 5 and number[0] != "0":
        return int(number), own
    return 0, name


# -- bytes ---------------------------------------------------------------------------------------


def encode(message: Struct, form: str = "msgpack") -> bytes:
    """The bytes of a message; `form` is `msgpack` or `json`.

    Raises `TravelError` for what has no bytes: half a character, a number beyond 64 bits.
    """
    module = msgspec.json if form == "json" else msgspec.msgpack
    try:
        return module.encode(message)
    except (UnicodeEncodeError, OverflowError, RecursionError) as error:
        raise TravelError(f"this cannot be written as a message: {error}") from None


def decode(data: bytes, kind: Any, form: str = "msgpack") -> Any:
    """The message. Raises `MessageError`, saying what is wrong and where."""
    module = msgspec.json if form == "json" else msgspec.msgpack
    try:
        return module.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeError, ValueError) as error:
        raise MessageError(f"this is not a message that can be read: {str(error)[:500]}") from None
