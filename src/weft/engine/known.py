"""`Known`: a model as the checker knows it, and as a client can: tree and sites, no weights.

What is here is enough to price a graph, to publish the model as data, and to record on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from weft.families.forward import LanguageFacts
from weft.signatures.signature import Signatures


@dataclass(frozen=True, eq=False)
class Known:
    """A model without its numbers.

    skeleton: the module tree, with weights on the meta device (or real ones, where they are there).
    signatures: what its sites look like.
    family: `language` or `plain`, the kind of inputs it takes (`wire.messages.Inputs`).
    facts: of a language model, else None. tokenizer: of a language model that has one.
    fingerprint: a hash of tree, weights' shapes, configuration and source code.
    source: its id on the hub, if that is where it is from; never a path.
    root: the method that a call of it is; None: its forward.
    """

    skeleton: nn.Module
    signatures: Signatures
    family: str
    fingerprint: str
    facts: LanguageFacts | None = None
    tokenizer: Any = None
    source: str = ""
    root: str | None = None
