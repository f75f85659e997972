"""`docs/wire.md` says what is there: every route, message, field, code and dtype, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Struct
from starlette.routing import compile_path

from weft.errors import WeftError
from weft.graph.check import MAX_DEPTH, MAX_TEXT
from weft.graph.node import AnyNode, Arg, Bound, Graph, Mark
from weft.graph.site import Site, Where
from weft.service.gateway import constants, events, jobs, protocol, server
from weft.service.gateway.app import ROUTES
from weft.service.gateway.bodies import IDLE_SECONDS, JSON_BYTES
from weft.service.gateway.entry import Entry
from weft.service.gateway.errors import status_of
from weft.service.gateway.models import CAPABILITIES
from weft.wire import frames
from weft.wire.messages import MESSAGES, PROTOCOL, Event
from weft.wire.reports import CLASSES

TEXT = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
SECTIONS = dict(re.findall(r"^#{2,4} (.+?)\n(.*?)(?=^#{2,4} |\Z)", TEXT, re.M | re.S))

ONLY_CLIENTS = {
    *("outside-trace", "not-saved", "stale-handle", "changed-constant", "setting"),
    *("server-away", "result-changed", "travel", "edit", "sweep"),
}
"""Codes of errors that never come from a server."""


def table(section: str) -> list[list[str]]:
    """The rows of the section's first table, without its head."""
    return rows_of(SECTIONS[section])


def rows_of(text: str) -> list[list[str]]:
    """The rows of the first table in a text, without its head."""
    found = re.search(r"(?:^\|.*\|\n)+", text, re.M)
    assert found is not None
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in found[0].splitlines()[2:]]


# -- routes ----------------------------------------------------------------------------------------


def told(entry: Entry) -> list[str]:
    """A route as its row says it."""
    names = [f"`{field.encode_name}`" for field in msgspec.structs.fields(entry.query)]
    others = [str(status) for status in sorted(entry.statuses)]
    return [
        f"`{entry.method} {entry.path}`",
        ", ".join(names) or "-",
        body(entry.takes),
        f"{entry.status} {body(entry.gives)}",
        ", ".join(others) or "-",
        entry.text + ("" if entry.key else " No key."),
    ]


def body(kind: Any) -> str:
    if kind is None:
        return "-"
    return f"`{kind.__name__}`" if isinstance(kind, type) else f"`{kind}`"


def test_the_table_of_routes_is_that_of_the_app() -> None:
    assert table("Routes") == [told(entry) for entry in ROUTES]


def test_no_other_route_is_spoken_of() -> None:
    spoken = set(re.findall(r"`(GET|POST|PUT|DELETE) (/[^`\s]*)", TEXT))
    assert spoken
    for method, path in spoken:
        place = path.partition("?")[0]
        fits = [e for e in ROUTES if e.method == method and compile_path(e.path)[0].match(place)]
        assert fits, f"{method} {path}"


def test_parameters_are_spoken_of_beyond_the_table() -> None:
    said = SECTIONS["Routes"].partition("The parameters:")[2]
    known = {field.encode_name for e in ROUTES for field in msgspec.structs.fields(e.query)}
    assert known == set(re.findall(r"`(\w+)`", said))


def test_headers_are_spoken_of() -> None:
    for entry in ROUTES:
        for name in entry.headers.keys() - {"If-None-Match"}:
            assert f"`{name}" in TEXT


# -- messages --------------------------------------------------------------------------------------


def test_every_message_has_a_section_and_no_other_has_one() -> None:
    assert set(re.findall(r"^#### `(\w+)`$", TEXT, re.M)) == MESSAGES.keys()


@pytest.mark.parametrize("name", MESSAGES)
def test_the_fields_of_a_message(name: str) -> None:
    fields = msgspec.structs.fields(MESSAGES[name])
    rows = [(row[0], row[2]) for row in table(f"`{name}`")]
    assert rows == [(f"`{field.encode_name}`", default(field)) for field in fields]


def default(field: msgspec.structs.FieldInfo) -> str:
    """What the field has where it is left out."""
    if field.required:
        return "-"
    found = field.default
    if field.default_factory is not msgspec.NODEFAULT:
        found = field.default_factory()
    plain = msgspec.to_builtins({} if isinstance(found, Struct) else found)
    return f"`{msgspec.json.encode(plain).decode()}`"


@pytest.mark.parametrize("name", MESSAGES)
def test_what_stands_for_a_message_is_a_message(name: str) -> None:
    """A type in a table, written like a name, is a message or one of a graph's."""
    types = {word for row in table(f"`{name}`") for word in re.findall(r"\b[A-Z]\w+", row[1])}
    assert types <= MESSAGES.keys() | {"Arg", "Graph", "Site"}


@pytest.mark.parametrize("name", MESSAGES)
def test_the_tag_of_a_message_is_named(name: str) -> None:
    tag = MESSAGES[name].__struct_config__.tag
    assert tag is None or f"`type` is `{tag}`" in SECTIONS[f"`{name}`"]


def test_what_clients_send_is_told_apart_from_what_servers_say() -> None:
    sent = TEXT.partition("### What a client sends")[2].partition("\n### ")[0]
    closed = {n for n, kind in MESSAGES.items() if kind.__struct_config__.forbid_unknown_fields}
    assert set(re.findall(r"^#### `(\w+)`$", sent, re.M)) == closed


def test_kinds_of_events() -> None:
    said = re.search(r"`event` is (.*?), `data`", SECTIONS["Events"], re.S)
    assert said is not None
    tags = [kind.__struct_config__.tag for kind in Event.__args__]
    assert re.findall(r"`(\w+)`", said[1]) == tags


# -- graphs and tensors ----------------------------------------------------------------------------


def listed(rows: list[list[str]]) -> dict[str, list[tuple[str, str]]]:
    """The fields of each part of a graph with their defaults, as a table lists them."""
    fields = r"`(\w+)`(?: = (`[^`]*`))?(?: \([^)]*\))?(?:, |: .*|$)"
    return {row[0].strip("`"): re.findall(fields, row[1]) for row in rows}


def had(kind: type[Struct]) -> list[tuple[str, str]]:
    fields = msgspec.structs.fields(kind)
    return [(f.encode_name, "" if f.required else default(f)) for f in fields if f.name != "at"]


def test_parts_of_a_graph() -> None:
    parts = listed(table("Graphs"))
    at = ("at", "`0`")
    assert {name: [f for f in fields if f != at] for name, fields in parts.items()} == {
        kind.__name__: had(kind) for kind in (Graph, Mark, Site, Where, Bound)
    }
    assert at in parts["Bound"]


def test_kinds_of_nodes() -> None:
    text = SECTIONS["Graphs"].partition("A node has `kind`, `at` = `0`")[2]
    assert listed(rows_of(text)) == {
        kind.__struct_config__.tag: had(kind) for kind in AnyNode.__args__
    }


def test_forms_of_arguments() -> None:
    said = dict(re.findall(r'^\| `\["(\w+)", (.*?)\]`', SECTIONS["Graphs"], re.M))
    kinds = [kind for kind in Arg.__args__ if isinstance(kind, type) and issubclass(kind, Struct)]
    fields = {kind.__struct_config__.tag: len(kind.__struct_fields__) for kind in kinds}
    assert {tag: len(names.split(", ")) for tag, names in said.items()} == fields


def test_dtypes() -> None:
    rows = {row[0].strip("`"): row[1] for row in table("Tensors")}
    assert {dtype: f"`{code}`" for dtype, code in frames.CODES.items()}.items() <= rows.items()
    assert rows.keys() == frames.CODES.keys() | {"complex128"}


# -- errors and bounds -----------------------------------------------------------------------------


def test_codes_of_errors() -> None:
    rows = {row[0].strip("`"): row[1] for row in table("Errors")}
    assert rows.keys() == CLASSES.keys()
    for code, kind in CLASSES.items():
        assert rows[code] == ("-" if code in ONLY_CLIENTS else str(status_of(kind("x")))), code


def test_codes_in_the_text_are_codes() -> None:
    spoken = set(re.findall(r"\b[45]\d\d `([\w-]+)`", TEXT))
    assert spoken
    assert spoken <= CLASSES.keys() | {"server"}
    assert all(issubclass(kind, WeftError) for kind in CLASSES.values())


def test_statuses_in_the_text_are_those_of_the_routes() -> None:
    rows = SECTIONS["Errors"].partition("Other statuses:")[2]
    everywhere = {401, 403, 405, 500}
    known = {status for entry in ROUTES for status in entry.statuses} | everywhere
    assert {int(status) for status in re.findall(r"\b[45]\d\d\b", rows)} <= known


def test_bounds() -> None:
    rows = dict(table("Bounds"))
    assert rows["a request's line and headers together"] == f"{server.HEADER_BYTES >> 10} KiB"
    assert rows["a message in JSON"] == f"{JSON_BYTES >> 20} MiB"
    assert rows["a head that does not come"] == f"{protocol.HEAD_SECONDS:g} seconds"
    assert rows["a body that stands still"] == f"{IDLE_SECONDS:g} seconds"
    assert rows["the header of an uploaded constant"] == f"{constants.HEADER_BYTES >> 20} MiB"
    assert rows["the header of `tensors`"] == f"{frames.MAX_HEADER >> 20} MiB"
    assert rows["dimensions of a tensor"] == str(frames.MAX_DIMS)
    assert rows["depth of nested arguments"] == str(MAX_DEPTH)
    assert rows["characters of a text in a graph"] == str(MAX_TEXT)
    assert rows["one `wait`"] == f"{_most(jobs.WaitQuery, 'wait')} seconds"
    assert rows["jobs in one list"] == str(_most(jobs.ListQuery, "limit"))
    assert f"Every {events.BEAT_SECONDS:g} seconds" in TEXT


def _most(kind: type[Struct], name: str) -> int:
    return msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"][name]["maximum"]


def test_the_protocol_and_its_capabilities() -> None:
    assert f"version {PROTOCOL}," in TEXT
    said = re.search(r"The capabilities: (.*?)\n\n", TEXT, re.S)
    assert said is not None
    assert tuple(re.findall(r"`(\w+)`", said[1])) == CAPABILITIES
