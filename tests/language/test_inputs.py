"""Every way to give a prompt, through `trace`: the numbers are those of the ids by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import weft
from tests.families import zoo
from tests.language.hooks import with_hooks
from weft.errors import InputError, WeftError
from weft.testing.same import bitwise, bounded, greedy

ROW = [1, 5, 6, 7]
ROWS = [[1, 5, 6, 7, 9, 4], [1, 8], [1, 3, 3]]
CHAT = [{"role": "user", "content": "w5 w6"}]
CHAT_IDS = [1, 125, 5, 6, 127]


@pytest.fixture(scope="module")
def spoken():
    """A Llama with a tokenizer: `w5` is 5, and a text starts with 1."""
    return weft.LanguageModel(zoo.build("llama"), tokenizer=zoo.tokenizer())


@pytest.fixture
def expected(spoken):
    with torch.no_grad():
        return lambda *rows: spoken.dispatch()(torch.tensor(rows)).logits


def logits_of(model, *inputs, **options):
    with model.trace(*inputs, **options) as tracer:
        logits = tracer.result.logits.save()
    return logits


GIVEN = {
    "text": "w5 w6 w7",
    "list of one text": ["w5 w6 w7"],
    "ids": ROW,
    "rows of ids": [ROW],
    "tensor": torch.tensor([ROW]),
    "tensor of one row": torch.tensor(ROW),
    "array": np.array([ROW]),
    "mapping": {"input_ids": torch.tensor([ROW]), "attention_mask": torch.ones(1, 4).long()},
}


@pytest.mark.parametrize("name", GIVEN)
@torch.no_grad()
def test_each_way_gives_the_numbers_of_the_ids(spoken, name):
    expected = spoken.dispatch()(torch.tensor([ROW])).logits
    bitwise(logits_of(spoken, GIVEN[name]), expected)


@torch.no_grad()
def test_what_a_tokenizer_returns(spoken):
    batch = spoken.tokenizer("w5 w6 w7", return_tensors="pt", return_token_type_ids=False)
    expected = spoken.dispatch()(torch.tensor([ROW])).logits
    bitwise(logits_of(spoken, batch), expected)
    bitwise(logits_of(spoken, input_ids=batch["input_ids"]), expected)


@torch.no_grad()
def test_a_chat_goes_through_its_template(spoken):
    ids = spoken.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    ids = ids["input_ids"] if not isinstance(ids, list) else ids
    expected = spoken.dispatch()(torch.tensor([ids])).logits
    bitwise(logits_of(spoken, CHAT), expected)


@torch.no_grad()
def test_embeddings_instead_of_ids(spoken):
    net = spoken.dispatch()
    embedded = net.model.embed_tokens(torch.tensor([ROW]))
    bitwise(logits_of(spoken, inputs_embeds=embedded), net(torch.tensor([ROW])).logits)


@torch.no_grad()
def test_forward_options_reach_the_model(spoken):
    with spoken.trace(ROW, logits_to_keep=1, output_hidden_states=True) as tracer:
        logits = tracer.result.logits.save()
        hidden = tracer.result.hidden_states[1].save()
    plain = spoken.dispatch()(torch.tensor([ROW]), output_hidden_states=True)
    bounded(logits, plain.logits[:, -1:])
    bitwise(hidden, plain.hidden_states[1])


# Padding is invisible


def test_rows_of_a_padded_batch_equal_the_rows_alone(subject):
    ids = [row.tolist() for row in (subject.ids[0], subject.ids[0, :3], subject.ids[0, 2:7])]
    with subject.model.trace(ids) as tracer:
        h = subject.layer_list[1].output.save()
        logits = tracer.result.logits.save()
        mask, lengths = tracer.mask, tracer.lengths
    assert lengths == (9, 3, 5)
    assert mask.sum(1).tolist() == [9, 3, 5] and bool(mask[:, -1].all())
    key = f"{subject.paths.layer(1)}.output"
    for number, row in enumerate(ids):
        seen = with_hooks(subject.net, {key: None}, torch.tensor([row]))
        for got, alone in ((h, seen[key]), (logits, seen.result.logits)):
            mine = got[number][mask[number]][None]
            if got.dtype == torch.float32:
                bounded(mine, alone)
            else:
                assert (mine - alone).abs().max() < 0.05 * alone.abs().max()
        if logits.dtype == torch.float32:
            greedy(logits[number][mask[number]], seen.result.logits[0])


def test_an_edit_of_the_last_position_acts_on_each_rows_last_token(llama, v):
    ids = [llama.ids[0].tolist(), llama.ids[0, :4].tolist()]
    with llama.model.trace(ids) as tracer:
        llama.model.model.layers[1].output[:, -1] += v
        logits = tracer.result.logits[:, -1].save()

    def edit(h):
        h[:, -1] += v

    for number, row in enumerate(ids):
        hooks = {"model.layers.1.output": edit}
        alone = with_hooks(llama.net, hooks, torch.tensor([row])).result.logits[:, -1]
        bounded(logits[number : number + 1], alone)


def test_the_mask_is_used_in_a_block(llama):
    ids = [llama.ids[0].tolist(), llama.ids[0, :4].tolist()]
    with llama.model.trace(ids) as tracer:
        h = llama.model.model.layers[1].output
        weights = tracer.mask[..., None]
        mean = ((h * weights).sum(1) / weights.sum(1)).save()
    for number, row in enumerate(ids):
        key = "model.layers.1.output"
        alone = with_hooks(llama.net, {key: None}, torch.tensor([row]))[key]
        bounded(mean[number : number + 1], alone.mean(1))


def test_without_padding_the_mask_is_full(llama):
    with llama.model.trace(llama.ids) as tracer:
        llama.model.lm_head.output.save()
        assert tracer.mask.shape == (1, 9) and bool(tracer.mask.all())
        assert tracer.lengths == (9,)


def test_without_tokens_there_is_no_mask():
    model = weft.Model(torch.nn.Linear(2, 2))
    with model.trace(torch.ones(1, 2)) as tracer:
        model.output.save()
        assert tracer.lengths is None
        with pytest.raises(WeftError):
            tracer.mask


def test_the_users_tensors_are_not_changed(llama):
    ids, mask = llama.ids.clone(), torch.ones_like(llama.ids)
    mask[0, :2] = 0
    kept = ids.clone(), mask.clone()
    with llama.model.trace(input_ids=ids, attention_mask=mask):
        llama.model.model.embed_tokens.input[:] = 3
        llama.model.lm_head.output.save()
    bitwise([ids, mask], list(kept))


def test_ids_beyond_the_vocabulary_are_refused(llama):
    with pytest.raises((InputError, IndexError)), llama.model.trace([[5, 99_999]]):
        llama.model.lm_head.output.save()


def test_a_text_on_the_tiny_model_means_something(tiny):
    with tiny.model.trace("The capital of France is"):
        best = tiny.model.lm_head.output[0, -1].argmax().save()
    assert tiny.tokenizer.decode([int(best)]).strip() == "Paris"
