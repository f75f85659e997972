"""A model as data: what a server knows of it without its weights, and tells its clients.

    known = know("openai-community/gpt2")     # or a folder, or a module that is there
    card(known, "gpt2")                       # tree, shape rules, configuration, tokenizer
    answer(known, query)                      # what no table covers

No card holds a path or the name of a file of this machine.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from weft.errors import InputError
from weft.families.forward import language_facts
from weft.families.loading import (
    DEFAULT_LOADING,
    LoadOptions,
    Source,
    load_options,
    load_tokenizer,
    skeleton,
)
from weft.signatures.signature import Signatures

from .fingerprint import fingerprint
from .known import Known


def know(source: str | nn.Module | Any, *, tokenizer: Any = None, **options: Any) -> Known:
    """What is known of a model: an id on the hub, a folder, or a module that is there.

    Of the first two only the configuration and the tokenizer are read. A module is of the family
    `language` if it is a `transformers` model that takes token ids, else `plain`. `options` are
    those of `families.loading.LoadOptions`; any other raises `UnknownOptionError`.
    """
    place, chosen = Source.of(source), load_options(**options)
    net = skeleton(place, chosen)
    facts = _facts(net)
    if facts is None and place.name:
        language_facts(net.config, type(net))  # says why it is no language model
    return Known(
        skeleton=net,
        signatures=Signatures(lambda: net, None if place.name else lambda: net),
        family="plain" if facts is None else "language",
        fingerprint=fingerprint(net),
        facts=facts,
        tokenizer=None if facts is None else _tokenizer(place, tokenizer, chosen),
        source="" if place.folder or not place.name else place.name,
    )


def _facts(net: nn.Module) -> Any:
    """The facts of a language model; None for any other module."""
    config = getattr(net, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    try:
        return language_facts(config, type(net))
    except InputError:
        return None


def _tokenizer(place: Source, given: Any, options: LoadOptions = DEFAULT_LOADING) -> Any:
    """The given tokenizer, or the one that lies beside the model; None where there is none."""
    if given is not None:
        return load_tokenizer(place, given, options)
    try:
        return load_tokenizer(place, None, options)
    except InputError:
        return None
