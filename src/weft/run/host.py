"""What a run asks of whoever has the model."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Host(Protocol):
    """The model behind a run. A list of tensors in a test has a host too."""

    def parameter(self, path: str) -> torch.Tensor:
        """A weight or buffer."""
        ...

    def apply(self, path: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The result of one of the model's modules, without firing a site."""
        ...

    def is_weight(self, where: int) -> bool:
        """Whether a storage (see `memory.storage`) holds a weight or buffer."""
        ...

    def is_anothers(self, where: int) -> bool:
        """Whether a storage holds a weight, a buffer, or an input that the caller gave."""
        ...

    @property
    def device(self) -> torch.device | None:
        """Where the model computes: where constants go."""
        ...
