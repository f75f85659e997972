"""Tokenizers as data: the ids and texts a client gets are those of the model's own tokenizer."""

from __future__ import annotations

import pytest
import torch

from tests.families import zoo
from weft.engine.speaker import Speaker
from weft.engine.speaking import tokenizer_card, tokens_of
from weft.errors import InputError, MessageError, UnknownOptionError
from weft.families.prepare import prepare_language
from weft.families.tokens import read_tokens
from weft.testing import tiny_path
from weft.wire.messages import TokenizerCard, Tokens, TokensQuery, decode, encode

TEXTS = ["The Eiffel Tower is in", "", " two  spaces", "Paris <eos> <pad>", "日本 🙂", "a\nb\tc"]


def tiny():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_path())


class Slow:
    """A tokenizer of somebody's own, in plain Python."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        one = [([1] if add_special_tokens else []) + [ord(c) % 90 for c in t] for t in [text]]
        return {"input_ids": one[0]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(65 + i % 26) for i in ids if not (skip_special_tokens and i == 1))


def speaker_of(tokenizer):
    """A client's tokenizer, and the questions that it asks."""
    asked = []

    def ask(query):
        asked.append(query)
        found = tokens_of(tokenizer, decode(encode(query), TokensQuery))
        return decode(encode(found), Tokens)

    card = decode(encode(tokenizer_card(tokenizer)), TokenizerCard)
    return Speaker("m", card, ask), asked


@pytest.mark.parametrize("make", [tiny, zoo.tokenizer])
def test_ids_and_texts_are_the_same_and_nothing_is_asked(make):
    mine = make()
    speaker, asked = speaker_of(mine)
    for special in (True, False):
        for text in TEXTS:
            ids = mine(text, add_special_tokens=special)["input_ids"]
            assert speaker(text, add_special_tokens=special)["input_ids"] == ids
            assert speaker.encode(text, add_special_tokens=special) == ids
            assert speaker.decode(ids) == mine.decode(ids)
            assert speaker.decode(torch.tensor(ids), True) == mine.decode(ids, True)
    assert speaker(TEXTS).input_ids == mine(TEXTS)["input_ids"]
    assert asked == []


def test_marks_and_vocabulary_are_the_models():
    mine = tiny()
    speaker, _ = speaker_of(mine)
    for name in ("bos", "eos", "unk", "pad", "mask"):
        assert getattr(speaker, f"{name}_token") == getattr(mine, f"{name}_token")
        assert getattr(speaker, f"{name}_token_id") == getattr(mine, f"{name}_token_id")
    assert speaker.get_vocab() == mine.get_vocab()
    assert len(speaker) == len(mine)
    assert speaker.convert_ids_to_tokens([5, 6]) == mine.convert_ids_to_tokens([5, 6])
    assert speaker.convert_tokens_to_ids("the") == mine.convert_tokens_to_ids("the")


def test_chats_are_rendered_by_the_server():
    mine = tiny()
    speaker, asked = speaker_of(mine)
    chat = [{"role": "user", "content": "what is two plus two"}]
    assert read_tokens(chat, speaker) == read_tokens(chat, mine)
    assert len(asked) == 1
    assert speaker.apply_chat_template(chat) == mine.apply_chat_template(
        chat, tokenize=True, return_dict=False
    )


def test_a_tokenizer_without_a_file_is_asked():
    speaker, asked = speaker_of(Slow())
    assert speaker("abc")["input_ids"] == Slow()("abc")["input_ids"]
    assert speaker(["a", "bc"]).input_ids == [Slow()("a")["input_ids"], Slow()("bc")["input_ids"]]
    assert speaker.encode("abc", add_special_tokens=False) == [7, 8, 9]
    assert speaker.batch_decode([[1, 2], [3]], True) == ["C", "D"]
    assert len(asked) == 4
    with pytest.raises(InputError, match="on the server only"):
        speaker.get_vocab()


def test_a_file_that_gives_other_ids_is_not_told():
    mine = tiny()
    original = type(mine).__call__
    odd = type("Odd", (type(mine),), {"__module__": "transformers.odd"})
    odd.__call__ = lambda self, text, **options: {  # type: ignore[method-assign]
        "input_ids": original(self, text, **options)["input_ids"][::-1]
    }
    mine.__class__ = odd
    card = tokenizer_card(mine)
    assert card is not None
    assert card.json is None
    assert not card.decodes


def test_a_class_of_somebody_elses_is_asked_even_if_its_file_agrees():
    mine = tiny()
    mine.__class__ = type("Mine", (type(mine),), {"__module__": "somebody"})
    card = tokenizer_card(mine)
    assert card is not None
    assert card.json is None


def test_prompts_become_the_same_call():
    mine = zoo.tokenizer()
    speaker, _ = speaker_of(mine)
    net = zoo.build("llama")
    from weft.families.forward import language_facts

    facts = language_facts(net.config, type(net))
    prompts = ["a b c", "a much longer prompt of some words"]
    one = prepare_language(prompts, mine, facts)
    other = prepare_language(prompts, speaker, facts)
    assert one.kwargs.keys() == other.kwargs.keys()
    for name, tensor in one.kwargs.items():
        same = torch.equal(tensor, other.kwargs[name]) if name != "use_cache" else True
        assert same, name


def test_options_that_it_has_not_got_raise():
    speaker, _ = speaker_of(tiny())
    with pytest.raises(UnknownOptionError, match="padding"):
        speaker("a", padding=True)
    with pytest.raises(UnknownOptionError, match="return_tensors"):
        speaker("a", return_tensors="tf")
    with pytest.raises(InputError, match="different lengths"):
        speaker(["the", "the the the"], return_tensors="pt")
    with pytest.raises(InputError, match="takes text"):
        speaker([1, 2])
    assert speaker("the the", return_tensors="pt").input_ids.shape[0] == 1


def test_questions_that_cannot_be_answered_say_why():
    with pytest.raises(InputError, match="no tokenizer"):
        tokens_of(None, TokensQuery(model="m", texts=("a",)))
    with pytest.raises(InputError, match="chat template"):
        mine = tiny()
        mine.chat_template = None
        speaker, _ = speaker_of(mine)
        read_tokens([{"role": "user", "content": "x"}], speaker)


def test_a_server_that_answers_too_little_or_sends_no_tokenizer():
    silent = Speaker("m", TokenizerCard(), lambda query: Tokens(rows=()))
    with pytest.raises(MessageError, match="0 answers to 1"):
        silent("a")
    with pytest.raises(MessageError, match="cannot be read"):
        Speaker("m", TokenizerCard(json='{"model": 3}'), lambda query: Tokens(rows=()))
