"""A stranger's graph with operations inside forwards at the steps of a generation."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from msgspec.structs import replace

import weft
from tests.engine.bench import limits
from tests.language.sources import IDS, attention_of, eager
from weft.engine.admit import admit
from weft.engine.insides import source_text
from weft.engine.publish import know
from weft.errors import (
    GraphError,
    LimitError,
    MessageError,
    NotReachedError,
    OtherSourceError,
    SiteMismatchError,
    UnknownPathError,
    WeftError,
)
from weft.families.prepare import prepare_language
from weft.families.sampling import sampling_of
from weft.graph.check import check
from weft.graph.loops import unrolled
from weft.graph.node import Loop, Read
from weft.wire.messages import PlainInputs, SourceQuery

OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}


@cache
def known():
    return know(eager("gpt2"))


@cache
def graph():
    """An edit of a pattern at every step, which is read at step 2."""
    model = weft.LanguageModel(eager("gpt2"))
    with model.generate(IDS, **OPTIONS) as tracer:
        attention_of(model, "gpt2").source.softmax_0.output[:, 0] = 0
        with tracer.iter[2]:
            attention_of(model, "gpt2").output[1].save("pattern")
    return tracer.graph.graph


def admitted(graph, **bounds):
    facts: Any = known().facts
    call = prepare_language(IDS, None, facts)
    return admit(
        graph, call, known(), limits(**bounds), sampling=[sampling_of({**OPTIONS, "seed": 1})]
    )


def reads(change):
    """The graph with another read at step 2."""
    whole = unrolled(graph())
    last = max([n for n, node in enumerate(whole.nodes) if isinstance(node, Read) and node.leaf])
    nodes = list(whole.nodes)
    nodes[last] = change(nodes[last])
    return replace(whole, nodes=tuple(nodes))


def at_port(port):
    return lambda node: replace(node, site=replace(node.site, port=port))


def test_it_is_priced_with_all_of_its_steps():
    price = admitted(graph())
    assert price.saved_bytes == 4 * 11 * 4


def _marks(change):
    return replace(graph(), sources=tuple([change(mark) for mark in graph().sources]))


CASES = {
    "another source": (
        lambda: _marks(lambda mark: replace(mark, digest="0" * 64)), OtherSourceError,
    ),
    "no marks": (lambda: replace(graph(), sources=()), GraphError),
    "no such operation": (
        lambda: reads(at_port("source.attention_interface_1.output")), UnknownPathError,
    ),
    "another shape": (
        lambda: reads(lambda node: replace(node, shape=(1, 4, 1, 10))), SiteMismatchError,
    ),
    "one that does not run": (
        lambda: reads(at_port("source.self_q_attn_0.output")), NotReachedError,
    ),
    "a step that never comes": (
        lambda: reads(lambda node: replace(node, site=replace(node.site, step=3))),
        NotReachedError,
    ),
    "a run that never comes": (
        lambda: reads(lambda node: replace(node, site=replace(node.site, call=1))),
        NotReachedError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_refused(name):
    made, error = CASES[name]
    with pytest.raises(error) as caught:
        admitted(made())
    assert isinstance(caught.value, WeftError)


@pytest.mark.parametrize("port", ["result", "source.a.b.output", "source.os.abort().output"])
def test_what_is_no_port_stands_in_no_loop(port):
    nodes = list(graph().nodes)
    (number, *_) = [n for n, node in enumerate(nodes) if isinstance(node, Loop)]
    loop: Any = nodes[number]
    body = tuple([at_port(port)(node) if isinstance(node, Read) else node for node in loop.body])
    nodes[number] = replace(loop, body=body)
    with pytest.raises(GraphError):
        check(replace(graph(), nodes=tuple(nodes)))


def test_learning_what_is_inside_has_a_limit_of_time():
    known().signatures.clear()  # nothing is known of this model
    with pytest.raises(LimitError, match="price_seconds"):
        admitted(graph(), price_seconds=1e-9)


def test_a_module_without_steps_is_asked_in_vain():
    net = know(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    query = SourceQuery(
        model="m",
        fingerprint=net.fingerprint,
        path="",
        inputs=PlainInputs(args=(), kwargs=()),
        turn="next",
    )
    with pytest.raises(MessageError, match="turns of a generation"):
        source_text(net, query)
