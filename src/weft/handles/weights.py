"""When a model's weights come: the tree at once, the weights on the first local run."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from weft.engine.fingerprint import fingerprint

_NOTHING = torch.empty(0)


class Weights:
    """A module that exists first as a skeleton on the meta device, then with its weights."""

    def __init__(
        self, skeleton: torch.nn.Module, load: Callable[[], torch.nn.Module] | None = None
    ) -> None:
        self._module = skeleton
        self._load = load
        self._lock = threading.Lock()
        self._first: tuple[torch.nn.Module, torch.Tensor] | None = None

    @property
    def are_loaded(self) -> bool:
        return self._load is None

    def skeleton(self) -> torch.nn.Module:
        """The tree as it is now: on meta, or the loaded module."""
        return self._module

    def loaded(self) -> torch.nn.Module:
        """The module with its weights; loads them on the first call."""
        if self._load is not None:
            with self._lock:
                if self._load is not None:
                    self._module = self._load()
                    self._load = None
        return self._module

    def device(self) -> torch.device:
        """Where the model's inputs go: the device of its first parameter."""
        self.loaded()
        return self._one().device

    def state(self) -> object:
        """What users switch on a model that is there, and what its sites look like depends on."""
        module = self._module
        config = module.__dict__.get("config")
        # the attribute behind `config._attn_implementation`, whose own look-up costs 4 us
        kernel = None if config is None else vars(config).get("_attn_implementation_internal")
        return module.training, self._one().dtype, kernel

    def _one(self) -> torch.Tensor:
        """The first parameter: the same object also after `module.to(...)`."""
        module = self._module
        if self._first is None or self._first[0] is not module:
            self._first = module, next(module.parameters(), _NOTHING)
        return self._first[1]


class Fingerprints:
    """The fingerprint of a model, found again when the user has switched something on it."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._last: tuple[object, str] | None = None

    def now(self) -> str:
        """The fingerprint as the model is now."""
        state = self._weights.state()
        if self._last is None or self._last[0] != state:
            self._last = state, fingerprint(self._weights.skeleton())
        return self._last[1]
