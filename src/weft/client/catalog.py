"""What a server has: its models, what they look like as data, and how it is doing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn
from urllib.parse import quote

from weft.errors import ModelNotReadyError, WrongModelError
from weft.wire.messages import (
    Applied,
    ApplyQuery,
    Deploy,
    Evict,
    ModelCard,
    ModelInfo,
    ModelList,
    ServerStatus,
    SignatureQuery,
    SourceQuery,
    SourceText,
    Tables,
    Tokens,
    TokensQuery,
)
from weft.wire.reports import escaped

from . import sync
from .core import Patience, Talk
from .effects import Sleep, Steps
from .figures import ago, size_of
from .servers import Server, server_at


class Models(list[ModelInfo]):
    """The models of a server; prints as a table."""

    def __repr__(self) -> str:
        rows = [("id", "class", "dtype", "parameters", "state", "memory", "last use")]
        rows += [
            (m.id, m.class_name, m.dtype, f"{m.parameters:,}", _state(m), _memory(m), _use(m))
            for m in self
        ]
        cells = [[escaped(cell, keep="") for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _state(model: ModelInfo) -> str:
    if model.state == "loading" and model.weight_bytes:
        return f"loading {model.loaded_bytes / model.weight_bytes:.0%}"
    return f"{model.state}, pinned" if model.pinned and model.host_bytes else model.state


def _memory(model: ModelInfo) -> str:
    """What it takes; what it took when it was there, in brackets."""
    now = [size_of(n) for n in (model.host_bytes, model.device_bytes) if n]
    last = [size_of(n) for n in (model.need_bytes, model.need_device_bytes) if n]
    return " + ".join(now) or (f"({' + '.join(last)})" if last else "")


def _use(model: ModelInfo) -> str:
    return "" if model.used is None else f"{ago(model.used)} ago"


@dataclass(frozen=True)
class Wanted:
    """The model that a handle stands for: by its name, if it has one, else by its fingerprint.

    `strictly` asks for the name: where a name says which weights are meant, another model of the
    same architecture is the wrong one. `weights` marks those that the handle has at hand, if any.
    """

    name: str | None
    fingerprint: str
    strictly: bool = False
    weights: str | None = field(default=None, compare=False)


def models(remote: bool | str | Server = True) -> Models:
    """The models that a server has, as a list that prints as a table.

    remote: which server: True (the configured one) or an address, as in `model.trace`. Each entry
    has `.id` (what `LanguageModel(id, remote=...)` takes), `.class_name`, `.dtype`, `.parameters`
    (how many), `.state` (`ready`, `loading`, `warm`, `cold` or `failed`), `.reason`,
    `.fingerprint`, `.host_bytes` and `.device_bytes` (measured) and `.used` (its last job).
    Raises `ServerAwayError`, `AccessError` (the key), `VersionMismatchError`.
    """
    server = server_at(remote)
    return Models(sync.run(server, listed(Talk(server))).models)


def status(remote: bool | str | Server = True) -> ServerStatus:
    """How a server is doing.

    remote: which server, as in `models`. It has `.version`, `.seconds` (how long it is up) and for
    each of `.models` `.id`, `.state`, `.waiting` and `.running` (how many jobs, everybody's).
    Raises what `models` raises.
    """
    server = server_at(remote)
    talk = Talk(server)
    return sync.run(server, _after_hello(talk, talk.ask("GET", "/api/status", ServerStatus)))


def listed(talk: Talk) -> Steps[ModelList]:
    """The models of the server."""
    yield from talk.hello()
    return (yield from talk.ask("GET", "/api/models", ModelList))


def chosen(talk: Talk, wanted: Wanted) -> Steps[ModelInfo]:
    """Which of the server's models is the wanted one. Raises `WrongModelError`.

    One found by its name is remembered; `forget` where the server turns out to have changed.
    """
    found = talk.server.resolved.get(wanted)
    if found is None:
        found = yield from _choose(talk, wanted)
        if found.id == wanted.name:
            talk.server.resolved[wanted] = found
    return found


def forget(server: Server, wanted: Wanted) -> None:
    server.resolved.pop(wanted, None)


def _choose(talk: Talk, wanted: Wanted) -> Steps[ModelInfo]:
    patience = Patience(talk)
    while True:
        there = (yield from listed(talk)).models
        found = _match(there, wanted)
        if found is not None:
            return found
        loading = any(model.state == "loading" for model in there)
        if not loading or not patience.lasts(0.5):
            _refuse(talk, there, wanted)
        yield Sleep(0.5)


def _match(there: tuple[ModelInfo, ...], wanted: Wanted) -> ModelInfo | None:
    for model in there:
        if model.id == wanted.name:
            return _usable(model)
    same = [model for model in there if model.fingerprint == wanted.fingerprint]
    return _usable(same[0]) if len(same) == 1 and not wanted.strictly else None


def _usable(model: ModelInfo) -> ModelInfo:
    if model.state == "failed":
        why = escaped(model.reason or "it could not be loaded")
        raise ModelNotReadyError(f"the server has {escaped(model.id)}, but not ready: {why}")
    return model


def _refuse(talk: Talk, there: tuple[ModelInfo, ...], wanted: Wanted) -> NoReturn:
    same = [escaped(m.id) for m in there if m.fingerprint == wanted.fingerprint]
    names = ", ".join(escaped(model.id) for model in there) or "none"
    what = f"no model {wanted.name!r}" if wanted.name else "no model like this one"
    if len(same) > 1:
        what = f"{len(same)} models like this one: {', '.join(same)}"
    way_out = (
        f"open it by its id there: weft.LanguageModel({same[0]!r}, remote=True)" if same else None
    )
    raise WrongModelError(
        f"the server at {talk.server.url} has {what}; it serves: {names}",
        fix=way_out or "open one of these, or ask who runs the server for yours",
    )


# -- models that come and go ----------------------------------------------------------------------


def deploy(talk: Talk, query: Deploy) -> Steps[ModelInfo]:
    """One more model for the server. Raises `AccessError` for one that its operator does not allow
    or a key without the scope `deploy`."""
    yield from talk.hello()
    return (yield from talk.ask("POST", "/api/models", ModelInfo, query))


def evict(talk: Talk, query: Evict) -> Steps[ModelInfo]:
    """A model out of memory, or off the server."""
    yield from talk.hello()
    return (yield from talk.ask("POST", "/api/models/evict", ModelInfo, query))


# -- a model as data -----------------------------------------------------------------------------


def card(talk: Talk, model: str) -> Steps[ModelCard]:
    """All that is needed to record on a model without having it."""
    yield from talk.hello()
    return (yield from talk.ask("GET", f"/api/card?model={quote(model, safe='')}", ModelCard))


def tables(talk: Talk, model: str) -> Steps[bytes]:
    """What the server knows of the model's sites so far."""
    path = f"/api/tables?model={quote(model, safe='')}"
    return (yield from talk.ask("GET", path, Tables)).data


def signature(talk: Talk, query: SignatureQuery) -> Steps[bytes]:
    """What the sites look like for one call."""
    return (yield from talk.ask("POST", "/api/signature", Tables, query)).data


def source(talk: Talk, query: SourceQuery) -> Steps[SourceText]:
    """The source of a forward, and its operations."""
    return (yield from talk.ask("POST", "/api/source", SourceText, query))


def applied(talk: Talk, query: ApplyQuery) -> Steps[bytes]:
    """What one of the model's modules gives for some layouts."""
    return (yield from talk.ask("POST", "/api/apply", Applied, query)).data


def tokens(talk: Talk, query: TokensQuery) -> Steps[Tokens]:
    """Token ids of texts or chats."""
    return (yield from talk.ask("POST", "/api/tokens", Tokens, query))


def _after_hello(talk: Talk, steps: Steps[ServerStatus]) -> Steps[ServerStatus]:
    yield from talk.hello()
    return (yield from steps)
