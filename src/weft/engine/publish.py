"""A model as data: what a server knows of it without its weights, and tells its clients.

known = know("openai-community/gpt2")     # or a folder, or a module that is there
card(known, "gpt2")                       # tree, shape rules, configuration, tokenizer
answer(known, query)                      # what no table covers
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from weft.errors import InputError, MessageError, UnknownPathError
from weft.families.call import ModelCall
from weft.families.forward import language_facts
from weft.families.loading import (
    DEFAULT_LOADING,
    LoadOptions,
    Source,
    load_options,
    load_tokenizer,
    skeleton,
)
from weft.families.rehearsal import layout_of
from weft.graph.frame import ITEM_SIZES
from weft.graph.node import Ref
from weft.kernels.aval import Aval, intern
from weft.signatures.signature import Signatures
from weft.wire import frames
from weft.wire.messages import (
    Applied,
    ApplyQuery,
    LanguageInputs,
    Layout,
    SignatureQuery,
    SourceQuery,
    SourceText,
    Tables,
    Tokens,
    TokensQuery,
)
from weft.wire.structures import build

from .cards import card
from .fingerprint import fingerprint
from .inputs import call_of
from .insides import source_text
from .known import Known
from .speaking import tokens_of
from .turns import flags_of, turns_for

__all__ = ["answer", "card", "know", "tokenizer_beside"]


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
        tokenizer=None if facts is None else tokenizer_beside(place, tokenizer, chosen),
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


def tokenizer_beside(place: Source, given: Any, options: LoadOptions = DEFAULT_LOADING) -> Any:
    """The given tokenizer, or the one that lies beside the model; None where there is none."""
    if given is not None:
        return load_tokenizer(place, given, options)
    try:
        return load_tokenizer(place, None, options)
    except InputError:
        return None


# -- questions -----------------------------------------------------------------------------------


def answer(
    known: Known, query: SignatureQuery | ApplyQuery | TokensQuery | SourceQuery
) -> Tables | Applied | Tokens | SourceText:
    """What a client asks of a model that it has not got.

    Raises a `WeftError` where the model cannot take what the question names.
    """
    if isinstance(query, TokensQuery):
        return tokens_of(known.tokenizer, query)
    if isinstance(query, ApplyQuery):
        return Applied(data=_applied(known, query))
    if isinstance(query, SourceQuery):
        return source_text(known, query)
    given, _ = frames.read(query.tensors) if query.tensors else ({}, {})
    call = call_of(query.inputs, given, known)
    if query.turn is not None:
        return Tables(data=_turn(known, query, call))
    return Tables(data=known.signatures.answer(call.args, dict(call.kwargs)))


def _turn(known: Known, query: SignatureQuery, call: ModelCall) -> bytes:
    if known.facts is None or not isinstance(query.inputs, LanguageInputs):
        raise MessageError("only a language model has turns of a generation")
    turns = turns_for(known.signatures, known.facts)
    return turns.answer(layout_of(call), flags_of(query.inputs.options), query.turn == "next")


def _applied(known: Known, query: ApplyQuery) -> bytes:
    avals = [_aval(layout) for layout in query.layouts]

    def value_of(ref: Ref) -> Aval:
        if ref.out or not 0 <= ref.node < len(avals):
            raise MessageError(f"the arguments name layout {ref.node}, which is not there")
        return avals[ref.node]

    args = tuple([build(arg, value_of) for arg in query.args])
    kwargs = {name: build(arg, value_of) for name, arg in query.kwargs}
    module = _module(known.skeleton, query.path)
    return known.signatures.rules.answer(module, query.path, args, kwargs)


def _module(net: nn.Module, path: str) -> nn.Module:
    """The module at a path, among those of the tree: a path never reads an attribute."""
    for name in path.split(".") if path else ():
        found = net._modules.get(name)
        if found is None:
            raise UnknownPathError(f"the model has no module {path[:200]!r}")
        net = found
    return net


_DTYPES = {name: getattr(torch, name) for name in ITEM_SIZES}
_LARGEST = 2**40
"""Elements up to which the layout of a question is believed to be somebody's tensor."""


def _aval(layout: Layout) -> Aval:
    dtype = _DTYPES.get(layout.dtype)
    if dtype is None or len(layout.shape) != len(layout.stride) or len(layout.shape) > 64:
        raise MessageError(f"a layout is not one of a tensor: {layout.dtype[:20]!r}")
    reach = layout.offset + sum(
        (size - 1) * step for size, step in zip(layout.shape, layout.stride, strict=True) if size
    )
    if max((reach, *layout.shape)) > _LARGEST:
        raise MessageError("a layout reaches further than any tensor does")
    return intern(layout.shape, layout.stride, layout.offset, dtype)
