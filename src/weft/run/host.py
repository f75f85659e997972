"""What a run asks of whoever has the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from weft.graph.site import Leaf, Site


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


class Told(Protocol):
    """What is known of a pass before it runs: `signatures.later.Later`."""

    def __call__(self, site: Site, leaf: Leaf) -> bool:
        """Whether the model changes a leaf's tensor in place after its site has fired."""
        ...

    def site(self, site: Site) -> Any:
        """The site's `leaves` (key path, what it is), and `rebuild(values)`; None: not known."""
        ...

    def singles(self, site: Site) -> frozenset[str]:
        """The modules that are called exactly once in the pass, or the step, of a site."""
        ...

    def inside(self, site: Site) -> Mapping[str, int]:
        """How often each module, by each of its paths, is called inside the call that `site` is
        the output of."""
        ...
