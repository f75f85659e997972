"""Shared generations equal those alone, whoever joins and leaves when: schedules at random.

A pool of requests runs alone once: tokens, and the hidden states of each layer at each step. Then
some of them share forwards under many schedules, each drawn from its own seed, so that a failure
names the schedule that can be run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import cache
from random import Random
from typing import Any, NamedTuple

import pytest
import torch

from tests.families import zoo
from tests.families.decoded import build, decoding
from weft.families.decoding import Decoding
from weft.families.decodings import Decodings, Turn
from weft.testing import same

POOL = 14
SCHEDULES = {"gemma3": 50, "gpt2": 25, "mamba": 25, "bloom": 25}
"""Sliding windows beside full attention; a table of positions; states; distances from the mask."""

Hidden = list[torch.Tensor]


class Alone(NamedTuple):
    """A request, and what it is alone: prompt and answer, hidden states of each step."""

    rows: list[list[int]]
    options: dict[str, Any]
    result: torch.Tensor
    steps: list[Hidden]


@cache
def _model(name: str) -> Any:
    if name == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        return zoo.build(name, num_hidden_layers=2, layer_types=kinds)
    return build(name)


@cache
def _pool(name: str) -> tuple[Alone, ...]:
    net, random, found = _model(name), Random(name), []
    for number in range(POOL):
        length = random.choice((1, 2, 3, 5, 5, 8, 13, 21))
        rows = zoo.tokens(*[length] * random.choice((1, 1, 2)), seed=number)
        options: dict[str, Any] = {"max_new_tokens": random.randint(1, 10)}
        if number % 2:
            options |= {"do_sample": True, "seed": number, "temperature": 1.4, "top_p": 0.95}
        if number % 5 == 0:
            options |= {"repetition_penalty": 1.3, "eos_token_id": list(range(20, 40))}
        one = decoding(net, rows, **options)
        with closing(Decodings(net)) as decodings:
            decodings.add(one)
            steps = [hidden for _, hidden in _forwards(net, decodings)]
        found.append(Alone(rows, options, one.result, steps))
    return tuple(found)


@torch.no_grad()
def _forwards(net: Any, decodings: Decodings) -> Iterator[tuple[Turn, Hidden]]:
    """Turn by turn; whoever takes them may add, and send away, between two turns."""
    while (turn := decodings.turn()) is not None:
        output = net(*turn.call[0], **turn.call[1], output_hidden_states=True)
        decodings.took(output)
        yield turn, list(output.hidden_states)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_each_what_it_has_alone(name: str) -> None:
    shared = sent_away = 0
    for seed in range(SCHEDULES[name]):
        try:
            turns, away = _schedule(name, Random(seed))
        except AssertionError as error:
            raise AssertionError(f"schedule {seed} of {name}: {error}") from error
        shared += sum(len(turn.places) > 1 for turn in turns)
        sent_away += away
    assert shared > 2 * SCHEDULES[name]  # else these would be tests of nothing
    assert sent_away > SCHEDULES[name] // 4


def _schedule(name: str, random: Random) -> tuple[list[Turn], int]:
    """Up to six requests; when each joins, and whether it is sent away, is chance."""
    net, pool = _model(name), _pool(name)
    chosen = [random.randrange(POOL) for _ in range(random.randint(2, 6))]
    joins = sorted(random.choice((0, 0, random.randint(1, 12))) for _ in chosen)
    stays = [random.choice((99, 99, random.randint(1, 8))) for _ in chosen]
    limit = random.choice((256, 256, 3))
    ones: list[Decoding] = []
    turns: list[Turn] = []
    with closing(Decodings(net, shared=True, rows=limit)) as decodings:

        def joining(now: int) -> None:
            while len(ones) < len(chosen) and joins[len(ones)] <= now:
                request = pool[chosen[len(ones)]]
                ones.append(decoding(net, request.rows, **request.options))
                assert decodings.add(ones[-1]) == len(ones) - 1

        while len(ones) < len(chosen):
            joining(max(len(turns), joins[len(ones)]))  # also where there was a pause
            for turn, hidden in _forwards(net, decodings):
                turns.append(turn)
                _assert_as_alone(turn, hidden, [pool[one] for one in chosen])
                joining(len(turns))
                for place in turn.places:
                    if place.step + 1 >= stays[place.number]:
                        decodings.leave(place.number)
    away = 0
    for one, number, stay in zip(ones, chosen, stays, strict=True):
        assert one.over
        expected = pool[number].result
        kept = min(expected.shape[1], len(pool[number].rows[0]) + stay)
        assert torch.equal(one.result, expected[:, :kept])
        away += kept < expected.shape[1]
    return turns, away


def _assert_as_alone(turn: Turn, hidden: Hidden, requests: list[Alone]) -> None:
    for place in turn.places:
        mine = [layer[slice(*place.rows)] for layer in hidden]
        if place.step == 0:  # what is on the right of a prompt is padding
            mine = [layer[:, : place.length] for layer in mine]
        same.bounded(mine, requests[place.number].steps[place.step])
