"""The models of the conformance suite: one small random model for each family and dtype.

    model = make("gpt2", torch.bfloat16)
    model.net, model.reference         # the same weights, here in bfloat16 and in float32
    model.give([row])                  # what its forward, and so `trace`, takes for one prompt

Causal decoders are those of the zoo; here stand the families that the zoo does not have.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from tests.families import zoo
from tests.families.zoo import LAYERS, VOCAB, Paths

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
# Beyond 16 tokens its frequencies are the long ones: prompts of the suite lie on both sides.
_LONG = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16}

# name -> (class of the model, prefix of its configuration, arguments of it)
_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mamba": (
        "MambaForCausalLM",
        "Mamba",
        {
            "hidden_size": 32,
            "num_hidden_layers": LAYERS,
            "state_size": 8,
            "time_step_rank": 4,
            # Hidden states of float32 beside layers of bfloat16 are exact but for few numbers, and
            # the largest error of few numbers is chance.
            "residual_in_fp32": False,
        },
    ),
    "bert": (
        "BertForMaskedLM",
        "Bert",
        {
            "hidden_size": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": zoo.POSITIONS,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": LAYERS,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
}
_PATHS = {
    "mamba": Paths(
        "backbone.embeddings",
        "backbone.layers",
        "mixer",
        "mixer.out_proj",
        "backbone.norm_f",
        "lm_head",
    ),
    "bert": Paths(
        "bert.embeddings.word_embeddings",
        "bert.encoder.layer",
        "attention",
        "output.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
    ),
    # The encoder: what it gives reaches the logits through the attention of the decoder.
    "t5": Paths(
        "shared",
        "encoder.block",
        "layer.0.SelfAttention",
        "layer.1.DenseReluDense",
        "encoder.final_layer_norm",
        "lm_head",
    ),
}

DECODER = 6
"""Tokens that the decoder of an encoder-decoder is given."""

FAMILIES: tuple[str, ...] = (*zoo.FAMILIES, "phi3_longrope", *_OTHERS)
DTYPES = (torch.float32, torch.bfloat16)
ENCODED = {"t5": "decoder.block"}
"""Families with an encoder, in which the sites of the cases lie; and where their decoder's layers
are, in which those of generations do."""
SILENT = ("bert",)
"""Families that give no next token: they cannot generate."""

Given = tuple[tuple, dict[str, Any]]
"""Positional and keyword arguments of `trace`, `invoke`, or the module itself."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under test. `reference` has the same weights in float32."""

    name: str
    dtype: torch.dtype
    net: nn.Module
    reference: nn.Module
    paths: Paths

    @property
    def generates(self) -> bool:
        return self.name not in SILENT

    def answering(self, number: int) -> str:
        """The layer with this number of those that run at each step of a generation."""
        listed = ENCODED.get(self.name)
        return self.paths.layer(number) if listed is None else f"{listed}.{number % LAYERS}"

    def give(self, *rows: Sequence[int]) -> Given:
        """The arguments for prompts of one length, alike for `trace` and for the bare module."""
        ids = torch.tensor([list(row) for row in rows])
        return (ids,), self._decoder(len(ids))

    def give_padded(self, rows: Sequence[Sequence[int]]) -> tuple[Given, list[slice]]:
        """The arguments of `trace` for prompts of any lengths, and where each row's positions are.

        A language model pads by itself, on the left; an encoder's prompts on the right.
        """
        width = max(map(len, rows))
        given: Given = (([list(row) for row in rows],), self._decoder(len(rows)))
        if self.name in ENCODED:
            return given, [slice(0, len(row)) for row in rows]
        return given, [slice(width - len(row), width) for row in rows]

    def _decoder(self, rows: int) -> dict[str, torch.Tensor]:
        """What the decoder of an encoder-decoder is given: the same for every prompt."""
        if self.name not in ENCODED:
            return {}
        return {"decoder_input_ids": torch.tensor(zoo.tokens(DECODER, seed=9) * rows)}

    def logits_at(self, positions: slice) -> slice:
        """Where the logits of a prompt lie, whose tokens lie at `positions`."""
        return slice(None) if self.name in ENCODED else positions


@cache
def make(name: str, dtype: torch.dtype) -> Subject:
    """The model of a family; the same one at every call."""
    net = _build(name, dtype)
    kept = copy.deepcopy(net).float() if dtype is not torch.float32 else net
    paths = _PATHS.get(name) or zoo.paths(name.partition("_longrope")[0])
    return Subject(name, dtype, net, kept, paths)


def _build(name: str, dtype: torch.dtype) -> nn.Module:
    if name == "phi3_longrope":
        return zoo.build("phi3", dtype, **_LONG)
    if name not in _OTHERS:
        return zoo.build(name, dtype)
    import transformers

    kind, prefix, arguments = _OTHERS[name]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{prefix}Config")(vocab_size=VOCAB, **special, **arguments)
    with torch.random.fork_rng(devices=[]):
        net = getattr(transformers, kind)(config)
    zoo.randomize(net, seed=0)
    return net.to(dtype).eval()
