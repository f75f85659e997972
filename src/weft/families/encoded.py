"""Generations of models with an encoder (T5): the encoder runs in the forward of step 0.

    decoding = EncoderDecoding(net, encoder_prompt(ids, mask), sampling)   # then as any `Decoding`

`generate` of `transformers` runs the encoder before its first forward. Here step 0 is a forward of
the root with the encoder in it, so that whoever draws a graph through that step sees the encoder;
later steps are given what it gave. The tokens are the same.

The answer begins with the decoder's start token, as `generate` returns it. Prompts may be padded on
either side: an encoder needs the mask alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.errors import InputError

from .call import ModelCall
from .decoding import Decoding
from .forward import LanguageFacts, forward_parameters


def encoder_prompt(ids: Tensor, mask: Tensor | None = None) -> ModelCall:
    """A prompt for the encoder: ids `[batch, pos]`, and where they are real (None: everywhere)."""
    if ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
        raise InputError(
            "ids are [batch, pos], and a mask has the same shape",
            fix="give both with a row for each prompt",
        )
    real = torch.ones_like(ids) if mask is None else mask.long()
    kwargs: dict[str, object] = {"input_ids": ids, "attention_mask": real}
    return ModelCall((), kwargs, None, None, *ids.shape)


class EncoderDecoding(Decoding):
    """See the module's text. `ids` are the decoder's, `[batch, 1 + new]`.

    Raises InputError for a model without an encoder, or that does not say how answers begin.
    """

    def _facts_of(self, net: Any) -> LanguageFacts:
        if not getattr(net.config, "is_encoder_decoder", False):
            raise InputError(f"{type(net).__name__} has no encoder", fix="use Decoding")
        takes, takes_any = forward_parameters(type(net))
        text = net.config
        return LanguageFacts(
            text.model_type, text.vocab_size, None, text.pad_token_id or 0, takes, takes_any, text
        )

    def _ids_of(self, call: ModelCall) -> Tensor:
        config = self.net.generation_config
        start = config.decoder_start_token_id
        start = config.bos_token_id if start is None else start
        if not isinstance(start, int):
            raise InputError(
                "the model does not say with which token an answer begins",
                fix="net.generation_config.decoder_start_token_id = ...",
            )
        ids: Any = call.kwargs["input_ids"]
        return torch.full((len(ids), 1), start, dtype=torch.int64, device=ids.device)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def _start(self) -> int:
        return self.ids.shape[1]

    def _first(self) -> dict[str, Any]:
        from transformers import DynamicCache, EncoderDecoderCache

        kept: dict[str, Any] = {"use_cache": self.uses_cache}
        kept["attention_mask"] = self.prompt.kwargs["attention_mask"]
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.sampling, name):
                kept[name] = True
        if self.uses_cache:
            config = self.net.config.get_text_config(decoder=True)
            both = DynamicCache(config=config), DynamicCache(config=config)
            kept["past_key_values"] = EncoderDecoderCache(*both)
        return kept

    def _inputs(self, last: int | None, first: bool) -> dict[str, Any]:
        inputs = super()._inputs(last, first)
        if first:
            return {"input_ids": self.prompt.kwargs["input_ids"], **inputs}
        return inputs

    def _grow(self, output: Any) -> None:
        from transformers.modeling_outputs import BaseModelOutput

        self.kept = self.net._update_model_kwargs_for_generation(
            output, self.kept, is_encoder_decoder=True
        )
        if "encoder_outputs" not in self.kept:
            encoded = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
            self.kept["encoder_outputs"] = encoded
