"""Inputs of a model, as a request carries them, and how a generation chooses its tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from weft.graph.node import Arg

from .base import Ask, Count, TokenId


class LanguageOptions(Ask, frozen=True):
    """Options of one forward pass of a language model: `families.forward.ForwardOptions`."""

    use_cache: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    output_router_logits: bool = False
    logits_to_keep: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0


class LanguageInputs(Ask, frozen=True, tag="language"):
    """Tokens for a language model. `given` names the tensors in the request's `tensors`.

    A mask says which positions are real; position ids only where the user gave them.
    """

    given: Annotated[
        tuple[
            Literal[
                "input_ids",
                "attention_mask",
                "position_ids",
                "inputs_embeds",
                "token_type_ids",
                "decoder_input_ids",
            ],
            ...,
        ],
        Meta(min_length=1, max_length=6),
    ]
    options: LanguageOptions = LanguageOptions()


class PlainInputs(Ask, frozen=True, tag="plain"):
    """Arguments for any other module. `Ref(n)` in them is the tensor `"in.n"` of `tensors`."""

    args: Annotated[tuple[Arg, ...], Meta(max_length=1024)] = ()
    kwargs: Annotated[tuple[tuple[str, Arg], ...], Meta(max_length=1024)] = ()


Inputs = LanguageInputs | PlainInputs


Ids = Annotated[tuple[TokenId, ...], Meta(max_length=4096)]
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]
Part = Annotated[float, Meta(ge=0.0, le=1.0)]
Whole = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Text = Annotated[str, Meta(min_length=1, max_length=256)]


class Generation(Ask, frozen=True):
    """How a generation goes on, and when it ends: `families.sampling.Sampling`, complete.

    Null means that an option is off. `seed` keys the draws of tokens.
    """

    max_new_tokens: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    max_length: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    min_new_tokens: Whole | None = None
    min_length: Whole = 0
    do_sample: bool = False
    temperature: Number | None = 1.0
    top_k: Whole | None = 50
    top_p: Part | None = 1.0
    min_p: Part | None = None
    typical_p: Part | None = 1.0
    epsilon_cutoff: Part | None = 0.0
    eta_cutoff: Part | None = 0.0
    repetition_penalty: Number | None = 1.0
    no_repeat_ngram_size: Whole | None = 0
    bad_words_ids: Annotated[tuple[Ids, ...], Meta(max_length=1024)] | None = None
    suppress_tokens: Ids | None = None
    begin_suppress_tokens: Ids | None = None
    forced_bos_token_id: TokenId | None = None
    forced_eos_token_id: Ids | None = None
    exponential_decay_length_penalty: tuple[Whole, Number] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    eos_token_id: Ids | None = None
    pad_token_id: TokenId | None = None
    stop_strings: Annotated[tuple[Text, ...], Meta(max_length=64)] | None = None
    use_cache: bool = True
    logits_to_keep: Whole = 1
    output_attentions: bool = False
    output_hidden_states: bool = False
    seed: Count | None = None
