"""A store in memory, a small model whose forward does what a test wants, and jobs for it.

shop = Shop()
job = shop.queued(reads("last"))
shop.worker().do(shop.claimed(job))
shop.saved(job)["h"]                   # as plain PyTorch gives it: shop.last()
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.run.graphs import Builder
from weft.client.backend import Request
from weft.client.results import opened
from weft.client.travel import constant_file, pack
from weft.engine.known import Known
from weft.engine.publish import know
from weft.service.jobs.life import Job
from weft.service.store.bells import Bell, Bells
from weft.service.store.ids import new_id
from weft.service.store.memory import MemoryLedger, MemoryObjects
from weft.service.store.shell import Shell
from weft.service.worker.loop import Worker
from weft.settings import Settings
from weft.wire.messages import EndEvent, ErrorReport, Event, JobInfo, decode, encode
from weft.wire.reports import error_of

MODEL = "net"
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Act(nn.Module):
    """Does what a test wants in the middle of the model's real pass."""

    def __init__(self) -> None:
        super().__init__()
        self.does: Callable[[], object] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.does is not None and type(x) is torch.Tensor and x.device.type == "cpu":
            self.does()
        return x


class Net(nn.Module):
    """first, act, last: what `act` does happens when `first` has fired and `last` has not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.act = Act()
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)))


class Clock:
    """The time, and more."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Shop:
    """See the module's text."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.bells = Bells.of_models([MODEL])
        self.objects = MemoryObjects()
        self.ledger = MemoryLedger(self.settings, Shell(self.bells, self.objects))
        self.clock = Clock()
        torch.manual_seed(3)
        self.net = Net().eval()
        self.known: Known = know(self.net)
        self._numbers = itertools.count()

    def close(self) -> None:
        self.bells.close()

    # -- the model -------------------------------------------------------------------------------

    def first(self) -> torch.Tensor:
        """What the first layer gives for `X`: `[3, 8]`."""
        with torch.no_grad():
            return torch.nn.functional.linear(X, self.net.first.weight, self.net.first.bias)

    def last(self) -> torch.Tensor:
        """What the model gives for `X`: `[3, 2]`."""
        with torch.no_grad():
            weight, bias = self.net.last.weight, self.net.last.bias
            return torch.nn.functional.linear(self.first(), weight, bias)

    def does(self, act: Callable[[], object] | None) -> None:
        self.net.act.does = act

    # -- jobs ------------------------------------------------------------------------------------

    def received(self, built: Builder, x: torch.Tensor = X, **changes: Any) -> Job:
        """A job as the gateway leaves it."""
        request = Request(built.graph(), built.constants, (x,))
        parcel = pack(request, "plain", small=0)
        fields = {"model": MODEL, "fingerprint": self.known.fingerprint, **changes}
        now = self.clock()
        job = Job(
            id=new_id(now),
            owner="ann",
            request_id=f"r{next(self._numbers)}",
            model=fields["model"],
            created=now,
            since=now,
            constants=tuple(parcel.large),
        )
        for digest, tensor in parcel.large.items():
            self.objects.put(f"constants/ann/{digest}", constant_file(tensor))
        self.objects.put(f"submits/{job.id}", encode(parcel.submit(job.request_id, **fields)))
        return self.ledger.submit(job, 100)[0]

    def queued(self, built: Builder, **changes: Any) -> Job:
        """A job as the checker leaves it, which here looks at nothing."""
        from tests.service.jobs import PRICED

        job = self.received(built, **changes)
        return self.ledger.step(job.id, PRICED, self.clock())

    def job(self, job: Job) -> Job:
        """How it is now."""
        found = self.ledger.job(job.id)
        assert found is not None
        return found

    def error(self, job: Job) -> Any:
        """What it failed with, as its owner gets it."""
        found = self.job(job).error
        assert found is not None
        return error_of(decode(found, ErrorReport, "json"))

    def saved(self, job: Job) -> dict[str, Any]:
        return opened(self.objects.get(f"results/{job.id}"))[1]

    def events(self, job: Job) -> list[Any]:
        """What its followers see."""
        return [decode(note.data, Event, "json") for note in self.ledger.notes(job.id)]

    def end(self, job: Job) -> JobInfo:
        """What the last of them says; it is the only such one."""
        *before, end = self.events(job)
        assert isinstance(end, EndEvent)
        assert not any(isinstance(event, EndEvent) for event in before)
        return end.job

    # -- who does them ---------------------------------------------------------------------------

    def worker(self, **options: Any) -> Worker:
        options = {"clock": self.clock, "holder": "w", **options}
        store = self.ledger, self.objects, self.bells
        return Worker(*store, MODEL, self.net, self.known, self.settings, **options)

    def one(self, **options: Any) -> Worker:
        """A worker that has done the next job."""
        worker = self.worker(**options)
        job = worker.claim()
        assert job is not None
        worker.do(job)
        return worker


def reads(*paths: str, log: str | None = None) -> Builder:
    """A graph that saves what these modules give, as `h` or by path; and logs."""
    like = {"first": (3, 8), "act": (3, 8), "last": (3, 2)}
    built = Builder()
    for path in paths:
        h = built.read(path, like[path])
        if log is not None:
            built.log(log)
        built.save("h" if len(paths) == 1 else path, h)
    return built


__all__ = ["MODEL", "Bell", "Net", "Shop", "X", "reads"]
