"""Blocks of every kind in a session: invokes, edits, generations, sweeps, names of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.language.generated import generated
from tests.language.hooks import with_hooks
from weft.errors import NotReachedError
from weft.testing.same import bitwise, bounded, moves

H = ["transformer.h.0.output", "transformer.h.1.output", "transformer.h.2.output"]
NEW = 3
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def other_of(ids):
    return ids.flip(1)


def test_invokes_and_edits_in_a_session(model, net, ids):
    with model.edit() as edited:
        model.transformer.h[0].output *= 2
    with model.session():
        with edited.trace() as tracer:
            with tracer.invoke(ids):
                one = model.transformer.h[1].output
            with tracer.invoke(other_of(ids)):
                two = model.transformer.h[1].output
        with edited.trace(ids, alone=True):
            model.transformer.h[1].output = (one + two) / 2
            logits = model.lm_head.output.save()
    twice = {H[0]: lambda h: h * 2}
    rows = torch.cat([ids, other_of(ids)], 0)  # as they ran: two rows of one batch
    seen = with_hooks(net, {**twice, H[1]: None}, rows)[H[1]]
    made = {**twice, H[1]: lambda h: (seen[:1] + seen[1:]) / 2}
    expected = with_hooks(net, made, ids).result.logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    moves(logits, with_hooks(net, twice, ids).result.logits)


def test_a_generation_gives_and_takes_values(model, net, ids, remote):
    """Of chosen steps, of the prompt's, and the ids; the next one is steered with them."""
    seen = generated(net, ids, {H[1]: None}, max_new_tokens=NEW)
    with model.session(remote=remote) as session:
        with model.generate(ids, **GREEDY) as tracer:
            first = model.transformer.h[1].output[:, -1]
            steps = []
            for _ in tracer.iter[1:]:
                steps.append(model.transformer.h[1].output[:, -1])
            answer = tracer.result
        assert len(session) == 2 + len(steps)
        with model.generate(answer, **GREEDY) as tracer:
            model.transformer.h[1].output[:, -1] += first + sum(steps)
            further = tracer.result.save()
        with model.trace(answer):
            h = model.transformer.h[1].output.save()
    direction = seen[H[1], 0][:, -1] + (seen[H[1], 1] + seen[H[1], 2])[:, -1]

    def steer(step, value):
        value[:, -1] += direction

    expected = generated(net, seen.result, {H[1]: steer}, max_new_tokens=NEW).result
    bitwise(further, expected)
    assert not torch.equal(further, generated(net, seen.result, {}, max_new_tokens=NEW).result)
    bitwise(h, with_hooks(net, {H[1]: None}, seen.result)[H[1]])


def test_a_step_that_was_never_reached(model, net, ids):
    plain = generated(net, ids, {H[1]: None}, max_new_tokens=NEW)
    ended = {**GREEDY, "eos_token_id": int(plain.result[0, ids.shape[1] + 1])}
    with model.session():
        steps = []
        with model.generate(ids, **ended) as tracer:
            for _ in tracer.iter[:]:
                steps.append(model.transformer.h[1].output[:, -1])
        bitwise(steps[1] + 0, plain[H[1], 1][:, -1])
        with pytest.raises(NotReachedError, match="ended before"):
            steps[2] + 0


def test_a_sweep_takes_values(model, net, ids, remote):
    """What its function holds is the function's own; what it returns is a tensor anyway."""
    strengths = [0.0, 1.0, 3.0]

    def steered(tracer, strength):
        model.transformer.h[1].output[:, -1] += strength * h
        return model.lm_head.output[0, -1]

    with model.session(remote=remote):
        with model.trace(other_of(ids)):
            h = model.transformer.h[1].output[:, -1]
        found = model.sweep(ids, steered, strength=strengths)
    source = with_hooks(net, {H[1]: None}, other_of(ids))[H[1]][:, -1]
    for number, strength in enumerate(strengths):

        def steer(value, strength=strength):
            value[:, -1] += strength * source

        expected = with_hooks(net, {H[1]: steer}, ids).result.logits[0, -1]
        bounded(found.values[number], expected)


def test_an_edit_takes_values_and_outlives_the_session(model, net, ids, remote):
    """By value, as it takes any tensor."""
    with model.session(remote=remote):
        with model.trace(other_of(ids)):
            h = model.transformer.h[1].output[:, -1]
        with model.edit() as edited:
            model.transformer.h[1].output[:, -1] = h
        with edited.trace(ids):
            inside = model.lm_head.output.save()
    with edited.trace(ids):
        after = model.lm_head.output.save()
    source = with_hooks(net, {H[1]: None}, other_of(ids))[H[1]]

    def patch(value):
        value[:, -1] = source[:, -1]

    expected = with_hooks(net, {H[1]: patch}, ids).result.logits
    bitwise(inside, expected)
    bitwise(after, expected)


def test_names_of_ones_own_in_a_session(net, ids, place, remote):
    model = place.language(net, rename={"transformer.h": "layers", "lm_head": "unembed"})
    with model.session(remote=remote):
        with model.trace(other_of(ids)):
            h = model.layers[1].output
        with model.trace(ids):
            model.layers[1].output = h
            logits = model.unembed.output.save()
    bitwise(logits, with_hooks(net, {}, other_of(ids)).result.logits)


def test_an_edit_of_an_invoke_for_a_value_that_is_only_held(model, net, ids, remote):
    """It has an effect, so nobody is warned, and it runs."""
    with model.session(remote=remote):
        with model.trace() as tracer:
            with tracer.invoke(ids):
                model.transformer.h[0].output *= 2
                h = model.transformer.h[2].output
            with tracer.invoke(other_of(ids)):
                model.lm_head.output.save()
        with model.trace(ids):
            model.transformer.h[2].output = h
            logits = model.lm_head.output.save()
    bounded(logits, with_hooks(net, {H[0]: lambda h: h * 2}, ids).result.logits)


def test_an_eager_trace_gives_and_takes_values(model, net, ids):
    seen = with_hooks(net, {H[1]: None}, other_of(ids))[H[1]]
    with model.session():
        with model.trace(other_of(ids), eager=True):
            h = model.transformer.h[1].output[:, -1]
        bitwise(h + 0, seen[:, -1])
        with model.trace(ids, eager=True):
            model.transformer.h[1].output[:, -1] = h
            shown = model.lm_head.output[0, -1].save()
        with model.trace(ids):
            model.transformer.h[1].output[:, -1] = h
            plainly = model.lm_head.output[0, -1].save()

    def patch(value):
        value[:, -1] = seen[:, -1]

    expected = with_hooks(net, {H[1]: patch}, ids).result.logits[0, -1]
    bitwise(plainly, expected)
    bitwise(shown, expected)


class Coder(nn.Module):
    """Has a second method."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x).relu()

    def encode(self, x):
        return self.inner(x) * 2


def test_another_method_gives_values_to_the_forward():
    torch.manual_seed(0)
    net, x = Coder(), torch.randn(2, 4)
    model = weft.Model(net)
    with model.session():
        with model.trace(x, fn="encode"):
            z = model.output
        with model.trace(x):
            model.inner.output = z - 1
            out = model.output.save()
    bitwise(out, (net.encode(x) - 1).relu().detach())
