"""The shipped tiny model is what its page says: measured again on prompts it was not trained on."""

import subprocess
import sys
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.testing import corpus, tiny_path
from weft.testing.evaluate import (
    Scores,
    answer_by_layer,
    evaluate,
    next_token_logits,
    token_ids,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_path()).eval()


@pytest.fixture(scope="module")
def scores(model, tokenizer) -> Scores:
    return evaluate(model, tokenizer, n=400, seed=20)


# --- the folder ----------------------------------------------------------------------------------


def test_folder_is_small_and_holds_no_pickle():
    files = list(Path(tiny_path()).iterdir())
    assert sum(file.stat().st_size for file in files) < 5_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja"}


def test_finding_the_folder_imports_neither_torch_nor_transformers():
    code = (
        "import sys, weft.testing, weft.testing.corpus; weft.testing.tiny_path();"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_loads_in_single_precision_with_the_stated_shape(model):
    assert model.dtype == torch.float32
    config = model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 4, 128)
    assert (config.num_attention_heads, config.intermediate_size) == (4, 384)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


# --- the corpus and its tokenizer ----------------------------------------------------------------


def test_same_seed_same_text():
    assert _rows(3) == _rows(3)
    assert _rows(3) != _rows(4)
    assert corpus.ioi_pairs(20, seed=1) == corpus.ioi_pairs(20, seed=1)
    assert corpus.ioi_pairs(20, seed=1) != corpus.ioi_pairs(20, seed=2)
    assert corpus.induction_sequences(3, seed=1) != corpus.induction_sequences(3, seed=2)


def test_text_does_not_depend_on_the_hash_seed():
    code = "from weft.testing import corpus as c; print(next(c.rows(5)), c.ioi_pairs(9, 5))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_vocabulary_is_the_tokenizers_and_all_of_it_occurs(tokenizer):
    vocabulary = corpus.vocabulary()
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(vocabulary)}
    said = set(chain.from_iterable(_rows(0, 3000)))
    assert said == set(vocabulary) - {corpus.PAD, corpus.UNK}


def test_rows_are_full():
    assert {len(row) for row in _rows(1)} == {48}


def test_tokenizer_cuts_as_the_corpus_does_and_knows_every_word(tokenizer):
    for row in _rows(6):
        text = "".join(word if word in corpus.SPECIAL else f" {word}" for word in row)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == row
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        "One day, when Mary and John went to the store, John gave a small, red book to Mary.",
        "three plus four equals seven.",
        "What is the capital of Egypt?",
    ],
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *corpus.split(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_names_and_answers_are_single_tokens(tokenizer):
    answers = [prompt.answer for prompt in (*corpus.facts(), *corpus.sums())]
    assert len(token_ids(tokenizer, [*corpus.NAMES, *answers])) == 24 + len(answers)


def test_an_answer_of_two_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="one known token, but 'New York'"):
        token_ids(tokenizer, ["New York"])


def test_ioi_pairs_differ_in_the_second_subject_only(tokenizer):
    for pair in corpus.ioi_pairs(200, seed=8):
        clean, corrupt = tokenizer.tokenize(pair.clean), tokenizer.tokenize(pair.corrupt)
        changed = [(a, b) for a, b in zip(clean, corrupt, strict=True) if a != b]
        assert changed == [(pair.wrong, pair.answer)]
        assert clean[-1] == "to"


# --- what it has learnt --------------------------------------------------------------------------


def test_indirect_objects(scores):
    assert scores.ioi_accuracy >= 0.9
    assert scores.ioi_logit_difference > 2


def test_induction(scores):
    assert scores.induction_second_half < 0.1
    assert scores.induction_first_half > 3  # random syllables cannot be guessed


def test_recall_and_agreement(scores):
    assert scores.facts >= 0.95
    assert scores.two_hop_facts >= 0.95
    assert scores.sums >= 0.95
    assert scores.agreement >= 0.95


def test_padding_does_not_change_the_answer(model, tokenizer):
    short, long = "The capital of France is", "The capital of the country of Petra is"
    together = next_token_logits(model, tokenizer, [short, long])
    alone = next_token_logits(model, tokenizer, [short])
    torch.testing.assert_close(together[:1], alone, atol=1e-3, rtol=1e-3)


def test_says_a_sentence_and_stops(model, tokenizer):
    batch = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(said[0]) == "<bos> The capital of France is Paris. <eos>"


def test_answers_a_chat(model, tokenizer):
    chat = [{"role": "user", "content": "What is the capital of Japan?"}]
    batch = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(said[0, batch["input_ids"].shape[1] :]) == "Tokyo. <eos>"


# --- what there is to see ------------------------------------------------------------------------


def test_answers_arise_over_the_layers(model, tokenizer):
    prompts = [*corpus.facts(), *corpus.two_hop_facts(), *corpus.sums()]
    lens = torch.tensor([answer_by_layer(model, tokenizer, prompt) for prompt in prompts])
    assert lens[:, 0].mean() < 0.3
    assert lens[:, 2].mean() < 0.5
    assert lens[:, -1].mean() > 0.9


def test_patching_moves_from_the_second_subject_to_the_end(model, tokenizer):
    pairs = corpus.ioi_pairs(60, seed=9)
    recovered = torch.stack([_recovered(model, tokenizer, pair) for pair in pairs]).mean(0)
    subject, end = recovered.unbind(-1)  # [layer] each
    assert subject[0] > 0.7 and end[0] < 0.2
    assert subject[1] > 0.7 and end[1] < 0.2
    assert subject[2] < 0.2 and end[2] > 0.7


@torch.no_grad()
def _recovered(model, tokenizer, pair: corpus.IoiPair) -> Tensor:
    """`[layer, 2]`: the share of the logit difference that one residual vector brings back.

    The residual of the clean run after a layer, put into the corrupted run at the second subject
    and at the last position.
    """
    clean = tokenizer(pair.clean, return_tensors="pt")["input_ids"]
    corrupt = tokenizer(pair.corrupt, return_tensors="pt")["input_ids"]
    answer, wrong = token_ids(tokenizer, [pair.answer, pair.wrong])
    places = ((clean != corrupt).nonzero()[0, 1].item(), -1)

    def difference(logits: Tensor) -> Tensor:
        return logits[0, -1, answer] - logits[0, -1, wrong]

    best, worst = difference(model(clean).logits), difference(model(corrupt).logits)
    patched = [
        [difference(_patched_logits(model, layer, place, clean, corrupt)) for place in places]
        for layer in model.model.layers
    ]
    return (torch.tensor(patched) - worst) / (best - worst)


def _patched_logits(model, layer, place: int, clean: Tensor, corrupt: Tensor) -> Tensor:
    """Logits of the corrupted run with one vector of the clean run: `[1, pos, vocab]`."""

    # Both prompts in one batch: the hook copies from row 0 into row 1.
    def patch(_module, _inputs, output: Tensor) -> Tensor:
        output = output.clone()
        output[1, place] = output[0, place]
        return output

    hook = layer.register_forward_hook(patch)
    try:
        return model(torch.cat([clean, corrupt])).logits[1:]
    finally:
        hook.remove()


def _rows(seed: int, n: int = 50) -> list[list[str]]:
    return list(islice(corpus.rows(seed), n))
