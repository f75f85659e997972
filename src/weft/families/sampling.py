"""`Sampling`: how tokens are chosen from logits, and when a generation ends. Plain data.

    given = {"max_new_tokens": 20, "do_sample": True, "top_p": 0.9}
    sampling = sampling_of(given, net.generation_config)

What is not given is what `transformers`' own `generate` would take: the value that the model's
generation config names, else its general default. An option that is unknown, or that would be
ignored here, raises `UnknownOptionError`: an option without effect is a wrong result that nobody
sees.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from weft.errors import UnknownOptionError


@dataclass(frozen=True, slots=True)
class Sampling:
    """The options of a generation, complete. Numbers and their meaning are those of `transformers`.

    max_new_tokens: tokens after the prompt, at most; max_length: of prompt and answer together,
        where `max_new_tokens` is None; where both are None, 20 new ones, within the positions that
        the model was made for. min_new_tokens, min_length: no end of sequence before.
    do_sample: draw from the distribution; else the likeliest token.
    temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff: only when drawing.
    repetition_penalty: above 1, tokens that are there already become less likely.
    no_repeat_ngram_size: no run of so many tokens twice. bad_words_ids: runs that never occur.
    suppress_tokens, begin_suppress_tokens: ids never drawn, or not as the first new one.
    forced_bos_token_id, forced_eos_token_id: the token after a prompt of one, and at the length
        limit. exponential_decay_length_penalty: (start, factor), towards an end.
    remove_invalid_values: NaN logits become 0, infinite ones the largest. renormalize_logits:
        processed scores are log-probabilities.
    eos_token_id: each of them ends its row; pad_token_id: what such a row is filled with.
    stop_strings: a row ends where its text has come to contain one of them.
    use_cache: keep keys and values, and run one token at a step; else the whole sequence.
    logits_to_keep: of that many last positions each step computes logits; 0: of all.
    output_attentions, output_hidden_states: each step's own result has them too.
    seed: keys the draws; the same seed draws the same tokens, alone or beside others.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    do_sample: bool = False
    temperature: float | None = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    typical_p: float | None = 1.0
    epsilon_cutoff: float | None = 0.0
    eta_cutoff: float | None = 0.0
    repetition_penalty: float | None = 1.0
    no_repeat_ngram_size: int | None = 0
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    eos_token_id: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] | None = None
    use_cache: bool = True
    logits_to_keep: int = 1
    output_attentions: bool = False
    output_hidden_states: bool = False
    seed: int | None = None

    @property
    def pad(self) -> int | None:
        """What a row that has ended is filled with; None where no row ends by a token."""
        if self.pad_token_id is None and self.eos_token_id:
            return self.eos_token_id[0]
        return self.pad_token_id

    def longest(self, length: int, positions: int | None = None) -> int:
        """Tokens of prompt and answer together, at most, for a prompt of `length` tokens.

        `positions` are those that the model was made for (`config.max_position_embeddings`).
        """
        if self.max_new_tokens is not None:
            return length + self.max_new_tokens
        if self.max_length is not None:
            return self.max_length
        whole = length + _NEW
        return whole if positions is None else min(whole, positions)


_NEW = 20  # new tokens where nobody says how many; the general default of transformers

OPTION_NAMES = tuple(field.name for field in fields(Sampling))


def sampling_of(given: Mapping[str, Any], defaults: Any = None) -> Sampling:
    """The options for keywords `given` by a user. None is a value: it turns an option off.

    `defaults` is the model's `generation_config`, or a mapping like it, or None. Raises
    UnknownOptionError for an option that is unknown or not supported, or has no meaning.
    """
    _refuse_unknown(given)
    shipped = _shipped(defaults)
    _refuse_unsupported({**shipped, **given}, given)
    chosen = {name: value for name, value in shipped.items() if name in OPTION_NAMES}
    chosen |= {name: value for name, value in given.items() if name in OPTION_NAMES}
    return Sampling(**{name: _checked(name, value) for name, value in chosen.items()})


def _shipped(defaults: Any) -> dict[str, Any]:
    """What a generation config names. None there means that it does not say."""
    if defaults is None:
        return {}
    everything = defaults if isinstance(defaults, Mapping) else vars(defaults)
    return {name: value for name, value in everything.items() if value is not None}


# -- what is not offered ---------------------------------------------------------------------------

_BEAMS = "beam search is not offered: its rows change places between steps"
_RESULT = "the result of a generation is its token ids"
_SAVE = "save what you want of each step in the block, for instance the output of lm_head"

# name -> (values that change nothing, reason, way out)
_UNSUPPORTED: Mapping[str, tuple[tuple[Any, ...], str, str]] = MappingProxyType(
    {
        "num_beams": ((None, 1), _BEAMS, "num_beams=1"),
        "num_beam_groups": ((None, 1), _BEAMS, "leave it out"),
        "diversity_penalty": ((None, 0, 0.0), _BEAMS, "leave it out"),
        "constraints": ((None,), _BEAMS, "leave it out"),
        "force_words_ids": ((None,), _BEAMS, "leave it out"),
        "num_return_sequences": (
            (None, 1),
            "each row of a prompt gives one sequence",
            "num_return_sequences=1, and give the prompt several times: [prompt] * n",
        ),
        "penalty_alpha": (
            (None, 0, 0.0),
            "contrastive search is not offered: it runs the model several times for each token",
            "penalty_alpha=None",
        ),
        "dola_layers": ((None,), "DoLa decoding is not offered", "dola_layers=None"),
        "guidance_scale": (
            (None, 1, 1.0),
            "classifier-free guidance is not offered: it runs a second prompt beside each",
            "guidance_scale=None",
        ),
        "prompt_lookup_num_tokens": ((None,), "assisted decoding is not offered", "leave it out"),
        "assistant_model": ((None,), "assisted decoding is not offered", "leave it out"),
        "watermarking_config": ((None,), "watermarks are not offered", "watermarking_config=None"),
        "token_healing": ((None, False), "token healing is not offered", "token_healing=False"),
        "prefill_chunk_size": (
            (None,),
            "the prompt is one step, in one piece",
            "prefill_chunk_size=None",
        ),
        "sequence_bias": (
            (None,),
            "it is not offered",
            "sequence_bias=None, and add to the logits in the block",
        ),
        "top_h": ((None,), "it is not offered", "top_h=None"),
        "encoder_repetition_penalty": ((None, 1, 1.0), "it is not offered", "leave it out"),
        "encoder_no_repeat_ngram_size": ((None, 0), "it is not offered", "leave it out"),
        "max_time": (
            (None,),
            "a limit in seconds gives other tokens on another day",
            "max_new_tokens=...",
        ),
    }
)

# Only where a user gives them: a config that names them changes nothing of the tokens.
_IDLE: Mapping[str, tuple[tuple[Any, ...], str, str]] = MappingProxyType(
    {
        "return_dict_in_generate": ((None, False), _RESULT, _SAVE),
        "output_scores": ((None, False), _RESULT, _SAVE),
        "output_logits": ((None, False), _RESULT, _SAVE),
        "cache_implementation": (
            (None, "dynamic", "hybrid"),
            "the cache grows with the tokens",
            "leave it out",
        ),
    }
)

_NOT_KNOWN: Mapping[str, str] = MappingProxyType(
    {
        "presence_penalty": "transformers has repetition_penalty, and so has Weft",
        "frequency_penalty": "transformers has repetition_penalty, and so has Weft",
        "max_tokens": "it is called max_new_tokens",
        "stop": "it is called stop_strings",
        "generator": "draws are keyed: give seed=",
        "logits_processor": "change the logits in the block",
        "stopping_criteria": "give stop_strings or eos_token_id, or stop in the block",
        "generation_config": "give its values as options",
        "streamer": "use tracer.stream(...)",
        "custom_generate": "no code of others is run",
        "past_key_values": "give the whole prompt; the cache of another run is not accepted",
    }
)


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for name in given:
        if name not in OPTION_NAMES and name not in _UNSUPPORTED and name not in _IDLE:
            near = difflib.get_close_matches(name, OPTION_NAMES, n=1)
            fix = _NOT_KNOWN.get(name) or (f"did you mean {near[0]}?" if near else None)
            valid = ", ".join(OPTION_NAMES)
            raise UnknownOptionError(f"unknown option {name!r}; valid: {valid}", fix=fix)


def _refuse_unsupported(values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, value in values.items():
        idle, reason, fix = _UNSUPPORTED.get(name) or _IDLE.get(name) or (None, "", "")
        if idle is None or any(value is one or (one is not None and value == one) for one in idle):
            continue
        if name in given:
            raise UnknownOptionError(f"{name}={value!r}: {reason}", fix=fix)
        if name in _UNSUPPORTED:
            raise UnknownOptionError(
                f"{name}={value!r} in the model's generation config: {reason}", fix=fix
            )


# -- values ----------------------------------------------------------------------------------------


def _checked(name: str, value: Any) -> Any:
    """The value as `Sampling` keeps it."""
    if value is None:
        return _OFF.get(name)
    try:
        return _CHECKS[name](value)
    except (TypeError, ValueError):
        raise UnknownOptionError(
            f"{name}={value!r}: it is {_MEANT[_CHECKS[name]]}", fix="give one, or leave it out"
        ) from None


# What None means where the field itself is never None.
_OFF: Mapping[str, Any] = MappingProxyType(
    {
        "min_length": 0,
        "do_sample": False,
        "remove_invalid_values": False,
        "renormalize_logits": False,
        "use_cache": True,
        "logits_to_keep": 1,
        "output_attentions": False,
        "output_hidden_states": False,
    }
)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or value < 0:
        raise ValueError
    return int(value)


def _some(value: Any) -> int:
    if _count(value) == 0:
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _positive(value: Any) -> float:
    if _number(value) <= 0:
        raise ValueError
    return float(value)


def _part(value: Any) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError
    return float(value)


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)):
        raise TypeError
    values = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if not values:
        raise ValueError
    return tuple([_count(one) for one in values])


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError
    return tuple([_ids(list(word)) for word in value])


def _texts(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else list(value)
    if not values or not all(isinstance(one, str) and one for one in values):
        raise ValueError
    return tuple(values)


def _decay(value: Any) -> tuple[int, float]:
    start, factor = value
    return _count(start), _positive(factor)


_MEANT: Mapping[Callable[[Any], Any], str] = MappingProxyType(
    {
        _flag: "True or False",
        _count: "a whole number, 0 or more",
        _some: "a whole number, 1 or more",
        _positive: "a number above 0; for the likeliest token give do_sample=False",
        _part: "a number from 0 to 1",
        _ids: "a token id or several",
        _words: "a list of lists of token ids",
        _texts: "a text or several, none of them empty",
        _decay: "(a whole number of tokens, a factor above 0)",
    }
)

_CHECKS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        **dict.fromkeys(("max_new_tokens", "max_length"), _some),
        **dict.fromkeys(
            (
                *("min_new_tokens", "min_length", "top_k", "no_repeat_ngram_size"),
                *("forced_bos_token_id", "pad_token_id", "logits_to_keep", "seed"),
            ),
            _count,
        ),
        **dict.fromkeys(
            (
                *("do_sample", "use_cache", "remove_invalid_values", "renormalize_logits"),
                *("output_attentions", "output_hidden_states"),
            ),
            _flag,
        ),
        **dict.fromkeys(("temperature", "repetition_penalty"), _positive),
        **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), _part),
        **dict.fromkeys(
            (
                *("suppress_tokens", "begin_suppress_tokens"),
                *("forced_eos_token_id", "eos_token_id"),
            ),
            _ids,
        ),
        "bad_words_ids": _words,
        "stop_strings": _texts,
        "exponential_decay_length_penalty": _decay,
    }
)
