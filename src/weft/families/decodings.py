"""`Decodings`: several generations whose forwards are shared, row by row.

    with closing(Decodings(net, shared=shares_steps(net, facts))) as decodings:
        numbers = [decodings.add(one) for one in (first, second)]  # `decoding.Decoding`s, not begun
        while (turn := decodings.turn()) is not None:
            output = net(*turn.call[0], **turn.call[1])
            decodings.took(output)
            ...                                                    # here others may join, or leave
    first.result, second.result

A generation begins with a forward for its prompt, alone or beside other prompts: shorter ones are
padded on the right, where a causal model does not look, and only where its cache keeps all that it
is given. Then its rows join those that are there, and leave when it is over. In the steps each row
has one token, its own position, and its cache at the right of the common width; what is left of it
is zero and masked. A row sees nothing of its neighbours, and each generation has a sampler of its
own whose draws are keyed, so its tokens are those it has alone.

Numbers are then those of another shape of batch: within rounding. Whether the model is one that
allows it is decided elsewhere (`engine.sharing`); without, and where rotary embeddings follow the
length, one generation runs after another. What a generation itself does not allow (no cache, a
padded prompt, a cache of another kind) runs alone, its forwards between those of the others.

Not here: graphs (`run.joined`). A forward that raises ends all who are in it: `close`, then begin
anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weft.errors import SamplingError
from weft.run.part import ModuleCall

from .caches import (
    align,
    caches_in,
    fresh_cache,
    has_joining_cache,
    join,
    longest_padded,
    narrow,
)
from .call import ModelCall
from .decoding import Decoding, inputs_of
from .forward import language_facts
from .ropes import moving_ropes
from .sampling import Sampling

LARGEST = 1 << 15
"""Tokens of one shared prompt forward, padding included."""

LITTLE = 256
"""So much padding costs nothing; what is more may be half as much as the prompts at most."""

ENDS = 8
"""Lengths of prompts that share a forward: the head runs at the last position of each, for all."""

POSITIONS = 1 << 16
"""Positions of the shared cache, rows times the longest that one of them may become."""


class Place(NamedTuple):
    """Where the rows of one generation lie in a turn.

    number: which generation; step: the step of its own; rows: from and to; length: how many
    positions it has, this step's included; width: of the forward's cache and step. Its positions
    are the last `length` of `width`, of a prompt's forward the first. Of the `kept` positions that
    the forward has logits of (1 where they are all, too), its last one is at `last`.
    """

    number: int
    step: int
    rows: tuple[int, int]
    length: int
    width: int
    last: int = -1
    kept: int = 1


class Turn(NamedTuple):
    """One forward: its call, and whose rows are where."""

    call: ModuleCall
    places: tuple[Place, ...]


class Decodings:
    """See the module's text.

    shared: whether the model was found to keep rows apart; rows: at most so many in a shared
    forward; positions: of the shared cache, rows times the longest of them, at most.

    `errors` are of generations that ended because nothing could be drawn, by number. A generation
    that is over is not kept here.
    """

    def __init__(
        self, net: nn.Module, shared: bool = False, rows: int = 256, positions: int = POSITIONS
    ) -> None:
        self.net: Any = net
        self.errors: dict[int, SamplingError] = {}
        self._limits = rows, positions
        facts = language_facts(net.config, type(net))
        self._takes, self._pad = facts.takes, facts.pad
        self._in_turn = not shared or bool(moving_ropes(net))
        self._count = 0
        self._all: dict[int, Decoding] = {}  # that are not over
        self._may_share: dict[int, bool] = {}
        self._waiting: list[int] = []
        self._alone: list[tuple[int, ModuleCall]] = []  # begun, with what they call next
        self._shared: list[int] = []
        self._cache: dict[str, Any] = {}  # of the shared rows, by its keyword
        self._lengths: dict[int, int] = {}  # positions in the cache
        self._last_alone = False
        self._now: tuple[str, Turn] | None = None

    # -- who takes part ----------------------------------------------------------------------------

    def add(self, decoding: Decoding) -> int:
        """A generation that has not begun; it joins at the next turn. Its number."""
        number, self._count = self._count, self._count + 1
        self._all[number] = decoding
        self._may_share[number] = not self._in_turn and may_share(decoding)
        self._waiting.append(number)
        return number

    def leave(self, number: int) -> None:
        """A generation ends here, between two turns; its cache is gone."""
        assert self._now is None, "a turn is on its way: its rows are needed"
        if number in self._all:
            self._all[number].close()
            self._let_go()

    def close(self) -> None:
        """Everything ends here, also in the middle of a turn."""
        for one in self._all.values():
            one.close()
        self._waiting, self._alone, self._shared = [], [], []
        self._all, self._may_share = {}, {}
        self._cache, self._lengths, self._now = {}, {}, None

    def _let_go(self) -> None:
        """Of those that are over: no trace of them is left, and the others' cache is theirs."""
        self._waiting = [one for one in self._waiting if not self._all[one].over]
        self._alone = [(one, call) for one, call in self._alone if not self._all[one].over]
        shared = [one for one in self._shared if not self._all[one].over]
        if len(shared) < len(self._shared):
            self._keep(shared)
        for number in [number for number, one in self._all.items() if one.over]:
            del self._all[number], self._may_share[number]

    # -- turn by turn ------------------------------------------------------------------------------

    def turn(self) -> Turn | None:
        """The next forward, or None when all are over."""
        assert self._now is None, "there is a turn on its way: give what it gave to took()"
        with self._closed_by_errors():
            self._now = self._choose()
        return None if self._now is None else self._now[1]

    @torch.no_grad()
    def took(self, output: Any, leaving: Collection[int] = ()) -> None:
        """Takes what the forward of the turn gave: `output.logits` `[rows, pos, vocab]`.

        Those that are `leaving` end here, and no token is chosen for them. Where nothing can be
        drawn for a generation, it ends; any other error ends all of them.
        """
        assert self._now is not None, "there is no turn to take anything of"
        kind, turn = self._now
        with self._closed_by_errors():
            for number in leaving:
                self._all[number].close()
            if kind != "alone":
                self._go_on(kind, turn, output)
            elif not self._all[turn.places[0].number].over:
                self._go_on_alone(turn.places[0].number, output)
            self._let_go()
            self._now = None

    def drop(self) -> None:
        """The forward of the turn came to nothing that is needed: all that are in it end here."""
        assert self._now is not None, "there is no turn to drop"
        _, turn = self._now
        for place in turn.places:
            self._all[place.number].close()
        self._let_go()
        self._now = None

    def _go_on(self, kind: str, turn: Turn, output: Any) -> None:
        logits = output.logits
        if kind == "prompt":
            self._absorb(turn, output)
        for place in turn.places:
            self._lengths[place.number] = place.length
            if self._all[place.number].over:
                continue  # it leaves
            try:
                self._all[place.number].take(logits[slice(*place.rows), place.last])
            except SamplingError as error:
                self._failed(place.number, error)

    def _failed(self, number: int, error: SamplingError) -> None:
        self.errors[number] = error.with_traceback(None)
        self._all[number].close()

    @contextmanager
    def _closed_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    # -- which forward comes next ------------------------------------------------------------------

    def _choose(self) -> tuple[str, Turn] | None:
        """Prompts first, so that all go on together; then those alone and the shared, by turns."""
        if self._waiting and not (self._in_turn and self._alone):
            first = self._waiting[0]
            if not self._may_share[first]:
                self._waiting.pop(0)
                self._alone.insert(0, (first, self._all[first].begin()))
                return "alone", self._turn_alone()
            if not self._shared or self._fits(self._shared, first):
                return "prompt", self._prompts()
        if self._alone and not (self._last_alone and self._shared):
            self._last_alone = True
            return "alone", self._turn_alone()
        self._last_alone = False
        return ("step", self._step()) if self._shared else None

    def _fits(self, numbers: list[int], one: int) -> bool:
        """Whether one more may join these, counted as long as each may become."""
        every = [*numbers, one]
        rows, longest = self._limits
        count = sum([self._rows(number) for number in every])
        width = max([self._all[number].longest for number in every])
        return count <= rows and count * width <= longest

    def _rows(self, number: int) -> int:
        return len(self._all[number].ids)

    def _turn_alone(self) -> Turn:
        number, call = self._alone[0]
        one = self._all[number]
        length = one.length
        return Turn(call, (Place(number, one.step, (0, len(one.ids)), length, length),))

    def _go_on_alone(self, number: int, output: Any) -> None:
        self._alone.pop(0)
        try:
            call = self._all[number].next(output)
        except SamplingError as error:
            self._failed(number, error)
            return
        if call is not None:  # behind the others, or again where they go one after another
            self._alone.insert(0 if self._in_turn else len(self._alone), (number, call))

    # -- prompts -----------------------------------------------------------------------------------

    def _prompts(self) -> Turn:
        """The first that waits, and those behind it that can stand beside it."""
        taken = self._waiting[:1]
        for number in self._waiting[1:]:
            every = [*taken, number]
            able = self._may_share[number] and self._may_stand([self._all[n] for n in every])
            if able and self._fits(self._shared + taken, number):
                taken.append(number)
        self._waiting = [one for one in self._waiting if one not in taken]
        ones = [self._all[number] for number in taken]
        ends = sorted({_length(one) for one in ones})
        width, keep = ends[-1], ones[0].sampling.logits_to_keep
        ids = torch.cat([_padded(one.ids, width, self._pad) for one in ones])
        positions = torch.arange(width, device=ids.device).repeat(len(ids), 1)
        places = [*self._places(taken, width, width)]
        if len(ends) > 1:
            places = [self._ended(place, keep, ends) for place in places]
            keep = torch.tensor(ends, device=ids.device) - 1 if keep else 0
        call = self._call(ids, fresh_cache(self.net), positions, first=True, keep=keep)
        return Turn(call, tuple(places))

    def _may_stand(self, ones: list[Decoding]) -> bool:
        """Whether these prompts can share a forward, as far as it is theirs to say."""
        lengths, keeps = set(map(_length, ones)), {one.sampling.logits_to_keep for one in ones}
        tokens = max(lengths) * sum([len(one.ids) for one in ones])
        if len(keeps) > 1 or tokens > LARGEST:
            return False
        if len(lengths) == 1:
            return True
        real = sum([one.ids.numel() for one in ones])
        padded = tokens - real <= max(LITTLE, real // 2)
        apart = max(lengths) <= longest_padded(self.net) and max(keeps) <= 1
        return apart and padded and len(lengths) <= ENDS

    def _ended(self, place: Place, keep: int, ends: list[int]) -> Place:
        """The same among prompts of several lengths."""
        length = _length(self._all[place.number])
        if not keep or "logits_to_keep" not in self._takes:
            return place._replace(length=length, last=length - 1)
        return place._replace(length=length, last=ends.index(length), kept=len(ends))

    def _absorb(self, turn: Turn, output: Any) -> None:
        """The rows of a prompt's forward join those that are there."""
        width, cache = turn.places[0].width, _cache_of(output, turn.call)
        lengths = [place.length for place in turn.places for _ in range(*place.rows)]
        if min(lengths) < width:
            for its in cache.values():
                align(its, torch.tensor(lengths), width)
        if not self._shared:
            self._cache = cache
        else:
            for name, mine in self._cache.items():
                join(mine, self._width(), cache[name], width)
        for place in turn.places:
            self._shared.append(place.number)
            self._lengths[place.number] = place.length

    # -- steps -------------------------------------------------------------------------------------

    def _step(self) -> Turn:
        """One token for each shared row."""
        numbers = self._shared
        ids = torch.cat([self._all[number].ids[:, -1:] for number in numbers])
        width = self._width() + 1
        lengths = torch.tensor([self._lengths[n] for n in numbers for _ in range(self._rows(n))])
        positions = lengths[:, None].to(ids.device)
        mask = None
        if bool((lengths != width - 1).any()):
            columns = torch.arange(width, device=ids.device)
            mask = (columns >= width - 1 - positions).long()
        call = self._call(ids, self._cache, positions, mask)
        places = list(self._places(numbers, 0, width))
        return Turn(call, tuple([p._replace(length=self._lengths[p.number] + 1) for p in places]))

    def _width(self) -> int:
        return max([self._lengths[one] for one in self._shared])

    def _keep(self, numbers: list[int]) -> None:
        """The rows of these stay; the width is what they need."""
        if not numbers:
            self._shared, self._cache, self._lengths = [], {}, {}
            return
        starts = {place.number: place.rows for place in self._places(self._shared, 0, 0)}
        rows = torch.tensor([row for one in numbers for row in range(*starts[one])])
        self._shared = numbers
        self._lengths = {one: self._lengths[one] for one in numbers}
        for cache in self._cache.values():
            narrow(cache, rows.to(self._all[numbers[0]].ids.device), self._width())

    def _places(self, numbers: list[int], length: int, width: int) -> Iterator[Place]:
        start = 0
        for number in numbers:
            stop = start + self._rows(number)
            yield Place(number, self._all[number].step, (start, stop), length, width)
            start = stop

    def _call(
        self,
        ids: Tensor,
        cache: dict[str, Any],
        positions: Tensor,
        mask: Tensor | None = None,
        first: bool = False,
        keep: int | Tensor = 1,
    ) -> ModuleCall:
        takes = self._takes
        kept = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        kept = {name: value for name, value in kept.items() if name in takes}
        return (), inputs_of(self.net, ids, None, first, {**kept, **cache, "use_cache": True})


def may_share(one: Decoding) -> bool:
    """Whether a generation's rows can stand beside others: it is plain, and has a cache of a kind
    that can be put together."""
    return is_plain(one.prompt, one.sampling) and has_joining_cache(one.net)


def is_plain(prompt: ModelCall, sampling: Sampling) -> bool:
    """Whether a generation is from tokens without padding, with a cache, and the model's result is
    logits alone."""
    more = sampling.output_attentions or sampling.output_hidden_states or not sampling.use_cache
    return prompt.kwargs.keys() <= {"input_ids", "use_cache"} and prompt.mask is None and not more


def _length(one: Decoding) -> int:
    """Of its prompt, which is all that it has."""
    return one.ids.shape[1]


def _padded(ids: Tensor, width: int, pad: int) -> Tensor:
    """`[rows, width]`."""
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=pad)


def _cache_of(output: Any, call: ModuleCall) -> dict[str, Any]:
    """The cache after a forward: the one that the model says it is, else the one it was given."""
    given = caches_in(call[1])
    return {name: getattr(output, name, None) or cache for name, cache in given.items()}
