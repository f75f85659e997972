"""Requests of many users in one forward, and in one decode loop, beside the bare model.

    ./run bench merging

32 different graphs (reads, fills, writes, patches, lenses, steering) on prompts of 5 to 200 tokens
go through one forward, as a worker draws them: from opened messages to finished results. Beside it
the same padded batch goes through the model alone. Then eight generations, joined in one decode
loop, beside one after another. What each job saved is compared with what it saves alone before
anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import GPT2LMHeadModel

import weft
from weft.client import loopback
from weft.engine.draw import Drawn, draw, overwritten_by
from weft.engine.known import Known
from weft.engine.merging import merger_of
from weft.engine.opened import Opened
from weft.engine.party import Entry, draw_together
from weft.engine.rolling import Decode
from weft.engine.stepping import sharer_of
from weft.kernels.frames import to_tensor
from weft.settings import load
from weft.testing.same import bounded

from .measure import Sample, in_turn, ratio
from .models import gpt2, prompt, waited

USERS, SHORTEST, LONGEST = 32, 5, 200
GENERATIONS, NEW, SHORT = 8, 20, 6
ROUNDS = 20


@dataclass(frozen=True)
class Merged:
    """One piece of work: another way of doing it, and shared."""

    name: str
    way: str
    other: Sample
    ours: Sample
    budget: str = ""

    @property
    def ratio(self) -> float:
        return ratio(self.other, self.ours)


class Users:
    """The requests of many users, as they lie before a worker."""

    def __init__(self, net: GPT2LMHeadModel, longest: int = LONGEST) -> None:
        self.net: Any = net
        self.model: Any = weft.LanguageModel(self.net, remote="local")
        self.layers = net.config.n_layer
        self.longest = longest
        self.limits = loopback.limits_of(load())
        self.known: Any = None
        self._seen: list[tuple[Opened, bool]] = []

    def entries(self, blocks: Sequence[Callable[[], Any]]) -> list[Entry]:
        """Runs each block alone, and keeps what came before the worker."""
        opened: list[Opened] = []

        def hears(net: Any, job: Opened, **options: Any) -> Drawn:
            opened.append(job)
            return draw(net, job, **options)

        def told(known: Known, *calls: Any, **options: Any) -> Any:
            self.known = known
            return overwritten_by(known, *calls, **options)

        with patch.object(loopback, "draw", hears), patch.object(loopback, "overwritten_by", told):
            for block in blocks:
                block()
        return [self.entry(job) for job in opened]

    def entry(self, job: Opened) -> Entry:
        told = overwritten_by(self.known, *job.calls, graph=job.graph, sampling=job.sampling)
        return Entry(job, self.limits, told, on_log=lambda text: None)

    # -- what they ask -----------------------------------------------------------------------------

    def blocks(self) -> list[Callable[[], Any]]:
        kinds = (self.read, self.fill, self.write, self.patch, self.lens, self.steer)
        span = self.longest - SHORTEST
        return [
            partial(kinds[n % len(kinds)], SHORTEST + span * n // (USERS - 1), n)
            for n in range(USERS)
        ]

    def _layer(self, n: int) -> Any:
        return self.model.transformer.h[n % self.layers]

    def _logits(self) -> Any:
        return self.model.lm_head.output[:, -1]

    def read(self, length: int, n: int) -> None:
        with self.model.trace(prompt(length)):
            self._layer(n).output[:, -2:].save("h")
            self._layer(n).mlp.output.mean(-1).save("mean")
            self._logits().save("logits")

    def fill(self, length: int, n: int) -> None:
        with self.model.trace(prompt(length)):
            self._layer(n).output[:, -1] *= 0.5 + n / 10
            self._logits().save("logits")

    def write(self, length: int, n: int) -> None:
        mlp = self._layer(n).mlp
        with self.model.trace(prompt(length)):
            mlp.output = mlp.output.flip(1) * (1 + n / 10)
            self._logits().softmax(-1).save("p")

    def patch(self, length: int, n: int) -> None:
        with self.model.trace() as tracer:
            with tracer.invoke(prompt(length)):
                clean = self._layer(n).output[:, -1]
            with tracer.invoke(prompt(length - 1)):
                self._layer(n).output[:, 1] = clean
                self._logits().save("logits")

    def lens(self, length: int, n: int) -> None:
        model = self.model
        with model.trace(prompt(length)):
            states = [block.output[:, -1] for block in model.transformer.h]
            for number, state in enumerate(states):
                model.lm_head(model.transformer.ln_f(state)).argmax(-1).save(f"l{number}")

    def steer(self, length: int, n: int) -> None:
        direction = torch.linspace(-1, 1, self.net.config.n_embd) * n
        with self.model.trace(prompt(length)):
            self._layer(n).output += direction
            self._logits().save("logits")

    def generate(self, length: int, n: int, new: int = NEW) -> None:
        how: dict[str, Any] = {"do_sample": True, "seed": n} if n % 2 else {"do_sample": False}
        with self.model.generate(
            prompt(length), max_new_tokens=new, eos_token_id=None, **how
        ) as tracer:
            self._layer(n).output[:, -1] *= 1.0 + n / 10
            tracer.result.save("ids")

    # -- the ways ----------------------------------------------------------------------------------

    def padded(self, entries: Sequence[Entry]) -> torch.Tensor:
        """The rows of all, padded on the right `[rows, longest]`, where the model is."""
        rows: list[Any] = [
            call.kwargs["input_ids"] for entry in entries for call in entry.opened.calls
        ]
        found = torch.zeros(len(rows), max(row.shape[1] for row in rows), dtype=torch.long)
        for place, row in zip(found, rows, strict=True):
            place[: row.shape[1]] = row[0]
        return found.to(self.net.device)

    def bare(self, ids: torch.Tensor, i: int = 0) -> None:
        with torch.no_grad():
            self.net(input_ids=ids, use_cache=False)
        waited(ids.device)

    def together(self, entries: Sequence[Entry], i: int = 0) -> list[Drawn]:
        merger = merger_of(self.known)
        assert merger is not None
        found = draw_together(self.net, entries, merger)
        return [one for one in found if isinstance(one, Drawn)]

    def alone(self, entries: Sequence[Entry], i: int = 0) -> list[Drawn]:
        """One after another."""
        return [
            draw(
                self.net,
                entry.opened,
                overwritten=entry.overwritten,
                merger=merger_of(self.known),
                sharer=sharer_of(self.known),
                tokenizer=self.known.tokenizer,
                limits=self.limits,
                strict=True,
                on_log=lambda text: None,
            )
            for entry in entries
        ]

    def rolling(self, entries: Sequence[Entry], i: int = 0) -> list[Drawn]:
        """Joined in one decode loop."""
        sharer = sharer_of(self.known)
        assert sharer is not None
        decode = Decode(self.net, sharer, self.known.tokenizer)
        tickets = [decode.join(entry) for entry in entries]
        while decode.turn():
            pass
        return [one.found for one in tickets if one and isinstance(one.found, Drawn)]


def merging_rows(rounds: int) -> Iterator[Merged]:
    """Everything, each row in turns of its own."""
    rounds = min(rounds, ROUNDS)
    for width, longest, budget in ((64, 32, ""), (64, LONGEST, "1.30"), (256, LONGEST, "1.30")):
        yield one_pass(gpt2(12, width), longest, rounds, budget)
    yield one_loop(gpt2(12), rounds)
    yield one_loop(gpt2(12), rounds, count=2 * GENERATIONS, new=SHORT)


def one_pass(net: GPT2LMHeadModel, longest: int, rounds: int, budget: str = "") -> Merged:
    """All users in one forward, beside the padded rows through the model alone."""
    users = Users(net, longest)
    entries = users.entries(users.blocks())
    _same(users.together(entries), users.alone(entries))
    ids = users.padded(entries)
    ways = [partial(users.bare, ids), partial(users.together, entries)]
    shape = f"{net.config.n_layer} layers of {net.config.n_embd}"
    bare, ours = in_turn(ways, rounds, warmup=0)
    name = f"{USERS} users, up to {longest} tokens, {shape}"
    return Merged(name, "the same rows, bare", bare, ours, budget)


def one_loop(net: GPT2LMHeadModel, rounds: int, count: int = GENERATIONS, new: int = NEW) -> Merged:
    """All generations in one decode loop, beside one after another."""
    users = Users(net)
    lengths = [SHORTEST + 4 * n for n in range(count)]
    entries = users.entries(
        [partial(users.generate, length, n, new) for n, length in enumerate(lengths)]
    )
    _same(users.rolling(entries), users.alone(entries))
    ways = [partial(users.alone, entries), partial(users.rolling, entries)]
    alone, ours = in_turn(ways, rounds, warmup=0)
    return Merged(f"{count} generations of {new} tokens", "one after another", alone, ours)


def _same(shared: Sequence[Drawn], alone: Sequence[Drawn]) -> None:
    """All took part, and each has what it has alone."""
    if len(shared) != len(alone):
        raise AssertionError(f"{len(alone) - len(shared)} of {len(alone)} did not take part")
    for one, other in zip(shared, alone, strict=True):
        assert one.manifest.saved == other.manifest.saved
        for name, frame in other.frames.items():
            bounded(to_tensor(one.frames[name]), to_tensor(frame))
