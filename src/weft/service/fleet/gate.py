"""The gateway as a process of the fleet. No torch.

python -m weft.service.fleet.gate FD PARENT
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

from weft.service.gateway.app import make_app
from weft.service.gateway.server import Server
from weft.service.sandbox.means import short
from weft.service.store.bells import Bell
from weft.service.store.logs import log_to_stderr
from weft.service.store.shelf import open_store

from .channel import DoDrain, DoFinish, DoForget, DoServe, IsAsked, IsReady, Message, follow
from .places import ledger_of, objects_of
from .process import die_with
from .spec import alone, settings_of


def main(argv: list[str]) -> int:
    """Is the gateway until it is told to end."""
    die_with(int(argv[1]))
    spec, given = alone(argv)
    settings, data = settings_of(spec), Path(spec.data)
    info, warning = logging.INFO, logging.WARNING
    names = ("weft.gateway", info), ("weft.jobs", info), ("uvicorn", warning)
    log_to_stderr(settings.log_format, spec.name, *names)
    ledger, objects = open_store(ledger_of(data), objects_of(data), settings, given.bells)
    app = make_app(
        ledger,
        objects,
        given.bells,
        settings,
        models=[model.id for model in spec.models],
        version=spec.version,
        scratch=data,
        sandbox=short(settings.sandbox),
    )
    listening = socket.socket(fileno=given.rest[0])
    server = Server(app, listening, ready=lambda: given.channel.send(IsReady()))

    app.gateway.order = lambda what, model: given.channel.send(IsAsked(what, model))

    def act(message: Message) -> None:
        if isinstance(message, DoServe):
            given.bells.workers[message.model] = Bell.of(*given.channel.files(2))
            app.gateway.models = (*app.gateway.models, message.model)
        elif isinstance(message, DoForget):
            app.gateway.models = tuple(one for one in app.gateway.models if one != message.model)
            if message.model in given.bells.workers:
                given.bells.workers.pop(message.model).close()
        elif isinstance(message, DoDrain):
            server.drain()
        elif isinstance(message, DoFinish):
            server.finish()

    follow(given.channel, act)
    server.run()
    ledger.close()
    objects.close()
    sys.stderr.flush()
    os._exit(0)  # the life-line's thread may be reading, which would hold a usual end up


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
