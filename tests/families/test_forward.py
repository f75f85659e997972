"""Options of a forward are a closed set: none is unknown, none is ignored."""

import pytest
import torch
from torch import nn

from tests.families import zoo
from weft.errors import InputError, UnknownOptionError
from weft.families.forward import (
    DEFAULT_OPTIONS,
    ForwardOptions,
    forward_keywords,
    language_facts,
    split_keywords,
)
from weft.families.prepare import prepare_language


def facts_of(net):
    return language_facts(net.config, type(net))


@pytest.fixture(scope="module")
def facts():
    return facts_of(zoo.build("llama"))


def test_the_default_asks_for_no_cache_and_nothing_else(facts):
    assert forward_keywords(DEFAULT_OPTIONS, facts) == {"use_cache": False}
    assert split_keywords({}, facts) == (DEFAULT_OPTIONS, {})


def test_keywords_are_options_or_tensors(facts):
    given = {"logits_to_keep": 2, "attention_mask": [[1]], "output_hidden_states": True}
    options, tensors = split_keywords(given, facts)
    assert options == ForwardOptions(logits_to_keep=2, output_hidden_states=True)
    assert tensors == {"attention_mask": [[1]]}
    assert forward_keywords(options, facts) == {
        "use_cache": False,
        "logits_to_keep": 2,
        "output_hidden_states": True,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"use_cahce": True},
            "option 'use_cahce'; valid: use_cache.*did you mean use_cache",
        ),
        ({"labels": 1}, r"unknown option 'labels'.*fix: compute the loss in the block"),
        ({"max_new_tokens": 3}, "model.generate"),
        ({"past_key_values": None}, "whole prompt"),
        ({"return_dict": False}, "named fields"),
        ({"zzz": 1}, "valid: use_cache, output_hidden_states, .*inputs_embeds"),
        ({"use_cache": 1}, "use_cache is True or False, not 1"),
        ({"output_hidden_states": "yes"}, "True or False, not 'yes'"),
        ({"logits_to_keep": -1}, "0 or more, not -1"),
        ({"logits_to_keep": True}, "0 or more, not True"),
        ({"logits_to_keep": 1.5}, "0 or more, not 1.5"),
        ({"output_router_logits": True}, "type 'llama' does not take it"),
        ({"output_attentions": True}, "'sdpa' attention never has the patterns.*fix: .*eager"),
    ],
)
def test_an_option_that_would_be_ignored_raises(given, message, facts):
    with pytest.raises(UnknownOptionError, match=f"(?s){message}"):
        split_keywords(given, facts)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_option_that_is_taken_has_its_effect(name):
    net = zoo.build(name, attn_implementation="eager")
    facts, row = facts_of(net), zoo.tokens(7)
    given = {
        "use_cache": True,
        "output_hidden_states": True,
        "output_attentions": True,
        "logits_to_keep": 2,
    }
    if name in zoo.EXPERT_FAMILIES:
        given["output_router_logits"] = True
    options, _ = split_keywords(given, facts)
    call = prepare_language(row, None, facts, options=options)
    with torch.no_grad():
        result = net(**call.kwargs)
        plain = net(torch.tensor(row)).logits
    assert torch.allclose(result.logits, plain[:, -2:], atol=1e-5)
    assert result.logits.shape[1] == 2
    assert len(result.hidden_states) == zoo.LAYERS + 1
    assert len(result.attentions) == zoo.LAYERS
    assert result.past_key_values.get_seq_length() == 7
    if name in zoo.EXPERT_FAMILIES:
        assert len(result.router_logits) == zoo.LAYERS


def test_attention_patterns_follow_a_switch_on_the_live_model():
    net = zoo.build("llama")
    facts = facts_of(net)
    wants = {"output_attentions": True}
    with pytest.raises(UnknownOptionError, match="sdpa"):
        split_keywords(wants, facts)
    net.set_attn_implementation("eager")
    split_keywords(wants, facts)


def test_a_model_without_tokens_is_no_language_model():
    class Pictures(nn.Module):
        def forward(self, pixels):
            return pixels

    with pytest.raises(InputError, match=r"Pictures is not a language model.*\n.*weft\.Model"):
        language_facts(zoo.config("llama"), Pictures)
