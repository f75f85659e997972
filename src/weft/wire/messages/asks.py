"""What a client asks: requests, sessions, deployments, questions about a model."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from weft.graph.node import Arg, Graph

from .base import Ask, Count, Digest, Id, ModelId, Seconds, TokenId
from .inputs import Generation, Inputs


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


def owner_of(name: str) -> tuple[int, str]:
    """Of an input's name in `Submit.tensors`: its invoke, and its name among that invoke's."""
    number, dot, own = name.partition(".")
    if dot and number.isascii() and number.isdecimal() and len(number) < 5 and number[0] != "0":
        return int(number), own
    return 0, name
