"""`Model`: any `nn.Module` with tensor inputs."""

from __future__ import annotations

from typing import Any

from torch import nn

from weft.client.backend import Backend
from weft.errors import InputError
from weft.families.any_module import prepare_any
from weft.families.call import ModelCall

from .handle import Handle
from .weights import Weights


class Model(Handle):
    """Any PyTorch module to experiment on; `trace` takes what its forward takes.

    model = Model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    with model.trace(torch.ones(3, 4)):
        hidden = model[1].output.save()                 # [3, 8]
    """

    def __init__(self, net: nn.Module, *, backend: Backend | None = None) -> None:
        if not isinstance(net, nn.Module):
            raise InputError(
                f"Model takes a torch.nn.Module, not {type(net).__name__}",
                fix="use LanguageModel for a model's id or folder",
            )
        super().__init__(Weights(net), backend)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.get(index)
        return list(self._children.values())[index]

    def __len__(self) -> int:
        return len(self._children)

    def _prepare(self, inputs: tuple, options: dict[str, Any]) -> ModelCall:
        return prepare_any(inputs, options)
