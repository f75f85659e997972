"""Weft: experiments on the inside of neural networks, as ordinary PyTorch in a `with` block.

    from weft import LanguageModel

    model = LanguageModel("openai-community/gpt2")
    with model.trace("The Eiffel Tower is in the city of") as tracer:
        h = model.transformer.h[5].output.save()

The public names, loaded when first used; nothing else stands here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.client.catalog import models, status
    from weft.client.job import AsyncJob, Job
    from weft.client.listing import jobs
    from weft.errors import RemoteError, ServerAwayError, WeftError
    from weft.graph.node import Graph
    from weft.handles.anything import Model
    from weft.handles.block import UnusedEditWarning
    from weft.handles.experiment import Experiment
    from weft.handles.language import LanguageModel
    from weft.handles.save import save
    from weft.handles.tracer import Tracer

__version__ = "0.1.0"

_HOMES = {
    "AsyncJob": "weft.client.job",
    "Experiment": "weft.handles.experiment",
    "Graph": "weft.graph.node",
    "Job": "weft.client.job",
    "LanguageModel": "weft.handles.language",
    "Model": "weft.handles.anything",
    "RemoteError": "weft.errors",
    "ServerAwayError": "weft.errors",
    "Tracer": "weft.handles.tracer",
    "UnusedEditWarning": "weft.handles.block",
    "WeftError": "weft.errors",
    "jobs": "weft.client.listing",
    "models": "weft.client.catalog",
    "save": "weft.handles.save",
    "status": "weft.client.catalog",
}

__all__ = [
    "AsyncJob",
    "Experiment",
    "Graph",
    "Job",
    "LanguageModel",
    "Model",
    "RemoteError",
    "ServerAwayError",
    "Tracer",
    "UnusedEditWarning",
    "WeftError",
    "jobs",
    "models",
    "save",
    "status",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
