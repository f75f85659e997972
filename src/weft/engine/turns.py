"""What the sites of each step of a generation look like, without weights.

    turns = Turns(known.signatures, known.facts)
    turns.at(call, sampling, 0)              # the prompt's forward
    turns.at(call, sampling, 7)              # one token, the others in the cache

Steps after the prompt are learnt by rehearsing two forwards (`families.rehearsal`). What is alike
with few tokens in the cache and with many is taken to be alike between; what is not follows the
length, or is learnt for it. Where somebody else has the model, `ask` is asked.

What operations inside forwards look like (`signatures.inside`) is learnt in the same way, by turns
of the signatures that tell of them: `at(call, sampling, 7, [("h.0.attn", ())])`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from weft.errors import InputError
from weft.families.call import ModelCall
from weft.families.forward import LanguageFacts
from weft.families.rehearsal import Layout, first_keywords, layout_of, prompt_of, rehearsal
from weft.families.sampling import Sampling
from weft.graph.inside import Place
from weft.kernels.aval import Aval, contiguous, intern
from weft.signatures.inside import Inner
from weft.signatures.learn import Row, Table
from weft.signatures.reading import decode
from weft.signatures.signature import Signature, Signatures
from weft.signatures.structure import Plain
from weft.signatures.tables import Exact, encode

Ask = Callable[[Layout, Sampling, bool, Place | None], bytes]
"""Asks for the prompt's forward of a layout, or for the one after it; with the operations of a
source."""

_LEAST, _MOST = 2, 64
_REMEMBERED = 256
_MOST_OWN = 4096


class _Kind(NamedTuple):
    """What decides beside the length. `flags` are those of the options that change a forward."""

    batch: int
    masked: bool
    typed: bool
    encoded: int
    flags: tuple[Any, ...]


class Turns:
    """The steps of one model's generations; safe to use from several threads."""

    def __init__(
        self, signatures: Signatures, facts: LanguageFacts, ask: Ask | None = None
    ) -> None:
        self._signatures = signatures
        self._place: Place | None = signatures.kept.get("inside")
        self._facts = facts
        self._ask = ask
        self._state = signatures.state()
        self._lock = threading.RLock()
        self._stretches: dict[_Kind, _Stretch] = {}
        self._first: dict[Any, Signature] = {}
        self._own: dict[tuple[Signature, int], Signature] = {}

    def at(
        self, call: ModelCall, sampling: Sampling, step: int, inside: Iterable[Place] = ()
    ) -> Signature:
        """The signature of one step of the generation that begins with this prompt. It knows the
        operations of the sources `inside`, too.

        Raises SourceError, UnknownPathError where there is no such source.
        """
        found, places = self._at(call, sampling, step), tuple(inside)
        if not places:
            return found
        own = self._alone(found, layout_of(call).length + step)
        for place in places:
            if ("inside", *place) not in own.kept:
                there = self.within(self._signatures.inside.of(*place))
                own.kept["inside", *place] = Inner(there.at(call, sampling, step), own)
        return own

    def _alone(self, found: Signature, length: int) -> Signature:
        """The signature as one of this length alone: of others it may be the same one, but for
        operations."""
        with self._lock:
            own = self._own.get((found, length))
            if own is None:
                if len(self._own) > _MOST_OWN:
                    self._own.clear()
                own = self._own[found, length] = found.again()
            return own

    def within(self, signatures: Signatures) -> Turns:
        """The steps as other signatures of the same model tell of them."""
        return turns_for(signatures, self._facts, self._ask)

    def _at(self, call: ModelCall, sampling: Sampling, step: int) -> Signature:
        with self._lock:
            self._start_anew()
            layout = layout_of(call)
            if step == 0:
                return self._prompt(call, layout, sampling)
            if not sampling.use_cache and not layout.encoded:
                return self._whole(layout, sampling, step)
            kind = _Kind(*layout[:1], *layout[2:], _flags(sampling))
            stretch = self._stretches.get(kind)
            if stretch is None:
                probe = partial(self._probe, layout, sampling)
                stretch = self._stretches[kind] = _Stretch(probe, self._signatures, self._positions)
            return stretch.at(layout.length + step - 1)

    def answer(self, layout: Layout, sampling: Sampling, later: bool) -> bytes:
        """For a client that asks: the table of one forward, as bytes."""
        with self._lock:
            self._start_anew()
            if later:
                table = self._probe(layout, sampling, layout.length)
            else:
                table = self._prompt(_stand_in(layout), layout, sampling).exact()
            return encode([], [Exact(table, ())])

    def _start_anew(self) -> None:
        state = self._signatures.state()
        if state != self._state:
            self._state = state
            self._stretches.clear()
            self._first.clear()
            self._own.clear()

    @property
    def _positions(self) -> int | None:
        return self._facts.positions

    def _prompt(self, call: ModelCall, layout: Layout, sampling: Sampling) -> Signature:
        if self._ask is None:
            keywords = first_keywords(call, sampling, self._facts)
            return self._signatures.for_call((), keywords)
        if "inputs_embeds" in call.kwargs:
            raise InputError(
                "a prompt of embeddings can be generated from only where the model is",
                fix="open the model on this machine, remote=False",
            )
        key = layout, _flags(sampling)
        found = self._first.get(key)
        if found is None:
            if len(self._first) > _REMEMBERED:
                self._first.clear()
            found = self._first[key] = self._asked(layout, sampling, False)
        return found

    def _whole(self, layout: Layout, sampling: Sampling, step: int) -> Signature:
        """Without a cache a step is a prompt that is longer. Not so beside an encoder, which runs
        once."""
        longer = layout._replace(length=layout.length + step)
        return self._prompt(_stand_in(longer), longer, sampling)

    def _probe(self, layout: Layout, sampling: Sampling, length: int) -> Table:
        layout = layout._replace(length=length)
        if self._ask is not None:
            return self._asked(layout, sampling, True).exact()
        return self._signatures.second(lambda net: rehearsal(net, layout, sampling))

    def _asked(self, layout: Layout, sampling: Sampling, later: bool) -> Signature:
        assert self._ask is not None
        (exact,) = decode(self._ask(layout, sampling, later, self._place)).exact
        return self._signatures.of_table(exact.table)


TURN_OPTIONS = ("use_cache", "logits_to_keep", "output_attentions", "output_hidden_states")
"""The options of a generation that change what a forward is like."""


def flags_of(options: Any) -> Sampling:
    """A generation that has these of a message's options."""
    return Sampling(**{name: getattr(options, name) for name in TURN_OPTIONS})


def _flags(sampling: Sampling) -> tuple[Any, ...]:
    return tuple([getattr(sampling, name) for name in TURN_OPTIONS])


def _stand_in(layout: Layout) -> ModelCall:
    return prompt_of(layout)


class _Stretch:
    """Steps that differ in the length of the cache alone."""

    def __init__(
        self, probe: Callable[[int], Table], signatures: Signatures, positions: int | None
    ) -> None:
        self._probe = probe
        self._signatures = signatures
        self._positions = positions
        self._tables: dict[int, Table] = {}
        self._found: dict[int, Signature] = {}
        self._alike: Signature | None = None  # of all lengths between the ends
        self._ends = (0, -1)

    def at(self, length: int) -> Signature:
        """The signature with so many tokens in the cache."""
        found = self._found.get(length)
        if found is None:
            if len(self._found) > _REMEMBERED:
                self._found.clear()
            found = self._found[length] = self._between(length)
        return found

    def _between(self, length: int) -> Signature:
        if length < _LEAST:
            return self._signatures.of_table(self._table(length))
        low, high = self._ends
        if not low <= length <= high:
            self._ends = low, high = _LEAST, self._end(length)
            first, last = self._table(low), self._table(high)
            same = first.rows == last.rows
            self._alike = self._signatures.of_table(first) if same else None
        if self._alike is not None:
            return self._alike
        first, last = self._table(low), self._table(high)
        if list(first.index) != list(last.index):
            return self._signatures.of_table(self._table(length))
        return self._signatures.of_rows(first, partial(self._row, length))

    def _end(self, length: int) -> int:
        end = _MOST
        while end < length:
            end *= 2
        if self._positions is not None and end >= self._positions:
            return max(length, min(end, self._positions - 1))
        return end

    def _table(self, length: int) -> Table:
        found = self._tables.get(length)
        if found is None:
            if len(self._tables) > _REMEMBERED:
                self._tables.clear()
            found = self._tables[length] = self._probe(length)
        return found

    def _row(self, length: int, index: int) -> Row:
        """Where sizes do not grow evenly all along, as beside a sliding window, by halves."""
        low, high = self._ends
        while True:
            first, last = self._table(low).rows[index], self._table(high).rows[index]
            if first == last or length in (low, high):
                return last if length == high else first
            middle = (low + high) // 2
            if _along(first, last, low, high, middle) == self._table(middle).rows[index]:
                found = _along(first, last, low, high, length)
                if found is not None:
                    return found
            low, high = (low, middle) if length <= middle else (middle, high)


def _along(first: Row, last: Row, low: int, high: int, length: int) -> Row | None:
    """A row whose sizes grow by the same number with each token, at another length."""
    if first.keys != last.keys or first.tree != last.tree:
        return None
    what = []
    for one, other in zip(first.what, last.what, strict=True):
        here = one if one == other else _leaf(one, other, low, high, length)
        if here is None:
            return None
        what.append(here)
    return first._replace(what=tuple(what))


def _leaf(one: Any, other: Any, low: int, high: int, length: int) -> Any:
    def number(a: int, b: int) -> int:
        return a + (b - a) * (length - low) // (high - low)

    if isinstance(one, Plain) and isinstance(other, Plain):
        if type(one.value) is int and type(other.value) is int:
            return Plain(number(one.value, other.value))
        return None
    if not (isinstance(one, Aval) and isinstance(other, Aval)):
        return None
    if one.dtype is not other.dtype or len(one.shape) != len(other.shape):
        return None
    shape = tuple(map(number, one.shape, other.shape))
    if one is contiguous(tuple(one.shape), one.dtype):
        return contiguous(shape, one.dtype)
    stride = tuple(map(number, one.stride, other.stride))
    return intern(shape, stride, number(one.offset, other.offset), one.dtype)


class Forward:
    """One forward of a generation, for whoever asks what is called in it (`signatures.inside`)."""

    def __init__(self, turns: Turns, call: ModelCall, sampling: Sampling, step: int) -> None:
        self.turns = turns
        self.call = call
        self.sampling = sampling
        self.step = step

    @property
    def args(self) -> tuple[Any, ...]:
        return self.call.args

    @property
    def kwargs(self) -> Mapping[str, Any]:
        return self.call.kwargs

    def seen(self, signatures: Signatures) -> Signature:
        """What it looks like as these signatures of the model tell of it."""
        return self.turns.within(signatures).at(self.call, self.sampling, self.step)

    def answer(self, signatures: Signatures) -> bytes:
        """The same for a client that asks, as bytes."""
        layout = layout_of(self.call)
        return self.turns.within(signatures).answer(layout, self.sampling, self.step > 0)


def turns_for(signatures: Signatures, facts: LanguageFacts, ask: Ask | None = None) -> Turns:
    """The steps of the generations of the model that has these signatures."""
    found = signatures.kept.get("turns")
    if found is None:  # they know the signatures: no table of ours may hold both
        found = signatures.kept["turns"] = Turns(signatures, facts, ask)
    return found
