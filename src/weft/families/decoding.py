"""`Decoding`: one generation, forward by forward. It says what to call next; somebody else calls.

    decoding = Decoding(net, prepare_language("The Eiffel", tokenizer, facts), sampling)
    call = decoding.begin()                     # (args, kwargs) of the prompt's forward: step 0
    while call is not None:
        output = net(*call[0], **call[1])       # whoever calls may draw a graph through it
        call = decoding.next(output)            # chooses a token for each row: the next step
    decoding.result                             # ids [batch, prompt + new]

The calls are those that `transformers`' own `generate` makes, keyword by keyword, so the numbers of
each step are its numbers. Rows that have ended go on with pads until all have.

Not here: forwards that several generations share (`decodings`), graphs, beams.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import InputError
from weft.families.call import ModelCall
from weft.families.sampler import Sampler
from weft.families.sampling import Sampling
from weft.run.part import ModuleCall


class Decoding:
    """One generation for the rows of one prompt call. See the module's text.

    net: a causal language model of `transformers`. call: its prompt (`prepare_language`).
    tokenizer: only for `stop_strings`.

    `step` is the number of the forward that is to be called or was called last; `ids` are prompt
    and tokens so far, `[batch, pos]`; `tokens` the ones chosen last, `[batch]`. Raises InputError
    where the model or the prompt is not for this.
    """

    def __init__(
        self, net: nn.Module, call: ModelCall, sampling: Sampling, tokenizer: Any = None
    ) -> None:
        self.sampling = sampling
        self.step = 0
        self.over = False
        self.tokens: Tensor | None = None
        self._net: Any = _able(net)
        ids = call.kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise InputError("a generation begins with token ids")
        self.ids = ids
        self.prompt = ids.shape[1]
        mask = call.kwargs.get("attention_mask")
        self.sampler = Sampler(sampling, ids, mask, net.config, tokenizer)  # type: ignore[arg-type]
        self._kept = _kept(self._net, ids, mask if call.mask is not None else None, sampling)

    def begin(self) -> ModuleCall:
        """The call of the prompt's forward."""
        return (), self._inputs(None, first=True)

    def next(self, output: Any) -> ModuleCall | None:
        """Takes the result of the forward that was called; the call of the next one, or None.

        `output.logits[:, -1]` are the logits `[batch, vocab]` that tokens are chosen from.
        """
        self.tokens = self.sampler.choose(output.logits[:, -1])
        self.ids = torch.cat([self.ids, self.tokens[:, None]], dim=-1)
        if self.sampler.ended(self.ids):
            self.close()
            return None
        self.step += 1
        self._grow(output)
        return (), self._inputs(1 if self.sampling.use_cache else None, first=False)

    @property
    def result(self) -> Tensor:
        """Prompt and answer, `[batch, pos]`: what `generate` of `transformers` returns."""
        return self.ids

    def close(self) -> None:
        """Lets go of the cache. Called when the generation is over; call it also if it is left."""
        self.over = True
        self._kept.clear()

    def _inputs(self, last: int | None, first: bool) -> dict[str, Any]:
        inputs = self._net.prepare_inputs_for_generation(
            self.ids, next_sequence_length=last, is_first_iteration=first, **self._kept
        )
        return {**inputs, "return_dict": True}

    def _grow(self, output: Any) -> None:
        """One more position."""
        self._kept = self._net._update_model_kwargs_for_generation(output, self._kept)


def _able(net: nn.Module) -> nn.Module:
    if not hasattr(net, "prepare_inputs_for_generation"):
        raise InputError(f"{type(net).__name__} cannot generate: it has no way to go on")
    return net


def _kept(net: Any, ids: Tensor, mask: Tensor | None, sampling: Sampling) -> dict[str, Any]:
    """What goes from step to step, as `generate` makes it: masks, positions, the cache."""
    from transformers import DynamicCache

    kept: dict[str, Any] = {"use_cache": sampling.use_cache, "logits_to_keep": 1}
    kept["position_ids"] = (
        torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).clone()
        if mask is None
        else (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    )
    kept["attention_mask"] = mask
    if sampling.use_cache:
        kept["past_key_values"] = DynamicCache(config=net.config.get_text_config(decoder=True))
    return kept
