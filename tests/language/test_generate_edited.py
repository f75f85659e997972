"""Generations of edited models: the batch of all prompts, and experiments that are run again.

The oracle is `transformers`' own `generate` with the edits as plain hooks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft
from tests.families import zoo
from tests.language.generated import generated
from weft.errors import EditError, RecordingError
from weft.graph.join import joined
from weft.graph.loops import unrolled
from weft.graph.node import Graph
from weft.graph.site import Where
from weft.testing.same import bitwise, bounded, moves

NEW = 4
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def prompt(*lengths: int) -> torch.Tensor:
    return torch.tensor(zoo.tokens(*lengths, seed=sum(lengths)))


def layer(subject: Any, number: int) -> Any:
    return subject.model.get(subject.paths.layer(number))


def key(subject: Any, number: int) -> str:
    return f"{subject.paths.layer(number)}.output"


@pytest.fixture
def edited(gpt2: Any, v: torch.Tensor) -> Any:
    """Layer 1 steered at the last position, layer 0 louder."""
    with gpt2.model.edit() as edited:
        layer(gpt2, 1).output[:, -1] += v
        layer(gpt2, 0).output = layer(gpt2, 0).output * 1.5
    return edited


def hooks(subject: Any, v: torch.Tensor, more: Any = None) -> dict[str, Any]:
    """The edits, and what the block does to layer 1 after them."""

    def add(step: int, h: torch.Tensor) -> None:
        h[:, -1] += v
        if more is not None:
            more(step, h)

    return {
        key(subject, 0): lambda step, h: h * 1.5,
        key(subject, 1): add,
        key(subject, 2): None,
    }


def padded(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts as one batch, padded on the left, with its mask."""
    width = max(row.shape[1] for row in rows)
    pads = [torch.zeros(1, width - row.shape[1], dtype=torch.int64) for row in rows]
    mask = [torch.cat([pad, torch.ones_like(row)], 1) for pad, row in zip(pads, rows, strict=True)]
    return torch.cat([torch.cat(p, 1) for p in zip(pads, rows, strict=True)]), torch.cat(mask)


# -- the batch of all prompts ----------------------------------------------------------------------


def test_an_empty_invoke_is_what_the_edited_model_makes_of_all(
    gpt2: Any, edited: Any, v: torch.Tensor
) -> None:
    """Its edits act at every step, wherever a prompt begins; opened again they act once."""
    ids, mask = padded(prompt(7), prompt(4))
    expected = generated(gpt2.net, ids, hooks(gpt2, v), attention_mask=mask, **GREEDY)
    plain = generated(gpt2.net, ids, {key(gpt2, 2): None}, attention_mask=mask, **GREEDY)
    with edited.generate(**GREEDY) as tracer:
        for one in (prompt(7), prompt(4)):
            with tracer.invoke(one):
                pass
        with tracer.invoke():
            result = tracer.result.save()
        with tracer.invoke():
            found = weft.save([])
            for _ in tracer.iter[:]:
                found.append(layer(gpt2, 2).output[:, -1])
    bitwise(result, expected.result)
    wanted = [expected[key(gpt2, 2), step][:, -1] for step in range(NEW)]
    bounded(list(found), wanted)
    for step in range(NEW):
        moves(found[step], plain[key(gpt2, 2), step][:, -1])


def test_a_block_that_edits_has_no_empty_invoke(gpt2: Any, edited: Any) -> None:
    with (
        pytest.raises(RecordingError, match="this block changes some of them") as caught,
        edited.generate(**GREEDY) as tracer,
    ):
        with tracer.invoke(prompt(7)):
            layer(gpt2, 1).output[:] *= 2
        with tracer.invoke():  # here
            pass
    assert "# here" in str(caught.value.line)
    assert "save in the others" in str(caught.value.fix)


# -- again -----------------------------------------------------------------------------------------


def steered(model: Any, subject: Any, prompts: Any, **options: Any) -> Any:
    """Halves layer 1 at every step and turns it at step 1; reads what comes of it."""
    with model.generate(**{**GREEDY, **options}) as tracer:
        for number, (ids, own) in enumerate(prompts):
            with tracer.invoke(ids, **own):
                site = layer(subject, 1)
                site.output[:] *= 0.5
                with tracer.iter[1]:
                    site.output[:] = site.output.flip(-1)
                seen = weft.save([], name=f"seen{number}")
                for _ in tracer.iter[:]:
                    seen.append(layer(subject, 2).output)
                tracer.result.save(f"ids{number}")
    return tracer


def test_an_experiment_runs_on_the_edited_model(
    gpt2: Any, edited: Any, v: torch.Tensor, tmp_path: Any
) -> None:
    """What it was recorded without comes before it, at each of its steps."""

    def more(step: int, h: torch.Tensor) -> None:
        h *= 0.5
        if step == 1:
            h[:] = h.flip(-1)

    prompts = [(prompt(7), {}), (prompt(4), {"max_new_tokens": 2})]
    steered(gpt2.model, gpt2, prompts).graph.save(tmp_path / "kept.weft")
    again = weft.Experiment.load(tmp_path / "kept.weft")
    found = again.run(edited, prompt(9), prompt(5))
    for number, (ids, steps) in enumerate([(prompt(9), NEW), (prompt(5), 2)]):
        options = {**GREEDY, "max_new_tokens": steps}
        expected = generated(gpt2.net, ids, hooks(gpt2, v, more), **options)
        bitwise(found[f"ids{number}"], expected.result)
        wanted = [expected[key(gpt2, 2), step] for step in range(steps)]
        bounded(found[f"seen{number}"], wanted)
        without = again.run(gpt2.model, prompt(9), prompt(5))[f"seen{number}"]
        moves(without[-1], wanted[-1])


def test_draws_of_edits_are_those_of_a_block(gpt2: Any) -> None:
    """On the edited model, with the seeds of block and invoke; twice the edits draw anew."""
    with gpt2.model.edit() as noisy:
        layer(gpt2, 0).output[:, -1:] += torch.randn_like(layer(gpt2, 0).output[:, -1:])
    drawn = {"do_sample": True, "temperature": 2.0, "seed": 3}
    prompts = [(prompt(7), {}), (prompt(4), drawn)]
    plain = steered(gpt2.model, gpt2, prompts, seed=5).graph
    there = steered(noisy, gpt2, prompts, seed=5)
    found = plain.run(noisy, prompt(7), prompt(4))
    bitwise(found, {name: there.results[name] for name in found})
    twice = there.graph.run(noisy, prompt(7), prompt(4))
    moves(twice["seen0"][-1], found["seen0"][-1])


def test_lines_stay_those_of_the_experiment(gpt2: Any, edited: Any) -> None:
    """Those of nodes in loops, too."""
    experiment = steered(gpt2.model, gpt2, [(prompt(7), {})]).graph.graph
    first = edited._edits[0].graph
    both, _ = joined((first, {}), (experiment, {}))

    def lines(graph: Graph) -> list[Where]:
        return [graph.where[node.at] for node in unrolled(graph).nodes]

    assert len(unrolled(experiment).nodes) > len(experiment.nodes)
    assert lines(both)[len(first.nodes) :] == lines(experiment)


def test_an_edit_that_does_not_fit_is_refused_with_its_line(gpt2: Any) -> None:
    experiment = steered(gpt2.model, gpt2, [(prompt(7), {})]).graph
    with gpt2.model.edit(prompt(7)) as pinned:
        layer(gpt2, 0).output[:, 5] *= 2  # here
    with pytest.raises((EditError, RecordingError), match="not valid at step 1") as caught:
        experiment.run(pinned, prompt(7))
    assert "# here" in str(caught.value.line)
