"""Users at work on one server, each with a key and a connection of his own.

    site = Site(server, "tiny", works, users=8)
    spell = asyncio.run(crowd(site, users=8, seconds=5.0))
    waits = asyncio.run(heavy_and_light(site, seconds=20.0))

Every user sends his next job when he has the answer to the last one, so the load follows what the
server can do. The clock starts when all have had one, so that the crowd's arrival is not counted.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median, quantiles

from weft.client import jobs
from weft.client.core import Talk
from weft.client.find import Place
from weft.client.servers import Server, server_at
from weft.errors import LimitError
from weft.service.fleet.keys import add_key, open_keys
from weft.settings import load
from weft.testing.process import Running
from weft.wire.messages import JobInfo, ServerStatus

from .line import Line
from .mix import Work

PARTS = ("gateway", "checker", "worker", "fleet", "users")
"""Whose processor time is told; `fleet` is the process above the others, and theirs' maker."""
SETTLED_SECONDS = 30.0
"""How long a crowd may take until each has had an answer; then the clock starts anyway."""
STRIDE = 7
"""How far apart two users begin in the list of works."""
PAGE = 1000
POURERS = 4
"""Connections over which the heavy user sends jobs."""


@dataclass(frozen=True)
class Done:
    """One job that was done: whose, what, how long he waited for it, and when he had it."""

    user: int
    work: Work
    seconds: float
    at: float
    info: JobInfo
    result: bytes


class Site:
    """A server, the users who have keys there, and the work that they send."""

    def __init__(self, server: Running, model: str, works: Sequence[Work], users: int) -> None:
        self.pid = server.process.pid
        self.model = model
        self.works = works
        self.own = server_at(server.url)  # with the key of this machine's user
        with open_keys(server.data) as ledger:
            keys = [add_key(ledger, f"user-{n}", time.time()) for n in range(users)]
        self.users = [Server(Place(server.url, key), load()) for key in keys]

    def order(self, user: int) -> Iterator[Work]:
        """What a user sends, for ever."""
        start = user * STRIDE % len(self.works)
        return islice(cycle(self.works), start, None)

    async def ask(self, line: Line, user: int, work: Work) -> Done:
        """Sends one job and waits for its answer. Raises `RuntimeError` where it is not done."""
        begun = time.monotonic()
        talk, body = Talk(self.users[user]), work.message(secrets.token_hex(16))
        end = await line.run(jobs.follow(talk, work.parcel, body))
        now = time.monotonic()
        if end.job.state != "done" or not end.result:
            raise RuntimeError(f"a job of kind {work.kind} ended as {end.job.state}: {end.job}")
        return Done(user, work, now - begun, now, end.job, end.result)

    async def batches(self, line: Line) -> tuple[float, float]:
        """Of all jobs so far: how many, and the sum of the sizes of their batches."""
        answer = await line.run(Talk(self.own).call("GET", "/metrics"))
        text = answer.body.decode()
        count, total = (
            _metric(text, f"weft_batch_jobs_{what}", self.model) for what in ("count", "sum")
        )
        return count, total

    async def waiting(self, line: Line) -> int:
        """How many jobs wait for the model."""
        told = await line.run(Talk(self.own).ask("GET", "/api/status", ServerStatus))
        return sum(one.waiting for one in told.models if one.id == self.model)


def _metric(text: str, name: str, model: str) -> float:
    found = re.search(rf'^{name}{{model="{model}"}} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


# -- all at once ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spell:
    """What a crowd had done in some time, and what it cost: seconds of processors by part."""

    users: int
    seconds: float
    done: Sequence[Done]
    spent: dict[str, float]
    batch: float

    @property
    def rate(self) -> float:
        return len(self.done) / self.seconds

    @property
    def latencies(self) -> list[float]:
        return sorted(one.seconds for one in self.done)

    @property
    def merged(self) -> float:
        return sum(one.info.merged for one in self.done) / max(1, len(self.done))

    @property
    def each(self) -> list[int]:
        """How many jobs of each user were done."""
        counts = Counter(one.user for one in self.done)
        return [counts[user] for user in range(self.users)]

    @property
    def worst(self) -> float:
        """The user with the fewest jobs, beside the one in the middle."""
        return min(self.each) / max(1, median(self.each))

    def cost(self, part: str) -> float:
        """Milliseconds of a processor for one job."""
        return 1e3 * self.spent.get(part, 0.0) / max(1, len(self.done))


def jain(numbers: Sequence[float]) -> float:
    """Jain's index: 1 where all have the same, 1/n where one has everything."""
    squares = len(numbers) * sum(x * x for x in numbers)
    return sum(numbers) ** 2 / squares if squares else 0.0


def p95(numbers: Sequence[float]) -> float:
    return quantiles(numbers, n=20)[-1] if len(numbers) > 1 else max(numbers, default=0.0)


async def crowd(site: Site, users: int, seconds: float) -> Spell:
    """Lets so many users work for so long."""
    done: list[Done] = []
    seen: set[int] = set()
    going, settled, watch = True, asyncio.Event(), Line(site.own)

    async def work_on(user: int) -> None:
        line = Line(site.users[user])
        for work in site.order(user):
            if not going:
                break
            done.append(await site.ask(line, user, work))
            seen.add(user)
            if len(seen) == users:
                settled.set()
        line.close()

    async with asyncio.TaskGroup() as group:
        for user in range(users):
            group.create_task(work_on(user))
        with suppress(TimeoutError):
            await asyncio.wait_for(settled.wait(), SETTLED_SECONDS)
        before, spent = await site.batches(watch), processors(site.pid)
        begun = time.monotonic()
        await asyncio.sleep(seconds)
        ended = time.monotonic()
        after, now = await site.batches(watch), processors(site.pid)
        going = False
    watch.close()
    counted = [one for one in done if begun < one.at <= ended]
    batch = (after[1] - before[1]) / max(1.0, after[0] - before[0])
    spent = {part: now[part] - spent[part] for part in PARTS}
    return Spell(users, ended - begun, counted, spent, batch)


# -- one against another -------------------------------------------------------------------------


@dataclass
class Waits:
    """What a light user had to wait for beside a heavy one, in seconds: from acknowledged to begun,
    for the price alone, for the answer; the jobs that waited then; and how long passes took."""

    wait: list[float] = field(default_factory=list)
    price: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)

    @property
    def in_passes(self) -> float:
        """The 95th percentile of the wait, in passes."""
        return p95(self.wait) / median(self.passes) if self.passes else math.nan


async def heavy_and_light(site: Site, seconds: float, every: float = 1.0) -> Waits:
    """User 0 sends jobs without waiting for any, as many as his limit lets him have; user 1 sends
    a job `every` so many seconds, as soon as the other's queue stands."""
    waits, going = Waits(), True
    plain = [work for work in site.works if work.kind != "generate"]
    works = cycle(plain)

    async def pour() -> None:
        line, talk = Line(site.users[0]), Talk(site.users[0], seconds=1.0)
        while going:
            work = next(works)
            try:
                body = work.message(secrets.token_hex(16))
                await line.run(jobs.send(talk, work.parcel, body))
            except LimitError:  # all that he may have wait
                continue
        line.close()

    async def light(line: Line, work: Work) -> None:
        done = await site.ask(line, 1, work)
        stages = done.info.stages
        waits.wait.append(stages["price"] + stages["queue"])
        waits.price.append(stages["price"])
        waits.whole.append(done.seconds)

    watch = Line(site.own)
    async with asyncio.TaskGroup() as group:
        for _ in range(POURERS):
            group.create_task(pour())
        await asyncio.sleep(seconds / 4)
        since, until = time.time(), time.monotonic() + seconds
        lines = [Line(site.users[1]) for _ in range(int(seconds / every) + 2)]
        for line, work in zip(lines, cycle(plain), strict=False):
            if time.monotonic() > until:
                break
            waits.depth.append(await site.waiting(watch))
            group.create_task(light(line, work))
            await asyncio.sleep(every)
        going = False
    async for job in _jobs(watch, site.users[0]):
        if job.state == "done" and job.created + sum(job.stages.values()) > since:
            waits.passes.append(job.stages["run"])
    for line in (watch, *lines):
        line.close()
    return waits


async def _jobs(line: Line, user: Server) -> AsyncIterator[JobInfo]:
    """All jobs of a user, newest first."""
    last = None
    while found := (await line.run(jobs.listed(Talk(user), PAGE, last))).jobs:
        for job in found:
            yield job
        last = found[-1].id


# -- whose time it was ---------------------------------------------------------------------------


def processors(pid: int) -> dict[str, float]:
    """Seconds of processors so far, by part: of the server that has this pid, and of this process.

    Read from /proc; elsewhere only this process is known.
    """
    spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    spent["users"] = time.process_time()
    found = {one.pid: one for path in Path("/proc").glob("[0-9]*/stat") if (one := _stat(path))}
    for one in found.values():
        above = one
        while above.pid != pid and above.parent in found:
            above = found[above.parent]
        if above.pid == pid:
            part = one.name.removeprefix("weft:")
            spent[part if part in PARTS else "fleet"] += one.seconds
    return spent


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    name: str
    seconds: float


def _stat(path: Path) -> _Process | None:
    """None where it has ended meanwhile."""
    try:
        head, _, tail = path.read_text().rpartition(")")
    except OSError:
        return None
    pid, _, name = head.partition(" (")
    fields = tail.split()
    ticks = int(fields[11]) + int(fields[12])
    return _Process(int(pid), int(fields[1]), name, ticks / os.sysconf("SC_CLK_TCK"))
