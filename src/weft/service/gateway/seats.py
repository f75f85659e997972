"""What a request within a session has to say, and the sessions that the gateway may tell of.

A session is its owner's alone: to anybody else it is not there. A graph that it has sent before may
come as its hash (`Seat.same`); graphs are remembered in this process (`graphs`), and asked for
again where they are not any more.
"""

from __future__ import annotations

from msgspec.structs import replace

from weft.errors import MessageError, NoSuchError, SessionLostError
from weft.service.jobs.life import Job
from weft.service.store.sessions import Session
from weft.wire.messages import Submit

from .errors import Refused
from .state import Gateway


def find(gateway: Gateway, owner: str, id: str) -> Session:
    session = gateway.ledger.session(id)
    if session is None or session.owner != owner:
        raise NoSuchError("there is no such session", fix="open one: with model.session(): ...")
    return session


def refuse_over(gateway: Gateway, session: Session) -> None:
    if session.over(gateway.clock()):
        raise SessionLostError(
            f"the session is over: {_why(session, gateway)}",
            fix="open a new one and begin again; what was saved is there",
        )


def _why(session: Session, gateway: Gateway) -> str:
    if session.ended is not None:
        return "it was closed"
    return (
        f"nothing was heard of its client for {gateway.settings.session_seconds:g} s "
        "(session_seconds)"
    )


def request_id(session: str, number: int) -> str:
    """What a request of a session is called."""
    return f"{session}-{number}"


def whole(gateway: Gateway, owner: str, submit: Submit) -> Submit:
    """The request with its graph, where it came as a hash. `Refused` (409) where none is known."""
    seat = submit.seat
    if seat is None:
        return submit
    find(gateway, owner, seat.id)
    if seat.same is None:
        gateway.graphs.keep(seat.id, submit.graph)
        return submit
    if submit.graph.nodes:
        raise MessageError("a request names an earlier graph, and has one itself")
    graph = gateway.graphs.find(seat.id, seat.same)
    if graph is None:
        error = NoSuchError("the graph is not known any more", fix="send the whole request")
        raise Refused(error, 409, missing=(seat.same,))
    return replace(submit, graph=graph, seat=replace(seat, same=None))


def check_seat(gateway: Gateway, owner: str, submit: Submit) -> Session | None:
    """The session of a request, of which it is the next one."""
    seat = submit.seat
    if seat is None:
        return None
    session = find(gateway, owner, seat.id)
    refuse_over(gateway, session)
    if session.model != submit.model:
        raise MessageError("the session is of another model", fix="open one for this model")
    if submit.request_id != request_id(seat.id, seat.number):
        raise MessageError("a request of a session is called after its number")
    if seat.number != session.last + 1 and gateway.ledger.find(owner, submit.request_id) is None:
        raise MessageError(
            f"request {seat.number} of the session came after request {session.last}",
            fix="number them one after another",
        )
    late = [one for one in seat.uses.values() if one.number >= seat.number]
    if late or any(one.number >= seat.number for one in seat.drops):
        raise MessageError("a request uses a value of a later one")
    return session


def entered(gateway: Gateway, session: Session | None, number: int, job: Job) -> None:
    """The request is in the ledger: its session goes on from there."""
    if session is not None:
        until = gateway.clock() + gateway.settings.session_seconds
        gateway.ledger.seat(session.id, number, job.id, until)
