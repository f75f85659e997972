"""Saved edits: an owner's changes of models under names, for the routes in OpenAI's form.

A saved edit is a file of `edited.save_edits(path)`, kept as it came. It belongs to the owner of the
key; nobody else has it. It is kept until it is deleted, and what a name means never changes while
it is there.
"""

from __future__ import annotations

import re

from starlette.responses import Response

from weft.errors import GraphError, LimitError, MessageError, NoSuchError
from weft.graph.check import check
from weft.graph.everywhere import check_pure_edit
from weft.graph.frame import Frame
from weft.graph.node import Graph
from weft.service.store.interface import Key
from weft.wire.codec import decode_edits
from weft.wire.messages import EditInfo, EditList

from .bodies import Bound, answer, held
from .errors import Refused, trusted
from .limits import check_stored, too_much
from .state import Gateway, Visit, limits_for

MEDIA = "application/octet-stream"
MOST = 1000
"""Edits of one owner."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _place(owner: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise MessageError("an edit's name has up to 64 letters, digits, - and _")
    return f"edits/{owner}/{name}"


async def save(gateway: Gateway, visit: Visit) -> Response:
    bound = Bound(limits_for(gateway, visit.key).body_bytes, "body_bytes")
    async with held(gateway, visit.request, bound) as data:
        return await gateway.off(_saved, gateway, visit, data)


def _saved(gateway: Gateway, visit: Visit, data: bytes) -> Response:
    place = _place(visit.owner, visit.request.path_params["name"])
    graph, _, _ = opened(data)
    nodes = limits_for(gateway, visit.key).nodes
    if len(graph.nodes) > nodes:
        raise too_much("nodes", nodes, f"the edit has {len(graph.nodes)} nodes")
    if gateway.objects.size(place) is None:
        if len(gateway.objects.names(f"edits/{visit.owner}/")) >= MOST:
            raise Refused(LimitError(f"{MOST} edits are kept of one owner", fix="delete some"), 413)
        check_stored(gateway, visit.key, len(data))
        if gateway.objects.put(place, data):
            return answer(visit.request, _info(gateway, place), 201)
    if gateway.objects.get(place) != data:
        error = MessageError("another edit has this name", fix="delete it first, or take another")
        raise Refused(error, 409)
    return answer(visit.request, _info(gateway, place))


def fetch(gateway: Gateway, visit: Visit) -> Response:
    data = _data(gateway, visit.owner, visit.request.path_params["name"])
    return Response(data, media_type=MEDIA)


def delete(gateway: Gateway, visit: Visit) -> Response:
    name = visit.request.path_params["name"]
    _data(gateway, visit.owner, name)
    gateway.objects.delete(_place(visit.owner, name))
    return Response(status_code=204)


def listing(gateway: Gateway, visit: Visit) -> Response:
    names = gateway.objects.names(f"edits/{visit.owner}/")
    return answer(visit.request, EditList(edits=tuple(_info(gateway, one) for one in names)))


def _info(gateway: Gateway, place: str) -> EditInfo:
    return EditInfo(name=place.rpartition("/")[2], bytes=gateway.objects.size(place) or 0)


def _data(gateway: Gateway, owner: str, name: str) -> bytes:
    try:
        return gateway.objects.get(_place(owner, name))
    except KeyError:
        raise NoSuchError(
            f"there is no edit {name[:64]!r} of yours on this server",
            fix="GET /api/edits lists yours; PUT /api/edits/NAME saves one",
        ) from None


def opened(data: bytes) -> tuple[Graph, dict[str, Frame], str]:
    """Graph, constants, and the fingerprint of the model. Raises `GraphError`."""
    graph, sent, print_ = decode_edits(data)
    check(graph)
    check_pure_edit(graph)
    if not graph.nodes:
        raise GraphError("the file holds no edits", fix="make some: with model.edit(): ...")
    return graph, sent, print_


def edit_of(gateway: Gateway, key: Key, name: str) -> tuple[Graph, dict[str, Frame], str]:
    """A saved edit of the key's owner. Raises `NoSuchError`. Blocks."""
    data = _data(gateway, key.owner, name)
    with trusted():
        return opened(data)
