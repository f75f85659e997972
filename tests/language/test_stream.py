"""`tracer.stream(x)`: values as they come to be, here and from a server, in one order.

The oracle is `transformers`' own `generate`, or the module itself, with plain hooks.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.language.generated import generated
from weft.errors import FailedRunError
from weft.handles.language import LanguageModel
from weft.testing.same import bitwise

NEW = 4
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def layer(subject, number):
    return subject.model.get(subject.paths.layer(number))


def hidden(value):
    return value[0] if isinstance(value, tuple) else value


def key(subject, number):
    return f"{subject.paths.layer(number)}.output"


def test_outside_of_loops_every_step_is_streamed(subject):
    head = "lm_head.output"
    expected = generated(subject.net, subject.ids, {head: None}, max_new_tokens=NEW)
    tokens = []
    with subject.model.generate(subject.ids, **GREEDY) as tracer:
        tracer.stream(subject.model.lm_head.output[:, -1].argmax(-1), to=tokens.append)
        ids = tracer.result.save()
    assert [type(token) for token in tokens] == [torch.Tensor] * NEW
    bitwise(torch.stack(tokens, 1), expected.result[:, subject.ids.shape[1] :])
    bitwise(ids, expected.result)


def test_without_a_function_values_are_kept(gpt2):
    """Numbers, text and containers come with them; each is given once."""
    expected = generated(gpt2.net, gpt2.ids, {key(gpt2, 1): None}, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        for step in tracer.iter[1:]:
            h = layer(gpt2, 1).output
            tracer.stream("step", step, {"h": [h, 0.5, None], "nan": float("nan")})
    kept = list(tracer.stream)
    assert [(text, step) for text, step, _ in kept] == [("step", step) for step in range(1, NEW)]
    for _, step, there in kept:
        assert list(there) == ["h", "nan"] and there["h"][1:] == [0.5, None]
        assert there["nan"] != there["nan"]
        bitwise(there["h"][0], expected[key(gpt2, 1), step])
    assert list(tracer.stream) == []


def test_values_keep_the_order_in_which_they_come_to_be(gpt2):
    """Whatever the order of lines, and whoever they go to."""
    heard = []
    with gpt2.model.generate(gpt2.ids, max_new_tokens=2, do_sample=False) as tracer:
        tracer.stream("late", layer(gpt2, 2).output.sum(), to=heard.append)
        tracer.stream("early", layer(gpt2, 0).output.sum(), to=heard.append)
        tracer.stream("middle", layer(gpt2, 1).output.sum(), to=lambda value: heard.append(value))
    assert [text for text, _ in heard] == ["early", "middle", "late"] * 2


def test_what_is_streamed_is_what_it_was(gpt2):
    """Neither a later edit changes it, nor does who has it change the model."""
    name = key(gpt2, 1)
    plain = generated(gpt2.net, gpt2.ids, {name: None}, max_new_tokens=2)

    def zero(step, h):
        hidden(h)[:] = 0

    changed = generated(gpt2.net, gpt2.ids, {name: zero}, max_new_tokens=2).result
    seen = []

    def spoil(h):
        seen.append(h.clone())
        h.fill_(7.0)

    with gpt2.model.generate(gpt2.ids, max_new_tokens=2, do_sample=False) as tracer:
        with tracer.iter[0]:
            tracer.stream(layer(gpt2, 1).output[:], to=spoil)
        layer(gpt2, 1).output[:] *= 0
        with tracer.iter[1]:
            tracer.stream(layer(gpt2, 1).output, to=spoil)
        ids = tracer.result.save()
    bitwise(seen[0], plain[name, 0])
    assert seen[1].eq(0).all() and seen[1].shape[1] == 1
    bitwise(ids, changed)


def test_steps_that_did_not_happen_stream_nothing(gpt2):
    plain = generated(gpt2.net, gpt2.ids, {}, max_new_tokens=NEW).result
    end = int(plain[0, gpt2.ids.shape[1] + 1])
    steps = 1 + plain[0, gpt2.ids.shape[1] :].tolist().index(end)
    assert steps < NEW
    with gpt2.model.generate(gpt2.ids, **GREEDY, eos_token_id=end) as tracer:
        for step in tracer.all():
            tracer.stream(step, layer(gpt2, 0).output)
    assert [step for step, _ in tracer.stream] == list(range(steps))


def test_a_single_forward_streams_too():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    model = weft.Model(net)
    with model.trace(x) as tracer:
        tracer.stream(model[1].output, model[0].output[:, 1:])
        tracer.stream(model[2].output)
    (both, last) = tracer.stream
    with torch.no_grad():
        first = net[0](x)
        bitwise(both, (first.relu(), first[:, 1:]))
        bitwise(last, net(x))
    assert both[1].is_contiguous() and both[1].untyped_storage().nbytes() == both[1].nbytes


def test_a_look_streams_nothing():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.ones(1, 3)
    model, heard = weft.Model(net), []
    with model.trace(x) as tracer:
        tracer.stream(model[0].output, to=heard.append)
        if float(model[1].output.sum()) > -1:
            model[1].output.save()
    assert len(heard) == 1


def test_what_a_function_raises_ends_the_run_as_itself(gpt2):
    class Enough(Exception):
        pass

    heard = []

    def two(value):
        heard.append(value)
        if len(heard) == 2:
            raise Enough("that will do")

    with (
        pytest.raises(Enough, match="that will do"),
        gpt2.model.generate(gpt2.ids, **GREEDY) as tracer,
    ):
        tracer.stream(layer(gpt2, 1).output.sum(), to=two)
        h = layer(gpt2, 1).output.save()
    assert len(heard) == 2
    with pytest.raises(FailedRunError):
        h + 1
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:  # the model is as it was
        ids = tracer.result.save()
    bitwise(ids, generated(gpt2.net, gpt2.ids, {}, max_new_tokens=NEW).result)


def test_a_failing_run_ends_the_stream_with_the_error():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Embedding(4, 2)), torch.ones(1, 3)
    model = weft.Model(net[0])
    with pytest.raises(Exception, match="index"), model.trace(x) as tracer:
        tracer.stream(model.output[0])
        index = (model.output[0] * 0).long() + 9
        torch.gather(model.output[0], 0, index).save()
    coming = iter(tracer.stream)
    with torch.no_grad():
        bitwise(next(coming), net[0](x)[0])
    with pytest.raises(FailedRunError, match="the stream ends here"):
        next(coming)


def test_as_a_server_would_it_is_the_same(gpt2):
    """`remote="local"`: all but the network."""
    model = LanguageModel(gpt2.net)

    def streamed(handle, **where):
        with handle.generate(gpt2.ids, **GREEDY, **where) as tracer:
            tracer.stream("all", handle.get(gpt2.paths.layer(1)).output)
            for step in tracer.iter[1:3]:
                tracer.stream(step, [handle.lm_head.output])
        return list(tracer.stream)

    there = streamed(gpt2.model)
    assert len(there) == NEW + 2
    for where in (False, "local"):
        found = streamed(model, remote=where)
        assert [name for name, _ in found] == [name for name, _ in there]
        bitwise([value for _, value in found], [value for _, value in there])
