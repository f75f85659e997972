"""The OpenAPI document, made of the table of routes and the messages themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from weft.wire.messages import PROTOCOL, Digest, ErrorReport, Event, Id, JobInfo, ModelId, Submit

from .entry import Entry

_REF = "#/components/schemas/{name}"
IN_PATH: dict[str, tuple[Any, str]] = {
    "id": (Id, "the id of a job of yours"),
    "name": (Id, "the name of an edit of yours"),
    "model": (ModelId, "the id of a model"),
    "digest": (Digest, "the SHA-256 of a tensor: of its dtype, its shape and its bytes"),
}
_EVERYWHERE = {
    400: "the request is malformed",
    403: "a Host or Origin that the server does not answer, or a key without the scope",
    500: "a mistake of the server's",
}
_ALWAYS = {"Weft-Request-Id": "what the server's log knows the request by"}
_OFTEN = {
    206: {"Content-Range": "which bytes these are", "ETag": "of the whole"},
    304: {"ETag": "of what the client has"},
    416: {"Content-Range": "how many bytes there are"},
    429: {"Retry-After": "seconds"},
    503: {"Retry-After": "seconds, where asking again is of use"},
}
"""Headers of a reply: those that it always has, and those that it may have."""
_TEXT = {"type": "string"}
_HEADERS: dict[str, dict[str, Any]] = {
    "Weft-Protocol": {"type": "string", "enum": [str(PROTOCOL)]},
    "Last-Event-ID": {"type": "string", "pattern": "^[0-9]{0,18}$"},
}
"""What a header of a request looks like, where not any text will do."""


def document(routes: Iterable[Entry], version: str) -> dict[str, Any]:
    """The whole document as plain data."""
    routes = tuple(routes)
    kinds = {kind for entry in routes for kind in (entry.takes, entry.gives) if _is_message(kind)}
    kinds |= {ErrorReport, *Event.__args__}
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
    schemas[Submit.__name__]["properties"]["protocol"] = {"const": PROTOCOL}
    paths: dict[str, Any] = {}
    for entry in routes:
        paths.setdefault(entry.path, {})[entry.method.lower()] = operation(entry)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Weft",
            "version": version,
            "description": "Experiments on the inside of a model, as graphs, drawn by a server.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def operation(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": f"{entry.method.lower()}{_words(entry.path)}",
        "summary": entry.text,
        "parameters": [*_path(entry), *_query(entry), *_headers(entry)],
        "responses": _responses(entry),
    }
    if entry.takes is not None:
        found["requestBody"] = {"required": True, "content": _content(entry.takes)}
    if entry.key:
        found["security"] = [{"key": [entry.scope]}]
    return found


def _words(path: str) -> str:
    return "".join(part.strip("{}").capitalize() for part in path.replace(".", "/").split("/"))


def _is_message(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


def _content(kind: Any) -> dict[str, Any]:
    """What a body is, by media type."""
    if kind is None:
        return {}
    if not _is_message(kind):
        return {kind: {"schema": _OTHERS.get(kind, {})}}
    return {"application/json": {"schema": _ref(kind)}, "application/msgpack": {"schema": {}}}


def _ref(kind: Any) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}


_EVENTS = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9]{1,19}$"},
        "event": {"enum": ["accepted", *(kind.__struct_config__.tag for kind in Event.__args__)]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [_ref(kind) for kind in (JobInfo, *Event.__args__)]},
        },
    },
}
"""One event of a stream."""
_OTHERS = {"text/html": _TEXT, "text/event-stream": _EVENTS}
"""What is no message."""


def _responses(entry: Entry) -> dict[str, Any]:
    good = {status for status in entry.statuses if status < 300} | {entry.status}
    said = {entry.status: "what was asked for"} | _EVERYWHERE | entry.statuses
    if entry.key:
        said[401] = "no valid key"
        said.setdefault(429, "a limit of the key; Retry-After says when to come back")
    return {str(status): _response(entry, status, said[status], good) for status in sorted(said)}


def _response(entry: Entry, status: int, text: str, good: set[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"description": text, "headers": _reply_headers(status)}
    if status == 304 or (status in good and entry.gives is None):
        return found
    content = _content(entry.gives if status in good else _unwell(entry, status))
    if status == 200 and entry.path == "/api/jobs" and entry.method == "POST":
        content |= _content("text/event-stream")
    return {**found, "content": content}


def _reply_headers(status: int) -> dict[str, Any]:
    said = [(name, text, True) for name, text in _ALWAYS.items()]
    said += [(name, text, False) for name, text in _OFTEN.get(status, {}).items()]
    return {
        name: {"description": text, "required": required, "schema": _TEXT}
        for name, text, required in said
    }


def _unwell(entry: Entry, status: int) -> Any:
    """A server that is not well says so in the message that was asked for."""
    return entry.gives if entry.path.startswith("/health") and status == 503 else ErrorReport


# -- parameters ------------------------------------------------------------------------------------


def _path(entry: Entry) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in entry.path.split("/") if part.startswith("{")]
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": IN_PATH[name][1],
            "schema": msgspec.json.schema(IN_PATH[name][0]),
        }
        for name in names
    ]


def _query(entry: Entry) -> list[dict[str, Any]]:
    schema = msgspec.json.schema(entry.query)["$defs"][entry.query.__name__]
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": of}
        for name, of in schema["properties"].items()
    ]


def _headers(entry: Entry) -> list[dict[str, Any]]:
    protocol = {"Weft-Protocol": "the protocol that the client speaks"} if entry.protocol else {}
    return [
        {
            "name": name,
            "in": "header",
            "description": text,
            "schema": _HEADERS.get(name, _TEXT),
        }
        for name, text in (protocol | entry.headers).items()
    ]
