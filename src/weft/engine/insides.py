"""Sources between a server and its clients: `source_text` tells one, `listing_of` reads it.

What is told is the text of a function and names; what is read is shown to people and compared, and
is never run.
"""

from __future__ import annotations

import re

from weft.errors import MessageError, SourceError
from weft.families.call import ModelCall
from weft.sources.listing import Listing, Operation
from weft.wire import frames
from weft.wire.messages import LanguageInputs, SourceQuery, SourceText
from weft.wire.reports import escaped

from .inputs import call_of
from .known import Known
from .turns import Forward, flags_of, turns_for

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_LONGEST = 1 << 20


def source_text(known: Known, query: SourceQuery) -> SourceText:
    """The answer to a question about a source.

    Raises `SourceError` where there is none to show, `UnknownPathError` for what is not there.
    """
    inside, call = known.signatures.inside, _call(known, query)
    listing = inside.listing(query.path, query.inside, call)
    if query.sites and call is None:
        raise SourceError("what operations look like is known for a call only")
    data = b""
    if query.sites and isinstance(call, Forward):
        data = call.answer(inside.of(query.path, query.inside))
    elif query.sites and call is not None:
        data = inside.answer(query.path, query.inside, call)
    return SourceText(
        digest=listing.digest,
        text=listing.text,
        operations=tuple([(one.name, one.line, one.tail) for one in listing.operations]),
        kin=tuple(inside.kin(query.path, query.inside)),
        data=data,
    )


def _call(known: Known, query: SourceQuery) -> ModelCall | Forward | None:
    if query.inputs is None:
        return None
    given, _ = frames.read(query.tensors) if query.tensors else ({}, {})
    call = call_of(query.inputs, given, known)
    if query.turn is None:
        return call
    if known.facts is None or not isinstance(query.inputs, LanguageInputs):
        raise MessageError("only a language model has turns of a generation")
    turns = turns_for(known.signatures, known.facts)
    return Forward(turns, call, flags_of(query.inputs.options), int(query.turn == "next"))


def listing_of(told: SourceText) -> Listing:
    """A source that was told. Raises `MessageError` for what is none; its text is safe to print."""
    lines = told.text.count("\n") + 1
    if len(told.text) > _LONGEST or len(told.operations) > _LONGEST:
        raise MessageError("a source is too long")
    for name, line, tail in told.operations:
        if not _NAME.fullmatch(name) or not 0 <= line < lines:
            raise MessageError("a source has an operation that cannot be")
        if tail and not _NAME.fullmatch(tail):
            raise MessageError("a source has an operation that cannot be")
    text = "\n".join([escaped(line, keep="\t") for line in told.text.split("\n")])
    return Listing(told.digest, text, tuple([Operation(*one) for one in told.operations]))
