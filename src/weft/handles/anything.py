"""`Model`: any `nn.Module` with tensor inputs."""

from __future__ import annotations

from typing import Any

from torch import nn

from weft.client.backend import Backend
from weft.errors import InputError, UnknownOptionError
from weft.families.any_module import prepare_any
from weft.families.call import ModelCall
from weft.families.together import plain_together
from weft.signatures.expressions import Formulas
from weft.signatures.layouts import Point
from weft.trace.aliases import Rename
from weft.trace.lines import lined, user_line, where

from .handle import Handle
from .served import served
from .weights import Weights
from .where import Remote, is_server


class Model(Handle):
    """Any PyTorch module to experiment on; `trace` takes what its forward takes.

    model = Model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    with model.trace(torch.ones(3, 4)):
        hidden = model[1].output.save()                 # [3, 8]

    remote: where its blocks run, unless they say so themselves: False, True, an address, "local" or
    "auto"; see `trace`. With True or an address `net` may be the id of one of that server's models
    (`weft.models()` lists them), which then comes as data, without weights.
    rename: further names for modules, by name or path: `{"encoder.block": "layers"}`.
    batch_dim: the dimension of the input tensors in which their rows lie (0; 1 for what goes time
    first). Only an empty invoke, which puts the inputs of all others together, has to know it.
    """

    @lined
    def __init__(
        self,
        net: nn.Module | str,
        *,
        backend: Backend | None = None,
        remote: Remote = None,
        rename: Rename | None = None,
        batch_dim: int | None = None,
    ) -> None:
        self.__dict__["_batch_dim"] = _checked(batch_dim)
        if isinstance(net, str) and is_server(remote):
            found = served(remote, net, "plain")
            weights = Weights(found.known.skeleton, found.no_weights)
            super().__init__(
                weights, backend, family="plain", remote=remote, served=found, rename=rename
            )
            return
        if not isinstance(net, nn.Module):
            raise InputError(
                f"Model takes a torch.nn.Module, not {type(net).__name__}",
                fix="use LanguageModel for a model's id or folder",
            )
        super().__init__(Weights(net), backend, family="plain", remote=remote, rename=rename)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.get(index)
        return list(self._children.values())[index]

    def __len__(self) -> int:
        return len(self._children)

    def _prepare(self, inputs: tuple, options: dict[str, Any]) -> ModelCall:
        return prepare_any(inputs, options, self._batch_dim or 0)

    def _together(self, calls: list[ModelCall], options: dict[str, Any]) -> ModelCall:
        if self._batch_dim is None:
            raise InputError(
                "an empty invoke shows the inputs of all others as one batch, and it is not said "
                "in which dimension of them the rows lie",
                line=where(user_line()),
                fix="say so where the model is opened: weft.Model(net, batch_dim=0)",
            )
        return plain_together(calls, self._batch_dim)

    def _formulas(self, call: ModelCall) -> tuple[Formulas, Point] | None:
        """Formulas know the batch as dimension 0 of the inputs."""
        return None if self._batch_dim else super()._formulas(call)


def _checked(batch_dim: Any) -> int | None:
    if batch_dim is None or (type(batch_dim) is int and batch_dim >= 0):
        return batch_dim
    raise UnknownOptionError(
        f"batch_dim is the number of a dimension, counted from 0, not {batch_dim!r}",
        line=where(user_line()),
        fix="batch_dim=0 where rows lie in the first",
    )
