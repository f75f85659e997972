"""The local backend: the model is in this process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weft.run import run

from .backend import Reply, Request


class LocalBackend:
    """Draws graphs through the module that `loaded()` gives (its weights load on first use)."""

    def __init__(self, loaded: Callable[[], torch.nn.Module]) -> None:
        self._loaded = loaded

    def run(self, request: Request) -> Reply:
        results = run(
            request.graph,
            request.constants,
            self._loaded(),
            request.args,
            dict(request.kwargs),
            strict=request.strict,
            device=request.device,
            overwritten=request.overwritten,
        )
        return Reply(results.saved, results.ended)
