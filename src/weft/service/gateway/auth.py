"""Who asks: the key, the Host and the Origin of a request.

A key is looked up by its SHA-256, so what is compared is never the key itself, and a wrong one, a
revoked one and none at all take the same steps and read the same. Host is checked because a page
in the user's own browser can reach a loopback server under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import time

from starlette.datastructures import Headers
from starlette.requests import Request

from weft.errors import AccessError, MessageError, VersionMismatchError
from weft.service.jobs.scopes import allows
from weft.service.store.interface import Key
from weft.settings import Settings
from weft.wire.messages import PROTOCOL

from .errors import Refused
from .state import Gateway

CHALLENGE = {"WWW-Authenticate": 'Bearer realm="weft"'}
USED_SECONDS = 60.0
"""How exactly it is known when a key was used last."""
WILDCARDS = frozenset({"", "0.0.0.0", "::"})
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


def key_of(gateway: Gateway, request: Request) -> Key:
    """The request's key; `Refused` with 401 without a valid one, or one of the past. Blocks."""
    given = request.headers.getlist("authorization")
    scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
    digest = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()
    row = gateway.ledger.key(digest)
    known = row is not None and hmac.compare_digest(row.digest, digest) and row.revoked is None
    if not known or row is None or scheme.lower() != "bearer":
        error = AccessError(
            "this server needs a valid key",
            fix="send it as 'Authorization: Bearer weft_...'; the setting is WEFT_KEY",
        )
        raise Refused(error, 401, CHALLENGE)
    now = gateway.clock()
    _check_expiry(row, now)
    if row.used is None or abs(now - row.used) >= USED_SECONDS:
        gateway.ledger.use_key(row.digest, now)
    return row


def _check_expiry(key: Key, now: float) -> None:
    """Whoever has the key may know that it was one."""
    if key.expires is not None and key.expires <= now:
        day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(key.expires))
        error = AccessError(
            f"this key was good until {day} UTC", fix="ask whoever runs the server for a new one"
        )
        raise Refused(error, 401, CHALLENGE)


def check_scope(key: Key, needed: str) -> None:
    """Refuses a key that may not do this, and names the scope that it would need."""
    if not allows(key.scopes, needed):
        has = ", ".join(key.scopes) or "none"
        raise AccessError(
            f"this needs a key with the scope {needed!r}; this key's scopes are: {has}",
            fix="ask whoever runs the server for a key with that scope",
        )


def check_host(headers: Headers, settings: Settings) -> None:
    """Refuses a Host header that is not this server's name."""
    given = headers.getlist("host")
    found = _HOST.fullmatch(given[0]) if len(given) == 1 else None
    if found is None:
        raise Refused(MessageError("the request needs exactly one valid Host header"), 400)
    if not host_allowed(found[1].strip("[]").lower().rstrip("."), settings):
        raise Refused(
            AccessError(
                "this server does not answer under the name in the Host header",
                fix="its operator can add the name to the setting allowed_hosts",
            ),
            403,
        )


def host_allowed(name: str, settings: Settings) -> bool:
    """Loopback, the bound address, names in the settings; any address where all are bound.

    An address cannot be rebound, only a name can.
    """
    if name in {"localhost", settings.bind.lower(), *_listed(settings.allowed_hosts)}:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or settings.bind in WILDCARDS


def check_origin(headers: Headers, settings: Settings) -> str | None:
    """The Origin, if the request has one and it is listed; refuses any other."""
    given = headers.getlist("origin")
    if not given:
        return None
    if len(given) == 1 and given[0].lower() in _listed(settings.allowed_origins):
        return given[0]
    raise Refused(
        AccessError(
            "this server does not answer pages of this origin",
            fix="its operator can add the origin to the setting allowed_origins",
        ),
        403,
    )


def check_protocol(headers: Headers) -> None:
    """Refuses a `Weft-Protocol` header with another version; without one, all is well."""
    given = headers.getlist("weft-protocol")
    if given and given != [str(PROTOCOL)]:
        raise other_protocol(", ".join(given))


def other_protocol(given: str) -> VersionMismatchError:
    """Client and server do not speak the same version."""
    return VersionMismatchError(
        f"this server speaks protocol {PROTOCOL}, the request says {given[:40]}",
        fix="install a version of Weft that speaks it; GET /api/hello says what the server is",
    )


def _listed(setting: str) -> set[str]:
    return {part.strip().lower() for part in setting.split(",") if part.strip()}
