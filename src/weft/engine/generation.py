"""A stranger's generation: its options, its bounds, what it costs.

    sampling = sampling_from(submit, known, calls)     # of each call
    check_generation(graph, calls, sampling, limits)

Options of a message are held against the same rules as a user's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from weft.errors import GraphError, InputError, MessageError
from weft.families.call import ModelCall
from weft.families.decoding import Decoding
from weft.families.encoded import generation_of
from weft.families.sampling import OPTION_NAMES, Sampling, sampling_of
from weft.graph.node import Backward, Graph
from weft.graph.site import RESULT
from weft.run.structure import tensors
from weft.wire.messages import Generation, Limits, Submit

from .known import Known
from .places import tree_of
from .refusals import over

Samplings = Sequence[Sampling] | None
"""The options of the generation of each call; None where calls are single forwards."""


def sampling_from(submit: Submit, known: Known, calls: Sequence[ModelCall]) -> Samplings:
    """The options that a message names, of each call. Raises what `sampling_of` does."""
    each = submit.generations
    if each and (submit.generation is not None or len(each) != len(calls)):
        raise MessageError(f"{len(calls)} inputs, and options of {len(each)} generations")
    if submit.generation is not None:
        each = (submit.generation,) * len(calls)
    if not each:
        return None
    if known.facts is None:
        raise InputError("this model does not generate", fix="it takes single forwards: trace")
    found = tuple([_sampling_of(one) for one in each])
    for call, sampling in zip(calls, found, strict=True):
        steps_of(call, sampling)
    return found


def _sampling_of(message: Generation) -> Sampling:
    return sampling_of({name: getattr(message, name) for name in OPTION_NAMES})


def steps_of(call: ModelCall, sampling: Sampling) -> int:
    """How many steps a generation from this prompt has, if it does not end early."""
    length = call.begun
    steps = sampling.longest(length) - length
    if steps < 1:
        raise InputError(
            f"the prompt has {length} tokens, max_length is {sampling.max_length}: nothing can be "
            "added",
            fix="give max_new_tokens",
        )
    return steps


def check_generation(
    graph: Graph, calls: Sequence[ModelCall], sampling: Samplings, limits: Limits
) -> None:
    """Raises where a graph is not one of such a generation, or asks for too much of it."""
    for node in graph.nodes:
        line = graph.where[node.at] if node.at < len(graph.where) else None
        if sampling is None:
            site = getattr(node, "site", None)
            if site is not None and (site.port == RESULT or site.step):
                raise GraphError(
                    f"{site} is of a generation, and this is a single forward",
                    line=line,
                    fix="run it with model.generate(...)",
                )
        elif isinstance(node, Backward):
            raise GraphError("there are no gradients in a generation", line=line)
    if sampling is None:
        return
    for call, how in zip(calls, sampling, strict=True):
        steps = steps_of(call, how)
        if steps > limits.new_tokens:
            raise over("new_tokens", f"{limits.new_tokens}", f"{steps} new tokens")


def pass_cost(known: Known, calls: Sequence[ModelCall], sampling: Samplings) -> float:
    """Operations of the model itself after the prompts' own forwards, nearly: each parameter meets
    each row once for each token."""
    if sampling is None:
        return 0.0
    each = zip(calls, sampling, strict=True)
    rows = sum([(call.batch or 1) * (steps_of(call, how) - 1) for call, how in each])
    return 2.0 * tree_of(known).size("") * rows


def prompt_cost(known: Known, calls: Sequence[ModelCall]) -> float:
    """Operations of the model's own passes over its inputs, nearly: each parameter meets each
    position, or each row where there are none. A pass that ends early counts whole."""
    return 2.0 * tree_of(known).size("") * sum([_positions(call) for call in calls])


def _positions(call: ModelCall) -> int:
    if call.length:
        return (call.batch or 1) * call.length
    given = [one for one in tensors((call.args, dict(call.kwargs))) if one.numel()]
    return max([one.numel() // (one.shape[-1] if one.dim() else 1) for one in given], default=1)


def decoders(
    net: nn.Module, calls: Sequence[ModelCall], sampling: Sequence[Sampling], tokenizer: Any
) -> Iterator[Decoding]:
    """A generation for each call."""
    for call, how in zip(calls, sampling, strict=True):
        yield generation_of(net, call, how, tokenizer if how.stop_strings else None)
