"""Experiments that were recorded in a generation, run again: from a file, on other prompts.

The oracle is `transformers`' own `generate` with hooks, or the block itself on the other prompt.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import weft
from tests.families import zoo
from tests.language.generated import generated
from weft.errors import GraphError, UnknownOptionError
from weft.testing.same import bitwise, bounded
from weft.wire.codec import encode
from weft.wire.frames import read, write

GOLDEN = Path(__file__).parent.parent / "golden"
NEW = 4
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def layer(subject, number):
    return subject.model.get(subject.paths.layer(number))


def kept(tracer, tmp_path):
    """The experiment of a block, through a file."""
    path = tmp_path / "kept.weft"
    tracer.graph.save(path)
    return weft.Experiment.load(path)


def steered(subject, ids, v, **options):
    with subject.model.generate(ids, **{**GREEDY, **options}) as tracer:
        layer(subject, 1).output[:, -1] += v
        seen = weft.save([], name="seen")
        for _ in tracer.iter[1:]:
            seen.append(layer(subject, 2).output)
        with tracer.iter[0]:
            layer(subject, 0).output[:, -1] *= 2
        tracer.result.save("ids")
    return tracer


def hooks(subject, v):
    def add(step, h):
        h[:, -1] += v

    def double(step, h):
        if step == 0:
            h[:, -1] *= 2

    return {
        f"{subject.paths.layer(1)}.output": add,
        f"{subject.paths.layer(0)}.output": double,
        f"{subject.paths.layer(2)}.output": None,
    }


def test_from_its_file_it_gives_the_same_tokens(gpt2, v, tmp_path):
    """On its prompt and on a longer one."""
    again = kept(steered(gpt2, gpt2.ids, v), tmp_path)
    for ids in (gpt2.ids, torch.tensor(zoo.tokens(13, seed=4))):
        seen = generated(gpt2.net, ids, hooks(gpt2, v), max_new_tokens=NEW)
        plain = generated(gpt2.net, ids, {}, max_new_tokens=NEW).result
        found = again.run(gpt2.model, ids)
        bitwise(found["ids"], seen.result)
        assert not torch.equal(seen.result, plain)
        last = f"{gpt2.paths.layer(2)}.output"
        bitwise(found["seen"], [seen[last, step] for step in range(1, NEW)])


def test_drawn_tokens_are_drawn_again(gpt2, v, tmp_path):
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 8}
    with gpt2.model.generate(gpt2.ids, **options) as tracer:  # a seed that nobody has chosen
        noise = torch.randn_like(layer(gpt2, 1).output[:, -1:])
        layer(gpt2, 1).output[:, -1:] += noise
        ids = tracer.result.save("ids")
    again = kept(tracer, tmp_path)
    bitwise(again.run(gpt2.model, gpt2.ids)["ids"], ids)
    other = again.run(gpt2.model, gpt2.ids, seed=17)["ids"]
    bitwise(other, again.run(gpt2.model, gpt2.ids, seed=17)["ids"])
    assert not torch.equal(other, ids)


def test_options_can_be_others(gpt2, v, tmp_path):
    again = kept(steered(gpt2, gpt2.ids, v), tmp_path)
    whole = again.run(gpt2.model, gpt2.ids)
    end = int(whole["ids"][0, 9 + 1])
    steps = 1 + whole["ids"][0, 9:].tolist().index(end)
    assert steps < NEW
    ended = again.run(gpt2.model, gpt2.ids, eos_token_id=end)
    bitwise(ended["ids"], whole["ids"][:, : 9 + steps])
    bitwise(ended["seen"], whole["seen"][: steps - 1])


def test_invokes_are_run_again(gpt2, v, tmp_path):
    one, two = torch.tensor(zoo.tokens(7, seed=7)), torch.tensor(zoo.tokens(4, seed=5))
    with gpt2.model.generate(**GREEDY) as tracer:
        with tracer.invoke(one):
            h = layer(gpt2, 1).output[:, -1]
            tracer.result.save("one")
        with tracer.invoke(two):
            with tracer.iter[0]:
                layer(gpt2, 1).output[:, -1] = h
            tracer.result.save("two")
    found = kept(tracer, tmp_path).run(gpt2.model, two, one)
    key = f"{gpt2.paths.layer(1)}.output"
    given = generated(gpt2.net, two, {key: None}, max_new_tokens=NEW)

    def put(step, value):
        if step == 0:
            value[:, -1] = given[key, 0][:, -1]

    bitwise(found["one"], given.result)
    bitwise(found["two"], generated(gpt2.net, one, {key: put}, max_new_tokens=NEW).result)


def test_an_experiment_of_step_0_alone_is_run_again(gpt2, tmp_path):
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        layer(gpt2, 1).output.save("h")
    key = f"{gpt2.paths.layer(1)}.output"
    expected = generated(gpt2.net, gpt2.ids, {key: None}, max_new_tokens=1)[key, 0]
    bounded(kept(tracer, tmp_path).run(gpt2.model, gpt2.ids)["h"], expected)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 5])
def test_other_numbers_of_steps_are_refused(gpt2, v, count):
    experiment = steered(gpt2, gpt2.ids, v).graph
    with pytest.raises(UnknownOptionError, match=f"for 4 new tokens, not {count}") as caught:
        experiment.run(gpt2.model, gpt2.ids, max_new_tokens=count)
    assert "leave max_new_tokens out" in str(caught.value.fix)


def test_a_file_that_does_not_say_how_is_refused(gpt2, v, tmp_path):
    """As they were written before it could be run again."""
    experiment = steered(gpt2, gpt2.ids, v).graph
    path = tmp_path / "old.weft"
    path.write_bytes(encode(experiment.graph, experiment._frames()))
    with pytest.raises(GraphError, match="not known in which"):
        weft.Experiment.load(path).run(gpt2.model, gpt2.ids)


def test_what_has_no_meaning_for_it_is_refused(gpt2, v):
    experiment = steered(gpt2, gpt2.ids, v).graph
    for options, said in (
        ({"grad": True}, "no gradients"),
        ({"blocking": False}, "waits for"),
        ({"num_beams": 2}, "beam"),
        ({"nonsense": 2}, "nonsense"),
        ({"use_cache": False}, "recorded with use_cache=True"),
    ):
        with pytest.raises(UnknownOptionError, match=said):
            experiment.run(gpt2.model, gpt2.ids, **options)
    with pytest.raises(GraphError, match="does not generate"):
        experiment.run(weft.Model(torch.nn.Linear(2, 2)), torch.ones(1, 2))


def test_a_golden_file_keeps_decoding(gpt2, v):
    """Written by version 0.1; what it means must never change."""
    experiment = weft.Experiment.load(GOLDEN / "generation-1.weft")
    seen = generated(gpt2.net, gpt2.ids, hooks(gpt2, v), max_new_tokens=NEW)
    bitwise(experiment.run(gpt2.model, gpt2.ids)["ids"], seen.result)
    assert experiment.generations == steered(gpt2, gpt2.ids, v, seed=5).graph.generations


@pytest.mark.parametrize("odd", ["{}x", '{"max_new_tokens": 0}', '{"max_new_tokens": "many"}'])
def test_a_file_whose_generation_cannot_be_read_is_refused(tmp_path, odd):
    frames, metadata = read((GOLDEN / "generation-1.weft").read_bytes())
    path = tmp_path / "odd.weft"
    path.write_bytes(write(frames, {**metadata, "generation": odd}))
    with pytest.raises(GraphError, match="generation cannot be read"):
        weft.Experiment.load(path)
