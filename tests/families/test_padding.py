"""Padding is invisible: a row of a padded batch gives the numbers that it gives alone.

The oracle is the model called by hand on the row's ids, with plain hooks.
"""

import pytest
import torch

from tests.families import zoo
from weft.errors import InputError
from weft.families.forward import PADDING_EXACT, language_facts
from weft.families.prepare import positions_of, prepare_language

BOUND = 1e-5  # of the largest magnitude of the tensor
PADS = (1, 2, 5, 20)


def facts_of(net):
    return language_facts(net.config, type(net))


def watch(name, net, *args, **kwargs):
    """The model by hand: `[embedding, layer outputs..., logits]`, each `[batch, pos, ...]`."""
    paths, seen = zoo.paths(name), []

    def keep(module, inputs, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [
        net.get_submodule(path).register_forward_hook(keep)
        for path in (paths.embedding, *(paths.layer(i) for i in range(zoo.LAYERS)))
    ]
    try:
        with torch.no_grad():
            logits = net(*args, **kwargs).logits
    finally:
        for handle in handles:
            handle.remove()
    return [*seen, logits]


def assert_rows_as_alone(name, net, call, rows):
    together = watch(name, net, *call.args, **call.kwargs)
    assert len(together) == zoo.LAYERS + 2
    for index, row in enumerate(rows):
        alone = watch(name, net, torch.tensor([row]))
        for level, (one, many) in enumerate(zip(alone, together, strict=True)):
            real = many[index][call.mask[index]]
            error = (one[0] - real).abs().max() / one.abs().max()
            assert error < BOUND, f"row {index}, level {level}: {error:.1e}"
    assert all(tensor.isfinite().all() for tensor in together)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_left_padded_rows_equal_the_rows_alone(name, attention):
    try:
        net = zoo.build(name, attn_implementation=attention)
    except ValueError as error:  # some have no sdpa, and say so
        if attention == "eager" or "scaled_dot_product_attention" not in str(error):
            raise
        pytest.skip(str(error))
    rows = zoo.tokens(25, *(25 - pads for pads in PADS))
    call = prepare_language(rows, None, facts_of(net))
    assert call.kwargs["input_ids"].shape == (5, 25)
    assert call.lengths == tuple(map(len, rows))
    assert call.mask[1].tolist() == [False] + [True] * 24
    assert_rows_as_alone(name, net, call, rows)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_right_padding_of_the_users_own_is_kept_and_exact(name):
    net = zoo.build(name)
    rows = zoo.tokens(25, *(25 - pads for pads in PADS))
    ids = torch.tensor([row + [7] * (25 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (25 - len(row)) for row in rows])
    call = prepare_language({"input_ids": ids, "attention_mask": mask}, None, facts_of(net))
    assert torch.equal(call.kwargs["input_ids"], ids)
    assert torch.equal(call.mask, mask.bool())
    assert_rows_as_alone(name, net, call, rows)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_embeddings_with_a_mask_equal_the_rows_alone(name):
    net = zoo.build(name)
    rows = zoo.tokens(12, 7)
    padded = prepare_language(rows, None, facts_of(net))
    paths = zoo.paths(name)
    embeds = net.get_submodule(paths.embedding)(padded.kwargs["input_ids"]).detach()
    tensors = {"inputs_embeds": embeds, "attention_mask": padded.mask}
    call = prepare_language(None, None, facts_of(net), tensors=tensors)
    with torch.no_grad():
        together = net(**call.kwargs).logits
        alone = net(torch.tensor([rows[1]])).logits[0]
    assert (together[1, 5:] - alone).abs().max() < BOUND * alone.abs().max()


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_without_padding_the_call_is_the_one_made_by_hand_to_the_bit(name):
    for dtype in (torch.float32, torch.bfloat16):
        net = zoo.build(name, dtype=dtype)
        for rows in (zoo.tokens(20), zoo.tokens(20, 20, 20)):
            ids = torch.tensor(rows)
            call = prepare_language(rows, None, facts_of(net))
            masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            assert call.kwargs.keys() == {"input_ids", "use_cache"}
            assert call.mask is None
            with torch.no_grad():
                ours = net(**call.kwargs).logits
                # By hand: the default (which fills a cache), and with what a tokenizer returns.
                assert torch.equal(ours, net(ids).logits)
                assert torch.equal(ours, net(**masked).logits)


@pytest.mark.parametrize("name", sorted(set(zoo.FAMILIES) - {"bloom"}))
def test_position_ids_alone_mean_what_they_mean_by_hand(name):
    # Without cache and mask, transformers would read the jump as two packed sequences.
    net = zoo.build(name)
    ids, positions = torch.tensor(zoo.tokens(6)), torch.tensor([[0, 0, 0, 1, 2, 3]])
    call = prepare_language(ids, None, facts_of(net), tensors={"position_ids": positions})
    with torch.no_grad():
        by_hand = net(ids, position_ids=positions).logits
        assert torch.equal(net(**call.kwargs).logits, by_hand)
        assert not torch.allclose(by_hand, net(ids).logits, atol=1e-3)  # they do matter


def test_a_real_token_with_the_id_of_the_pad_is_not_masked():
    net = zoo.build("llama")
    rows = [[0, 5, 0, 7, 0, 0], [9, 0]]
    call = prepare_language(rows, None, facts_of(net))
    assert call.mask.tolist() == [[True] * 6, [False] * 4 + [True] * 2]
    assert_rows_as_alone("llama", net, call, rows)


def test_the_pad_is_the_tokenizers_then_its_end_then_the_models():
    facts = facts_of(zoo.build("llama", pad_token_id=9))
    rows = [[5, 6], [7]]

    def pad(tokenizer):
        return prepare_language(rows, tokenizer, facts).kwargs["input_ids"][1, 0].item()

    assert pad(zoo.tokenizer(pad_token="<pad>")) == 0
    assert pad(zoo.tokenizer()) == 2  # eos
    assert pad(None) == 9
    outside = zoo.tokenizer()
    outside.pad_token_id = zoo.VOCAB  # a pad that was added, and the embedding was not resized
    assert pad(outside) == 2
    assert facts_of(zoo.build("gpt2", pad_token_id=None, eos_token_id=None)).pad == 0


def test_padding_is_left_whatever_the_tokenizer_prefers():
    tokenizer = zoo.tokenizer(bos=False, pad_token="<pad>", padding_side="right")
    call = prepare_language(["w5 w6 w7", "w8"], tokenizer, facts_of(zoo.build("gpt2")))
    assert call.kwargs["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]


def test_positions_count_the_real_tokens_and_stay_inside_a_table():
    left, right, hole = [0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]
    positions = positions_of(torch.tensor([left, right, hole]))
    assert positions.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_padding_that_is_not_verified_is_refused():
    net = zoo.build("llama")
    net.config.model_type = "somebody_elses"
    with pytest.raises(InputError, match=r"padding is not verified .* 'somebody_elses'"):
        prepare_language([[5, 6], [7]], None, facts_of(net))
    prepare_language([[5, 6], [7, 8]], None, facts_of(net))  # nothing is padded
    assert {facts_of(zoo.build(name)).model_type for name in zoo.FAMILIES} <= PADDING_EXACT


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def test_rope_that_follows_the_longest_row_is_refused_where_it_would_differ():
    net = zoo.build("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    long, short = zoo.tokens(20, 6)
    with pytest.raises(InputError, match=r"rows of 6 and 20 tokens .* beyond 16"):
        prepare_language([long, short], None, facts_of(net))
    # Below the limit it is exact.
    rows = [long[:16], short]
    assert_rows_as_alone("phi3", net, prepare_language(rows, None, facts_of(net)), rows)
    # The refusal is no superstition: padded by hand, the short row comes out different.
    call = prepare_language([long, short], None, facts_of(zoo.build("phi3")))
    with torch.no_grad():
        alone = net(torch.tensor([short])).logits[0]
        together = net(**call.kwargs).logits[1, 14:]
    assert (alone - together).abs().max() > 1e-3


def test_dynamic_rope_is_refused_beyond_its_limit():
    net = zoo.build("llama", rope_parameters=DYNAMIC, max_position_embeddings=16)
    with pytest.raises(InputError, match="beyond 16"):
        prepare_language(zoo.tokens(20, 18), None, facts_of(net))
    prepare_language(zoo.tokens(20, 20), None, facts_of(net))
    prepare_language(zoo.tokens(16, 6), None, facts_of(net))
