"""The load test: 1, 8, 32 and 100 users at once on a server of this machine, and what it costs.

    found = measured(TINY, seconds=5.0)
    print("\n".join(report([found])))

A server runs as `weft serve` runs, with its own processes, and is asked over the loopback address;
users and server share the cores. What they do is in `mix`, how they do it in `crowd`. Nothing is
told before a sample of the answers was held to what the model gives here, by itself.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import Any

from transformers import AutoModelForCausalLM

from weft.client.servers import server_at
from weft.testing import tiny_path
from weft.testing.process import served

from .crowd import PARTS, Site, Spell, Waits, crowd, heavy_and_light, jain, p95
from .mix import Work, all_at_once, record
from .models import gpt2

USERS = (1, 8, 32, 100)
MANY = 100
VARIANTS = 8
SAMPLE = 100
"""How many answers of a row are checked."""
WARM_USERS = BATCH = 32
LONGEST_ROW = 40.0
OPTIONS = ("--requests-per-minute", "0")
"""A user alone asks more often than the default lets one key."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""The bare model has one thread, too."""


@dataclass(frozen=True)
class Subject:
    """A model under load. `opened()` gives its folder and the model itself, on its device."""

    name: str
    opened: Callable[[], Any]
    device: str = "cpu"


@contextmanager
def _tiny() -> Iterator[tuple[str, Any]]:
    yield tiny_path(), AutoModelForCausalLM.from_pretrained(tiny_path()).eval()


@contextmanager
def _wide() -> Iterator[tuple[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        net = gpt2(layers=12, width=256, heads=8)
        net.save_pretrained(folder)
        yield folder, net


TINY = Subject("tiny", _tiny)
WIDE = Subject("wide", _wide)


@dataclass(frozen=True)
class Bare:
    """The model alone. `seconds` by work, on the rows of each in turn; `at_once` those of one of
    `BATCH` jobs whose rows are together, the best that sharing forwards could come to."""

    seconds: dict[Work, float]
    at_once: float

    @property
    def rate(self) -> float:
        return len(self.seconds) / sum(self.seconds.values())


@dataclass(frozen=True)
class Found:
    """What was measured on one model."""

    model: str
    bare: Bare
    spells: Sequence[Spell]
    waits: Waits

    def spell(self, users: int) -> Spell | None:
        return next((one for one in self.spells if one.users == users), None)

    def over(self, spell: Spell) -> float:
        """Median milliseconds from asking to the answer, beyond the bare pass of the same rows."""
        return 1e3 * median(one.seconds - self.bare.seconds[one.work] for one in spell.done)

    def times_one(self, spell: Spell) -> float:
        """Throughput beside one user's, who has one job at a time."""
        return spell.rate / self.spells[0].rate


def measured(
    subject: Subject, seconds: float, users: Sequence[int] = USERS, variants: int = VARIANTS
) -> Found:
    """All rows of one model, of so many seconds each (three times as many for 100 users, who wait
    longer for each job). Raises `AssertionError` where an answer is not the right one."""
    with subject.opened() as (folder, net):
        environ = {**os.environ, **ONE_THREAD}
        options = (*OPTIONS, "--device", subject.device)
        with served(f"{subject.name}={folder}", options=options, environ=environ) as server:
            works = record(folder, net, server_at(server.url), variants)
            site = Site(server, subject.name, works, max(2, *users))
            asyncio.run(crowd(site, min(WARM_USERS, max(users)), seconds / 2))
            alone = bare(works, net, seconds / 2)
            spells = [_checked(asyncio.run(_row(site, count, seconds))) for count in users]
            length = min(4 * seconds, LONGEST_ROW)
            waits = asyncio.run(heavy_and_light(site, length, every=min(1.0, length / 8)))
    return Found(subject.name, alone, spells, waits)


async def _row(site: Site, users: int, seconds: float) -> Spell:
    return await crowd(site, users, 3 * seconds if users >= MANY else seconds)


def _checked(spell: Spell) -> Spell:
    """The same, once some of its answers have been held to the local run."""
    done = list(spell.done)
    for one in random.Random(0).sample(done, min(SAMPLE, len(done))):
        one.work.check(one.result)
    return spell


def bare(works: Sequence[Work], net: Any, seconds: float) -> Bare:
    """What the model takes by itself; works take turns, and then they are a batch."""
    each = _times([work.bare for work in works], seconds)
    batch = list(islice(cycle(works), BATCH))
    (all_of_them,) = _times([partial(all_at_once, batch, net)], seconds)
    return Bare(dict(zip(works, each, strict=True)), all_of_them / BATCH)


def _times(functions: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Medians, of calls in turn for so long; once at least, after a call that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    until = time.monotonic() + seconds
    while not times[-1] or time.monotonic() < until:
        for function, taken in zip(functions, times, strict=True):
            begun = time.perf_counter()
            function()
            taken.append(time.perf_counter() - begun)
    return [median(taken) for taken in times]


# -- as text -------------------------------------------------------------------------------------


def report(found: Sequence[Found]) -> list[str]:
    """Tables and plots."""
    spells = [(one, spell) for one in found for spell in one.spells]
    return [
        *_table("budget|model|measured|at most or least|met", _budgets(found)),
        "",
        *_table(
            "model|users|jobs/s|x one user|x bare|median, ms|p95, ms|longest, ms|over bare, ms"
            "|merged|batch|Jain|worst user",
            [row for one in found for row in _rows(one)],
        ),
        "",
        *_table(f"model|users|{'|'.join(PARTS)}|together", [_costs(*pair) for pair in spells]),
        "",
        *_table(
            "model|jobs that waited|a pass, ms|light: wait, p95, ms|in passes|price, p95, ms"
            "|whole, p95, ms",
            map(_waited, found),
        ),
        "",
        *_plots(found),
    ]


def _table(head: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    titles = head.split("|")
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _budgets(found: Sequence[Found]) -> Iterator[list[str]]:
    for one in found:
        over, waits, many = one.over(one.spells[0]), one.waits.in_passes, one.spell(MANY)
        yield _budget(
            one, "one user, median over the bare pass", f"{over:.1f} ms", "15", over <= 15
        )
        if many is not None:
            times, worst = one.times_one(many), f"{many.worst:.2f} of the middle one"
            yield _budget(one, "100 users, jobs/s x one user's", f"{times:.1f}", "4", times >= 4)
            yield _budget(one, "100 users, the worst", worst, "none starves", many.worst > 0)
        yield _budget(one, "a light user's wait, p95", f"{waits:.1f} passes", "2", waits <= 2)


def _budget(found: Found, what: str, measured: str, bound: str, met: bool) -> list[str]:
    return [what, found.model, measured, bound, "yes" if met else "**no**"]


def _bare_rows(found: Found) -> Iterator[list[str]]:
    bare = found.bare
    middle = f"{1e3 * median(bare.seconds.values()):.1f}"
    yield [found.model, "bare, in turn", f"{bare.rate:.1f}", "", "1.00", middle, *[""] * 7]
    rate = 1 / bare.at_once
    times = [f"{rate / found.spells[0].rate:.2f}", f"{rate / bare.rate:.2f}"]
    yield [found.model, f"bare, {BATCH} at once", f"{rate:.1f}", *times, *[""] * 8]


def _rows(found: Found) -> Iterator[list[str]]:
    yield from _bare_rows(found)
    yield from [_row_of(found, spell) for spell in found.spells]


def _row_of(found: Found, spell: Spell) -> list[str]:
    ms = [1e3 * seconds for seconds in spell.latencies]
    return [
        found.model,
        str(spell.users),
        f"{spell.rate:.1f}",
        f"{found.times_one(spell):.2f}",
        f"{spell.rate / found.bare.rate:.2f}",
        *[f"{time:.0f}" for time in (median(ms), p95(ms), max(ms))],
        f"{found.over(spell):.1f}",
        f"{spell.merged:.0%}",
        f"{spell.batch:.1f}",
        f"{jain(spell.each):.2f}",
        f"{spell.worst:.2f}",
    ]


def _costs(found: Found, spell: Spell) -> list[str]:
    each = [spell.cost(part) for part in PARTS]
    return [found.model, str(spell.users), *[f"{cost:.2f}" for cost in (*each, sum(each))]]


def _waited(found: Found) -> list[str]:
    waits = found.waits
    length = median(waits.passes) if waits.passes else 0.0
    wait, price, whole = map(p95, (waits.wait, waits.price, waits.whole))
    return [
        found.model,
        f"{min(waits.depth)} to {max(waits.depth)}",
        *[f"{1e3 * seconds:.0f}" for seconds in (length, wait)],
        f"{waits.in_passes:.2f}",
        *[f"{1e3 * seconds:.0f}" for seconds in (price, whole)],
    ]


def _plots(found: Sequence[Found]) -> Iterator[str]:
    names = ", then ".join(one.model for one in found)
    rates = [[spell.rate for spell in one.spells] for one in found]
    yield from _plot(f"Jobs a second, by users ({names})", "jobs a second", found[0], rates)
    for one in found:
        ms = [[1e3 * seconds for seconds in spell.latencies] for spell in one.spells]
        lines = [[median(times) for times in ms], [p95(times) for times in ms]]
        yield ""
        yield from _plot(f"{one.model}: median, then p95, by users", "milliseconds", one, lines)


def _plot(title: str, axis: str, found: Found, lines: Sequence[Sequence[float]]) -> Iterator[str]:
    users = ", ".join(f'"{one.users}"' for one in found.spells)
    top = max(number for line in lines for number in line)
    yield "```mermaid"
    yield "xychart-beta"
    yield f'    title "{title}"'
    yield f'    x-axis "users" [{users}]'
    yield f'    y-axis "{axis}" 0 --> {math.ceil(1.1 * top)}'
    for line in lines:
        yield f"    line [{', '.join(f'{number:.1f}' for number in line)}]"
    yield "```"
