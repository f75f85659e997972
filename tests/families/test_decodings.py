"""Generations that share forwards give the tokens that each has alone, whoever is beside it."""

from __future__ import annotations

import gc
import weakref
from contextlib import closing
from typing import Any

import pytest
import torch

from tests.families import zoo
from tests.families.decoded import EVERY, MORE, assert_same, build, decoding, prompt, run
from weft.errors import SamplingError
from weft.families.decoding import Decoding
from weft.families.decodings import Decodings, Turn

SHARED = [name for name in EVERY if name not in ("phi3 longrope", "llama dynamic")]

# (rows of ids, options): lengths and ends differ, two look alike, one prompt has two rows
REQUESTS: list[tuple[Any, dict[str, Any]]] = [
    (zoo.tokens(4), {"max_new_tokens": 9}),
    (zoo.tokens(12, seed=1), {"max_new_tokens": 3}),
    (zoo.tokens(4, 4, seed=2), {"max_new_tokens": 6}),
    (zoo.tokens(7, seed=3), {"max_new_tokens": 12, "do_sample": True, "seed": 5, "top_k": 9}),
    (zoo.tokens(1, seed=4), {"max_new_tokens": 5, "repetition_penalty": 1.3}),
]


@torch.no_grad()
def together(net: Any, ones: list[Decoding], late: dict[int, Decoding] | None = None) -> list[Turn]:
    """Runs all of them; those of `late` join after so many turns. The turns there were."""
    late = dict(late or {})
    decodings = Decodings(net, shared=True)
    for one in ones:
        decodings.add(one)
    turns = []
    while True:
        for one in [late.pop(when) for when in list(late) if when <= len(turns)]:
            decodings.add(one)
        turn = decodings.turn()
        if turn is None:
            assert not late
            return turns
        turns.append(turn)
        decodings.took(net(*turn.call[0], **turn.call[1]))


def _ones(net: Any, requests: Any = None) -> list[Decoding]:
    return [decoding(net, rows, **options) for rows, options in requests or REQUESTS]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SHARED)
def test_tokens_are_those_of_each_alone(name: str, attention: str) -> None:
    if name in MORE:
        if attention == "eager":
            return
        net = build(name)
    else:
        try:
            net = zoo.build(name, attn_implementation=attention)
        except ValueError:
            pytest.skip(f"{name} has no {attention} attention")
    alone = [run(net, one) for one in _ones(net)]
    ones = _ones(net)
    turns = together(net, ones[:2] + ones[3:], late={4: ones[2]})
    for one, expected in zip(ones, alone, strict=True):
        assert torch.equal(one.result, expected)
    steps = sum(one.step + 1 for one in ones)
    assert len(turns) < 0.6 * steps  # forwards were shared


class _Letters:
    """A tokenizer of letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_a_stop_string_ends_its_own_rows() -> None:
    net: Any = zoo.build("gpt2")
    free = [run(net, decoding(net, rows, max_new_tokens=9)) for rows, _ in REQUESTS[:3]]
    text = _Letters().decode(free[0][0, 7:9].tolist())
    options = [{"stop_strings": text}, {"stop_strings": "never"}, {}]
    given = zip(REQUESTS, options, strict=False)
    ones = [decoding(net, r, _Letters(), max_new_tokens=9, **o) for (r, _), o in given]
    together(net, ones)
    assert torch.equal(ones[0].result, free[0][:, :9])
    assert_same([one.result for one in ones[1:]], free[1:])


def test_logits_are_within_rounding_of_those_alone() -> None:
    net = zoo.build("gemma3")
    rows = [zoo.tokens(4), zoo.tokens(12, seed=1)]
    alone: list[list[torch.Tensor]] = []
    for one in [decoding(net, row, max_new_tokens=12) for row in rows]:
        seen: list[torch.Tensor] = []

        def note(module: Any, args: Any, out: Any, seen: Any = seen) -> None:
            seen.append(out.logits[:, -1])

        hook = net.register_forward_hook(note)
        run(net, one)
        hook.remove()
        alone.append(seen)
    ones = [decoding(net, row, max_new_tokens=12) for row in rows]
    decodings = Decodings(net, shared=True)
    for one in ones:
        decodings.add(one)
    with torch.no_grad():
        while (turn := decodings.turn()) is not None:
            output = net(**turn.call[1])
            for place in turn.places:
                got = output.logits[slice(*place.rows), -1]
                expected = alone[place.number][place.step]
                assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
            decodings.took(output)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "mixtral", "mamba"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_neighbour_of_bad_numbers_is_not_seen(name: str, poison: float) -> None:
    """The second generation's hidden states are poisoned from the embedding on, at each step."""
    net = build(name)
    requests = [(zoo.tokens(3), {"max_new_tokens": 8}), (zoo.tokens(9), {"max_new_tokens": 8})]
    expected = run(net, _ones(net, requests)[0])
    ones = _ones(net, requests)
    decodings = Decodings(net, shared=True)
    for one in ones:
        decodings.add(one)
    places: list[Any] = []

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for place in places:
            if place.number == 1:
                output[slice(*place.rows)] = poison
        return output

    hook = net.get_input_embeddings().register_forward_hook(spoil)
    with torch.no_grad():
        while (turn := decodings.turn()) is not None:
            places[:] = turn.places
            decodings.took(net(**turn.call[1]))
    hook.remove()
    assert torch.equal(ones[0].result, expected)


def test_one_that_cannot_go_on_leaves_and_the_others_do_not_notice() -> None:
    net = zoo.build("qwen3")
    requests = [
        (zoo.tokens(3), {"max_new_tokens": 6}),
        (zoo.tokens(5), {"max_new_tokens": 6, "do_sample": True, "seed": 1}),
        (zoo.tokens(8), {"max_new_tokens": 6}),
    ]
    expected = [run(net, one) for one in _ones(net, requests)]
    ones = _ones(net, requests)
    decodings = Decodings(net, shared=True)
    for one in ones:
        decodings.add(one)
    with torch.no_grad():
        while (turn := decodings.turn()) is not None:
            output = net(**turn.call[1])
            for place in turn.places:
                if place.number == 1 and place.step == 3:
                    output.logits[slice(*place.rows)] = float("nan")
            decodings.took(output)
    assert list(decodings.errors) == [1]
    assert isinstance(decodings.errors[1], SamplingError)
    assert "at step 3" in decodings.errors[1].message
    assert torch.equal(ones[1].result, expected[1][:, : 5 + 3])
    for number in (0, 2):
        assert torch.equal(ones[number].result, expected[number])


def test_one_may_be_sent_away_between_turns() -> None:
    net = zoo.build("gpt_neox")
    expected = [run(net, one) for one in _ones(net)]
    ones = _ones(net)
    decodings = Decodings(net, shared=True)
    numbers = [decodings.add(one) for one in ones]
    with torch.no_grad():
        for turn_number in range(100):
            if turn_number == 6:
                decodings.leave(numbers[3])
            turn = decodings.turn()
            if turn is None:
                break
            assert turn_number < 6 or numbers[3] not in [place.number for place in turn.places]
            decodings.took(net(**turn.call[1]))
    for number in (0, 1, 2, 4):
        assert torch.equal(ones[number].result, expected[number])


def test_what_is_not_plain_runs_alone_between_the_others() -> None:
    net = zoo.build("llama")
    requests: list[tuple[Any, dict[str, Any]]] = [
        (zoo.tokens(4), {"max_new_tokens": 5}),
        (zoo.tokens(4, 6), {"max_new_tokens": 5}),  # padded
        (zoo.tokens(5), {"max_new_tokens": 5, "use_cache": False}),
        (prompt(net, None, inputs_embeds=torch.randn(1, 3, 32)), {"max_new_tokens": 5}),
        (zoo.tokens(9), {"max_new_tokens": 5}),
    ]
    expected = [run(net, one) for one in _ones(net, requests)]
    ones = _ones(net, requests)
    turns = together(net, ones)
    for one, alone in zip(ones, expected, strict=True):
        assert torch.equal(one.result, alone)
    both = [turn for turn in turns if len(turn.places) > 1]
    assert {place.number for turn in both for place in turn.places} == {0, 4}
    for turn in turns:
        for place in turn.places:
            assert place.length == requests_length(requests, place.number) + place.step


def requests_length(requests: Any, number: int) -> int:
    return [4, 6, 5, 3, 9][number]


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_where_ropes_follow_the_length_one_goes_after_another(name: str) -> None:
    net = build(name)
    before = {path: buffer.clone() for path, buffer in net.named_buffers()}
    requests = [(zoo.tokens(8), {"max_new_tokens": 6}), (zoo.tokens(3), {"max_new_tokens": 9})]
    expected = [run(net, one) for one in _ones(net, requests)]
    ones = _ones(net, requests)
    turns = together(net, ones)
    assert [turn.places[0].number for turn in turns] == [0] * 6 + [1] * 9
    for one, alone in zip(ones, expected, strict=True):
        assert torch.equal(one.result, alone)
    assert_same(dict(net.named_buffers()), before)


def test_places_say_where_rows_are() -> None:
    net = zoo.build("llama")
    turns = together(net, _ones(net))
    for turn in turns:
        ids = turn.call[1]["input_ids"]
        mask = turn.call[1].get("attention_mask")
        assert turn.places[-1].rows[1] == len(ids)
        assert [p.rows[0] for p in turn.places[1:]] == [p.rows[1] for p in turn.places[:-1]]
        for place in turn.places:
            rows, _ = REQUESTS[place.number]
            assert place.rows[1] - place.rows[0] == len(rows)
            assert place.length == len(rows[0]) + place.step
            assert place.width == max(one.length for one in turn.places)
            if mask is not None:
                real = mask[slice(*place.rows)]
                assert real.shape[1] == place.width
                assert (real.sum(1) == place.length).all()
                assert real[:, place.width - place.length :].all()


def prompts_of(turns: list[Turn]) -> list[list[int]]:
    """Who shared each of the prompts' forwards."""
    first = [[place.number for place in turn.places if place.step == 0] for turn in turns]
    return [numbers for numbers in first if numbers]


@pytest.mark.parametrize("keep", [0, 1])
def test_prompts_of_several_lengths_share_a_forward(keep: int) -> None:
    net = zoo.build("llama")
    lengths = (5, 23, 4, 5, 7)
    requests = [(zoo.tokens(n, seed=n), {"max_new_tokens": 4}) for n in lengths]
    expected = [run(net, one) for one in _ones(net, requests)]
    ones = [decoding(net, r, **o, logits_to_keep=keep) for r, o in requests]
    turns = together(net, ones)
    assert prompts_of(turns) == [[0, 1, 2, 3, 4]]
    assert len(turns) == 4
    ids = turns[0].call[1]["input_ids"]
    for place in turns[0].places:
        row, length = ids[place.rows[0]], lengths[place.number]
        assert (place.length, place.width) == (length, 23)
        assert row[:length].tolist() == requests[place.number][0][0]
        places = [4, 7, 5, 23] if keep == 0 else [4, 5, 7, 23]
        assert place.last == (length - 1 if keep == 0 else places.index(length))
    for one, alone in zip(ones, expected, strict=True):
        assert torch.equal(one.result, alone)


def test_prompts_are_padded_as_far_as_their_caches_keep_all() -> None:
    """The window of the sliding layers is 6, with the next position."""
    net = zoo.build("gemma3")
    requests = [(zoo.tokens(n, seed=n), {"max_new_tokens": 8}) for n in (3, 5, 9, 4, 2)]
    expected = [run(net, one) for one in _ones(net, requests)]
    ones = _ones(net, requests)
    turns = together(net, ones)
    assert prompts_of(turns) == [[0, 1, 3, 4], [2]]
    for one, alone in zip(ones, expected, strict=True):
        assert torch.equal(one.result, alone)


def test_states_that_run_over_padding_are_not_padded() -> None:
    net = build("mamba")
    turns = together(net, [decoding(net, zoo.tokens(n), max_new_tokens=2) for n in (3, 5, 3)])
    assert prompts_of(turns) == [[0, 2], [1]]


def test_prompts_that_look_otherwise_wait_for_the_next_forward() -> None:
    net = zoo.build("gpt2", n_positions=1024)
    much = [(zoo.tokens(n), {}) for n in (3, 600, 4, 500)]  # padding would be most of it
    more = [(zoo.tokens(4), {"logits_to_keep": 0}), (zoo.tokens(3), {"logits_to_keep": 2})]
    more += [(zoo.tokens(4), {"logits_to_keep": 2}), (zoo.tokens(9), {"logits_to_keep": 0})]
    many = [(zoo.tokens(n), {}) for n in range(1, 12)]
    for requests, expected in (
        (much, [[0, 2], [1, 3]]),
        (more, [[0, 3], [1], [2]]),
        (many, [[*range(8)], [8, 9, 10]]),
    ):
        ones = [decoding(net, rows, max_new_tokens=2, **how) for rows, how in requests]
        alone = [decoding(net, rows, max_new_tokens=2, **how) for rows, how in requests]
        assert prompts_of(together(net, ones)) == expected
        assert all(torch.equal(a.result, run(net, b)) for a, b in zip(ones, alone, strict=True))


def test_no_more_rows_at_once_than_is_allowed() -> None:
    net = zoo.build("gpt2")
    ones = [decoding(net, zoo.tokens(4), max_new_tokens=4) for _ in range(5)]
    decodings = Decodings(net, shared=True, rows=2)
    for one in ones:
        decodings.add(one)
    most = 0
    with torch.no_grad():
        while (turn := decodings.turn()) is not None:
            most = max(most, len(turn.call[1]["input_ids"]))
            decodings.took(net(**turn.call[1]))
    assert most == 2
    assert all(torch.equal(one.result, ones[0].result) for one in ones)


def test_no_cache_is_left_when_all_are_over_or_closed() -> None:
    net = zoo.build("mistral")
    for early in (False, True):
        ones = _ones(net)
        decodings = Decodings(net, shared=True)
        for one in ones:
            decodings.add(one)
        caches: list[weakref.ref[Any]] = []
        with torch.no_grad():
            while (turn := decodings.turn()) is not None:
                caches.append(weakref.ref(turn.call[1]["past_key_values"]))
                decodings.took(net(**turn.call[1]))
                if early and len(caches) == 5:
                    decodings.close()
        del turn
        gc.collect()
        assert len(caches) >= 5
        assert not any(cache() for cache in caches)
        assert all(one.over for one in ones)


def test_a_row_that_leaves_takes_its_cache_with_it() -> None:
    """The width and the rows of the shared cache are what those need who are still there."""
    net = zoo.build("gemma3")
    ones = [
        decoding(net, zoo.tokens(30), max_new_tokens=2),
        decoding(net, zoo.tokens(4), max_new_tokens=9),
    ]
    turns = together(net, ones)
    cache = turns[-1].call[1]["past_key_values"]
    assert turns[-1].places[0].width == 4 + 8
    shapes = [tuple(layer.keys.shape[::2]) for layer in cache.layers]
    assert shapes == [(1, 5), (1, 12), (1, 5)]
    assert turns[-1].call[1].get("attention_mask") is None


def test_a_model_that_is_not_known_to_keep_rows_apart_runs_one_after_another() -> None:
    net = zoo.build("llama")
    expected = [run(net, one) for one in _ones(net)]
    ones = _ones(net)
    decodings = Decodings(net)
    for one in ones:
        decodings.add(one)
    numbers = []
    with torch.no_grad():
        while (turn := decodings.turn()) is not None:
            numbers += [place.number for place in turn.places]
            assert len(turn.places) == 1
            decodings.took(net(**turn.call[1]))
    assert numbers == sorted(numbers)
    for one, alone in zip(ones, expected, strict=True):
        assert torch.equal(one.result, alone)


def test_the_shared_cache_becomes_no_larger_than_is_allowed() -> None:
    """A long row would make all others as wide: those that would be too much wait."""
    net = zoo.build("gpt2")
    rows = [(zoo.tokens(4), {"max_new_tokens": 3})] * 3 + [(zoo.tokens(30), {"max_new_tokens": 3})]
    ones = _ones(net, rows)
    decodings = Decodings(net, shared=True, positions=66)
    for one in ones:
        decodings.add(one)
    most, beside = 0, set()
    with torch.no_grad():
        while (turn := decodings.turn()) is not None:
            most = max(most, turn.places[-1].rows[1] * turn.places[0].width)
            beside |= {tuple(sorted(place.number for place in turn.places))}
            decodings.took(net(**turn.call[1]))
    assert (0, 1, 2) in beside
    assert (3,) in beside
    assert most <= 66
    assert all(one.over for one in ones)


class Broken(Exception):
    pass


@pytest.mark.parametrize("name", ["gemma3", "phi3 longrope"])
@pytest.mark.parametrize("where", ["forward", "took"])
def test_an_error_ends_all_and_leaves_the_model_as_it_was(name: str, where: str) -> None:
    net = build(name)
    before = {path: buffer.clone() for path, buffer in net.named_buffers()}
    plain = {path: set(vars(one)) for path, one in net.named_modules()}
    ones = _ones(net)
    caches: list[weakref.ref[Any]] = []
    with pytest.raises(Broken), closing(Decodings(net, shared=True)) as decodings, torch.no_grad():
        for one in ones:
            decodings.add(one)
        for count in range(100):
            turn = decodings.turn()
            assert turn is not None
            if "past_key_values" in turn.call[1]:  # else the frequencies have just switched
                caches.append(weakref.ref(turn.call[1]["past_key_values"]))
            output = net(**turn.call[1])
            if count == 7 and where == "forward":
                raise Broken
            if count == 7:
                ones[turn.places[0].number].take = _break  # type: ignore[method-assign]
            decodings.took(output)
    del turn, output
    gc.collect()
    assert len(caches) >= 7
    assert not any(cache() for cache in caches)
    assert all(one.over for one in ones)
    assert_same(dict(net.named_buffers()), before)
    assert {path: set(vars(one)) for path, one in net.named_modules()} == plain
    assert decodings.turn() is None


def _break(logits: torch.Tensor) -> None:
    raise Broken


def test_a_generation_that_is_over_is_not_kept() -> None:
    net = zoo.build("gpt2")
    decodings = Decodings(net, shared=True)
    gone = []
    with torch.no_grad():
        for seed in range(3):
            one = decoding(net, zoo.tokens(4, seed=seed), max_new_tokens=2)
            decodings.add(one)
            gone.append(weakref.ref(one))
            while (turn := decodings.turn()) is not None:
                decodings.took(net(**turn.call[1]))
    del one
    gc.collect()
    assert not any(one() for one in gone)


@torch.no_grad()
def test_who_leaves_with_a_turn_has_no_token_of_it() -> None:
    net = zoo.build("qwen3")
    requests = [(zoo.tokens(3), {"max_new_tokens": 6}), (zoo.tokens(5), {"max_new_tokens": 6})]
    expected = [run(net, one) for one in _ones(net, requests)]
    ones = _ones(net, requests)
    with closing(Decodings(net, shared=True)) as decodings:
        numbers = [decodings.add(one) for one in ones]
        turns = 0
        while (turn := decodings.turn()) is not None:
            turns += 1
            output = net(**turn.call[1])
            if turns == 3:  # the prompts, a step, and this one
                output.logits[0] = float("nan")
            decodings.took(output, [numbers[0]] if turns == 3 else [])
    assert torch.equal(ones[0].result, expected[0][:, : 3 + 2])
    assert torch.equal(ones[1].result, expected[1])
    assert not decodings.errors


@torch.no_grad()
def test_a_turn_that_is_dropped_ends_all_that_are_in_it() -> None:
    net = zoo.build("qwen3")
    requests = [(zoo.tokens(n), {"max_new_tokens": 4}) for n in (3, 3, 5)]
    expected = [run(net, one) for one in _ones(net, requests)]
    ones = _ones(net, requests)
    with closing(Decodings(net, shared=True)) as decodings:
        for one in ones[:2]:
            decodings.add(one)
        first = decodings.turn()
        assert first is not None and [place.number for place in first.places] == [0, 1]
        decodings.add(ones[2])
        decodings.drop()
        while (turn := decodings.turn()) is not None:
            decodings.took(net(**turn.call[1]))
    assert [one.result.shape[1] for one in ones] == [3, 3, 9]
    assert torch.equal(ones[2].result, expected[2])
