"""Invokes of a generation with options of their own: each is what it is in a block of its own.

The oracle is `transformers`' own `generate` with hooks, prompt by prompt; its one draw is replaced
by the keyed one.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.families import zoo
from tests.language.generated import generated, keyed
from weft.errors import InputError, RecordingError, UnknownOptionError
from weft.testing.same import bitwise, bounded

GOLDEN = Path(__file__).parent.parent / "golden"
BASE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def prompt(*lengths: int) -> torch.Tensor:
    return torch.tensor(zoo.tokens(*lengths, seed=sum(lengths)))


DRAWN = {"do_sample": True, "top_k": 0}
EACH: list[tuple[torch.Tensor, dict[str, Any]]] = [
    (prompt(6), {}),
    (prompt(9), {**DRAWN, "temperature": 0.7, "seed": 3, "max_new_tokens": 6}),
    (prompt(6, 6), {"repetition_penalty": 3.0, "max_new_tokens": 2}),
    (prompt(3), {**DRAWN, "top_p": 0.9, "seed": 4}),
    (prompt(7), {"max_length": 8}),
]
"""Prompts, and what their invokes say over the block's."""


def layer(subject: Any, number: int) -> Any:
    return subject.model.get(subject.paths.layer(number))


def key(subject: Any, number: int) -> str:
    return f"{subject.paths.layer(number)}.output"


def alone(subject: Any, ids: torch.Tensor, hooks: Any, options: dict[str, Any]) -> Any:
    """`generate` of transformers."""
    given = {**BASE, **options}
    if "max_length" in options:
        del given["max_new_tokens"]
    with keyed(given.pop("seed", 0)):
        return generated(subject.net, ids, hooks, attention_mask=torch.ones_like(ids), **given)


@contextmanager
def counted(net: Any) -> Any:
    """The rows of each forward of the model."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(kwargs["input_ids"]))

    hook = net.register_forward_pre_hook(note, with_kwargs=True)
    yield rows
    hook.remove()


def test_each_is_what_it_is_in_a_block_of_its_own(gpt2: Any, v: torch.Tensor) -> None:
    """With an edit at every step, and a loop over its own steps."""

    def add(step: int, h: torch.Tensor) -> None:
        h[:, -1] += v

    hooks = {key(gpt2, 1): add, key(gpt2, 2): None}
    expected = [alone(gpt2, ids, hooks, options) for ids, options in EACH]
    assert [one.steps for one in expected] == [4, 6, 2, 4, 1]

    def run() -> list[Any]:
        found = []
        with gpt2.model.generate(**BASE) as tracer:
            for ids, options in EACH:
                with tracer.invoke(ids, **options):
                    layer(gpt2, 1).output[:, -1] += v
                    seen = weft.save([])
                    for _ in tracer.iter[:]:
                        seen.append(layer(gpt2, 2).output)
                    found.append((tracer.result.save(), seen))
        return found

    run()  # the trial of the model
    with counted(gpt2.net) as rows:
        found = run()
    assert rows == [6, 5, 3, 3, 1, 1]  # two rows leave after a step; one goes on
    for (ids, seen), one in zip(found, expected, strict=True):
        bitwise(ids, one.result)
        bounded(list(seen), [one[key(gpt2, 2), step] for step in range(one.steps)])
    with gpt2.model.generate(EACH[1][0], **{**BASE, **EACH[1][1]}) as tracer:
        layer(gpt2, 1).output[:, -1] += v
        ids = tracer.result.save()
    bitwise(found[1][0], ids)


def test_prompts_of_other_lengths_have_other_numbers_of_steps(gpt2: Any, v: torch.Tensor) -> None:
    """`max_length` of the block; edits outside of loops act at each of them."""

    def add(step: int, h: torch.Tensor) -> None:
        h += v

    options = {"max_length": 11, "do_sample": False, "pad_token_id": 0}
    found, steps = [], []
    with gpt2.model.generate(**options) as tracer:
        for ids in (prompt(9), prompt(4)):
            with tracer.invoke(ids):
                layer(gpt2, 1).output[:] += v
                steps.append(list(tracer.all()))
                found.append(tracer.result.save())
    assert steps == [[0, 1], [0, 1, 2, 3, 4, 5, 6]]
    hooks = {key(gpt2, 1): add}
    bitwise(found, [alone(gpt2, ids, hooks, options).result for ids in (prompt(9), prompt(4))])


@pytest.mark.parametrize("looped", [False, True])
def test_values_come_from_one_that_goes_on_for_longer(gpt2: Any, looped: bool) -> None:
    """An edit of the one by the other at every step that it has; in a loop, at those of both."""
    first, second = (2, 4) if looped else (4, 2)
    seen = alone(gpt2, prompt(5), {key(gpt2, 0): None}, {"max_new_tokens": first})

    def put(step: int, h: torch.Tensor) -> None:
        if step < 2:
            h[:, -1] = seen[key(gpt2, 0), step][:, -1] * 2

    expected = alone(gpt2, prompt(9), {key(gpt2, 1): put}, {"max_new_tokens": second})
    plain = alone(gpt2, prompt(9), {}, {"max_new_tokens": second}).result
    with gpt2.model.generate(**BASE) as tracer:
        with tracer.invoke(prompt(5), max_new_tokens=first):
            h = layer(gpt2, 0).output[:, -1]
            each = [layer(gpt2, 0).output[:, -1] for _ in tracer.iter[:]]
            one = tracer.result.save()
        with tracer.invoke(prompt(9), max_new_tokens=second):
            if looped:
                for step in tracer.iter[:2]:
                    layer(gpt2, 1).output[:, -1] = each[step] * 2
            else:
                layer(gpt2, 1).output[:, -1] = h * 2
            two = tracer.result.save()
    bitwise([one, two], [seen.result, expected.result])
    assert not torch.equal(expected.result, plain)


def acts(subject: Any, tracer: Any, h: Any) -> list[Any]:
    """Edits and a stop of an invoke that need a value of another one at every step."""
    site = layer(subject, 1)

    def put() -> None:
        site.output[:, -1] = h  # here

    def add() -> None:
        site.output[:, -1] += h  # here

    def skip() -> None:
        site.skip(site.input + h.unsqueeze(1))  # here

    def stop() -> None:
        tracer.stop_if(h.norm() + site.output[:, -1].norm() < 0)  # here

    return [put, add, skip, stop]


@pytest.mark.parametrize("number", range(4))
def test_an_edit_needs_values_at_all_of_its_steps(gpt2: Any, number: int) -> None:
    with (
        pytest.raises(RecordingError, match="at step 2 it needs a value of another") as caught,
        gpt2.model.generate(**BASE) as tracer,
    ):
        with tracer.invoke(prompt(5), max_new_tokens=2):
            h = layer(gpt2, 0).output[:, -1]
        with tracer.invoke(prompt(9)):
            acts(gpt2, tracer, h)[number]()
            tracer.result.save()
    assert "# here" in str(caught.value.line)
    assert "for step in tracer.iter[:2]" in str(caught.value.fix)


def test_what_is_told_ends_with_its_values(gpt2: Any, capsys: Any) -> None:
    with gpt2.model.generate(**BASE) as tracer:
        with tracer.invoke(prompt(5), max_new_tokens=2):
            h = layer(gpt2, 0).output[:, -1].norm()
            tracer.log("first", h)
        with tracer.invoke(prompt(9)):
            tracer.log("both", h + layer(gpt2, 0).output[:, -1].norm())
            tracer.log("second", layer(gpt2, 0).output[:, -1].norm())
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert [said.count(name) for name in ("first", "both", "second")] == [2, 2, 4]


@pytest.mark.parametrize("seed", [None, 9])
def test_draws_of_the_block_are_those_of_the_invokes_seed(gpt2: Any, seed: int | None) -> None:
    """Its tokens, and the numbers that its edits draw; others have the block's."""

    def noisy(tracer: Any) -> Any:
        noise = torch.randn_like(layer(gpt2, 1).output[:, -1:])
        layer(gpt2, 1).output[:, -1:] += noise
        with tracer.iter[1]:
            layer(gpt2, 0).output[:, -1:] += torch.rand_like(layer(gpt2, 0).output[:, -1:])
        return tracer.result.save()

    own = {**DRAWN, "temperature": 2.0, "seed": 3}
    with gpt2.model.generate(prompt(6), **{**BASE, **own}) as tracer:
        expected = noisy(tracer)
    with gpt2.model.generate(**BASE, seed=seed) as tracer:
        with tracer.invoke(prompt(9)):
            other = noisy(tracer)
        with tracer.invoke(prompt(6), **own):
            found = noisy(tracer)
        with tracer.invoke(prompt(6), **own):
            again = noisy(tracer)
    bitwise([found, again], [expected] * 2)
    if seed is not None:
        with gpt2.model.generate(prompt(9), **BASE, seed=seed) as tracer:
            alone = noisy(tracer)
        bitwise(other, alone)


def test_the_first_invoke_may_have_the_seed(gpt2: Any) -> None:
    """Its draws are told apart from those of the others."""
    found = []
    with gpt2.model.generate(**BASE) as tracer:
        assert len(tracer.graph) == 0  # there is none yet
        for options in ({"seed": 3}, {}, {}):
            with tracer.invoke(prompt(6), **options):
                found.append(weft.save(torch.rand_like(layer(gpt2, 1).output)))
    assert str(tracer.graph).count(", seed 3)") == 1
    with gpt2.model.generate(prompt(6), **BASE, seed=3) as tracer:
        expected = weft.save(torch.rand_like(layer(gpt2, 1).output))
    bitwise(found[0], expected)
    assert len({float(one.sum()) for one in found}) == 3


def test_an_empty_invoke_has_options_too(gpt2: Any) -> None:
    ids = torch.cat([prompt(5), prompt(5) + 1])
    expected = alone(gpt2, ids, {}, {"max_new_tokens": 6, "repetition_penalty": 3.0}).result
    with gpt2.model.generate(**BASE) as tracer:
        with tracer.invoke(ids[:1]):
            pass
        with tracer.invoke(ids[1:]):
            pass
        with tracer.invoke(max_new_tokens=6, repetition_penalty=3.0):
            result = tracer.result.save()
        with (
            pytest.raises(RecordingError, match="have the same options"),
            tracer.invoke(max_new_tokens=5),
        ):
            pass
    bitwise(result, expected)


def steered(subject: Any) -> Any:
    """Two invokes, the second with options of its own, in one experiment."""
    with subject.model.generate(**BASE, seed=2) as tracer:
        for number, (ids, options) in enumerate(EACH[:2]):
            with tracer.invoke(ids, **options):
                layer(subject, 1).output[:, -1] *= 1.5
                tracer.result.save(f"ids{number}")
    return tracer


def test_a_golden_file_keeps_decoding(gpt2: Any) -> None:
    """Written by version 0.1; what it means must never change."""
    experiment = weft.Experiment.load(GOLDEN / "generations-1.weft")
    new = steered(gpt2)
    assert experiment.generations == new.graph.generations
    found = experiment.run(gpt2.model, EACH[0][0], EACH[1][0])
    bitwise(found, {name: new.results[name] for name in ("ids0", "ids1")})


def test_the_experiment_keeps_them(gpt2: Any, tmp_path: Any) -> None:
    with gpt2.model.generate(**BASE) as tracer:
        for number, (ids, options) in enumerate(EACH[:3]):
            with tracer.invoke(ids, **options):
                h = layer(gpt2, 1).output
                h[:, -1:] += torch.rand_like(h[:, -1:])
                tracer.result.save(f"ids{number}")
    tracer.graph.save(tmp_path / "kept.weft")
    again = weft.Experiment.load(tmp_path / "kept.weft")
    prompts = [ids for ids, _ in EACH[:3]]
    found = again.run(gpt2.model, *prompts)
    for name, value in tracer.results.items():
        bitwise(found[name], value)
    one, other = again.run(gpt2.model, *prompts, seed=8), again.run(gpt2.model, *prompts, seed=8)
    bitwise(one["ids1"], other["ids1"])
    assert not torch.equal(one["ids1"], found["ids1"])
    with pytest.raises(UnknownOptionError, match="for 4 new tokens, not 5"):
        again.run(gpt2.model, *prompts, max_new_tokens=5)


# -- refused ---------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temprature": 0.7}, UnknownOptionError, "did you mean temperature"),
    ({"temperature": 0}, UnknownOptionError, "above 0"),
    ({"seed": 2**63}, UnknownOptionError, "whole number from 0"),
    ({"seed": 1.0}, UnknownOptionError, "whole number from 0"),
    ({"num_beams": 2}, UnknownOptionError, "beam search"),
    ({"alone": True}, UnknownOptionError, "option of the whole block.*model.generate"),
    ({"use_cache": False}, UnknownOptionError, "option of the whole block.*model.generate"),
    ({"output_router_logits": True}, UnknownOptionError, "unknown option"),
    ({"max_length": 6}, InputError, "nothing can be added"),
]


@pytest.mark.parametrize(("options", "kind", "said"), REFUSED, ids=str)
def test_what_an_invoke_cannot_have(
    gpt2: Any, options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with gpt2.model.generate(**BASE) as tracer:
        with (
            pytest.raises(kind, match=f"(?s){said}") as caught,
            tracer.invoke(prompt(6), **options),
        ):
            pass
        assert __file__ in str(caught.value)
        with tracer.invoke(prompt(6)):  # knows nothing of it
            assert list(tracer.iter[:]) == [0, 1, 2, 3]
            layer(gpt2, 1).output.save()


def test_a_step_beyond_its_own_last(gpt2: Any) -> None:
    with gpt2.model.generate(**BASE) as tracer:
        with tracer.invoke(prompt(6), max_new_tokens=2):
            with pytest.raises(RecordingError, match=r"no step 2.* the steps are 0 to 1"):
                list(tracer.iter[2])
            layer(gpt2, 1).output.save()
        with tracer.invoke(prompt(6)):
            assert list(tracer.iter[2:]) == [2, 3]


def test_a_single_forward_takes_none(gpt2: Any) -> None:
    with gpt2.model.trace() as tracer:
        for options in ({"temperature": 0.7}, {"seed": 3}):
            with pytest.raises(UnknownOptionError):
                tracer.invoke(prompt(6), **options)
        with tracer.invoke(prompt(6)):
            layer(gpt2, 1).output.save()
