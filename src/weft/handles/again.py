"""A recorded generation, run again: `Experiment.run` of what a block of `model.generate` recorded.

with model.generate(prompt, max_new_tokens=8, do_sample=True, seed=3) as tracer:
    model.model.layers[1].output[:, -1] += v
    ids = tracer.result.save("ids")
tracer.graph.save("steered.weft")
weft.Experiment.load("steered.weft").run(model, prompt)["ids"]       # the same tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from msgspec.structs import asdict, replace

from weft.client.backend import Request
from weft.engine.stepping import sharer
from weft.engine.steps import Steps
from weft.engine.turns import turns_for
from weft.errors import GraphError, UnknownOptionError
from weft.families.call import ModelCall
from weft.families.encoded import generation_of
from weft.families.forward import TENSOR_NAMES
from weft.families.sampling import Sampling, sampling_of
from weft.graph.inside import inside_of_graph
from weft.graph.node import Call, Graph, Loop

from .edits import before
from .experiment import Experiment, check_paths, vet
from .options import Own, check_place, check_rerun, split
from .reached import reached
from .session import remote_of

if TYPE_CHECKING:
    from .handle import Handle


def generate_again(
    handle: Handle, experiment: Experiment, inputs: tuple, options: dict[str, Any]
) -> dict[str, Any]:
    """What the experiment saves, by name. Options are those of `model.generate`; the default of
    each is what was recorded."""
    own, rest = split(options)
    facts = getattr(handle, "_facts", None)
    if facts is None:
        raise GraphError(
            "this experiment was recorded in a generation, and this model does not generate",
            fix="run it on the language model that it was recorded on",
        )
    _check(own)
    place = handle._places.pick(remote_of(handle, own.remote))
    check_place(own, place)
    check_paths(experiment.graph, handle._root.paths)
    tensors = {name: rest.pop(name) for name in TENSOR_NAMES if name in rest}
    each = _samplings(experiment, own, rest)
    calls = handle._calls_again(experiment.graph, inputs, tensors)
    _check_steps(experiment, each, calls)
    if place.kind == "here":
        calls = [call.to(handle._weights.device()) for call in calls]
    steps = Steps(turns_for(handle._signatures, facts), calls, each)
    graph = experiment.graph if own.seed is None else seeded(experiment.graph, own.seed)
    graph, constants = before(handle, calls, graph, experiment.constants, steps)
    if place.kind == "here":
        vet(graph, calls, handle._known(), each)
    speaks = any(one.stop_strings for one in each)
    tokenizer = handle.tokenizer if speaks else None  # type: ignore[attr-defined]

    def decoders(net: torch.nn.Module) -> Sequence[Any]:
        pairs = zip(calls, each, strict=True)
        return [generation_of(net, call, sampling, tokenizer) for call, sampling in pairs]

    call, *further = calls
    request = Request(
        graph,
        constants,
        call.args,
        call.kwargs,
        strict=False,
        device=own.device,
        overwritten=Steps(steps.turns, calls, each, inside_of_graph(graph)).told(),
        further=tuple([(one.args, one.kwargs) for one in further]),
        alone=own.alone,
        sampling=each,
        decoders=decoders,
        sharer=sharer(handle._signatures, facts) if further else None,
    )
    return reached(graph, place.backend.run(request).saved)


def _check(own: Own) -> None:
    check_rerun(own)
    if own.grad:
        raise UnknownOptionError(
            "grad=True: there are no gradients in a generation",
            fix="generate first, and trace what came out: model.trace(ids, grad=True)",
        )


def _samplings(experiment: Experiment, own: Own, given: dict[str, Any]) -> list[Sampling]:
    """How the tokens of each invoke are chosen: as recorded, but for what is given now."""
    given = given if own.seed is None else {**given, "seed": own.seed}
    each = [sampling_of({**asdict(one), **given}) for one in experiment.generations]
    cached = experiment.generations[0].use_cache
    if each[0].use_cache != cached:
        raise UnknownOptionError(
            f"this experiment was recorded with use_cache={cached}: what it does to positions at a "
            "step would be another thing",
            fix="leave use_cache out; or record it anew",
        )
    return each


def seeded(graph: Graph, seed: int) -> Graph:
    """The graph with another seed for all of its draws."""
    return replace(graph, nodes=_unseeded(graph.nodes), seed=seed)


def _unseeded(nodes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Nodes whose draws are all keyed by the graph's seed."""
    found = []
    for node in nodes:
        if isinstance(node, Loop):
            node = replace(node, body=_unseeded(node.body))
        elif isinstance(node, Call) and node.seed is not None:
            node = replace(node, seed=None)
        found.append(node)
    return tuple(found)


def _check_steps(
    experiment: Experiment, each: Sequence[Sampling], calls: Sequence[ModelCall]
) -> None:
    """What acts at every step was recorded for so many steps, and is not said of others."""
    for recorded, sampling, call in zip(experiment.generations, each, calls, strict=True):
        steps, most = sampling.longest(call.begun) - call.begun, recorded.max_new_tokens
        if steps != most:
            raise UnknownOptionError(
                f"this experiment was recorded for {most} new tokens, not {steps}: it names their "
                "steps one by one",
                fix="leave max_new_tokens out; or record it anew",
            )
