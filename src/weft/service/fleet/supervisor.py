"""The fleet: carries out what `rules` decide about the processes of a server.

    fleet = Fleet(models, settings, data, ledger, objects, bells, listening, signals, say=print)
    reason = fleet.run()                   # until a signal says so

It holds the listening socket and the bells, so that whichever process dies, connections wait in the
socket and rings in the pipes until the next one is there.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import TextIO

from weft.service.store.bells import Bells
from weft.service.store.interface import Ledger, Objects
from weft.service.store.sweep import sweep
from weft.settings import Settings

from . import rules
from .channel import DoDrain, DoFinish, DoMark, IsReady, IsUnusable, Message
from .hands import Hands
from .models import Deployment
from .rules import Died, Drain, Finish, Kill, Over, Ready, Release, Role, Say, Start, State
from .signals import Signals
from .spec import Spec

EXPIRE_SECONDS, SWEEP_SECONDS = 1.0, 60.0
"""How often silent holders are looked for, and the store is tidied."""

LOG = logging.getLogger("weft.fleet")


def show(line: str, file: TextIO) -> None:
    """Prints a line; nobody who reads it any more is no reason to end."""
    try:
        print(line, file=file, flush=True)
    except BrokenPipeError:
        return


class Fleet:
    """See the module's text. `say` is for people, `run` returns the reason of a failure."""

    def __init__(
        self,
        models: Sequence[Deployment],
        settings: Settings,
        data: Path,
        ledger: Ledger,
        objects: Objects,
        bells: Bells,
        listening: socket.socket,
        signals: Signals,
        *,
        say: Callable[[str], None],
        version: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = tuple(models)
        self._settings = settings
        self._data = data
        self._ledger = ledger
        self._objects = objects
        self._listening = listening
        self._signals = signals
        self._say = say
        self._version = version
        self._clock = clock
        self._begun = clock()
        self._of = {f"worker {model.id}": model.id for model in models}
        roles: dict[str, Role] = {"gateway": "gateway", "checker": "checker"}
        roles |= dict.fromkeys(self._of, "worker")
        self._state = State.of(roles, settings.drain_seconds)
        self._marks: dict[str, DoMark] = {}
        self._holders: dict[str, str] = {}
        self._births = 0
        self._reason: str | None = None
        self._selector = DefaultSelector()
        self._hands = Hands(
            self._selector,
            bells,
            on_message=self._hear,
            on_gone=lambda name: self._happen(Died(name)),
            write=lambda line: show(line, sys.stderr),
        )

    def run(self) -> str | None:
        """Serves; None for an orderly end."""
        ended = threading.Event()
        housekeeper = threading.Thread(target=self._keep_house, args=(ended,), daemon=True)
        self._selector.register(self._signals, EVENT_READ, self._hear_signals)
        try:
            housekeeper.start()
            self._happen(rules.Begin())
            while self._state.mode != "over":
                self._turn()
        finally:
            self._hands.close()
            ended.set()
            housekeeper.join()
            self._selector.close()
        return self._reason

    def _hear_signals(self) -> None:
        for _ in range(self._signals.heard()):
            self._stop()

    def _stop(self) -> None:
        """The first time orderly, the second time now."""
        if self._state.mode == "serving":
            self._say("stopping: what runs may finish; once more to stop at once")
        self._happen(rules.Stop())

    def _turn(self) -> None:
        wanted = rules.wake(self._state)
        timeout = None if wanted is None else max(0.0, wanted - self._clock())
        for key, _ in self._selector.select(timeout):
            key.data()
        self._happen(rules.Tick())

    # -- events ----------------------------------------------------------------------------------

    def _hear(self, name: str, message: Message) -> None:
        if isinstance(message, IsReady):
            self._happen(Ready(name))
        elif isinstance(message, IsUnusable):
            self._happen(rules.Unusable(name, message.reason))

    def _happen(self, event: rules.Event) -> None:
        self._state, commands = rules.decide(self._state, event, self._clock())
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: rules.Command) -> None:
        match command:
            case Start(name):
                self._start(name)
            case Drain(name):
                self._hands.tell(name, DoDrain())
            case Finish(name):
                self._hands.tell(name, DoFinish())
            case Kill(name):
                self._hands.kill(name)
            case Release(name):
                self._release(name)
            case Say(name, state, reason):
                self._mark(DoMark(self._of[name], state, reason))
            case Over(reason):
                self._reason = reason

    # -- commands --------------------------------------------------------------------------------

    def _start(self, name: str) -> None:
        part = self._state.parts[name]
        self._births += 1
        self._holders[name] = f"{name} #{self._births}"
        spec = Spec(
            name=name,
            role=part.role,
            holder=self._holders[name],
            data=str(self._data),
            settings={**asdict(self._settings), "key": None},
            models=self._models,
            model=self._of.get(name),
            version=self._version,
        )
        extra = (self._listening.fileno(),) if part.role == "gateway" else ()
        self._hands.make(spec, extra)
        if part.role == "checker":
            for mark in self._marks.values():
                self._hands.tell(name, mark)

    def _release(self, name: str) -> None:
        """Takes back what a dead process had at once. Where that fails, its leases end."""
        try:
            lost = self._ledger.release(self._holders[name], time.time())
            if self._state.parts[name].role == "checker":
                self._ledger.reopen_questions()
        except Exception:
            LOG.exception("what %s had could not be taken back", name)
            return
        if lost:
            ids = ", ".join(job.id for job in lost)
            LOG.info("%s had %s: it goes on from the beginning", name, ids)

    def _mark(self, mark: DoMark) -> None:
        """The checker publishes how the worker of a model is; also one that is to come."""
        if mark.state == "failed":
            self._say(f"{mark.model} cannot be served: {mark.reason}")
        elif mark.model not in self._marks:
            self._say(f"{mark.model} is ready ({self._clock() - self._begun:.1f} s)")
        self._marks[mark.model] = mark
        self._hands.tell("checker", mark)

    # -- the store -------------------------------------------------------------------------------

    def _keep_house(self, ended: threading.Event) -> None:
        """Takes back the claims of who is silent, and now and then removes what nobody needs."""
        swept = self._clock()
        while not ended.wait(EXPIRE_SECONDS):
            try:
                self._ledger.expire(time.time())
                if self._clock() - swept >= SWEEP_SECONDS:
                    swept = self._clock()
                    sweep(self._ledger, self._objects, time.time(), self._settings)
            except Exception:
                LOG.exception("the store could not be tidied; it will be tried again")
