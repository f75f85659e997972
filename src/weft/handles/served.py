"""A model of a server as a handle needs it: tree, signatures, facts and tokenizer, as data.

Nothing of it is code, and none of it needs the weights or `transformers`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

from msgspec.structs import replace

from weft.client import catalog, sync
from weft.client.catalog import Wanted
from weft.client.core import Talk
from weft.client.find import is_configured
from weft.client.servers import Server, server_at
from weft.client.travel import pack_inputs
from weft.engine.insides import listing_of
from weft.engine.known import Known
from weft.engine.turns import TURN_OPTIONS, Forward, turns_for
from weft.errors import UnknownOptionError, WeftError
from weft.families.call import ModelCall
from weft.families.rehearsal import Layout as PromptLayout
from weft.families.rehearsal import layout_of, prompt_of
from weft.families.sampling import Sampling
from weft.graph.inside import Place
from weft.graph.node import Ref
from weft.kernels.aval import Aval, dtype_name
from weft.settings import load
from weft.sources.listing import Listing
from weft.wire import frames
from weft.wire.messages import (
    ApplyQuery,
    Layout,
    ModelCard,
    SignatureQuery,
    SourceQuery,
    SourceText,
    Tokens,
    TokensQuery,
)
from weft.wire.structures import lower


@dataclass(frozen=True)
class Served:
    """One model of one server. `known` is what recording needs of it."""

    server: Server
    card: ModelCard
    known: Known

    def wanted(self) -> Wanted:
        return Wanted(self.card.info.id, self.card.info.fingerprint, strictly=True)

    def config(self) -> Any:
        """Its configuration."""
        from weft.engine.standin import config_of

        return config_of(self.card)

    def tokenizer(self) -> Any:
        """Its tokenizer; None where it has none."""
        from weft.engine.standin import tokenizer_of

        return tokenizer_of(self.card, Asking(self.server, self.card).tokens)

    def no_weights(self) -> Any:
        """What is said where weights are needed."""
        raise WeftError(
            f"there are no weights of {self.card.info.id} here: they are at {self.server.url}",
            fix="run blocks there (the default of this handle), or open the model without remote=",
        )


def served(remote: Any, name: str, family: str) -> Served:
    """The model `name` of a server, as data. Raises `WrongModelError` where it is not there."""
    from weft.engine.standin import known_of

    server = server_at(remote)
    talk = Talk(server)
    found = sync.run(server, catalog.chosen(talk, Wanted(name, "", strictly=True)))
    card = sync.run(server, catalog.card(talk, found.id))
    if card.info.family != family:
        right = "LanguageModel" if card.info.family == "language" else "Model"
        raise UnknownOptionError(
            f"{name} is of the {card.info.family} family", fix=f"open it with weft.{right}"
        )
    tables = sync.run(server, catalog.tables(talk, found.id))
    one = Served(server, card, known_of(card, tables, Asking(server, card)))
    server.resolved[one.wanted()] = card.info  # it need not be looked for again
    if one.known.facts is not None:
        turns_for(one.known.signatures, one.known.facts, Asking(server, card).turn)
    return one


def only_served() -> bool:
    """Whether language models can come from a server only: no `transformers`, but a server."""
    return importlib.util.find_spec("transformers") is None and is_configured(load())


_TURNS: dict[bool, Literal["first", "next"]] = {False: "first", True: "next"}


class Asking:
    """Asks the server what signatures cannot tell by themselves."""

    def __init__(self, server: Server, card: ModelCard) -> None:
        self._server = server
        self._info = card.info
        self._takes = card.takes

    def signature(self, args: tuple, kwargs: dict[str, Any]) -> bytes:
        """What the sites look like for a call."""
        inputs, tensors = pack_inputs(self._info.family, args, kwargs)
        query = SignatureQuery(
            model=self._info.id,
            fingerprint=self._info.fingerprint,
            inputs=inputs,
            tensors=frames.write(tensors),
        )
        return sync.run(self._server, catalog.signature(Talk(self._server), query))

    def source(
        self, path: str, way: tuple[str, ...], call: ModelCall | Forward | None
    ) -> tuple[Listing, tuple[str, ...]]:
        """A source, and the other modules for which it is the same."""
        query = self._query(path, way)
        if way and isinstance(call, Forward):
            query = self._of_turn(query, layout_of(call.call), call.sampling, call.step > 0)
        elif way and call is not None:
            query = self._of_call(query, call.args, dict(call.kwargs))
        found = self._told(query)
        return listing_of(found), found.kin

    def inside(self, path: str, way: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> bytes:
        """What the sites look like for a call, with the operations of a source."""
        return self._told(self._of_call(self._query(path, way, sites=True), args, kwargs)).data

    def _query(self, path: str, way: tuple[str, ...], sites: bool = False) -> SourceQuery:
        id, fingerprint = self._info.id, self._info.fingerprint
        return SourceQuery(model=id, fingerprint=fingerprint, path=path, inside=way, sites=sites)

    def _of_call(self, query: SourceQuery, args: tuple, kwargs: dict[str, Any]) -> SourceQuery:
        inputs, given = pack_inputs(self._info.family, args, kwargs)
        return replace(query, inputs=inputs, tensors=frames.write(given))

    def _of_turn(
        self, query: SourceQuery, layout: PromptLayout, sampling: Sampling, later: bool
    ) -> SourceQuery:
        inputs, tensors = self._packed(layout, sampling)
        return replace(query, inputs=inputs, tensors=tensors, turn=_TURNS[later])

    def _told(self, query: SourceQuery) -> SourceText:
        return sync.run(self._server, catalog.source(Talk(self._server), query))

    def turn(
        self, layout: PromptLayout, sampling: Sampling, later: bool, place: Place | None
    ) -> bytes:
        """What the sites look like at a forward of a generation; with those of a source."""
        if place is not None:
            asked = self._query(*place, sites=True)
            return self._told(self._of_turn(asked, layout, sampling, later)).data
        inputs, tensors = self._packed(layout, sampling)
        query = SignatureQuery(
            model=self._info.id,
            fingerprint=self._info.fingerprint,
            inputs=inputs,
            tensors=tensors,
            turn=_TURNS[later],
        )
        return sync.run(self._server, catalog.signature(Talk(self._server), query))

    def _packed(self, layout: PromptLayout, sampling: Sampling) -> tuple[Any, bytes]:
        """A prompt of this layout, with the options that change what a forward is like."""
        call = prompt_of(layout)
        flags = {name: getattr(sampling, name) for name in TURN_OPTIONS}
        if "logits_to_keep" not in self._takes:
            del flags["logits_to_keep"]
        inputs, given = pack_inputs(self._info.family, call.args, {**call.kwargs, **flags})
        return inputs, frames.write(given)

    def apply(self, path: str, args: tuple, kwargs: dict[str, Any]) -> bytes:
        """What a module gives for arguments with avals as tensors."""
        layouts: list[Layout] = []

        def ref_of(value: Any) -> Ref | None:
            if not isinstance(value, Aval):
                return None
            layouts.append(
                Layout(
                    dtype=dtype_name(value.dtype),
                    shape=tuple(value.shape),
                    stride=tuple(value.stride),
                    offset=value.offset,
                )
            )
            return Ref(len(layouts) - 1)

        lowered = tuple([lower(arg, ref_of) for arg in args])
        named = tuple([(name, lower(arg, ref_of)) for name, arg in kwargs.items()])
        query = ApplyQuery(
            model=self._info.id,
            fingerprint=self._info.fingerprint,
            path=path,
            layouts=tuple(layouts),
            args=lowered,
            kwargs=named,
        )
        return sync.run(self._server, catalog.applied(Talk(self._server), query))

    def tokens(self, query: TokensQuery) -> Tokens:
        """Token ids by the server."""
        return sync.run(self._server, catalog.tokens(Talk(self._server), query))
