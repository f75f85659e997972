"""A client's side of a model as data: stand-ins made from a card, without weights or source code.

    known = known_of(card, tables, asker)     # enough to record on; the asker answers the rest
    tokenizer = tokenizer_of(card, ask)
    config = config_of(card)

A card is a message: names in it become attributes of stand-ins, and nothing of it is ever run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from weft.errors import MessageError, WeftError
from weft.families.forward import LanguageFacts
from weft.graph.frame import ITEM_SIZES
from weft.signatures.asking import Asker
from weft.signatures.rules import RULES
from weft.signatures.signature import Signatures
from weft.wire.messages import ModelCard, ModuleCard, TensorCard, Tokens, TokensQuery
from weft.wire.reports import escaped

from .known import Known
from .speaker import Speaker

_DTYPES = {name: getattr(torch, name) for name in ITEM_SIZES}


def known_of(card: ModelCard, tables: bytes, asker: Asker) -> Known:
    """The model of a card, as one that is known. Raises `MessageError` for a card of none."""
    net = skeleton_of(card)
    signatures = Signatures(lambda: net, asker=asker)
    if tables:
        signatures.add_bytes(tables)
    return Known(
        skeleton=net,
        signatures=signatures,
        family=card.info.family,
        fingerprint=card.info.fingerprint,
        facts=facts_of(card),
        source=card.source,
    )


# -- the tree ------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """A module in name only: its weights are shapes, its forward is on the server."""

    weft_rule: str | None = None
    weft_details = ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise WeftError(
            f"{type(self).__name__} cannot be called here: its weights are on the server",
            fix="call it on values inside a block, or open the model without remote=",
        )

    def extra_repr(self) -> str:
        return self.weft_details


class _List(StandIn, nn.ModuleList):
    pass


class _Sequential(StandIn, nn.Sequential):
    pass


class _Dict(StandIn, nn.ModuleDict):
    pass


_BASES: dict[str, type[StandIn]] = {
    "": StandIn,
    "list": _List,
    "sequential": _Sequential,
    "dict": _Dict,
}


def skeleton_of(card: ModelCard) -> nn.Module:
    """The module tree, with weights on the meta device. Raises `MessageError` for no tree."""
    return _Tree().grown(card.modules)


class _Tree:
    """Grows a tree from the cards of its modules; a parent comes before what is in it."""

    def __init__(self) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._kinds: dict[tuple[str, str, str | None], type[StandIn]] = {}

    def grown(self, cards: tuple[ModuleCard, ...]) -> nn.Module:
        for card in cards:
            self._add(card)
        if "" not in self._modules:
            raise MessageError("the card of a model shows no module")
        return self._modules[""]

    def _add(self, card: ModuleCard) -> None:
        if card.path in self._modules:
            raise _odd(card.path, "stands twice in the tree")
        module = self._modules[card.path] = self._module(card)
        parent, _, name = card.path.rpartition(".")
        if card.path:
            if parent not in self._modules or not name:
                raise _odd(card.path, "has no parent")
            _put(self._modules[parent]._modules, card.path, name, module)

    def _module(self, card: ModuleCard) -> nn.Module:
        if card.of is not None:
            if card.of not in self._modules or card.of == card.path:
                raise _odd(card.path, "is another module that does not stand before it")
            return self._modules[card.of]
        module = self._kind(card)()
        module.eval()
        module.__dict__.update(
            {k: v for k, v in card.plain.items() if k.isidentifier() and not hasattr(nn.Module, k)}
        )
        module.__dict__["weft_details"] = escaped(card.details, keep="")
        for own in card.parameters:
            tensor = nn.Parameter(self._tensor(card, own), requires_grad=False)
            _put(module._parameters, card.path, own.name, self._shared(card, own, tensor))
        for own in card.buffers:
            _put(module._buffers, card.path, own.name, self._shared(card, own))
        return module

    def _kind(self, card: ModuleCard) -> type[StandIn]:
        rule = card.rule if card.rule in RULES else None  # a newer server may know more
        key = (card.kind, card.base, rule)
        if key not in self._kinds:
            name = card.kind if card.kind.isidentifier() else "Module"
            self._kinds[key] = type(name, (_BASES[card.base],), {"weft_rule": rule})
        return self._kinds[key]

    def _shared(
        self, card: ModuleCard, own: TensorCard, made: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The tensor, or the one that it is again."""
        where = f"{card.path}.{own.name}" if card.path else own.name
        if own.of is None:
            self._tensors[where] = self._tensor(card, own) if made is None else made
            return self._tensors[where]
        if own.of not in self._tensors:
            raise _odd(where, "is a tensor that does not stand before it")
        return self._tensors[own.of]

    def _tensor(self, card: ModuleCard, own: TensorCard) -> torch.Tensor:
        if own.dtype not in _DTYPES:
            raise _odd(card.path, f"has weights of dtype {own.dtype!r}, which is not known here")
        try:
            return torch.empty(own.shape, dtype=_DTYPES[own.dtype], device="meta")
        except (RuntimeError, TypeError, OverflowError):
            raise _odd(card.path, f"has weights of shape {list(own.shape)}") from None


def _put(space: dict[str, Any], path: str, name: str, thing: Any) -> None:
    if not name or "." in name or name in space:
        raise _odd(path, f"has something named {name!r}")
    space[name] = thing


def _odd(path: str, what: str) -> MessageError:
    return MessageError(f"the card of the model is no tree: {escaped(path[:200])!r} {what[:200]}")


# -- facts and configuration ---------------------------------------------------------------------


def facts_of(card: ModelCard) -> LanguageFacts | None:
    """What is to be known of a language model before its input can be made; None for another."""
    if card.info.family != "language":
        return None
    return LanguageFacts(
        model_type=card.model_type,
        vocab=card.vocab,
        positions=card.positions,
        pad=card.pad,
        takes=frozenset(card.takes),
        takes_any=card.takes_any,
        config=config_of(card).get_text_config(),
    )


def config_of(card: ModelCard) -> Config:
    """The configuration: its entries are attributes."""
    return Config(card.config, card.attention)


class Config:
    """A configuration that was told: `config.num_hidden_layers`, `config.to_dict()`.

    It can be read; changing it would change nothing.
    """

    def __init__(self, entries: dict[str, Any], attention: str | None = None) -> None:
        self.__dict__.update(_entries=entries, _attn_implementation=attention)

    def __getattr__(self, name: str) -> Any:
        entries = self.__dict__.get("_entries", {})
        if name not in entries:
            raise AttributeError(f"this configuration has no {name!r}")
        return entries[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("the model is on a server: its configuration cannot be changed here")

    def __dir__(self) -> list[str]:
        return sorted([*object.__dir__(self), *self._entries])

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{k}={v!r}' for k, v in self._entries.items())})"

    def to_dict(self) -> dict[str, Any]:
        """All entries."""
        return dict(self._entries)

    def get_text_config(self) -> Config:
        """That of the language model inside, for a model of several kinds of input."""
        inner = self._entries.get("text_config")
        return Config(inner, self._attn_implementation) if isinstance(inner, dict) else self


# -- the tokenizer -------------------------------------------------------------------------------


def tokenizer_of(card: ModelCard, ask: Callable[[TokensQuery], Tokens]) -> Speaker | None:
    """The tokenizer of a card; it asks for what its file cannot tell. None where there is none."""
    return None if card.tokenizer is None else Speaker(card.info.id, card.tokenizer, ask)
