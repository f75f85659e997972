"""Each way to give a prompt gives the same ids, and each wrong way says what is wrong."""

import collections

import numpy as np
import pytest
import torch

from tests.families import zoo
from weft.errors import InputError
from weft.families.forward import language_facts
from weft.families.prepare import prepare_language

ROW = [1, 5, 6, 7]
ROWS = [[1, 5, 6, 7], [1, 8]]
PADDED = [[1, 5, 6, 7], [2, 2, 1, 8]]
TEXTS = ["w5 w6 w7", "w8"]
CHAT = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w5 w6"}]


@pytest.fixture(scope="module")
def facts():
    net = zoo.build("llama")
    return language_facts(net.config, type(net))


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.tokenizer()


def ids(call):
    return call.kwargs["input_ids"].tolist()


def by_name(pairs):
    return [pytest.param(given, id=name) for name, given in pairs]


def one_of_each():
    yield "text", "w5 w6 w7"
    yield "texts", ["w5 w6 w7"]
    yield "tuple of texts", ("w5 w6 w7",)
    yield "ints", ROW
    yield "tuple of ints", tuple(ROW)
    yield "numpy ints", [np.int64(i) for i in ROW]
    yield "scalar tensors", list(torch.tensor(ROW))
    yield "rows", [ROW]
    yield "tensor row", torch.tensor(ROW)
    yield "tensor", torch.tensor([ROW])
    yield "int32 tensor", torch.tensor([ROW], dtype=torch.int32)
    yield "list of tensors", [torch.tensor(ROW)]
    yield "array row", np.array(ROW)
    yield "array", np.array([ROW], dtype=np.uint16)
    yield "list of arrays", [np.array(ROW)]
    yield "dict", {"input_ids": torch.tensor([ROW])}
    yield "dict of lists", {"input_ids": [ROW], "attention_mask": [[1] * 4]}
    yield "dict of a text", {"input_ids": "w5 w6 w7"}


@pytest.mark.parametrize("given", by_name(one_of_each()))
def test_every_kind_of_one_prompt_gives_the_same_call(given, facts, tokenizer):
    call = prepare_language(given, tokenizer, facts)
    assert ids(call) == [ROW]
    assert call.kwargs["input_ids"].dtype is torch.int64
    assert call.kwargs.keys() == {"input_ids", "use_cache"}
    assert (call.args, call.mask, call.lengths, call.batch, call.length) == ((), None, (4,), 1, 4)


def several_of_each():
    yield "texts", TEXTS
    yield "rows", ROWS
    yield "list of tensors", [torch.tensor(row) for row in ROWS]
    yield "list of arrays", [np.array(row) for row in ROWS]
    yield "mixed rows", [ROWS[0], torch.tensor(ROWS[1])]
    yield "dict of rows", {"input_ids": ROWS}
    yield "dict with ragged mask", {"input_ids": ROWS, "attention_mask": [[1] * 4, [1] * 2]}
    yield "padded dict", {"input_ids": PADDED, "attention_mask": [[1] * 4, [0, 0, 1, 1]]}
    yield "what a tokenizer returns", zoo.tokenizer()(TEXTS)
    yield (
        "padded by a tokenizer",
        zoo.tokenizer(pad_token="</s>", padding_side="left")(
            TEXTS, padding=True, return_tensors="pt"
        ),
    )


@pytest.mark.parametrize("given", by_name(several_of_each()))
def test_every_kind_of_a_batch_gives_the_same_call(given, facts, tokenizer):
    call = prepare_language(given, tokenizer, facts)
    assert ids(call) == PADDED
    assert call.kwargs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert call.kwargs["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert call.mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert (call.lengths, call.batch, call.length) == ((4, 2), 2, 4)


@pytest.mark.parametrize("text", ["w5", "w5 w99 nothing", "", "  w7 "])
def test_text_is_tokenized_as_the_tokenizer_does(text, facts, tokenizer):
    assert ids(prepare_language(text, tokenizer, facts)) == [tokenizer(text)["input_ids"]]
    several = prepare_language([text, "w5 w6 w7 w8 w9"], tokenizer, facts)
    assert several.kwargs["input_ids"][0][several.mask[0]].tolist() == tokenizer(text)["input_ids"]


def test_chats_go_through_the_template_up_to_where_the_assistant_speaks(facts, tokenizer):
    system, user, assistant = 125, 126, 127
    first = [system, 9, user, 5, 6, assistant]  # no <s>: a template says itself what it wants
    assert ids(prepare_language(CHAT, tokenizer, facts)) == [first]
    second = [{"role": "user", "content": "w7"}]
    call = prepare_language([CHAT, second], tokenizer, facts)
    assert ids(call) == [first, [2, 2, 2, user, 7, assistant]]
    assert call.lengths == (6, 3)


def test_a_mask_by_keyword_joins_a_prompt(facts):
    call = prepare_language([[5, 6, 7]], None, facts, tensors={"attention_mask": [[0, 1, 1]]})
    assert call.mask.tolist() == [[False, True, True]]
    assert call.kwargs["position_ids"].tolist() == [[0, 0, 1]]


def test_positions_by_keyword_are_taken_as_they_are(facts):
    tensors = {"attention_mask": [[0, 1, 1]], "position_ids": [3, 4, 5]}
    call = prepare_language([[5, 6, 7]], None, facts, tensors=tensors)
    assert call.kwargs["position_ids"].tolist() == [[3, 4, 5]]


def test_token_types_of_zero_are_dropped_by_a_model_that_has_none(facts):
    call = prepare_language({"input_ids": [ROW], "token_type_ids": [[0] * 4]}, None, facts)
    assert call.kwargs.keys() == {"input_ids", "use_cache"}
    with pytest.raises(InputError, match="take no token_type_ids"):
        prepare_language({"input_ids": [ROW], "token_type_ids": [[0, 0, 1, 1]]}, None, facts)
    net = zoo.build("gpt2")
    with_types = language_facts(net.config, type(net))
    call = prepare_language({"input_ids": [ROW], "token_type_ids": [0, 0, 1, 1]}, None, with_types)
    assert call.kwargs["token_type_ids"].tolist() == [[0, 0, 1, 1]]


def test_embeddings_take_the_place_of_tokens(facts):
    embeds = torch.randn(2, 5, 32)
    call = prepare_language(None, None, facts, tensors={"inputs_embeds": embeds})
    assert torch.equal(call.kwargs["inputs_embeds"], embeds)
    assert (call.lengths, call.batch, call.length) == ((5, 5), 2, 5)
    assert prepare_language({"inputs_embeds": embeds[0]}, None, facts).batch == 1


def test_the_users_tensors_are_neither_changed_nor_shared(facts):
    given = {
        "input_ids": torch.tensor(PADDED),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]]),
    }
    before = {name: tensor.clone() for name, tensor in given.items()}
    call = prepare_language(given, None, facts)
    for name in given:
        call.kwargs[name].add_(1)
        assert torch.equal(given[name], before[name])
    for one in (torch.tensor([ROW]), torch.tensor(ROW), np.array(ROW)):
        prepare_language(one, None, facts).kwargs["input_ids"].zero_()
        assert one.reshape(-1).tolist() == ROW
    embeds = torch.randn(1, 3, 32, requires_grad=True)
    made = prepare_language(None, None, facts, tensors={"inputs_embeds": embeds})
    assert made.kwargs["inputs_embeds"].data_ptr() != embeds.data_ptr()
    made.kwargs["inputs_embeds"].sum().backward()  # a copy that gradients go through
    assert embeds.grad is not None


# --- refusals ------------------------------------------------------------------------------------

Wrong = collections.namedtuple("Wrong", "given message")
WRONG = {
    "nothing": Wrong(None, "once, as tokens or as inputs_embeds"),
    "a number": Wrong(3, "cannot make a prompt of int 3.*give a text"),
    "an object": Wrong(object(), "cannot make a prompt of a object"),
    "no rows": Wrong([], "empty: no row"),
    "an empty row": Wrong([ROW, []], "row 1 has no tokens"),
    "an empty tensor": Wrong(torch.zeros(1, 0, dtype=torch.int64), r"empty.*\[1, 0\]"),
    "floats": Wrong(torch.tensor([[1.0]]), "whole numbers.*float32"),
    "bools": Wrong(torch.tensor([[True]]), "whole numbers.*bool"),
    "float array": Wrong(np.array([[1.0]]), "whole numbers.*float64"),
    "a scalar": Wrong(torch.tensor(3), r"\[pos\] or \[batch, pos\], not \[\]"),
    "three dimensions": Wrong(torch.zeros(1, 1, 1).long(), r"not \[1, 1, 1\]"),
    "ragged nesting": Wrong([[1, [2]], [3, 4]], "row of token ids holds a list"),
    "rows and ids": Wrong([[1, 2], 3], "list of rows holds int 3 at index 1"),
    "ids and rows": Wrong([3, [1, 2]], "row of token ids holds a list"),
    "texts and ids": Wrong(["w5", 3], "list of texts holds int 3 at index 1"),
    "floats in a list": Wrong([1, 2.5], "row of token ids holds float 2.5"),
    "bools in a list": Wrong([True, False], "row of token ids holds bool True"),
    "None in a list": Wrong([None], "row of token ids holds a NoneType"),
    "rows of rows": Wrong([torch.tensor([ROW])], r"row of a list is \[pos\], not \[1, 4\]"),
    "too large a number": Wrong([[2**70]], "do not fit"),
    "a negative id": Wrong([[5, -1]], "token id -1 at row 0, position 1"),
    "an id too high": Wrong([[5, 6], [7, 128]], "token id 128 at row 1, position 1.*128"),
    "an id too high in a tensor": Wrong(torch.tensor([[128]]), "outside the vocabulary of 128"),
    "one message": Wrong(CHAT[0], "a chat is a list of messages"),
    "a message without role": Wrong([{"content": "w5"}], "message 0.*role and content"),
    "a message without text": Wrong([CHAT[0], {"role": "user"}], "message 1"),
    "chats and texts": Wrong([CHAT, "w5"], "list of chats holds str 'w5' at index 1"),
    "unknown names": Wrong({"input_ids": ROW, "labels": ROW}, "unknown input labels.*input_ids"),
    "a mask only": Wrong({"attention_mask": [[1]]}, "once, as tokens or as inputs_embeds"),
    "tokens twice": Wrong(
        {"input_ids": ROW, "inputs_embeds": torch.zeros(1, 4, 32)}, "give the prompt once"
    ),
    "a short mask": Wrong({"input_ids": [ROW], "attention_mask": [[1]]}, r"is \[1, 1\]"),
    "a 4-D mask": Wrong(
        {"input_ids": [ROW], "attention_mask": torch.ones(1, 1, 4, 4)}, "masks of more dimensions"
    ),
    "a mask of twos": Wrong({"input_ids": [ROW], "attention_mask": [[1, 2, 1, 1]]}, "0 and 1"),
    "a mask of halves": Wrong({"input_ids": [ROW], "attention_mask": [[0.5] * 4]}, "0 and 1"),
    "a row all masked": Wrong(
        {"input_ids": PADDED, "attention_mask": [[1] * 4, [0] * 4]}, "row 1 is all mask"
    ),
    "a mask of other rows": Wrong(
        {"input_ids": ROWS, "attention_mask": [[1] * 4, [1] * 4]}, "rows of 4, 2 tokens"
    ),
    "a mask of strings": Wrong({"input_ids": [ROW], "attention_mask": "1111"}, "not a tensor"),
    "short positions": Wrong({"input_ids": [ROW], "position_ids": [[0, 1]]}, r"is \[1, 2\]"),
    "float positions": Wrong({"input_ids": [ROW], "position_ids": [[0.5] * 4]}, "whole numbers"),
    "negative positions": Wrong({"input_ids": [ROW], "position_ids": [[-1, 0, 1, 2]]}, "negative"),
    "flat embeddings": Wrong({"inputs_embeds": torch.zeros(32)}, r"\[batch, pos, d_model\]"),
    "whole embeddings": Wrong({"inputs_embeds": torch.zeros(1, 4, 32).long()}, "floating-point"),
    "no embeddings": Wrong({"inputs_embeds": torch.zeros(1, 0, 32)}, "not \\[1, 0, 32\\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_prompt_says_what_is_wrong(name, facts, tokenizer):
    given, message = WRONG[name]
    with pytest.raises(InputError, match=f"(?s){message}"):
        prepare_language(given, tokenizer, facts)


def test_text_without_a_tokenizer_names_the_way_out(facts):
    for given in ("w5", ["w5"], CHAT):
        with pytest.raises(InputError, match=r"no tokenizer\n.*fix: LanguageModel\(\.\.\., tok"):
            prepare_language(given, None, facts)


def test_chats_without_a_template_name_the_way_out(facts):
    with pytest.raises(InputError, match=r"no chat template\n.*fix: give the prompt as one text"):
        prepare_language(CHAT, zoo.tokenizer(chat=False), facts)


def test_a_text_of_no_tokens_is_empty(facts):
    with pytest.raises(InputError, match="row 0 has no tokens"):
        prepare_language("", zoo.tokenizer(bos=False), facts)


def test_a_prompt_given_twice(facts):
    with pytest.raises(InputError, match="input_ids given twice"):
        prepare_language([ROW], None, facts, tensors={"input_ids": [ROW]})


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
def test_a_prompt_longer_than_the_table_of_positions(name):
    size = {"gptj": {"n_positions": zoo.POSITIONS}}.get(name, {})
    net = zoo.build(name, **size)
    facts = language_facts(net.config, type(net))
    (row,) = zoo.tokens(zoo.POSITIONS + 1)
    net(**prepare_language(row[1:], None, facts).kwargs)
    padded = prepare_language([row[1:], row[:3]], None, facts)
    net(**padded.kwargs)
    with pytest.raises(InputError, match="the prompt has 65 positions, this model has 64"):
        prepare_language(row, None, facts)
    with pytest.raises((IndexError, RuntimeError)):  # what it would have been
        net(torch.tensor([row]))
    far = {"position_ids": [0, 64]}
    with pytest.raises(InputError, match="the prompt has 65 positions"):
        prepare_language([5, 6], None, facts, tensors=far)


def test_bloom_takes_no_positions():
    net = zoo.build("bloom")
    facts = language_facts(net.config, type(net))
    assert "position_ids" not in prepare_language(ROWS, None, facts).kwargs
    with pytest.raises(InputError, match="'bloom' take no position_ids"):
        prepare_language([ROW], None, facts, tensors={"position_ids": [0, 1, 2, 3]})


def test_a_call_moves_to_a_device(facts):
    call = prepare_language(ROWS, None, facts)
    assert call.to("cpu") is call
    moved = call.to("meta")
    assert moved.kwargs["input_ids"].is_meta
    assert moved.mask.is_meta
    assert moved.kwargs["use_cache"] is False
    assert (moved.lengths, moved.batch) == (call.lengths, call.batch)
