"""What the forward of a language model takes: its facts, and the options a trace may set.

    facts = language_facts(net.config, type(net))
    options, tensors = split_keywords({"output_hidden_states": True, "attention_mask": mask}, facts)

Options are a closed, typed set. What is not listed raises: `**kwargs` of a `transformers` forward
swallows any keyword, and an option that is accepted and ignored is a wrong result that nobody sees.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from weft.errors import InputError, UnknownOptionError

# --- options -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ForwardOptions:
    """Options of one forward pass.

    use_cache: also return a key-value cache. Off, because in one pass nothing uses it, and the
        numbers are the same to the bit with and without.
    output_hidden_states, output_attentions, output_router_logits: add these to the model's own
        result. Attention patterns exist only with `attn_implementation="eager"`.
    logits_to_keep: compute the logits of the last that many positions only; 0 means all.
    """

    use_cache: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    output_router_logits: bool = False
    logits_to_keep: int = 0

    def __post_init__(self) -> None:
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise UnknownOptionError(
                    f"{name} is True or False, not {getattr(self, name)!r}", fix="True or False"
                )
        keep = self.logits_to_keep
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 0:
            raise UnknownOptionError(
                f"logits_to_keep is a whole number, 0 or more, not {keep!r}",
                fix="logits_to_keep=1 for the last position, 0 for all",
            )

    def chosen(self) -> dict[str, object]:
        """The options that differ from their default."""
        return {
            f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default
        }


_FLAGS = ("use_cache", "output_hidden_states", "output_attentions", "output_router_logits")
OPTION_NAMES = tuple(f.name for f in fields(ForwardOptions))
TENSOR_NAMES = (
    *("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids"),
    "decoder_input_ids",
)

# Keywords people reach for that are not offered: what to do instead.
_INSTEAD = {
    "labels": "compute the loss in the block, from the logits: F.cross_entropy(...)",
    "max_new_tokens": "a trace is one forward pass; use model.generate(...)",
    "past_key_values": "give the whole prompt; the cache of another pass is not accepted",
    "return_dict": "the model's result always has named fields",
    "cache_position": "give position_ids",
}


def split_keywords(
    given: Mapping[str, object], facts: LanguageFacts
) -> tuple[ForwardOptions, dict[str, object]]:
    """The keywords of a trace, as (options, input tensors).

    Raises UnknownOptionError for a keyword that is neither, or that this model would ignore.
    """
    if not given:
        return DEFAULT_OPTIONS, {}
    tensors = {name: value for name, value in given.items() if name in TENSOR_NAMES}
    chosen = {name: value for name, value in given.items() if name not in tensors}
    for name in chosen:
        if name not in OPTION_NAMES:
            raise unknown_option(name, OPTION_NAMES + TENSOR_NAMES, _INSTEAD)
    options = ForwardOptions(**chosen)  # type: ignore[arg-type]
    forward_keywords(options, facts)
    return options, tensors


def unknown_option(
    name: str, valid: tuple[str, ...], instead: Mapping[str, str]
) -> UnknownOptionError:
    """The error for a keyword that is not offered: the valid ones, and what to do instead."""
    near = difflib.get_close_matches(name, valid, n=1)
    fix = instead.get(name) or (f"did you mean {near[0]}?" if near else "leave it out")
    return UnknownOptionError(f"unknown option {name!r}; valid: {', '.join(valid)}", fix=fix)


def forward_keywords(options: ForwardOptions, facts: LanguageFacts) -> dict[str, object]:
    """The keywords that `options` add to the call of the model's forward.

    Raises UnknownOptionError for an option that this model has no use for.
    """
    keywords: dict[str, object] = {"use_cache": False} if "use_cache" in facts.takes else {}
    if options is DEFAULT_OPTIONS:
        return keywords
    for name, value in options.chosen().items():
        _check_taken(name, facts)
        keywords[name] = value
    return keywords


def _check_taken(name: str, facts: LanguageFacts) -> None:
    # In transformers 5 these two travel in **kwargs: the forward's signature does not show them.
    hidden = facts.takes_any and name in ("output_hidden_states", "output_attentions")
    if name not in facts.takes and not hidden:
        raise UnknownOptionError(
            f"{name}: a model of type {facts.model_type!r} does not take it",
            fix="leave it out; print(model) shows the model",
        )
    attention = facts.attention
    if name == "output_attentions" and attention != "eager":
        raise UnknownOptionError(
            f"output_attentions: {attention!r} attention never has the patterns",
            fix='load the model with attn_implementation="eager"',
        )


DEFAULT_OPTIONS = ForwardOptions()

# --- facts ---------------------------------------------------------------------------------------

# Tables of learned or precomputed positions: an index past the end fails in the middle of a model.
_TABLE_OF_POSITIONS = frozenset(
    {
        "bert",
        "bart",
        "biogpt",
        "codegen",
        "ctrl",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gptj",
        "openai-gpt",
        "opt",
    }
)

# Types whose padded rows were shown to equal the row alone, one test each (tests/families). bloom
# and mpt take no position ids: their alibi is found in the mask, or needs none.
_PADDING_EXACT = """
    apertus arcee bert biogpt bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone4
    falcon gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss
    gptj granite granitemoe helium llama mamba ministral3 mistral mixtral mpt nemotron olmo olmo2
    olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3
    stablelm starcoder2 xglm
"""
PADDING_EXACT = frozenset(_PADDING_EXACT.split())

ENCODERS_EXACT = frozenset({"bart", "t5"})
"""Encoder-decoders of which the same was shown, with padding on the right (tests/families)."""

SEES_BOTH_SIDES = frozenset({"bert"})
"""Types whose tokens see what stands to their right: without a mask, no padding may stand there."""


@dataclass(frozen=True, slots=True, eq=False)
class LanguageFacts:
    """What has to be known of a language model before its input can be made.

    model_type: the type in its configuration (`"llama"`).
    vocab: rows of its embedding; token ids are below.
    positions: the longest input that its table of positions allows; None where any length runs.
    pad: a token id to fill padding with when the tokenizer names none.
    takes: the parameters of its forward; takes_any: it also has `**kwargs`.
    config: its configuration (the attention kernel may be switched on a live model).
    """

    model_type: str
    vocab: int
    positions: int | None
    pad: int
    takes: frozenset[str]
    takes_any: bool
    config: Any

    @property
    def encoder(self) -> bool:
        """Whether the prompt is for an encoder, and a decoder makes the answer."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def attention(self) -> str | None:
        return getattr(self.config, "_attn_implementation", None)


def language_facts(config: Any, model_class: type) -> LanguageFacts:
    """The facts of a `transformers` language model: a causal one, or an encoder with a decoder.

    `config` is its configuration, `model_class` the class whose forward will be called.
    Raises InputError for a model that does not take token ids.
    """
    takes, takes_any = forward_parameters(model_class)
    both = getattr(config, "is_encoder_decoder", False)
    if both and not {"decoder_input_ids", "encoder_outputs"} <= takes:
        raise InputError(
            f"{model_class.__name__} has no decoder to which token ids can be given",
            fix="use weft.Model(net), which passes arguments as they are",
        )
    text = config if both else config.get_text_config()
    vocab = getattr(text, "vocab_size", None)
    if "input_ids" not in takes or vocab is None:
        raise InputError(
            f"{model_class.__name__} is not a language model: its forward takes no token ids",
            fix="use weft.Model(net), which passes arguments as they are",
        )
    return LanguageFacts(
        model_type=text.model_type,
        vocab=vocab,
        positions=text.max_position_embeddings if text.model_type in _TABLE_OF_POSITIONS else None,
        pad=_pad_id(text, vocab),
        takes=takes,
        takes_any=takes_any,
        config=text,
    )


@lru_cache(maxsize=256)
def forward_parameters(model_class: type) -> tuple[frozenset[str], bool]:
    """(names of the parameters of its forward, whether it also has `**kwargs`)."""
    parameters = inspect.signature(model_class.forward).parameters.values()
    names = frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    return names - {"self"}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _pad_id(config: Any, vocab: int) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        ids = getattr(config, name, None)
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and 0 <= first < vocab:
            return first
    return 0


# --- what padding would change -------------------------------------------------------------------


def refuse_padding(facts: LanguageFacts, lengths: tuple[int, ...]) -> None:
    """Raise InputError where rows with padding would not give the numbers they give alone."""
    if facts.model_type not in (ENCODERS_EXACT if facts.encoder else PADDING_EXACT):
        raise InputError(
            f"prompts of different lengths in one batch: padding is not verified for models of "
            f"type {facts.model_type!r}, a padded row could differ from the row alone",
            fix="give prompts of equal length, or each in a tracer.invoke(...) of its own",
        )
    limit = _rope_limit(facts.config)
    if limit is not None and max(lengths) > limit and min(lengths) != max(lengths):
        raise InputError(
            f"rows of {min(lengths)} and {max(lengths)} tokens in one batch: beyond {limit} tokens "
            "the rotary frequencies of this model follow the longest row, so that shorter rows "
            "would differ from the row alone",
            fix="give prompts of equal length, or each in a tracer.invoke(...) of its own",
        )


def _rope_limit(config: Any) -> int | None:
    """Length beyond which rotary frequencies follow the longest row: longrope, dynamic scaling.

    Source: `dynamic_rope_update` in transformers 5.23, `modeling_rope_utils.py`.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [v for v in rope.values() if isinstance(v, dict)]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") == "longrope" or "dynamic" in kind.get("rope_type", "")
    ]
    return min(limits, default=None)
