"""The models of a server as the fleet keeps them: which there are, what each takes, who wants them.

    residents = Residents(models, ledger, settings)
    state = residents.begin(state)             # a part for each, with what was measured before
    for event in residents.turn(pids): ...     # news for `rules`, at most every LOOK seconds
    residents.said(Say("worker tiny", "cold"))

It reads the store (jobs, deployed models) and the system (memory), and writes the row of each
worker's memory, which the gateway shows and the next start begins with. Decides nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from weft.errors import WeftError
from weft.service.gateway.sources import may_deploy, source_of
from weft.service.store.bells import Bell
from weft.service.store.interface import Ledger
from weft.service.store.models import Deployed, WorkerMemory
from weft.settings import Settings

from . import meter
from .models import MOST, Deployment
from .parts import (
    Added,
    Budget,
    Demand,
    Event,
    Known,
    Limited,
    Looked,
    Measured,
    Need,
    Part,
    Removed,
    Resident,
    State,
)

LOOK, MEASURE, CACHE = 0.5, 2.0, 15.0
"""Seconds between two looks at the jobs, two measures of processes, and two of the page cache."""
TELL = 0.25
"""How far a load has come is written so often at most."""
SHARE = 0.9
"""Of what is free at the start, all models may have so much if no setting says otherwise."""
HOST_BASE, DEVICE_BASE = 256 << 20, 512 << 20
DEVICE_HOST = 2 << 30
"""Beyond its weights a worker takes about so much, before it was ever measured: on the host, on a
device, and on the host where its weights go to a device."""

LOG = logging.getLogger("weft.fleet")


def part_of(model: str) -> str:
    """The name of the part that is a model's worker."""
    return f"worker {model}"


class Residents:
    """See the module's text. Used from the fleet's own thread only."""

    def __init__(
        self,
        models: Sequence[Deployment],
        ledger: Ledger,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._clock = clock
        self._fixed = {model.id for model in models}
        self.models = {model.id: model for model in models}
        self._tries: dict[str, int] = {}
        self._memory: dict[str, WorkerMemory] = {}
        self._begun: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._next = dict.fromkeys(("look", "measure", "cache"), 0.0)
        self._device_all = 0
        self._host = settings.models_bytes or int(SHARE * meter.free_bytes()) or None
        self.heard = True  # whether there may be new jobs of a model that is not loaded
        self.removed: set[str] = set()
        self._adopt(self._of_the_store())

    # -- the beginning ---------------------------------------------------------------------------

    def begin(self, state: State) -> State:
        """The state with a part for each model, and with the budget."""
        for model in self.models.values():
            part = Part(part_of(model.id), "worker", model=self._resident(model))
            state = state.with_part(part)
        return replace(state, budget=self._budget(), grows=may_deploy(self._settings))

    def _resident(self, model: Deployment) -> Resident:
        row = self._memory[model.id]
        known = Need(row.need, row.need_device) if row.need else None
        return Resident(pinned=model.pinned, need=known, used=row.used)

    def _budget(self) -> Budget:
        device = self._settings.models_device_bytes or int(SHARE * self._device_all)
        return Budget(self._host, device or None)

    # -- which models there are ------------------------------------------------------------------

    def _of_the_store(self) -> Iterator[tuple[Deployment, int]]:
        """Deployed models that may still be served. Those of the operator's own go before."""
        for row in self._ledger.deployed():
            if row.id in self._fixed:
                continue
            try:
                yield self._checked(row), row.tries
            except (msgspec.DecodeError, WeftError) as error:
                LOG.info("%s was deployed, and is not served: %s", row.id, error)

    def _checked(self, row: Deployed) -> Deployment:
        """What its row says; weights that stay under another name stay under this one, too."""
        model = msgspec.json.decode(row.body, type=Deployment)
        model = replace(model, id=row.id, source=source_of(model.source, self._settings))
        same = [model, *[self.models[id] for id in self._fixed]]
        said = [one.weights(self._settings) for one in same if one.source == model.source]
        stay = [most for leave, most in said if not leave]
        return replace(model, weights_leave=False, weights_bytes=min(stay)) if stay else model

    def _adopt(self, found: Iterator[tuple[Deployment, int]]) -> None:
        for model, tries in found:
            if len(self.models) < MOST:
                self.models[model.id], self._tries[model.id] = model, tries
        for model in self.models.values():
            self._remember(model)

    def _remember(self, model: Deployment) -> None:
        """Its row, with the measures of last time if they are of the same weights."""
        of, known = model.same_weights(), self._ledger.memory(model.id)
        pinned, own = model.pinned, model.id in self._fixed
        row = WorkerMemory(model=model.id, of=of, pinned=pinned, own=own)
        if known is not None and known.of == of:
            gone: dict[str, Any] = {"state": "cold", "host": 0, "device": 0, "loaded": 0}
            row = replace(known, pinned=pinned, own=own, **gone)
        self._memory[model.id] = row
        self._write(model.id, cached=True)

    def changes(self) -> list[Event]:
        """What was deployed and put away since the last time, by the store."""
        wanted = {model.id: (model, tries) for model, tries in self._of_the_store()}
        events: list[Event] = []
        for id in [id for id in self.models if id not in wanted and id not in self._fixed]:
            del self.models[id], self._tries[id]
            self.removed.add(id)
            events.append(Removed(part_of(id)))
        for id, (model, tries) in wanted.items():
            if self.models.get(id) == model and self._tries.get(id) == tries:
                continue
            if id not in self.models and len(self.models) >= MOST:
                continue
            new = id not in self.models
            self.removed.discard(id)
            self.models[id], self._tries[id] = model, tries
            if new:
                self._remember(model)
            else:
                self._change(id, pinned=model.pinned)
            events.append(Added(part_of(id), model.pinned, self._resident(model).need))
        return events

    # -- news ------------------------------------------------------------------------------------

    def due(self) -> float:
        """When `turn` has something to do next."""
        return 0.0 if self.heard else self._next["look"]

    def turn(self, pids: Mapping[str, int]) -> Iterator[Event]:
        """What has become of jobs and memory. `pids` are the processes that are ready, by part."""
        now = self._clock()
        if now >= self._next["look"] or self.heard:
            self._next["look"], self.heard = now + LOOK, False
            yield self._look()
        if now >= self._next["measure"]:
            self._next["measure"] = now + MEASURE
            for id in self.models:
                if part_of(id) in pids:
                    yield self.measured(id, pids[part_of(id)])
        if now >= self._next["cache"]:
            self._next["cache"] = now + CACHE
            for id in self.models:
                self._write(id, cached=self._memory[id].state == "cold")

    def _look(self) -> Looked:
        counts = self._ledger.counts()
        sessions = self._ledger.open_sessions(time.time())
        used = {row.model: row.used for row in self._ledger.memories()}
        return Looked(
            {
                part_of(id): Demand(
                    waiting=counts.get((id, "queued"), 0),
                    running=counts.get((id, "running"), 0),
                    sessions=sessions.get(id, 0),
                    used=used.get(id, 0.0),
                )
                for id in self.models
            }
        )

    def known(self, id: str, weights: int) -> Event | None:
        """The checker knows a model: what a load of it takes, before one was measured."""
        model = self.models.get(id)
        if model is None:
            return None
        self._change(id, weights=weights)
        if model.device in (None, "cpu"):
            return Known(part_of(id), Need(weights + HOST_BASE))
        return Known(part_of(id), Need(DEVICE_HOST, weights + DEVICE_BASE))

    # -- what workers take -----------------------------------------------------------------------

    def loading(self, id: str, loaded: int) -> None:
        """So many bytes of its weights are in memory."""
        if id in self._memory and self._clock() - self._told.get(id, 0.0) >= TELL:
            self._told[id] = self._clock()
            weights = self._memory[id].weights
            self._change(id, loaded=min(loaded, weights) if weights else loaded)

    def using(self, id: str, device: int, device_free: int) -> None:
        """So much device memory does its process have."""
        if id in self._memory:
            self._change(id, device=device, free_device=device_free)

    def ready(self, id: str, pid: int | None, device: int, device_all: int) -> tuple[Event, Need]:
        """It is loaded: the budget, which may be known by that only, and what it takes."""
        self._device_all = max(self._device_all, device_all)
        host = meter.process_bytes(pid) if pid else 0
        row = self._memory[id]
        self._change(
            id,
            host=host,
            device=device,
            peak=host,
            need=host or row.need,
            need_device=device or row.need_device,
            loaded=row.weights,
            load_seconds=self._clock() - self._begun.get(id, self._clock()),
        )
        row = self._memory[id]
        return Limited(self._budget()), Need(row.need, row.need_device)

    def measured(self, id: str, pid: int) -> Measured:
        """What its process takes now."""
        row = self._memory[id]
        host = meter.process_bytes(pid) or row.host
        if abs(host - row.host) > row.host // 100:
            self._change(id, host=host, peak=max(row.peak, host))
        return Measured(part_of(id), Need(host, row.device))

    def begun(self, id: str) -> None:
        """Its process was made."""
        self._begun[id] = self._clock()

    def took(self, id: str) -> float:
        """Seconds that its last load took."""
        return self._memory[id].load_seconds if id in self._memory else 0.0

    def rung(self, bell: Bell) -> None:
        """A job was queued for a model that has no process."""
        bell.drain()
        self.heard = True

    def said(self, id: str, state: str) -> None:
        """Its state is another one."""
        if id not in self._memory:
            return
        gone: dict[str, Any] = {"host": 0, "device": 0, "loaded": 0} if state != "ready" else {}
        self._change(id, state=state, **gone)
        if state == "cold":
            self.heard = True  # a job may have come for it meanwhile
            self._write(id, cached=True)

    def dropped(self, id: str) -> None:
        """Nothing of it is left. Its measures stay, for when it is deployed again."""
        if id in self._memory and id not in self.models:
            self._change(id, state="cold", host=0, device=0, loaded=0)
            del self._memory[id]

    # -- the rows --------------------------------------------------------------------------------

    def _change(self, id: str, **changes: Any) -> None:
        self._memory[id] = replace(self._memory[id], **changes)
        self._write(id)

    def _write(self, id: str, *, cached: bool = False) -> None:
        row = self._memory[id]
        if cached and id in self.models:
            files, held = meter.cached_bytes(meter.weight_files(self.models[id].source))
            row = replace(row, files=files, cached=held)
        row = replace(row, free=meter.free_bytes(), measured=time.time())
        self._memory[id] = row
        self._ledger.put_memory(row)
