"""Models for the tests of meaning. Tests get a model from here and nowhere else, so that the same
tests can run where `connect` gives a model that lives elsewhere.

`net` is the bare module, for the oracle; `model` is Weft's handle on the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from tests.language.hooks import hook_count
from weft.testing import tiny_path
from weft.testing.same import bitwise

FAMILIES = ("gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "mixtral")
DTYPES = (torch.float32, torch.bfloat16)
CASES = [(name, dtype) for name in FAMILIES for dtype in DTYPES] + [("tiny", torch.float32)]


@dataclass
class Subject:
    """A model under test: the bare `net`, Weft's `model` on it, its paths, and ids to run on."""

    net: nn.Module
    model: Any
    paths: zoo.Paths
    ids: torch.Tensor
    baseline: torch.Tensor
    tokenizer: Any = None

    @property
    def layer_list(self) -> Any:
        return self.model.get(self.paths.layer_list)


@cache
def _net(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any, zoo.Paths]:
    if name != "tiny":
        return zoo.build(name, dtype), None, zoo.paths(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=dtype)
    return net.eval(), AutoTokenizer.from_pretrained(tiny_path()), zoo.paths("llama")


@cache
def _subject(name: str, dtype: torch.dtype) -> Subject:
    net, tokenizer, paths = _net(name, dtype)
    ids = torch.tensor(zoo.tokens(9, seed=1))
    with torch.no_grad():
        baseline = net(ids).logits
    model = connect(net, tokenizer)
    with model.scan(ids):
        pass  # learns the shapes: that pass fires the hooks with which tests count
    return Subject(net, model, paths, ids, baseline, tokenizer)


def connect(net: nn.Module, tokenizer: Any = None) -> Any:
    """Weft's handle on a language model."""
    return weft.LanguageModel(net, tokenizer=tokenizer)


@pytest.fixture(autouse=True)
def subjects() -> Iterator[Callable[..., Subject]]:
    """Gives `Subject`s by family; afterwards each is as it was: no hook, the same logits."""
    used: list[Subject] = []

    def get(name: str, dtype: torch.dtype = torch.float32) -> Subject:
        subject = _subject(name, dtype)
        used.append(subject)
        return subject

    yield get
    for subject in {id(subject): subject for subject in used}.values():
        assert hook_count(subject.net) == 0
        with torch.no_grad():
            bitwise(subject.net(subject.ids).logits, subject.baseline)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def subject(request: pytest.FixtureRequest, subjects: Callable[..., Subject]) -> Subject:
    """Every architecture in every dtype, and the tiny trained model."""
    return subjects(*request.param)


@pytest.fixture
def gpt2(subjects: Callable[..., Subject]) -> Subject:
    return subjects("gpt2")


@pytest.fixture
def llama(subjects: Callable[..., Subject]) -> Subject:
    return subjects("llama")


@pytest.fixture
def tiny(subjects: Callable[..., Subject]) -> Subject:
    return subjects("tiny")


@pytest.fixture
def model(gpt2: Subject) -> Any:
    """Weft's handle on a GPT-2, where the architecture does not matter."""
    return gpt2.model


@pytest.fixture
def net(gpt2: Subject) -> nn.Module:
    """The bare module behind `model`."""
    return gpt2.net


@pytest.fixture
def ids(gpt2: Subject) -> torch.Tensor:
    """`[1, 9]` token ids."""
    return gpt2.ids


@pytest.fixture
def v() -> torch.Tensor:
    """A direction, `[32]`."""
    return torch.linspace(-2, 2, 32)
