"""The fleet: carries out what `rules` decide about the processes of a server.

    fleet = Fleet(residents, settings, data, ledger, objects, bells, listening, signals, say=print)
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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import TextIO

from weft.service.store.bells import Bell, Bells
from weft.service.store.interface import Ledger, Objects
from weft.service.store.sweep import sweep
from weft.settings import Settings

from . import rules
from .channel import (
    DoDrain,
    DoFinish,
    DoForget,
    DoMark,
    DoServe,
    IsAsked,
    IsKnown,
    IsLoading,
    IsReady,
    IsUnusable,
    IsUsing,
    Message,
)
from .hands import Hands
from .orphans import dismiss
from .parts import (
    Added,
    Begin,
    Command,
    Died,
    Drain,
    Drop,
    Event,
    Evicted,
    Finish,
    Kill,
    Over,
    Ready,
    Release,
    Removed,
    Role,
    Say,
    Start,
    State,
    Stop,
    Tick,
    Unusable,
)
from .residents import Residents, part_of
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
        residents: Residents,
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
        self._bells = bells
        self._settings = settings
        self._data = data
        self._ledger = ledger
        self._objects = objects
        self._listening = listening
        self._signals = signals
        self._say = say
        self._version = version
        self._clock = clock
        self._residents = residents
        roles: dict[str, Role] = {"gateway": "gateway", "checker": "checker"}
        self._state = residents.begin(State.of(roles, settings.drain_seconds))
        self._of = {part_of(id): id for id in residents.models}
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
            self._happen(Begin())
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
        self._happen(Stop())

    def _turn(self) -> None:
        now = self._clock()
        wanted = [rules.wake(self._state), self._residents.due()]
        timeout = max(0.0, min(time for time in wanted if time is not None) - now)
        for key, _ in self._selector.select(timeout):
            key.data()
        self._happen(Tick())
        if self._state.mode == "serving":
            ready = self._hands.pids(part.name for part in self._state.workers("ready"))
            for event in self._residents.turn(ready):
                self._happen(event)

    # -- events ----------------------------------------------------------------------------------

    def _hear(self, name: str, message: Message) -> None:
        match message:
            case IsReady(device, device_all) if name in self._of:
                self._loaded(name, device, device_all)
            case IsReady():
                self._happen(Ready(name))
            case IsUnusable(reason):
                self._happen(Unusable(name, reason))
            case IsKnown(model, weights):
                known = self._residents.known(model, weights)
                if known is not None:
                    self._happen(known)
            case IsLoading(loaded) if name in self._of:
                self._residents.loading(self._of[name], loaded)
            case IsUsing(device, free) if name in self._of:
                self._residents.using(self._of[name], device, free)
            case IsAsked("evict", model):
                self._happen(Evicted(part_of(model)))
            case IsAsked():
                self._reconcile()

    def _loaded(self, name: str, device: int, device_all: int) -> None:
        pid = self._hands.pids([name]).get(name)
        limited, took = self._residents.ready(self._of[name], pid, device, device_all)
        self._happen(Ready(name, took if took.host else None))
        self._happen(limited)

    def _reconcile(self) -> None:
        """Takes over what was deployed and put away since the last time."""
        for event in self._residents.changes():
            if isinstance(event, Removed):
                self._shut(self._of[event.name])
            elif isinstance(event, Added):
                self._open(event.name.removeprefix(part_of("")))
            self._happen(event)
            if isinstance(event, Added):
                self._hands.tell("checker", DoFinish())

    def _open(self, id: str) -> None:
        """The gateway and the next checker know the model, too; this checker finishes for that."""
        self._ledger.drop_card(id)
        if id not in self._bells.workers:
            self._of[part_of(id)] = id
            bell = self._bells.workers[id] = Bell.pair()
            self._hands.tell("gateway", DoServe(id), bell.fds())

    def _shut(self, id: str) -> None:
        self._listen(id, False)
        self._bells.workers.pop(id).close()
        for name in ("gateway", "checker"):
            self._hands.tell(name, DoForget(id))
        self._ledger.drop_card(id)
        self._marks.pop(id, None)

    def _listen(self, id: str, cold: bool) -> None:
        """The bell of a model that has no worker is heard here: there is a job for it."""
        bell = self._bells.workers.get(id)
        if bell is None or (bell in self._selector.get_map()) == cold:
            return
        if cold:
            self._selector.register(bell, EVENT_READ, lambda: self._residents.rung(bell))
        else:
            self._selector.unregister(bell)

    def _happen(self, event: Event) -> None:
        self._state, commands = rules.decide(self._state, event, self._clock())
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
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
            case Drop(name):
                self._residents.dropped(self._of[name])
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
            models=tuple(self._residents.models[id] for id in self._bells.workers),
            model=self._of.get(name),
            version=self._version,
        )
        if part.role == "worker":
            self._listen(self._of[name], False)
            self._residents.begun(self._of[name])
        extra = (self._listening.fileno(),) if part.role == "gateway" else ()
        self._hands.make(spec, extra)
        if part.role == "checker":
            for mark in self._marks.values():
                self._hands.tell(name, mark)

    def _release(self, name: str) -> None:
        """Takes back what a dead process had at once. Where that fails, its leases end."""
        try:
            lost = self._ledger.release(self._holders[name], time.time())
            if name == "checker":
                self._ledger.reopen_questions()
        except Exception:
            LOG.exception("what %s had could not be taken back", name)
            return
        if lost:
            ids = ", ".join(job.id for job in lost)
            LOG.info("%s had %s: it goes on from the beginning", name, ids)

    def _mark(self, mark: DoMark) -> None:
        """The checker publishes how the worker of a model is; also one that is to come."""
        before = self._marks.get(mark.model)
        if mark.state == "failed":
            self._say(f"{mark.model} cannot be served: {mark.reason}")
        elif mark.state == "ready" and (before is None or before.state != "ready"):
            self._say(f"{mark.model} is ready ({self._residents.took(mark.model):.1f} s)")
        elif mark.state == "cold" and before is not None and before.state == "ready":
            self._say(f"{mark.model} has left memory")
        self._marks[mark.model] = mark
        self._residents.said(mark.model, mark.state)
        self._listen(mark.model, mark.state == "cold")
        self._hands.tell("checker", mark)

    # -- the store -------------------------------------------------------------------------------

    def _keep_house(self, ended: threading.Event) -> None:
        """Takes back the claims of who is silent, and now and then removes what nobody needs."""
        swept = self._clock()
        while not ended.wait(EXPIRE_SECONDS):
            try:
                now, served = time.time(), tuple(self._residents.models)
                self._ledger.expire(now)
                removed = tuple(self._residents.removed)
                dismiss(self._ledger, served, removed, now, self._settings.keep_seconds)
                if self._clock() - swept >= SWEEP_SECONDS:
                    swept = self._clock()
                    sweep(self._ledger, self._objects, time.time(), self._settings)
            except Exception:
                LOG.exception("the store could not be tidied; it will be tried again")
