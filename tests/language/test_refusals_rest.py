"""Refusals that no test of a capability brings about: what is said, and the way out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import weft
from tests.families import zoo
from weft.client.travel import chosen_how, frame_of, pack_inputs
from weft.errors import InputError, TravelError, UnknownOptionError, WeftError
from weft.families.forward import language_facts
from weft.families.prepare import prepare_language
from weft.families.sampling import Sampling

GREEDY = {"max_new_tokens": 2, "do_sample": False}
IDS = torch.tensor(zoo.tokens(5, seed=3))


@pytest.fixture(scope="module")
def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=zoo.VOCAB, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_position_embeddings=12, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("answer", "says"),
    [([[5] * 13], "the answer has 13 positions, this model has 12"), ("x", "is not a tensor")],
)
def test_an_answer_that_is_none(bart: nn.Module, answer: Any, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        weft.LanguageModel(bart).generate(IDS, decoder_input_ids=answer, **GREEDY)
    assert caught.value.fix is not None


def test_another_method_of_a_served_model(gpt2: Any, place: Any) -> None:
    here = str(place) == "here"
    says = "is no method" if here else "runs its forward and no other method"
    with pytest.raises(UnknownOptionError, match=says), gpt2.model.trace(gpt2.ids, fn="encode"):
        pass


def test_a_generation_from_embeddings_of_a_served_model(gpt2: Any, place: Any) -> None:
    embeds = torch.randn(1, 3, 32)
    if str(place) == "here":
        with gpt2.model.generate(inputs_embeds=embeds, **GREEDY) as tracer:
            ids = tracer.result.save()
        assert ids.shape == (1, 2)
        return
    with gpt2.model.generate(torch.ones(1, 3, dtype=torch.long), **GREEDY) as tracer:
        tracer.result.save()  # what ids of this shape look like is known from here on
    with (
        pytest.raises(InputError, match="only where the model is") as caught,
        gpt2.model.generate(inputs_embeds=embeds, **GREEDY) as tracer,
    ):
        tracer.result.save()
    assert "remote=False" in str(caught.value)


def test_the_whole_batch_of_embeddings(gpt2: Any) -> None:
    with (
        pytest.raises(InputError, match="one of the invokes has embeddings"),
        gpt2.model.trace() as tracer,
    ):
        with tracer.invoke(IDS):
            gpt2.model.lm_head.output.save()
        with tracer.invoke(inputs_embeds=torch.randn(1, 3, 32)):
            gpt2.model.lm_head.output.save()
        with tracer.invoke():
            gpt2.model.lm_head.output.save()


def test_an_operation_without_tensors_has_no_input(gpt2: Any) -> None:
    attention = gpt2.layer_list[0].attn.source
    with (
        pytest.raises(WeftError, match="has no tensor among its inputs") as caught,
        gpt2.model.trace(gpt2.ids),
    ):
        _ = attention.ALL_ATTENTION_FUNCTIONS_get_interface_0.input
    assert "use .inputs" in str(caught.value)


def test_a_module_without_a_configuration() -> None:
    with pytest.raises(InputError, match="no transformers configuration") as caught:
        weft.LanguageModel(nn.Linear(2, 2))
    assert "weft.Model(net)" in str(caught.value)


def test_an_encoder_without_a_decoder_of_ids() -> None:
    class Odd(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    config = SimpleNamespace(is_encoder_decoder=True, vocab_size=9, model_type="odd")
    with pytest.raises(InputError, match="Odd has no decoder to which token ids can be given"):
        language_facts(config, Odd)


def test_embeddings_for_a_model_that_takes_none(gpt2: Any) -> None:
    facts = language_facts(gpt2.net.config, type(gpt2.net))
    facts = replace(facts, takes=facts.takes - {"inputs_embeds"})
    with pytest.raises(InputError, match="models of type 'gpt2' take no inputs_embeds"):
        prepare_language(None, None, facts, tensors={"inputs_embeds": torch.randn(1, 3, 32)})


def test_what_does_not_travel() -> None:
    with pytest.raises(TravelError, match=r"a constant does not travel .* a meta tensor"):
        frame_of(torch.empty(2, device="meta"), "a constant")
    with pytest.raises(TravelError, match=r"x does not travel .*sparse"):
        frame_of(torch.eye(2).to_sparse(), "x")
    with pytest.raises(TravelError, match="the option 'odd' does not travel"):
        pack_inputs("language", (), {"input_ids": IDS, "odd": 1})
    sampling = Sampling(temperature="hot")  # type: ignore[arg-type]
    with pytest.raises(TravelError, match="an option of the generation does not travel"):
        chosen_how(sampling)
