"""A request in OpenAI's form as an ordinary job: a small graph around the client's own.

    job = submitted(gateway, key, asked, ids, card)     # through `accept`, as any other

The graph saves the ids of the generation, and where they are streamed it hands out each token at
the step that takes it in. What is done to the model stands before that.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from weft.errors import CancelledError, GraphError, NoSuchError, OtherModelError
from weft.graph.check import check
from weft.graph.everywhere import everywhere
from weft.graph.frame import Frame
from weft.graph.join import joined
from weft.graph.loops import every
from weft.graph.node import Const, Graph, Log, Loop, Read, Ref, Save
from weft.graph.passes import invokes_of
from weft.graph.site import RESULT, Site
from weft.service.jobs.life import Cancel, IllegalStepError, Job
from weft.service.store.interface import Key
from weft.wire import frames
from weft.wire.messages import PROTOCOL, Generation, LanguageInputs, ModelCard, Submit, encode
from weft.wire.reports import report_of

from ..accept import accept_submit
from ..edits import edit_of
from ..limits import too_much
from ..state import Gateway, limits_for
from .asks import Asked
from .errors import odd
from .scores import INPUTS, LAST, LEAF, scoring

IDS = "weft.ids"
"""The name under which the ids of prompt and answer are saved."""
MINE = frozenset({IDS, LAST})
"""Names of saves that are not the client's."""


class Sent(NamedTuple):
    """A job, and what is needed to read what it says."""

    job: Job
    ids: tuple[int, ...]  # of the prompt
    most: int  # tokens
    ends: frozenset[int]  # tokens that end it
    stream: int  # the number of the stream of its tokens


def check_choices(gateway: Gateway, key: Key, asked: Asked) -> None:
    """Holds a request to the number of its choices."""
    most = limits_for(gateway, key).choices
    if asked.choices > most:
        raise too_much(
            "choices",
            most,
            f"{asked.choices} choices are asked for",
            "send more requests; their jobs share forward passes all the same",
        )


def submitted(
    gateway: Gateway,
    key: Key,
    asked: Asked,
    rows: Sequence[tuple[int, ...]],
    card: ModelCard,
    request: str = "",
) -> list[Sent]:
    """The jobs of a request: one for each choice, `n` for each prompt, each with a seed of its own,
    the seed of the one before plus one. `request` is the id of the HTTP request. Raises what
    `accept` does, and `Refused` for a field; none of them goes on then. Blocks."""
    first = secrets.randbits(63) if asked.seed is None else asked.seed
    found: list[Sent] = []
    try:
        for ids in rows:
            for _ in range(asked.n):
                one = replace(asked, seed=(first + len(found)) % 2**63)
                found.append(_submitted(gateway, key, one, ids, card, request))
    except BaseException:
        for one in found:
            abandon(gateway, one, "another choice of its request was refused")
        raise
    return found


def abandon(gateway: Gateway, sent: Sent, why: str) -> None:
    """Cancels a job that nobody waits for any more. Blocks."""
    error = report_of(CancelledError(f"job {sent.job.id} was cancelled: {why}"))
    with suppress(IllegalStepError, NoSuchError):
        gateway.ledger.step(sent.job.id, Cancel(encode(error, "json")), gateway.clock())


def _submitted(
    gateway: Gateway, key: Key, asked: Asked, ids: tuple[int, ...], card: ModelCard, request: str
) -> Sent:
    most = _most(gateway, key, asked, len(ids), card)
    how = generation_of(asked, card, most)
    graph, sent, stream = _graph(gateway, key, asked, most, len(ids), card)
    named = {node.key: node for node in graph.nodes if isinstance(node, Const)}
    constants = {name: frames.digest(sent[name]) for name in named if name in sent}
    absent = sorted(named.keys() - sent.keys() - asked.constants.keys())
    if absent:
        odd("weft.constants", f"the graph names a constant {absent[0][:60]!r} that is not given")
    data = b"".join(one.to_bytes(8, "little") for one in ids)
    tensors = {"input_ids": Frame("int64", (1, len(ids)), data)}
    tensors |= {constants[name]: sent[name] for name in constants}
    submit = Submit(
        protocol=PROTOCOL,
        request_id=secrets.token_hex(16),
        model=asked.model,
        fingerprint=card.info.fingerprint,
        graph=graph,
        inputs=LanguageInputs(given=("input_ids",)),
        constants={**{n: d for n, d in asked.constants.items() if n in named}, **constants},
        tensors=frames.write(tensors),
        strict=False,
        generation=how,
    )
    job, _ = accept_submit(gateway, key, submit, request)
    return Sent(job, ids, most, frozenset(how.eos_token_id or ()), stream)


def _most(gateway: Gateway, key: Key, asked: Asked, begun: int, card: ModelCard) -> int:
    """How many tokens are to be generated: without a word what is usual, where there may be as
    many, or else as many as there may be."""
    limit = limits_for(gateway, key).new_tokens
    if asked.most is not None:
        if asked.most > limit:
            raise too_much("new_tokens", limit, f"{asked.most} tokens are asked for")
        _check_recorded(asked, asked.most)
        return asked.most
    least, positions = min(limit, asked.usual or limit), _positions(card)
    if positions is None:
        return least
    if positions > begun:
        return min(least, positions - begun)
    if card.positions is not None and asked.usual is None:
        odd("messages", f"the prompt has {begun} tokens, the model {card.positions} positions")
    return least  # the checker says whether the model goes on beyond what it was made for


def _positions(card: ModelCard) -> int | None:
    """Those that the model was made for. None: nobody says."""
    made_for = card.config.get("max_position_embeddings")
    return card.positions or (made_for if type(made_for) is int and made_for > 0 else None)


def _check_recorded(asked: Asked, most: int) -> None:
    recorded = asked.recorded
    if recorded is not None and recorded.max_new_tokens not in (None, most):
        odd(
            "max_tokens",
            f"weft.graph was recorded for {recorded.max_new_tokens} new tokens, not {most}: it "
            "names their steps one by one",
            "leave max_tokens out, or record it anew",
        )


# -- how tokens are chosen ------------------------------------------------------------------------


def generation_of(asked: Asked, card: ModelCard, most: int) -> Generation:
    """The options: what the request says, and what it has no word for as the model's generation
    config has it; `top_k` is off where that does not name it. Raises `Refused`."""
    config = card.generation
    for name in ("num_beams", "num_beam_groups"):
        if config.get(name, 1) not in (None, 1):
            odd("model", f"the model's generation config says {name}, which is not offered")
    kept = {name: config[name] for name in Generation.__struct_fields__ if name in config}
    kept = {name: value for name, value in kept.items() if name not in _NOT_KEPT}
    if isinstance(kept.get("eos_token_id"), int):
        kept["eos_token_id"] = [kept["eos_token_id"]]
    draws = asked.temperature > 0
    chosen = {
        "top_k": None,
        **kept,
        "max_new_tokens": most,
        "do_sample": draws,
        "temperature": asked.temperature if draws else 1.0,
        "top_p": asked.top_p if draws else 1.0,
        "stop_strings": asked.stop or None,
        "seed": asked.seed if draws else None,
        "logits_to_keep": 0 if asked.echo and asked.tops is not None else 1,
    }
    try:
        return msgspec.convert(chosen, Generation)
    except msgspec.ValidationError as error:
        odd("model", f"the model's generation config has an option that is not offered: {error}")


_NOT_KEPT = frozenset(
    {"max_length", "min_length", "min_new_tokens", "use_cache", "logits_to_keep"}
    | {"output_attentions", "output_hidden_states"}
)
"""What a generation config says of lengths and outputs is not about tokens of this request."""


# -- the graph ------------------------------------------------------------------------------------


def _graph(
    gateway: Gateway, key: Key, asked: Asked, most: int, begun: int, card: ModelCard
) -> tuple[Graph, dict[str, Frame], int]:
    """Edit, the client's graph, and what tells the tokens; its constants; the stream's number."""
    whole: tuple[Graph, dict[str, Frame]] = Graph(nodes=()), {}
    if asked.edit is not None:
        edit, sent, made_for = edit_of(gateway, key, asked.edit)
        if made_for != card.info.fingerprint:
            raise OtherModelError(
                f"the edit {asked.edit!r} was made for another model than {asked.model}",
                fix="make it on this one: weft.LanguageModel(..., remote=True)",
            )
        whole = everywhere(edit, most), sent
    stream = 0
    if asked.graph is not None:
        _check_graph(asked.graph, asked)
        logs = [one.stream or 0 for one in every(asked.graph) if isinstance(one, Log)]
        stream = 1 + max(logs, default=0)
        own = asked.graph, asked.sent
        whole = joined(whole, own) if whole[0].nodes else own
    mine = telling(most, stream if asked.stream and asked.tops is None else None)
    if asked.tops is not None:
        scores = scoring(most, asked.tops, stream, begun if asked.echo else 0)
        mine = joined((scores, {}), (mine, {}))[0]
    if not whole[0].nodes:
        return mine, {}, stream
    graph, sent = joined(whole, (mine, {}))
    return graph, dict(sent), stream


def telling(steps: int, stream: int | None) -> Graph:
    """Saves the ids, and with `stream` hands out each token when the step after it takes it in;
    the last one is only among the ids."""
    nodes: list[Any] = []
    if stream is not None and steps > 1:
        taken = Read(site=INPUTS, leaf=LEAF, shape=(1, 1), dtype="int64")
        body = (taken, Log(parts=(Ref(0),), stream=stream))
        nodes.append(Loop(start=1, stop=steps, body=body))
    read = Read(site=Site("", RESULT), shape=(1, steps), dtype="int64")
    nodes += [read, Save(name=IDS, value=Ref(len(nodes)))]
    return Graph(nodes=tuple(nodes))


def _check_graph(graph: Graph, asked: Asked) -> None:
    try:
        check(graph)
    except GraphError as error:
        odd("weft.graph", error.message, error.fix)
    if max(invokes_of(graph), default=0):
        odd("weft.graph", "the graph is one of several inputs", "record it with one prompt")
    for node in graph.nodes:
        if isinstance(node, Save) and node.name in MINE:
            odd("weft.graph", f"the graph saves something as {node.name!r}, the server's own name")
    if any(_edits_ids(node) for node in every(graph)):
        for name, told in (("stream", asked.stream), ("logprobs", asked.tops is not None)):
            if told:
                odd(name, f"the graph changes the ids that go into the model: no {name} with it")


def _edits_ids(node: Any) -> bool:
    site = getattr(node, "site", None)
    if isinstance(node, Read) or site is None:
        return False
    return (site.path, site.port) == ("", "inputs")
