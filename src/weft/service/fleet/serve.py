"""`weft serve`: from a command line to a running server, and everything gone when it ends.

serve(parse_all(["./models/tiny"]), settings, key_only=False)
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from weft.errors import ServerError, SettingError
from weft.service.gateway.sources import may_deploy
from weft.service.sandbox.means import check as check_sandbox
from weft.service.sandbox.means import told
from weft.service.store.bells import Bell, Bells
from weft.service.store.lock import lock_folder
from weft.service.store.shelf import open_store
from weft.service.store.sweep import recover
from weft.settings import Settings, data_folder

from .keys import announced, local_key
from .models import Deployment
from .places import ledger_of, objects_of
from .residents import Residents
from .signals import Signals
from .supervisor import Fleet

BACKLOG = 512


def serve(
    models: Sequence[Deployment],
    settings: Settings,
    *,
    key_only: bool = False,
    say: Callable[[str], None] = print,
    version: str = "",
) -> None:
    """Serves until it is told to stop. Raises `ServerError` where it cannot go on.

    With `key_only`, or where other machines can reach it only, no key is made for the local user.
    """
    check_sandbox(settings.sandbox)
    if not models and not may_deploy(settings):
        raise SettingError(
            "there is no model to serve",
            fix="name one: weft serve MODEL; or say with model_roots which may be deployed",
        )
    check_choice("metrics", settings.metrics, ("key", "loopback"))
    check_choice("log_format", settings.log_format, ("json", "text"))
    logging.basicConfig(level=logging.INFO, format="[fleet] %(message)s")
    data = data_folder(settings)
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())  # first: none of them leaves anything behind
        stack.enter_context(lock_folder(data))
        listening = stack.enter_context(listen(settings.bind, settings.port))
        url = url_of(listening)
        bells = stack.enter_context(Bells.of_models())
        ledger, objects = open_store(ledger_of(data), objects_of(data), settings, bells)
        stack.callback(ledger.close)
        stack.callback(objects.close)
        stack.callback(objects.clear)
        recover(ledger, objects, time.time())
        ledger.drop_cards()
        residents = Residents(models, ledger, settings)
        bells.workers.update((id, Bell.pair()) for id in residents.models)
        has_key = not key_only and url_is_local(url)
        if has_key:
            key = local_key(data, ledger, time.time())
            stack.enter_context(announced(url, key))
        greet(say, url, list(residents.models.values()), has_key)
        say(f"(sandbox of checker and workers: {told(settings.sandbox)})")
        store = ledger, objects, bells
        fleet = Fleet(
            residents, settings, data, *store, listening, signals, say=say, version=version
        )
        reason = fleet.run()
    if reason is not None:
        raise ServerError(reason)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises `SettingError` for a word that a setting has not."""
    if value not in choices:
        raise SettingError(f"{name} is one of {', '.join(choices)}, not {value!r}")


@contextmanager
def listen(bind: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there. Raises `SettingError` where it cannot."""
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(
            bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listening = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise SettingError(
            f"cannot listen at {bind}, port {port}: {error.strerror or error}",
            fix="choose another port with --port; 0 takes a free one",
        ) from None
    # Made anew of its number it knows that it speaks TCP, without which asyncio leaves Nagle's
    # algorithm on, which waits for 40 ms twice in each request.
    with socket.socket(fileno=listening.detach()) as known:
        yield known


def url_of(listening: socket.socket) -> str:
    """The address by which clients reach it; from this machine, where all are let in."""
    host, port = listening.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1")
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"


def is_local(bind: str) -> bool:
    """Whether a server that listens there is reached by this machine, as far as its name tells."""
    return bind in ("", "localhost", "0.0.0.0", "::", "::1") or bind.startswith("127.")


def url_is_local(url: str) -> bool:
    return url.startswith(("http://127.", "http://[::1]"))


def greet(say: Callable[[str], None], url: str, models: Sequence[Deployment], key: bool) -> None:
    """What a person sees first: where, what, and what to type."""
    names = ", ".join(model.id for model in models) or "no model yet"
    say(f"Weft serves {names} at {url}")
    say("")
    if not models:
        say("(weft deploy MODEL adds one)")
        return
    say("    import weft")
    say(f'    model = weft.LanguageModel("{models[0].id}", remote=True)')
    say('    with model.trace("Hello"):')
    say("        logits = model.lm_head.output.save()")
    say("")
    where = "on this machine the key is found by itself" if key else "keys: weft keys add NAME"
    say(f"({where}; Ctrl-C stops the server)")
