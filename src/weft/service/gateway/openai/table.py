"""The routes in OpenAI's form, and those of saved edits, which they name."""

from __future__ import annotations

from weft.wire.messages import EditInfo, EditList

from .. import edits
from ..entry import BODY, Entry
from . import routes

_NOT_EDIT = {400: "this cannot be a name", 404: "there is no such edit of yours"}
_OPENAI = {
    **BODY,
    400: "a field is unknown, not offered or does not fit; `param` names it",
    404: "the server has no such model, or you have no such edit",
    409: "another model; or the job was cancelled",
    422: "the model or the graph does not take it",
    429: "a limit of the key; `Retry-After` says when to come back",
    503: "the model is not ready, or the server is about to stop",
}

ROUTES: tuple[Entry, ...] = (
    Entry(
        method="GET",
        path="/api/edits",
        handler=edits.listing,
        text="Your saved edits, by name.",
        gives=EditList,
        scope="read",
    ),
    Entry(
        method="PUT",
        path="/api/edits/{name}",
        handler=edits.save,
        text="Saves the edits of a model under a name: a file of `edited.save_edits(path)`.",
        takes=edits.MEDIA,
        gives=EditInfo,
        statuses={
            201: "it is there now",
            409: "another edit has this name",
            422: "it is no file of edits",
            **BODY,
        },
    ),
    Entry(
        method="GET",
        path="/api/edits/{name}",
        handler=edits.fetch,
        text="A saved edit, as it was sent.",
        gives=edits.MEDIA,
        statuses=_NOT_EDIT,
        scope="read",
    ),
    Entry(
        method="DELETE",
        path="/api/edits/{name}",
        handler=edits.delete,
        text="Deletes a saved edit.",
        status=204,
        statuses=_NOT_EDIT,
    ),
    Entry(
        method="GET",
        path="/v1/models",
        handler=routes.models,
        text="The models, in OpenAI's form.",
        gives="application/json",
        protocol=False,
        scope="read",
    ),
    Entry(
        method="GET",
        path="/v1/models/{model}",
        handler=routes.model,
        text="One model, in OpenAI's form.",
        gives="application/json",
        statuses={404: "the server has no such model"},
        protocol=False,
        scope="read",
    ),
    Entry(
        method="POST",
        path="/v1/completions",
        handler=routes.completions,
        text="Goes on with a text, in OpenAI's form; `weft` is an extension field.",
        takes="application/json",
        gives="application/json",
        statuses=_OPENAI,
        protocol=False,
    ),
    Entry(
        method="POST",
        path="/v1/chat/completions",
        handler=routes.chats,
        text="Answers a chat, in OpenAI's form; `weft` is an extension field.",
        takes="application/json",
        gives="application/json",
        statuses=_OPENAI,
        protocol=False,
    ),
)
