"""`ModelCall`: one call of a root module, ready to be made.

    call = prepare_language("The Eiffel Tower", tokenizer, facts)
    net(*call.args, **call.kwargs)

It is data: what would stand between the parentheses of `net(...)`, and where the real tokens are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModelCall:
    """The arguments of the root module's forward, and which positions are real.

    args, kwargs: what the root module is called with.
    batch, length: rows and positions of the input, padding included; None where there are none.
    lengths: real tokens per row, `len(lengths) == batch`; None where there are no tokens.
    mask: bool `[batch, pos]`, True at real tokens; None when every position is real.
    """

    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    mask: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    batch: int | None = None
    length: int | None = None

    @property
    def begun(self) -> int:
        """Tokens that an answer goes on from: the decoder's, where the prompt is an encoder's."""
        answer = self.kwargs.get("decoder_input_ids")
        return answer.shape[1] if isinstance(answer, Tensor) else self.length or 0

    def to(self, device: torch.device | str) -> ModelCall:
        """The same call with the tensors on `device`; itself when they are there already."""
        target = torch.device(device) if isinstance(device, str) else device
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor) and not _same_device(value.device, target):
                break
        else:
            return self
        return replace(
            self,
            args=tuple(_move(v, target) for v in self.args),
            kwargs={name: _move(v, target) for name, v in self.kwargs.items()},
            mask=None if self.mask is None else self.mask.to(target),
        )


def _same_device(here: torch.device, there: torch.device) -> bool:
    """`cuda` without an index means any CUDA device."""
    return here == there or (here.type == there.type and there.index is None)


def _move(value: object, device: torch.device) -> object:
    return value.to(device) if isinstance(value, Tensor) else value
