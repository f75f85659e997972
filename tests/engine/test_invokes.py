"""A request of several invokes: opened, priced and drawn, and nothing that it says is believed."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from tests.families import zoo
from weft.engine.admit import admit
from weft.engine.draw import draw, overwritten_by
from weft.engine.generation import pass_cost
from weft.engine.known import Known
from weft.engine.merging import merger_of
from weft.engine.opened import Opened, open_submit
from weft.errors import (
    GraphError,
    LateEditError,
    LimitError,
    MessageError,
    NotReachedError,
    SiteMismatchError,
)
from weft.families.forward import language_facts
from weft.families.prepare import prepare_language
from weft.graph.node import Call, Graph, Read, Ref, Save, Write
from weft.graph.site import Site
from weft.kernels.frames import to_frame, to_tensor
from weft.signatures.signature import Signatures
from weft.testing.same import bounded
from weft.wire import frames
from weft.wire.messages import Generation, LanguageInputs, Submit, owner_of

from .bench import limits

A, B = [torch.tensor([row]) for row in zoo.tokens(9, 4, seed=1)]
WIDTH = 32


@pytest.fixture(scope="module")
def net():
    return zoo.build("gpt2")


@pytest.fixture(scope="module")
def known(net):
    facts = language_facts(net.config, type(net))
    return Known(net, Signatures(lambda: net), "language", "0" * 64, facts)


def calls_of(known, *prompts):
    assert known.facts is not None
    return [prepare_language(ids, None, known.facts) for ids in prompts]


def read(invoke, length, layer=1):
    site = Site(f"transformer.h.{layer}", "output", invoke=invoke)
    return Read(site=site, shape=(1, length, WIDTH), dtype="float32")


def saving(*reads):
    """A graph that saves what it reads."""
    nodes = []
    for number, one in enumerate(reads):
        nodes += [one, Save(name=f"s{number}", value=Ref(2 * number))]
    return Graph(nodes=tuple(nodes))


def test_the_price_is_that_of_all_invokes(known):
    first, *further = calls_of(known, A, B)
    graph = saving(read(0, 9), read(1, 4), read(1, 4, layer=2))
    price = admit(graph, first, known, limits(), True, further)
    assert price.sites == 3
    assert price.saved_bytes == (9 + 4 + 4) * WIDTH * 4


def test_limits_count_all_invokes(known):
    first, *further = calls_of(known, A, B)
    graph = saving(read(0, 9), read(1, 4))
    size = (9 + 4) * WIDTH * 4
    admit(graph, first, known, limits(result_bytes=size), True, further)
    with pytest.raises(LimitError, match="result_bytes"):
        admit(graph, first, known, limits(result_bytes=size - 1), True, further)


def test_the_sites_of_an_invoke_are_its_own(known):
    first, *further = calls_of(known, A, B)
    with pytest.raises(SiteMismatchError):
        admit(saving(read(1, 9)), first, known, limits(), True, further)


def test_an_invoke_without_an_input(known):
    (first,) = calls_of(known, A)
    with pytest.raises(GraphError, match="no input"):
        admit(saving(read(1, 4)), first, known, limits(), True)


@pytest.mark.parametrize("invoke", [-1, 512, 2**40])
def test_impossible_invokes(known, invoke):
    (first,) = calls_of(known, A)
    with pytest.raises(GraphError, match="numbered"):
        admit(saving(read(invoke, 9)), first, known, limits(), True)


def test_a_circle_is_refused_before_it_runs(known):
    first, *further = calls_of(known, A, A)
    nodes = (
        read(0, 9, layer=2),
        Write(site=Site("transformer.h.1", "output", invoke=1), value=Ref(0)),
        read(1, 9, layer=2),
        Write(site=Site("transformer.h.1", "output", invoke=0), value=Ref(2)),
        Save(name="x", value=Ref(2)),
    )
    with pytest.raises(LateEditError):
        admit(Graph(nodes=nodes), first, known, limits(), True, further)


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_drawn_is_each_alone(net, known, alone):
    calls = calls_of(known, A, B)
    nodes = (
        read(0, 9),
        Call(op="mul", args=(Ref(0), 2.0)),
        Write(site=Site("transformer.h.1", "output"), value=Ref(1)),
        read(0, 9, layer=2),
        Save(name="a", value=Ref(3)),
        read(1, 4, layer=2),
        Save(name="b", value=Ref(5)),
    )
    first, *further = calls
    opened = Opened(Graph(nodes=nodes), {}, first, tuple(further), alone)
    told = overwritten_by(known, *calls)
    drawn = draw(net, opened, overwritten=told, limits=limits(), merger=merger_of(known))
    found = {name: to_tensor(drawn.frames[str(arg.node)]) for name, arg in drawn.manifest.saved}
    for name, ids in (("a", A), ("b", B)):
        single = (
            Graph(nodes=nodes[:5])
            if name == "a"
            else saving(read(0, 4, layer=2))
        )  # fmt: skip
        (call,) = calls_of(known, ids)
        one = draw(net, Opened(single, {}, call), overwritten=None, limits=limits())
        (_, arg), *_ = one.manifest.saved
        bounded(found[name], to_tensor(one.frames[str(arg.node)]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("input_ids", (0, "input_ids")),
        ("in.0", (0, "in.0")),
        ("1.input_ids", (1, "input_ids")),
        ("12.in.3", (12, "in.3")),
        ("0.input_ids", (0, "0.input_ids")),
        ("01.in.0", (0, "01.in.0")),
        ("\u0661.in.0", (0, "\u0661.in.0")),
        ("99999999999.x", (0, "99999999999.x")),
        (".x", (0, ".x")),
    ],
)
def test_whose_a_tensor_is(name, expected):
    assert owner_of(name) == expected


@pytest.fixture
def opened_both(known):
    """Opens a message with two inputs."""

    def opened(graph, **more):
        given = {"input_ids": to_frame(A), "1.input_ids": to_frame(B)}
        message = Submit(
            protocol=1,
            request_id="r",
            model="m",
            fingerprint=known.fingerprint,
            graph=graph,
            inputs=LanguageInputs(given=("input_ids",)),
            further=(LanguageInputs(given=("input_ids",)),),
            tensors=frames.write(given),
            **more,
        )
        return open_submit(message, lambda digest: None, known)  # type: ignore[arg-type]

    return opened


def test_messages_that_do_not_hold_together(known):
    inputs = LanguageInputs(given=("input_ids",))

    def submit(graph, tensors, **more):
        given = {name: to_frame(ids) for name, ids in tensors.items()}
        return Submit(
            protocol=1,
            request_id="r",
            model="m",
            fingerprint="0" * 64,
            graph=graph,
            inputs=inputs,
            tensors=frames.write(given),
            **more,
        )

    def opened(*args, **more):
        return open_submit(submit(*args, **more), lambda digest: None, known)  # type: ignore[arg-type]

    both = {"input_ids": A, "1.input_ids": B}
    graph = saving(read(0, 9), read(1, 4))
    assert [call.length for call in opened(graph, both, further=(inputs,)).calls] == [9, 4]
    with pytest.raises(MessageError, match="of no invoke"):
        opened(saving(read(0, 9)), both)
    with pytest.raises(MessageError, match="more invokes"):
        opened(graph, {"input_ids": A})
    with pytest.raises(MessageError, match="not both"):
        opened(graph, {"input_ids": A}, further=(inputs,))


def test_generations_that_do_not_hold_together(opened_both):
    graph = saving(read(0, 9), read(1, 4))
    one, two = Generation(max_new_tokens=2), Generation(max_new_tokens=5, seed=3)
    each = opened_both(graph, generations=(one, two)).sampling
    assert [sampling.max_new_tokens for sampling in each] == [2, 5]
    alike = opened_both(graph, generation=two).sampling
    assert [sampling.seed for sampling in alike] == [3, 3]
    for odd in ({"generations": (one,)}, {"generations": (one, two), "generation": one}):
        with pytest.raises(MessageError, match="2 inputs, and options of"):
            opened_both(graph, **odd)


def test_each_generation_has_its_own_steps(opened_both, known):
    """A step is one that the invoke has, whatever others have; each counts for the limit."""
    each = (Generation(max_new_tokens=2), Generation(max_new_tokens=5))

    def priced(invoke, step, **changed):
        site = replace(read(invoke, 1).site, step=step)
        opened = opened_both(saving(replace(read(invoke, 1), site=site)), generations=each)
        admit(
            opened.graph,
            opened.call,
            known,
            limits(**changed),
            further=opened.further,
            sampling=opened.sampling,
        )
        return pass_cost(known, opened.calls, opened.sampling)

    assert priced(1, 4) == priced(0, 1) > 0
    with pytest.raises(NotReachedError, match="step 2 does not fire"):
        priced(0, 2)
    with pytest.raises(LimitError, match="new_tokens"):
        priced(0, 1, new_tokens=4)
