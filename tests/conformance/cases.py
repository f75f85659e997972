"""The acceptance cases. Each is a function of a lane; its numbers are judged against plain hooks,
autograd, or the same run alone, never against numbers of our own.

    case(lane, judge)          # raises, or leaves its verdict in the judge

A block is written once, and runs in every lane.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import einops
import torch
from torch import nn

from tests.families import zoo
from tests.families.zoo import LAYERS
from tests.language.autograd import gradients
from tests.language.hooks import hook_count, with_hooks

from . import strangers
from .generations import steering
from .lanes import Lane, hidden
from .models import Given, Subject
from .options import refusals
from .verdicts import Judge

PADDED = (25, 24, 23, 20, 5)
"""Lengths of rows in one batch: 0, 1, 2, 5 and 20 pad tokens."""

WIDER = "a padded batch has more rows and positions than the prompt alone"
BATCH = "gradients of two prompts in one batch, each against its own alone"

A, B, C = zoo.tokens(9, 9, 9, seed=1)


@dataclass(frozen=True)
class Case:
    """One of the acceptance cases, by its number."""

    number: int
    title: str
    run: Callable[[Lane, Judge], None]


def logits(net: nn.Module, given: Given) -> torch.Tensor:
    args, kwargs = given
    with torch.no_grad():
        return net(*args, **kwargs).logits


# -- 1: padding ------------------------------------------------------------------------------------


def padding(lane: Lane, judge: Judge) -> None:
    """Rows of a padded batch are what they are alone: all layers, and the logits.

    In half precision the rows of a level are judged as one tensor: of few numbers the largest error
    is chance, twice that of another run as often as half of it.
    """
    subject, rows = lane.subject, zoo.tokens(*PADDED)
    shapes = lane.shapes or WIDER
    found = _levels_of_rows(lane, rows)
    if subject.dtype is not torch.float32:
        alone = lambda net: _as_one([_levels_alone(subject, net, row) for row in rows])
        judge.same(_as_one(found), alone, shapes)
        return
    for row, got in zip(rows, found, strict=True):
        judge.same(got, lambda net, row=row: _levels_alone(subject, net, row), shapes)


def _as_one(rows: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Each level with the numbers of all rows."""
    return [torch.cat([part.flatten() for part in level]) for level in zip(*rows, strict=True)]


def _levels_of_rows(lane: Lane, rows: list[list[int]]) -> list[list[torch.Tensor]]:
    if lane.name == "beside":  # each in an invoke of its own
        got = []
        with lane.several() as tracer:
            for row in rows:
                args, kwargs = lane.subject.give(row)
                with tracer.invoke(*args, **kwargs):
                    got.append(_saved_levels(lane))
        return got
    given, places = lane.subject.give_padded(rows)
    with lane.block(given):
        levels = _saved_levels(lane)
    last = len(levels) - 1
    return [
        [
            level[n : n + 1, lane.subject.logits_at(place) if index == last else place]
            for index, level in enumerate(levels)
        ]
        for n, place in enumerate(places)
    ]


def _saved_levels(lane: Lane) -> list[Any]:
    levels = [hidden(lane.layer(n).output).save() for n in range(LAYERS)]
    return [*levels, lane.model.output.logits.save()]


def _levels_alone(subject: Subject, net: nn.Module, row: list[int]) -> list[torch.Tensor]:
    args, kwargs = subject.give(row)
    keys = [f"{subject.paths.layer(n)}.output" for n in range(LAYERS)]
    seen = with_hooks(net, dict.fromkeys(keys), *args, **kwargs)
    return [*(hidden(seen[key]) for key in keys), seen.result.logits]


# -- 2: reads, edits, saves ------------------------------------------------------------------------


def _view(h: Any) -> None:
    h.view(-1)[::5] = 0.5


def _transpose(h: Any) -> None:
    h.transpose(1, 2)[:, 3:7] *= -2


def _chunk(h: Any) -> None:
    h.chunk(4, -1)[1].add_(1)


def _heads(h: Any) -> None:
    einops.rearrange(h, "b s (h d) -> b h s d", h=4)[:, 2].mul_(1.5)


def _column(h: Any) -> None:
    h[:, :, 3] = 1


EDITS: tuple[tuple[Callable[[Any], None], ...], ...] = (
    (_view, _transpose),
    (_chunk, _heads),
    (_column,),
)
"""Of each layer, in order."""


def edits(lane: Lane, judge: Judge) -> None:
    """Reads before and after edits, edits through views, saves that keep what they were."""
    subject, given = lane.subject, lane.subject.give(A)
    before, after = [], []
    with lane.block(given):
        for number, changes in enumerate(EDITS):
            before.append(hidden(lane.layer(number).output).save())
            for change in changes:
                change(hidden(lane.layer(number).output))
            after.append(hidden(lane.layer(number).output).save())
        out = lane.model.output.logits.save()
    judge.same([before, after, out], lambda net: _edited(subject, net, given))
    judge.moves([*after, out], [*before, logits(subject.net, given)])


def _edited(subject: Subject, net: nn.Module, given: Given) -> Any:
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []

    def hook(changes: Any) -> Callable[[Any], None]:
        def act(output: Any) -> None:
            before.append(hidden(output).clone())
            for change in changes:
                change(hidden(output))
            after.append(hidden(output).clone())

        return act

    hooks = {f"{subject.paths.layer(n)}.output": hook(each) for n, each in enumerate(EDITS)}
    args, kwargs = given
    return [before, after, with_hooks(net, hooks, *args, **kwargs).result.logits]


# -- 4: a run patched with its own activations -----------------------------------------------------


def own_activations(lane: Lane, judge: Judge) -> None:
    """Nothing changes, not by a bit: whether they are assigned or copied in place."""
    given = lane.subject.give(A)
    with lane.block(given):
        acts = [hidden(lane.layer(n).output).save() for n in range(LAYERS)]
        base = lane.model.output.logits.save()
    with lane.block(given):
        for number, act in enumerate(acts):
            hidden(lane.layer(number).output)[:] = act
        filled = lane.model.output.logits.save()
    with lane.block(given):
        for number, act in enumerate(acts):
            _assign(lane.layer(number), act)
        assigned = lane.model.output.logits.save()
    judge.exact([filled, assigned], [base, base])
    judge.same(base, lambda net: logits(net, given))


def _assign(module: Any, act: torch.Tensor) -> None:
    if isinstance(module.output, tuple):
        module.output = (act, *module.output[1:])
    else:
        module.output = act


# -- 5: gradients ----------------------------------------------------------------------------------


def _loss(out: Any) -> Any:
    return out.logits.float()[:, -1].logsumexp(-1).sum()


def _other_loss(out: Any) -> Any:
    return out.logits.float()[:, 1].square().mean()


def _first_half(gradient: Any) -> Any:
    changed = gradient.clone()
    changed[:, :4] = 0
    return changed


def gradient(lane: Lane, judge: Judge) -> None:
    """Gradients at sites: of two backwards, replaced, and of prompts in a batch."""
    subject, given = lane.subject, lane.subject.give(A)
    with lane.block(given):
        first = hidden(lane.layer(0).output)
        one, two = _loss(lane.model.output), _other_loss(lane.model.output)
        with one.backward(retain_graph=True):
            by_one = first.grad.save()
        with two.backward():
            by_two = first.grad.save()
    judge.same(
        [by_one, by_two], lambda net: [_grad(subject, net, given, f) for f in (_loss, _other_loss)]
    )
    with lane.block(given):
        first, second = hidden(lane.layer(0).output), hidden(lane.layer(1).output)
        with _loss(lane.model.output).backward():
            second.grad = _first_half(second.grad)
            replaced = first.grad.save()
    judge.same(replaced, lambda net: _grad(subject, net, given, _loss, _first_half))
    with lane.block(lane.subject.give(B, C)):
        first = hidden(lane.layer(0).output)
        _loss(lane.model.output).backward()
        rows = first.grad.save()
    for row, got in ((B, rows[:1]), (C, rows[1:])):
        alone = subject.give(row)
        judge.same(got, lambda net, alone=alone: _grad(subject, net, alone, _loss), BATCH)


def _grad(subject: Subject, net: nn.Module, given: Given, loss: Any, change: Any = None) -> Any:
    """By autograd, over weights that ask for no gradients, as Weft's: the gradient at layer 0, with
    that at layer 1 changed on its way."""
    args, kwargs = given
    key = f"{subject.paths.layer(0)}.output"
    backward = {} if change is None else {f"{subject.paths.layer(1)}.output": change}
    return gradients(net, [key], loss, *args, backward=backward, frozen=True, **kwargs)[key]


# -- 6: nothing is left behind ---------------------------------------------------------------------


def leftovers(lane: Lane, judge: Judge) -> None:
    """After runs, errors and eight threads the model is as it was; threads get what one gets."""
    subject, given = lane.subject, lane.subject.give(A)
    hooks, base = hook_count(subject.net), logits(subject.net, given)
    for options, shapes in _ways(lane):
        scaled = lambda n, options=options: _scaled(lane, given, 1 + n / 4, **options)
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(scaled, range(8)))
        for number, got in enumerate(found):
            oracle = lambda net, n=number: _scaled_alone(subject, net, given, 1 + n / 4)
            judge.same(got, oracle, shapes)
    judge.raises(IndexError, "index", lambda: _fail_in_the_middle(lane, given))
    judge.raises(ZeroDivisionError, "", lambda: _fail_while_recording(lane, given))
    assert hook_count(subject.net) == hooks, "hooks are left"
    judge.exact(logits(subject.net, given), base)


def _ways(lane: Lane) -> list[tuple[dict[str, Any], str]]:
    """Options of blocks that are on their way at once, and why shapes are then others: as they
    come, and where they share, each by itself, too."""
    return [({}, lane.crowded), *([({"alone": True}, "")] if lane.crowded else [])]


def _scaled(lane: Lane, given: Given, scale: float, **options: Any) -> torch.Tensor:
    with lane.block(given, **options):
        hidden(lane.layer(1).output)[:, 2:] *= scale
        return lane.model.output.logits.save()


def _scaled_alone(subject: Subject, net: nn.Module, given: Given, scale: float) -> torch.Tensor:
    def hook(output: Any) -> None:
        hidden(output)[:, 2:] *= scale

    args, kwargs = given
    hooks = {f"{subject.paths.layer(1)}.output": hook}
    return with_hooks(net, hooks, *args, **kwargs).result.logits


def _fail_in_the_middle(lane: Lane, given: Given) -> None:
    with lane.block(given):
        hidden(lane.layer(0).output)[:] = 0
        hidden(lane.layer(1).output)[:, torch.tensor([99])].save()


def _fail_while_recording(lane: Lane, given: Given) -> None:
    with lane.block(given):
        hidden(lane.layer(0).output)[:] = 0
        1 / 0


# -- 7: the same source everywhere, beside strangers -----------------------------------------------


def places(lane: Lane, judge: Judge) -> None:
    """One program: what hooks give, also on a server full of strangers' requests, and among as
    many invokes."""
    subject, given = lane.subject, lane.subject.give(A)
    names = ("read", "moved", "out")
    oracle = lambda net: _program_alone(subject, net, given)
    if lane.name == "remote":
        for options, shapes in _ways(lane):
            with strangers.around(lane) as mine:
                with lane.block(given, blocking=False, **options) as tracer:
                    _program(lane)
                mine()
                got = tracer.job.result()
            judge.same([got[n] for n in names], oracle, shapes)
        return
    if lane.name == "beside":
        args, kwargs = given
        with strangers.invoked(lane) as tracer, tracer.invoke(*args, **kwargs):
            _program(lane)
        got = tracer.results
    else:
        with lane.block(given) as tracer:
            _program(lane)
        got = tracer.results
    judge.same([got[n] for n in names], oracle)


def _program(lane: Lane) -> None:
    first, last = hidden(lane.layer(0).output), hidden(lane.layer(-1).output)
    early = first[:, 1:3].clone()
    first[:, -1] = 0.5 * first[:, -1] + first[:, :-1].mean(1)
    last[:, 4:6] += early.softmax(-1)
    first[:, -1].save("read")
    last.save("moved")
    lane.model.output.logits.save("out")


def _program_alone(subject: Subject, net: nn.Module, given: Given) -> Any:
    kept: dict[str, torch.Tensor] = {}

    def on_first(output: Any) -> None:
        first = hidden(output)
        kept["early"] = first[:, 1:3].clone()
        first[:, -1] = 0.5 * first[:, -1] + first[:, :-1].mean(1)
        kept["read"] = first[:, -1].clone()

    def on_last(output: Any) -> None:
        hidden(output)[:, 4:6] += kept["early"].softmax(-1)
        kept["moved"] = hidden(output).clone()

    layer = subject.paths.layer
    hooks = {f"{layer(0)}.output": on_first, f"{layer(-1)}.output": on_last}
    args, kwargs = given
    out = with_hooks(net, hooks, *args, **kwargs).result.logits
    return [kept["read"], kept["moved"], out]


CASES: tuple[Case, ...] = (
    Case(1, "1, 2, 5 and 20 pad tokens in a batch: as alone", padding),
    Case(2, "reads, edits through views, saves that stay", edits),
    Case(3, "steering in `generate`", steering),
    Case(4, "patched with its own activations: to the bit", own_activations),
    Case(5, "gradients: two backwards, replaced, in a batch", gradient),
    Case(6, "errors and eight threads leave nothing behind", leftovers),
    Case(7, "the same source everywhere, beside strangers", places),
    Case(8, "what is not there raises", refusals),
)
