"""Models for the tests of meaning, each of which runs twice: here, and on a live server.

`net` is the bare module, for the oracle; `model` is Weft's handle on the same one. In the second
run a server in this process, over HTTP on a free port, has the same modules: what a test gets from
`subjects`, `weft.LanguageModel` and `weft.Model` then runs there by default. A language model's
tree comes from the server as data; the tree of any other module is that of the test. Tests that are
only about this process stand in `LOCAL_ONLY`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from tests.families import zoo
from tests.language import places
from tests.language.hooks import hook_count
from tests.language.places import Place, stays_here
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
def _subject(place: Place, name: str, dtype: torch.dtype) -> Subject:
    net, tokenizer, paths = _net(name, dtype)
    ids = torch.tensor(zoo.tokens(9, seed=1))
    with torch.no_grad():
        baseline = net(ids).logits
    model = place.language(net, tokenizer)
    with model.scan(ids):
        pass  # learns the shapes: that pass fires the hooks with which tests count
    return Subject(net, model, paths, ids, baseline, tokenizer)


def _names(metafunc: pytest.Metafunc, argument: str) -> bool:
    """Whether a test says itself what an argument is to be."""
    marks = metafunc.definition.iter_markers("parametrize")
    return any(argument in str(mark.args[0]) for mark in marks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test runs in both places."""
    module: Any = metafunc.module
    there = pytest.param(places.THERE, marks=_ANNOUNCED)
    here = stays_here(module.__name__.rpartition(".")[2], metafunc.function.__name__)
    if "remote" in metafunc.fixturenames and not _names(metafunc, "remote"):  # of a session
        each = [(places.HERE, False), (places.HERE, "local")]
        each += [] if here else [pytest.param(places.THERE, None, marks=_ANNOUNCED)]
        ids = ["here", "loopback", "server"][: len(each)]
        metafunc.parametrize(
            ("place", "remote"), each, ids=ids, indirect=["place"], scope="session"
        )
        return
    both = [places.HERE] if here else [places.HERE, there]
    metafunc.parametrize("place", both, ids=str, indirect=True, scope="session")


_ANNOUNCED = pytest.mark.filterwarnings("ignore::weft.errors.RemoteLookWarning")


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Where the models of a test run. Opened anew, it is another server: workers that take tests
    from one another come back to a place that they have left."""
    with request.param.opened():
        yield request.param
    _subject.cache_clear()


@pytest.fixture(autouse=True)
def _handles_of_the_place(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test itself makes runs there too, until its end."""
    place.take_over(monkeypatch)
    yield
    place.tidy()


@pytest.fixture(autouse=True)
def subjects(place: Place) -> Iterator[Callable[..., Subject]]:
    """Gives `Subject`s by family; afterwards each is as it was: no hook, the same logits."""
    used: list[Subject] = []

    def get(name: str, dtype: torch.dtype = torch.float32) -> Subject:
        subject = _subject(place, name, dtype)
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
