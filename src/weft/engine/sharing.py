"""May generations on a model share their forwards? Facts, and a trial beside hostile neighbours.

    decodings = Decodings(net, shared=shares_steps(net, facts))

As for forwards of one block (`engine.merging`), two things must agree: all that is known of the
model speaks for it, and a trial, once for each model. In it two generations run beside an over-long
one and beside three whose caches hold NaN, infinities and 1e30; one joins late, and neighbours
leave before the end. At every step their logits must be what they are when each runs alone.

The trial is about logits, so about tokens. Which sites could be offered in shared steps, it does
not say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from weft.errors import InputError
from weft.families.caches import caches_in, overwrite
from weft.families.call import ModelCall
from weft.families.decoding import Decoding
from weft.families.decodings import Decodings, Turn
from weft.families.forward import LanguageFacts
from weft.families.sampling import Sampling

from .merging import may_share, state_of
from .trial import LENGTHS, VICTIMS, agree, device_of, prompts

POISON = {2: float("nan"), 3: float("inf"), 4: 1e30}
"""What the neighbours' caches hold, by number."""

STEPS = (6, 3, 6, 4, 6, 5)
"""Tokens of each generation: some leave while the victims go on."""

_LATE = 4  # the last victim joins after so many turns: prompts, and steps

_TRIALS: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def shares_steps(net: nn.Module, facts: LanguageFacts | None) -> bool:
    """Whether the rows of several generations may stand in one forward of this model."""
    if facts is None or not may_share(facts, net):
        return False
    state = state_of(net, facts)
    known = _TRIALS.get(net)
    if known is None or known[0] != state:
        known = _TRIALS[net] = state, _trial(net, facts)
    return known[1]


class _Step(NamedTuple):
    """What one step of a victim gave: logits `[rows, vocab]`."""

    number: int
    step: int
    logits: Tensor


def _trial(net: nn.Module, facts: LanguageFacts) -> bool:
    plain = prompts(facts, device_of(net), LENGTHS)
    calls = [ModelCall(*call, batch=1, length=_length(call)) for call in plain]
    try:
        alone = [{step.step: step for step in _alone(net, calls[one], one)} for one in VICTIMS]
        steps = list(_together(net, calls))
    except (RuntimeError, ValueError, TypeError, LookupError, InputError):
        return False  # a model that cannot even take the batch is not shared
    return all(_same(steps, victim, own) for victim, own in zip(VICTIMS, alone, strict=True))


def _length(call: Any) -> int:
    return call[1]["input_ids"].shape[1]


def _same(steps: list[_Step], victim: int, alone: dict[int, _Step]) -> bool:
    """Step by step, as long as the tokens are the same: two may be equally likely."""
    mine = [step for step in steps if step.number == victim]
    if len(mine) != len(alone):
        return False
    for one in mine:
        expected = alone[one.step].logits
        if not agree(one.logits, expected):
            return False
        if not torch.equal(one.logits.argmax(-1), expected.argmax(-1)):
            return True
    return True


def _decoding(net: nn.Module, call: ModelCall, number: int) -> Decoding:
    """No token ends it: how many there are is for us to say."""
    return Decoding(net, call, Sampling(max_new_tokens=STEPS[number]))


def _alone(net: nn.Module, call: ModelCall, number: int) -> Iterator[_Step]:
    with closing(Decodings(net)) as decodings:
        decodings.add(_decoding(net, call, number))
        for turn, logits in _turns(net, decodings):
            yield _Step(number, turn.places[0].step, logits[:, turn.places[0].last])


def _together(net: nn.Module, calls: list[ModelCall]) -> Iterator[_Step]:
    with closing(Decodings(net, shared=True)) as decodings:
        late = VICTIMS[-1]
        ones = [_decoding(net, call, number) for number, call in enumerate(calls)]
        for one in ones[:late]:
            decodings.add(one)
        for count, (turn, logits) in enumerate(_turns(net, decodings)):
            for place in turn.places:
                if place.number in POISON:
                    for cache in caches_in(turn.call[1]).values():
                        overwrite(cache, place.rows, POISON[place.number])
                elif place.number in VICTIMS:
                    mine = logits[slice(*place.rows), place.last]
                    yield _Step(place.number, place.step, mine)
            if count == _LATE:
                decodings.add(ones[late])


@torch.no_grad()
def _turns(net: nn.Module, decodings: Decodings) -> Iterator[tuple[Turn, Tensor]]:
    """Each forward; its logits `[rows, pos, vocab]` are seen before it is taken."""
    while (turn := decodings.turn()) is not None:
        output = net(*turn.call[0], **turn.call[1])
        yield turn, output.logits.clone()
        decodings.took(output)
