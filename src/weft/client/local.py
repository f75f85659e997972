"""The local backend: the model is in this process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weft.run.generate import run_generations
from weft.run.invokes import run_all

from .backend import Reply, Request
from .values import listening


class LocalBackend:
    """Draws graphs through the module that `loaded()` gives (its weights load on first use)."""

    def __init__(self, loaded: Callable[[], torch.nn.Module]) -> None:
        self._loaded = loaded

    def run(self, request: Request) -> Reply:
        if request.decoders is not None:
            return self._generate(request)
        results = run_all(
            request.graph,
            request.constants,
            self._loaded(),
            request.calls,
            strict=request.strict,
            device=request.device,
            overwritten=request.overwritten,
            on_value=listening(request.listen, request.device),
            merger=None if request.alone or request.grad else request.merger,
            grad=request.grad,
        )
        return Reply(results.saved, results.ended)

    def _generate(self, request: Request) -> Reply:
        module = self._loaded()
        results = run_generations(
            request.graph,
            request.constants,
            module,
            request.decoders(module),  # type: ignore[misc]
            strict=request.strict,
            device=request.device,
            overwritten=request.overwritten,
            sharer=None if request.alone else request.sharer,
            on_value=listening(request.listen, request.device),
        )
        return Reply(results.saved, results.ended)
