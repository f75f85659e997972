"""Case 8: what is not there raises, and says what is: module paths, and options of both blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.families import zoo
from weft.errors import UnknownOptionError, UnknownPathError

from .lanes import Lane
from .models import Given, Subject
from .verdicts import Judge

(PROMPT,) = zoo.tokens(9, seed=1)

_OF_A_TRACE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"remote": "nowhere"}, "means no place"),
    ({"seed": -1}, "seed"),
    ({"alone": "yes"}, "alone is True or False"),
    ({"output_hidden_stats": True}, "did you mean output_hidden_states"),
    ({"labels": torch.tensor([1])}, "labels"),
    ({"past_key_values": None}, "past_key_values"),
)
"""Options, and what the error must say."""

_OF_A_GENERATION: tuple[tuple[dict[str, Any], str], ...] = (
    ({"num_beams": 2}, "beam search is not offered"),
    ({"max_new_token": 4}, "did you mean max_new_tokens"),
    ({"custom_generate": "somebody/code"}, "no code of others is run"),
    ({"temperature": "warm"}, "temperature"),
)


def refusals(lane: Lane, judge: Judge) -> None:
    """Unknown paths raise with the nearest real one, unknown and wrong options raise."""
    given = lane.subject.give(PROMPT)
    for path, pattern in _wrong_paths(lane.subject):
        judge.raises(UnknownPathError, pattern, lambda path=path: _read(lane, given, path))
    for options, pattern in _OF_A_TRACE:
        traced = lambda options=options: _trace(lane, given, options)
        judge.raises(UnknownOptionError, pattern, traced)
    for options, pattern in _OF_A_GENERATION if lane.subject.generates else ():
        generated = lambda options=options: _generate(lane, options)
        judge.raises(UnknownOptionError, pattern, generated)


def _wrong_paths(subject: Subject) -> Iterator[tuple[str, str]]:
    """A path with one letter too many, and the name that the error must have."""
    layer, _, name = subject.paths.attention(1).rpartition(".")
    yield f"{layer}.{name}x" if layer else f"{name}x", rf"nearest are .*{name}"
    listed, _, last = subject.paths.layer_list.rpartition(".")
    yield f"{listed}.{last}s", rf"nearest are .*{last}"


def _read(lane: Lane, given: Given, path: str) -> None:
    with lane.block(given):
        lane.model.get(path).output.save()


def _trace(lane: Lane, given: Given, options: dict[str, Any]) -> None:
    with lane.block(given, **options):
        pass


def _generate(lane: Lane, options: dict[str, Any]) -> None:
    with lane.generation(PROMPT, **{"max_new_tokens": 2, **options}) as tracer:
        tracer.result.save()
