"""A server inside this process, for tests: real HTTP on a free port, everything else in threads.

    with serve({"tiny": tiny_path()}, run_seconds=5.0) as server:
        model = weft.LanguageModel(tiny_path(), remote=server.url)
        ...
        server.add("mine", my_module)      # a model that was made just now
        server.remove("mine")

Gateway, checker and workers are those of `weft serve`; only the processes around them are missing,
and with them what only a process can do: end work that does not return. The store is in memory
unless `data` names a folder. When the block is left no thread, port or file is there any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from weft import __version__
from weft.engine.known import Known
from weft.engine.publish import know
from weft.service.checker.loop import Checker
from weft.service.fleet.keys import add_key, announced
from weft.service.fleet.loading import loaded
from weft.service.fleet.models import Deployment
from weft.service.fleet.places import ledger_of, objects_of
from weft.service.fleet.serve import listen, url_of
from weft.service.gateway.app import App, make_app
from weft.service.gateway.server import Server as Gateway
from weft.service.jobs.scopes import SCOPES
from weft.service.store.bells import Bell, Bells
from weft.service.store.interface import Ledger, Objects
from weft.service.store.memory import MemoryLedger, MemoryObjects
from weft.service.store.shelf import open_store
from weft.service.store.shell import Shell
from weft.service.worker.loop import Worker
from weft.settings import Settings

PATIENCE = 60.0
"""Seconds that a thread may take to end."""


@dataclass
class _Running:
    """One model's worker."""

    worker: Worker
    thread: threading.Thread


class Server:
    """A running server. `url` and `key` are for clients; `ledger` and `objects` for looking in."""

    def __init__(
        self,
        models: Mapping[str, Any],
        settings: Settings,
        data: Path | None = None,
        find: bool = True,
    ) -> None:
        self.settings = settings
        self._given = dict(models)
        self._find = find
        self._data = data
        self._stack = ExitStack()
        self._workers: dict[str, _Running] = {}

    # -- its life --------------------------------------------------------------------------------

    def __enter__(self) -> Server:
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _open(self, stack: ExitStack) -> None:
        listening = stack.enter_context(listen(self.settings.bind, 0))
        self.url = url_of(listening)
        self.bells = stack.enter_context(Bells.of_models())
        self._open_store(stack)
        self.key = add_key(self.ledger, "local", time.time(), scopes=SCOPES)
        if self._find:
            stack.enter_context(announced(self.url, self.key))
        self.checker = Checker(self.ledger, self.objects, self.bells, {}, self.settings)
        self._start(stack, self.checker.run, self.checker.stop, "checker")
        self._app = self._make_app()
        gateway = Gateway(self._app, listening)
        self._start(stack, gateway.run, gateway.finish, "gateway")
        stack.callback(self._remove_all)
        for id, model in self._given.items():
            self.add(id, model)

    def _open_store(self, stack: ExitStack) -> None:
        self.objects: Objects
        self.ledger: Ledger
        if self._data is None:
            self.objects = MemoryObjects()
            self.ledger = MemoryLedger(self.settings, Shell(self.bells, self.objects))
        else:
            places = ledger_of(self._data), objects_of(self._data)
            self.ledger, self.objects = open_store(*places, self.settings, self.bells)
        stack.callback(self.ledger.close)

    def _make_app(self) -> App:
        return make_app(
            self.ledger,
            self.objects,
            self.bells,
            self.settings,
            models=(),
            version=__version__,
            scratch=self._data,
        )

    def _start(self, stack: ExitStack, run: Any, stop: Any, name: str) -> None:
        thread = threading.Thread(target=run, name=f"weft {name}")
        thread.start()
        stack.callback(_end, thread, stop)

    # -- its models ------------------------------------------------------------------------------

    def add(self, id: str, model: str | Path | nn.Module, tokenizer: Any = None) -> None:
        """Has a model from now on: a module that is there, or a folder or id that is loaded.

        One of this name that it had before is gone. Raises what loading the model raises.
        """
        if id in self._workers:
            self._end_worker(id)  # the checker knows the model all the while
        net, known = _loaded(id, model, tokenizer)
        self.bells.workers[id] = Bell.pair()
        worker = Worker(self.ledger, self.objects, self.bells, id, net, known, self.settings)
        running = _Running(worker, threading.Thread(target=self._work, args=(id, worker)))
        self._workers[id] = running
        if id not in self._app.gateway.models:
            self._app.gateway.models = (*self._app.gateway.models, id)
        running.thread.start()
        self.checker.mark(id, "ready")
        self.checker.add(id, known)

    def _work(self, id: str, worker: Worker) -> None:
        worker.run()
        if worker.spoilt:  # a process would be replaced, a module of a test cannot be
            self.checker.mark(id, "failed", "a job has changed its weights")

    def remove(self, id: str) -> None:
        """Has it no longer. Its jobs that wait go on waiting."""
        self._app.gateway.models = tuple(one for one in self._app.gateway.models if one != id)
        self.checker.remove(id)
        self._end_worker(id)

    def _end_worker(self, id: str) -> None:
        running = self._workers.pop(id)
        _end(running.thread, running.worker.stop)
        self.bells.workers.pop(id).close()

    def _remove_all(self) -> None:
        for id in list(self._workers):
            self.remove(id)


def serve(
    models: Mapping[str, Any] | None = None,
    *,
    data: Path | None = None,
    find: bool = True,
    **settings: Any,
) -> Server:
    """A server with these models (id -> module, folder or id on the hub), for a `with` block.

    settings: those of `weft.settings`. With `find`, clients of this user find its key by its
    address, as they do for `weft serve`.
    """
    return Server(models or {}, Settings(**settings), data, find)


def _loaded(id: str, model: Any, tokenizer: Any) -> tuple[nn.Module, Known]:
    if isinstance(model, nn.Module):
        return model, know(model, tokenizer=tokenizer)
    net, _ = loaded(Deployment.parse(f"{id}={model}"))
    return net, know(str(model), tokenizer=tokenizer)


def _end(thread: threading.Thread, stop: Any) -> None:
    stop()
    thread.join(PATIENCE)
    if thread.is_alive():
        raise RuntimeError(f"the thread {thread.name!r} does not end")
