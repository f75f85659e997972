"""httpx, imported when first used: the clients for both drivers, set up alike."""

from __future__ import annotations

import ssl
from functools import cache
from typing import Any

from weft.settings import Settings

from .effects import READ_SECONDS
from .find import is_loopback


@cache
def httpx() -> Any:
    """The library. Raises `ImportError` with the way to get it."""
    try:
        import httpx as library
    except ImportError as error:
        raise ImportError(
            'asking a server needs httpx: pip install "weft[client]"', name="httpx"
        ) from error
    return library


def sync_client(url: str, settings: Settings, transport: Any = None) -> Any:
    """An `httpx.Client` for one server."""
    return httpx().Client(**_options(url, settings, transport))


def async_client(url: str, settings: Settings, transport: Any = None) -> Any:
    """An `httpx.AsyncClient` for one server."""
    return httpx().AsyncClient(**_options(url, settings, transport))


def timeout(settings: Settings, seconds: float) -> Any:
    """Limits of one call: `seconds` of silence."""
    return httpx().Timeout(seconds, connect=settings.connect_seconds)


def _options(url: str, settings: Settings, transport: Any) -> dict[str, Any]:
    library = httpx()
    options: dict[str, Any] = {
        "base_url": url,
        "timeout": timeout(settings, READ_SECONDS),
        "limits": library.Limits(max_connections=256, max_keepalive_connections=32),
        # a proxy for the outside must not get what goes to this machine
        "trust_env": not is_loopback(url),
        "verify": _certificates() if url.startswith("https") else False,
        "follow_redirects": False,
    }
    return options if transport is None else {**options, "transport": transport}


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes longer than a request."""
    return httpx().create_ssl_context()
