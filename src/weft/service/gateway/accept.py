"""From a submitted message to a job in the ledger. All of it blocks: it runs on a thread.

What can be known without torch is checked here: protocol, model, grammar, sizes, constants. What is
stored is the checked message written anew, without its constants, which lie beside it under their
digests and their owner's name. The object is written before the row that names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from weft.errors import (
    GraphError,
    MessageError,
    ModelNotReadyError,
    NoSuchError,
    OtherModelError,
    WeftError,
    WrongModelError,
)
from weft.graph.check import check
from weft.graph.frame import Frame
from weft.graph.node import Const, Graph
from weft.service.jobs.life import Job
from weft.service.jobs.usage import settings_for
from weft.service.store.ids import new_id
from weft.service.store.interface import Card, Key, QueueFullError
from weft.service.store.sessions import Session
from weft.settings import Settings
from weft.wire import frames
from weft.wire.messages import PROTOCOL, Inputs, LanguageInputs, Submit, encode, owner_of

from . import seats
from .auth import other_protocol
from .bodies import read
from .errors import Refused
from .limits import check_kept, check_seconds, check_stored, queue_full, too_much
from .state import Gateway, limits_for

RETRY_SECONDS = 5
"""What Retry-After says where the time is not known."""


def accept(gateway: Gateway, key: Key, data: bytes, form: str, asked: str = "") -> tuple[Job, bool]:
    """The job of a request, and whether it is new. `asked` is the id of the HTTP request. Raises
    `WeftError` or `Refused`."""
    submit = seats.whole(gateway, key.owner, submit_of(data, form))
    return accept_submit(gateway, key, submit, asked)


def accept_submit(gateway: Gateway, key: Key, submit: Submit, asked: str = "") -> tuple[Job, bool]:
    """The same of a message that was read."""
    try:
        return _accept(gateway, key, submit, asked)
    except (WeftError, Refused):
        # What was acknowledged once stays so, also when it would be refused by now.
        earlier = gateway.ledger.find(key.owner, submit.request_id)
        if earlier is None:
            raise
        return _same(earlier, digest_of(submit)), False


def _accept(gateway: Gateway, key: Key, submit: Submit, asked: str) -> tuple[Job, bool]:
    check_model(gateway, key, submit.model, submit.fingerprint)
    session = seats.check_seat(gateway, key.owner, submit)
    check_graph(submit.graph, limits_for(gateway, key).nodes)
    check_keep(gateway.settings, submit.keep_seconds)
    check_seconds(gateway, key)
    check_kept(gateway, key)
    tensors = frames.read(submit.tensors)[0] if submit.tensors else {}
    constants, inputs = sorted_out(submit, tensors)
    keep_constants(gateway, key, submit, constants)
    job = new_job(gateway, key, submit, session, asked)
    bare = replace(submit, tensors=frames.write(inputs) if inputs else b"")
    entered, new = enter(gateway, job, encode(bare))
    seats.entered(gateway, session, submit.seat.number if submit.seat else 0, entered)
    return entered, new


class _Head(Struct):
    protocol: int = PROTOCOL


def submit_of(data: bytes, form: str) -> Submit:
    """The message. One of another protocol is refused as such, whatever else is new in it."""
    try:
        submit = read(data, Submit, form)
    except MessageError:
        spoken = read(data, _Head, form).protocol
        if spoken != PROTOCOL:
            raise other_protocol(str(spoken)) from None
        raise
    if submit.protocol != PROTOCOL:
        raise other_protocol(str(submit.protocol))
    return submit


# -- the model ------------------------------------------------------------------------------------


def models_of(gateway: Gateway, key: Key | None) -> tuple[str, ...]:
    """The models of the server, as far as a key may know of them."""
    few = () if key is None else key.models
    return tuple(id for id in gateway.models if not few or id in few)


def check_model(
    gateway: Gateway, key: Key | None, model: str, fingerprint: str | None = None
) -> Card | None:
    """The model's card. None: nothing is known of it yet, and jobs wait for that.

    A model whose weights are not there has one as soon as the checker has looked at it.
    """
    models = models_of(gateway, key)
    if model not in models:
        served = ", ".join(models) or "none"
        raise WrongModelError(
            f"this server has no model {model[:80]!r}", fix=f"the models it has: {served}"
        )
    card = gateway.ledger.card(model)
    if card is None:
        return None
    if card.state == "failed":
        raise ModelNotReadyError(
            f"{model} could not be loaded by the server: {card.reason or 'no reason is known'}",
            fix="the server's operator has to look at it; weft.models() shows what is there",
        )
    if not card.card:
        return None
    if fingerprint is not None and fingerprint != card.fingerprint:
        raise OtherModelError(
            f"{model} on this server is not the model that this was recorded on: its modules or "
            "their source code differ",
            fix="take the modules from the server, with LanguageModel(..., remote=True), or "
            "install the versions of torch and transformers that it has",
        )
    return card


def check_keep(settings: Settings, seconds: float | None) -> float:
    """How long a job may be kept. Raises `Refused`."""
    if seconds is not None and seconds > settings.longest_keep_seconds:
        raise too_much(
            "longest_keep_seconds",
            settings.longest_keep_seconds,
            f"a job is to be kept for {seconds:g} s",
            "ask for less, and fetch the result before",
        )
    return settings.keep_seconds if seconds is None else seconds


# -- the graph ------------------------------------------------------------------------------------


def check_graph(graph: Graph, nodes: int) -> None:
    """Grammar and size."""
    if len(graph.nodes) > nodes:
        raise too_much(
            "nodes", nodes, f"the graph has {len(graph.nodes)} nodes", "record less in one block"
        )
    check(graph)


# -- tensors --------------------------------------------------------------------------------------


def sorted_out(
    submit: Submit, tensors: Mapping[str, Frame]
) -> tuple[dict[str, Frame], dict[str, Frame]]:
    """The tensors of a request: constants by digest, each proven, and inputs by name."""
    keys = {node.key for node in submit.graph.nodes if isinstance(node, Const)}
    if submit.seat is not None:
        keys = keys ^ submit.seat.uses.keys()  # values of the session stand for these
    if keys != submit.constants.keys():
        odd = sorted(keys ^ submit.constants.keys())[0]
        raise GraphError(f"constant {odd[:60]!r} is not both in the graph and in its constants")
    wanted = set(submit.constants.values())
    constants = {name: frame for name, frame in tensors.items() if name in wanted}
    for digest, frame in constants.items():
        if frames.digest(frame) != digest:
            raise MessageError(f"the tensor sent as {digest} has another digest")
    inputs = {name: frame for name, frame in tensors.items() if name not in wanted}
    _check_names(submit, inputs)
    return constants, inputs


def _check_names(submit: Submit, inputs: Mapping[str, Frame]) -> None:
    """No input is missing, and nothing is sent that nobody asked for."""
    each: list[set[str]] = [set() for _ in range(1 + len(submit.further))]
    for name in inputs:
        number, own = owner_of(name)
        each[number if number < len(each) else 0].add(own if number < len(each) else name)
    for number, one in enumerate((submit.inputs, *submit.further)):
        _check_names_of(one, each[number])


def _check_names_of(inputs: Inputs, given: set[str]) -> None:
    if isinstance(inputs, LanguageInputs):
        expected = set(inputs.given)
    else:
        expected = {f"in.{number}" for number in range(len(given))}
    if expected != given:
        odd = sorted(expected ^ given)[0]
        raise MessageError(
            f"tensor {odd[:80]!r} is not both among the inputs and in what was sent for them"
        )


def constant_name(owner: str, digest: str) -> str:
    """Where a constant lies: beside nobody else's, so that a digest tells strangers nothing."""
    return f"constants/{owner}/{digest}"


def keep_constants(gateway: Gateway, key: Key, submit: Submit, sent: Mapping[str, Frame]) -> None:
    """Stores what was sent; the others must be there already."""
    owner = key.owner
    absent = missing(gateway, owner, set(submit.constants.values()) - sent.keys())
    if absent:
        error = NoSuchError(
            f"{len(absent)} of the graph's constants are not on the server",
            fix="upload them with PUT /api/constants/DIGEST, then send this again",
        )
        raise Refused(error, 409, missing=absent)
    for digest, frame in sent.items():
        name = constant_name(owner, digest)
        if not gateway.objects.touch(name):
            file = frames.write({"x": frame})
            check_stored(gateway, key, len(file))
            gateway.objects.put(name, file)


def missing(gateway: Gateway, owner: str, digests: set[str]) -> tuple[str, ...]:
    """Those that the owner has not got here. The others count as used now."""
    there = gateway.objects.touch
    return tuple(sorted(one for one in digests if not there(constant_name(owner, one))))


# -- the job --------------------------------------------------------------------------------------


def new_job(gateway: Gateway, key: Key, submit: Submit, session: Session | None, asked: str) -> Job:
    now = gateway.clock()
    return Job(
        id=new_id(now),
        owner=key.owner,
        request_id=submit.request_id,
        asked=asked,
        digest=digest_of(submit),
        model=submit.model,
        created=now,
        since=now,
        look=submit.look,
        weight=key.weight,
        limits=key.limits,
        nodes=len(submit.graph.nodes),
        constants=tuple(sorted(set(submit.constants.values()))),
        session="" if session is None else session.id,
        after=None if session is None else session.job,
        keep=submit.keep_seconds,
    )


def digest_of(submit: Submit) -> str:
    """What makes two requests the same, whether or not constants travelled with them."""
    held = set(submit.constants.values())
    tensors = frames.read(submit.tensors)[0] if submit.tensors else {}
    inputs = {name: frames.digest(frame) for name, frame in tensors.items() if name not in held}
    seen = hashlib.sha256(encode(replace(submit, tensors=b"")))
    seen.update(repr(sorted(inputs.items())).encode())
    return seen.hexdigest()


def enter(gateway: Gateway, job: Job, stored: bytes) -> tuple[Job, bool]:
    """Writes the request, then the row that names it. The second of two equal ones finds the
    first one's job, and takes its own object away again."""
    name, job = f"submits/{job.id}", replace(job, request_bytes=len(stored))
    gateway.objects.put(name, stored, durable=False)  # the row that names it comes next
    entered = False
    most = settings_for(gateway.settings, job.limits).queued_jobs
    try:
        found, entered = gateway.ledger.submit(job, most)
    except QueueFullError:
        raise queue_full(gateway, job.model, most) from None
    finally:
        if not entered:
            gateway.objects.delete(name)
    if not entered:
        return _same(found, job.digest), False
    return found, True


def _same(earlier: Job, digest: str) -> Job:
    if earlier.digest != digest:
        error = MessageError(
            f"the request id {earlier.request_id} was used for another request",
            fix="give each request an id of its own",
        )
        raise Refused(error, 409)
    return earlier
