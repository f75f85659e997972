"""Generations of models with an encoder (T5): the encoder runs in the forward of step 0.

    decoding = generation_of(net, prepare_language(prompt, tokenizer, facts), sampling)

`generate` of `transformers` runs the encoder before its first forward. Here step 0 is a forward of
the root with the encoder in it, so that whoever draws a graph through that step sees the encoder;
later steps are given what it gave. The tokens are the same.

The answer begins with `decoder_input_ids`, most often one token, as `generate` returns it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weft.errors import InputError

from .call import ModelCall
from .decoding import Decoding
from .forward import LanguageFacts, language_facts
from .sampling import Sampling


def generation_of(net: Any, call: ModelCall, sampling: Sampling, tokenizer: Any = None) -> Decoding:
    """The generation of a model, of whichever kind it is."""
    both = getattr(net.config, "is_encoder_decoder", False)
    kind = EncoderDecoding if both else Decoding
    return kind(net, call, sampling, tokenizer)


class EncoderDecoding(Decoding):
    """See the module's text. `ids` are the decoder's, `[batch, 1 + new]`.

    Raises InputError for a model without an encoder, and for a prompt of embeddings.
    """

    def _facts_of(self, net: Any) -> LanguageFacts:
        if not getattr(net.config, "is_encoder_decoder", False):
            raise InputError(f"{type(net).__name__} has no encoder", fix="use Decoding")
        return language_facts(net.config, type(net))

    def _ids_of(self, call: ModelCall) -> Tensor:
        if "inputs_embeds" in call.kwargs:
            raise InputError(
                "an encoder-decoder generates from token ids, not from embeddings",
                fix="give token ids, and write to the output of the encoder's embedding",
            )
        ids: Any = call.kwargs["decoder_input_ids"]
        return ids

    def _mask_of(self, call: ModelCall) -> Tensor | None:
        """None: the decoder's tokens are all real."""
        return None

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def _start(self) -> int:
        return self.ids.shape[1]

    def _first(self) -> dict[str, Any]:
        from transformers import DynamicCache, EncoderDecoderCache

        kept: dict[str, Any] = {"use_cache": self.uses_cache}
        if self.prompt.mask is not None:
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
