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
    from weft.errors import WeftError
    from weft.graph.node import Graph
    from weft.models.anything import Model
    from weft.models.experiment import Experiment
    from weft.models.language import LanguageModel
    from weft.models.save import save
    from weft.models.tracer import Tracer, UnusedEditWarning

__version__ = "0.1.0"

_HOMES = {
    "Experiment": "weft.models.experiment",
    "Graph": "weft.graph.node",
    "LanguageModel": "weft.models.language",
    "Model": "weft.models.anything",
    "Tracer": "weft.models.tracer",
    "UnusedEditWarning": "weft.models.tracer",
    "WeftError": "weft.errors",
    "save": "weft.models.save",
}

__all__ = [
    "Experiment",
    "Graph",
    "LanguageModel",
    "Model",
    "Tracer",
    "UnusedEditWarning",
    "WeftError",
    "save",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
