"""A checker or a worker as a process of its own: what it is given, and how it begins and ends.

A model that cannot be loaded is said to the fleet with the reason, without a path of the server's:
clients will read it. The whole reason stands in the log.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from weft.engine.publish import know
from weft.service.checker.bounds import ProcessBounds
from weft.service.checker.loop import Checker
from weft.service.sandbox.confine import Confined
from weft.service.store.bells import Bells
from weft.service.store.interface import Ledger, Objects
from weft.service.store.logs import log_to_stderr
from weft.service.store.shelf import open_store
from weft.service.worker.loop import Worker
from weft.settings import Settings
from weft.wire.reports import report_of

from .channel import (
    Channel,
    DoFinish,
    DoForget,
    DoMark,
    IsKnown,
    IsLoading,
    IsReady,
    IsUnusable,
    IsUsing,
    Message,
    follow,
)
from .loading import device_bytes, loaded, weights_of
from .models import Deployment
from .places import ledger_of, objects_of
from .spec import Given, Spec, settings_of
from .walls import confined_for

CHECKER_BYTES = 4 << 30
"""Address space that the checker may take beyond what it has when its models are known."""

LOG = logging.getLogger("weft.fleet")


@dataclass(frozen=True)
class Store:
    """What both work on."""

    ledger: Ledger
    objects: Objects
    bells: Bells
    settings: Settings
    confined: Confined


def run(spec: Spec, given: Given) -> int:
    """Is that process, until it is told to end; returns its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the fleet decides
    given.bells.only(spec.role, spec.model)
    settings, data = settings_of(spec), Path(spec.data)
    log_to_stderr(settings.log_format, spec.name, ("", logging.INFO))
    ledger, objects = open_store(ledger_of(data), objects_of(data), settings, given.bells)
    tempfile.tempdir = str(objects.drafts)
    begin = _checker if spec.role == "checker" else _worker
    try:
        confined = confined_for(spec, objects)
        confined.begin()
        store = Store(ledger, objects, given.bells, settings, confined)
        return begin(spec, given.channel, store)
    finally:
        ledger.close()
        objects.close()


# -- the checker -----------------------------------------------------------------------------------


def _checker(spec: Spec, channel: Channel, store: Store) -> int:
    bounds = ProcessBounds()
    checker = Checker(
        store.ledger,
        store.objects,
        store.bells,
        {},
        store.settings,
        holder=spec.holder,
        bounds=bounds,
    )
    for model in spec.models:
        checker.add(model.id)

    finishing = False

    def act(message: Message) -> None:
        nonlocal finishing
        if finishing:
            return  # the ledger may be closed by now; the next one is told, too
        if isinstance(message, DoMark):
            checker.mark(message.model, message.state, message.reason)
        elif isinstance(message, DoForget):
            checker.remove(message.model)
        elif isinstance(message, DoFinish):
            finishing = True
            checker.stop()

    follow(channel, act)
    for model in spec.models:
        _look_at(checker, model, channel, store.settings)
    bounds.limit_memory(CHECKER_BYTES)
    store.confined.finish()
    channel.send(IsReady())
    checker.run()
    return 0


def _look_at(checker: Checker, model: Deployment, channel: Channel, settings: Settings) -> None:
    try:
        known = know(model.source, **model.tree_options())
        checker.add(model.id, known, model.weights(settings))
        channel.send(IsKnown(model.id, weights_of(known.skeleton)))
    except Exception as error:
        LOG.exception("%s cannot be known", model.id)
        checker.fail(model.id, reason_of(error))


def reason_of(error: Exception) -> str:
    """Why a model could not be loaded, as clients may read it: no path, one line."""
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    return report_of(RuntimeError(text)).message


# -- a worker --------------------------------------------------------------------------------------


def _worker(spec: Spec, channel: Channel, store: Store) -> int:
    model = next(model for model in spec.models if model.id == spec.model)
    workers: list[Worker] = []
    stopped = False

    def act(message: Message) -> None:
        nonlocal stopped
        if isinstance(message, DoFinish):
            stopped = True
            for worker in workers:
                worker.stop()

    follow(channel, act)
    try:
        net, known = loaded(model, lambda loaded: channel.send(IsLoading(loaded)))
    except Exception as error:
        LOG.exception("%s cannot be loaded", model.id)
        channel.send(IsUnusable(reason_of(error)))
        return 1
    workers.append(
        Worker(
            store.ledger,
            store.objects,
            store.bells,
            model.id,
            net,
            known,
            store.settings,
            holder=spec.holder,
            die=lambda: os._exit(75),
        )
    )
    mine, _, everything = device_bytes()
    store.confined.finish()
    channel.send(IsReady(mine, everything))
    _watch_device(channel)
    if not stopped:
        workers[0].run()
    return 0


def _watch_device(channel: Channel, every: float = 5.0) -> None:
    """Tells now and then how much device memory this process has; only where there is a device."""
    told = device_bytes()
    if not told[2]:
        return

    def watch() -> None:
        last = told[0]
        while True:
            time.sleep(every)
            mine, free, _ = device_bytes()
            if mine != last:
                last = mine
                channel.send(IsUsing(mine, free))

    threading.Thread(target=watch, name="device memory", daemon=True).start()
