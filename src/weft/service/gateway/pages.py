"""The interface for people: the OpenAPI document and a page made of it. No script runs on it."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.responses import Response

from . import openapi
from .state import Gateway, Visit

POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
code, .route { font-family: ui-monospace, monospace } table { border-collapse: collapse }
td { padding: 0 1rem 0 0; vertical-align: top } h2 { margin-top: 2rem; font-size: 1.1rem }
@media (prefers-color-scheme: dark) { body { background: #16181d; color: #dde } }
"""


def document(gateway: Gateway, visit: Visit) -> Response:
    data = msgspec.json.encode(_document(gateway))
    return Response(data, media_type="application/json")


def page(gateway: Gateway, visit: Visit) -> Response:
    text = rendered(_document(gateway))
    return Response(text, media_type="text/html", headers={"Content-Security-Policy": POLICY})


def _document(gateway: Gateway) -> dict[str, Any]:
    return openapi.document(gateway.routes, gateway.version)


def rendered(document: dict[str, Any]) -> str:
    """The document as a page."""
    info = document["info"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_text(info['title'])}</title>",
        f"<style>{STYLE}</style>",
        f"<h1>{_text(info['title'])} {_text(info['version'])}</h1>",
        f"<p>{_text(info['description'])} The same for programs: <code>/openapi.json</code>.</p>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += _operation(path, method, operation)
    return "".join(parts)


def _operation(path: str, method: str, operation: dict[str, Any]) -> Iterable[str]:
    key = "" if "security" in operation else " (no key needed)"
    yield f"<h2 class=route>{_text(method.upper())} {_text(path)}</h2>"
    yield f"<p>{_text(operation['summary'])}{key}</p><table>"
    for given in operation["parameters"]:
        yield _row(f"{given['in']} {given['name']}", given.get("description", ""))
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        yield _row(f"takes {media}", _name(content))
    for status, response in operation["responses"].items():
        names = {_name(content) for content in response.get("content", {}).values()} - {""}
        yield _row(status, " ".join([response["description"], *sorted(names)]))
    yield "</table>"


def _row(left: str, right: str) -> str:
    return f"<tr><td><code>{_text(left)}</code><td>{_text(right)}"


def _name(content: dict[str, Any]) -> str:
    return content["schema"].get("$ref", "").rpartition("/")[2]


def _text(text: str) -> str:
    return html.escape(str(text))
