"""`Invoke`: one of several inputs of a block, `with tracer.invoke(prompt):`.

with model.trace() as tracer:
    with tracer.invoke("The Eiffel Tower is in"):
        h = model.transformer.h[5].output.save()          # as it is when this prompt runs alone
    with tracer.invoke(["Rome", "The Colosseum is in"]):
        model.transformer.h[5].output[:, -1] = h[:, -1]   # values flow between invokes
    with tracer.invoke():                                 # all prompts, as trace([...]) shows them
        logits = model.lm_head.output.save()
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from weft.errors import RecordingError, WeftError
from weft.families.call import ModelCall
from weft.families.together import Rows, places_in
from weft.signatures.rows import dims_of
from weft.trace.lines import user_line, where
from weft.trace.sites import LeafState

if TYPE_CHECKING:
    from .tracer import Tracer


class Invoke:
    """One input of a block, and its sites. What it gives is what `tracer` gives for one input."""

    def __init__(
        self, tracer: Tracer, call: ModelCall | None, options: dict[str, Any], how: Any = None
    ) -> None:
        self._tracer = tracer
        self._call = call
        self._options = options
        self._how = how
        self._scope: AbstractContextManager[None] | None = None

    def __enter__(self) -> Invoke:
        if self._scope is not None:
            raise self._tracer._recorder.refusal(
                "an invoke was opened a second time", "call tracer.invoke(...) again"
            )
        tracer = self._tracer
        begins = self._call is not None or self._is_first_of_a_generation()
        number = self._whole() if self._call is None else tracer._add(self._call, self._how)
        self._call = tracer._calls[number]
        scope = tracer._recorder.invokes.opened(number)  # type: ignore[union-attr]
        scope.__enter__()
        try:
            if begins:
                tracer._begin()
        except BaseException:
            scope.__exit__(None, None, None)
            raise
        self._scope = scope
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._scope is not None
        self._scope.__exit__(*error)

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Real tokens per row; None where the input is not tokens."""
        return None if self._call is None else self._call.lengths

    @property
    def mask(self) -> torch.Tensor:
        """`[batch, pos]`, True at real tokens."""
        return mask_of(self._call)

    @property
    def result(self) -> Any:
        """The model's own result for this input, as a site."""
        return self._tracer.result

    # -- all prompts ---------------------------------------------------------------------------

    def _is_first_of_a_generation(self) -> bool:
        """Whether edits of the model are to be recorded for the batch of all prompts. In a single
        forward what the others have changed, edits of the model too, is in its rows already."""
        return self._tracer._recorder.steps is not None and self._tracer._whole is None

    def _whole(self) -> int:
        """The number of the invoke of all prompts, with the edits of theirs in their rows."""
        tracer = self._tracer
        if tracer._whole is None:
            if not tracer._calls:
                raise tracer._recorder.refusal(
                    "an empty invoke shows all prompts of the block, and there is none yet",
                    "open it after the others: it comes last",
                )
            recorder = tracer._recorder
            if recorder.steps is not None and recorder.edits:
                raise recorder.refusal(
                    "an empty invoke of a generation shows what all prompts generate as they are, "
                    "and this block changes some of them",
                    "leave out the empty invoke, and save in the others",
                )
            calls = list(tracer._calls)
            call = tracer._handle._together(calls, self._options)
            tracer._whole = number = tracer._add(call, self._how)
            recorder.invokes.shown = number  # type: ignore[union-attr]
            if recorder.steps is None:
                _Replay(tracer, calls, call).show(number)
        elif (self._options, self._how) != tracer._whole_options:
            raise tracer._recorder.refusal(
                "two empty invokes show the same pass, so they have the same options",
                "give the options to the first of them",
            )
        tracer._whole_options = self._options, self._how
        return tracer._whole


class _Replay:
    """What the invokes have changed, shown in the batch of all of them."""

    def __init__(self, tracer: Tracer, calls: list[ModelCall], whole: ModelCall) -> None:
        self._recorder: Any = tracer._recorder
        self._places = places_in(calls)
        self._call = whole
        self._formulas = tracer._handle._formulas

    def show(self, number: int) -> None:
        recorder = self._recorder
        edits = list(recorder.invokes.edited())
        if not edits:
            return
        found = self._formulas(self._call)
        noted = len(recorder.edits)
        with recorder.invokes.opened(number):
            for leaf in edits:
                self._copy(leaf, found)
        del recorder.edits[noted:]  # they are no edits of the user's

    def _copy(self, leaf: LeafState, found: Any) -> None:
        """Copies what a leaf is in its own invoke to where it lies in the batch."""
        sites, site = self._recorder.sites, leaf.site.site
        there = sites.state(site.path, site.port, site.call)
        dims = None if found is None else dims_of(found[0], there.signature.index, leaf.leaf)
        target = there.tensors.get(leaf.leaf)
        index = None
        if dims is not None and target is not None:
            index = _part(dims, target.aval.shape, leaf.aval.shape, self._places[site.invoke])
        if index is None:
            raise RecordingError(
                f"the edit of {leaf} at {where(self._recorder.line_of(leaf.edited))} cannot be "
                "shown in the whole batch: it is not known where its rows lie there",
                line=where(user_line()),
                fix="leave out the empty invoke, and save in the others",
            )
        sites.read_leaf(target)[index] = sites.read_leaf(leaf)


def _part(dims: Any, whole: Any, own: Any, rows: Rows) -> tuple[slice, ...] | None:
    """The rows and positions of one invoke in a tensor of the whole batch."""
    if len(own) != len(whole):
        return None
    index = []
    for dim, size, part in zip(dims, whole, own, strict=True):
        if dim == ("B",) and part == rows.stop - rows.start:
            index.append(slice(rows.start, rows.stop))
        elif dim == ("S",) and part == rows.length:
            index.append(slice(size - part, size))  # padded on the left
        elif dim == () and part == size:
            index.append(slice(None))
        else:
            return None
    return tuple(index)


def mask_of(call: ModelCall | None) -> torch.Tensor:
    """`[batch, pos]`, True at real tokens."""
    if call is not None and call.mask is not None:
        return call.mask
    if call is None or call.batch is None or call.length is None:
        raise WeftError(
            "this input has no tokens, so it has no mask",
            fix="give masks of your own where the input is not tokens",
        )
    return torch.ones(call.batch, call.length, dtype=torch.bool)
