"""Where the tests of meaning run: in this process, or on a server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

import weft
from weft.handles.anything import Model
from weft.handles.language import LanguageModel

_WEIGHTS = "weights, which a client has none of"
_KEPT = "the module's own state, which a server never lets a request change"
_HERE = "memory of this process; test_live_session counts what a server keeps"
_ARGUMENT = "an argument of the constructor that is wrong in another way where names mean models"
_EAGER = "eager=True, which is refused on a server: lines would wait for it one by one"
_METHOD = "fn=, which is refused on a server: it runs the forward of its models and no other method"
_GRAPH = "grad=True, which is refused on a server: what autograd knows of a tensor stays there"
_ADDRESS = "an address that it says itself"
_ALIKE = "models of which the server has two alike by then; test_generate_source asks it the rest"
LOCAL_ONLY: dict[str, str] = {
    "test_any_module::test_buffers_change_as_they_would_alone": _KEPT,
    "test_any_module::test_what_is_no_module_is_refused": _ARGUMENT,
    "test_eager": _EAGER,
    "test_eager_ends": _EAGER,
    "test_eager_same": _EAGER,
    "test_generate_source_kinds": _ALIKE,
    "test_modules::test_outside_a_block_a_module_is_the_real_one": _WEIGHTS,
    "test_modules::test_weights_are_real_outside_a_block": _WEIGHTS,
    "test_session::test_only_what_somebody_holds_is_kept": _HERE,
    "test_session::test_a_session_of_this_machine_on_a_model_of_a_server": _ADDRESS,
    "test_session::test_nothing_piles_up_in_a_long_loop": _HERE,
    "test_session_blocks::test_an_eager_trace_gives_and_takes_values": _EAGER,
    "test_session_blocks::test_another_method_gives_values_to_the_forward": _METHOD,
    "test_session_gradients::test_gradients_flow_from_trace_to_trace_where_that_is_asked_for": (
        _GRAPH
    ),
    "test_tree::test_get_walks_a_dotted_path_to_a_weight": _WEIGHTS,
    "test_tree::test_the_configuration_is_the_models_own_object": _WEIGHTS,
    "test_tree::test_the_first_run_loads_them": _WEIGHTS,
}
"""Tests, and files of tests, of what only exists where the model is: what they are about."""


def stays_here(module: str, test: str) -> bool:
    """Whether a test runs in this process only."""
    return module in LOCAL_ONLY or f"{module}::{test}" in LOCAL_ONLY


class Place:
    """This process."""

    def __str__(self) -> str:
        return "here"

    @contextmanager
    def opened(self) -> Iterator[None]:
        yield

    def take_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes `weft.Model` and `weft.LanguageModel` give handles of this place."""

    def tidy(self) -> None:
        """Forgets the models that a test has made itself."""

    def language(self, net: Any, tokenizer: Any = None, **options: Any) -> Any:
        """A handle on a language model."""
        return weft.LanguageModel(net, tokenizer=tokenizer, **options)


class OnServer(Place):
    """A live server in this process, to which every module of a test is given."""

    def __init__(self) -> None:
        self._server: Any = None
        self._kept: dict[nn.Module, str] = {}
        self._made: dict[int, tuple[nn.Module, str]] = {}
        self._numbers = itertools.count()

    def __str__(self) -> str:
        return "server"

    @contextmanager
    def opened(self) -> Iterator[None]:
        from weft.testing.service import serve

        with serve({}) as self._server:
            yield
        self._kept.clear()

    def take_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WEFT_HOST", self._server.url)
        monkeypatch.setenv("WEFT_KEY", self._server.key)
        monkeypatch.setattr(weft, "Model", self._any, raising=False)
        monkeypatch.setattr(weft, "LanguageModel", self._language, raising=False)

    def tidy(self) -> None:
        for _, id in self._made.values():
            self._server.remove(id)
        self._made.clear()

    def language(self, net: Any, tokenizer: Any = None, **options: Any) -> Any:
        if net not in self._kept:
            self._kept[net] = self._deploy(net, tokenizer)
        return LanguageModel(self._kept[net], remote=self._server.url, **options)

    def _deploy(self, net: Any, tokenizer: Any = None) -> str:
        id = f"net-{next(self._numbers)}"
        self._server.add(id, net, tokenizer=tokenizer)
        return id

    def _have(self, net: Any, tokenizer: Any = None) -> None:
        """A module of a test is on the server once, until the test is over."""
        if isinstance(net, nn.Module) and net not in self._kept and id(net) not in self._made:
            self._made[id(net)] = net, self._deploy(net, tokenizer)

    def _any(self, net: Any, **options: Any) -> Any:
        model = Model(net, **options, remote=self._server.url)
        self._have(net)
        return model

    def _language(self, source: Any, **options: Any) -> Any:
        self._have(source, options.get("tokenizer"))
        return LanguageModel(source, **options, remote=self._server.url)


HERE, THERE = Place(), OnServer()
