"""`Block`: the life of one `with model.trace(...)` block, from recording to results.

It opens a recorder, has a graph of it when the block is left, sends that where it shall run, and
hands out what comes back. What a user can say inside is `Tracer`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch

from weft.client.backend import Reply, Request
from weft.client.core import Traffic
from weft.errors import (
    FailedRunError,
    LookError,
    NotFinishedError,
    RemoteLookWarning,
)
from weft.families.call import ModelCall
from weft.graph.folding import folded
from weft.graph.node import Const, Graph
from weft.graph.passes import asks_nothing, prune, silent
from weft.graph.site import Site
from weft.run.turns import check_turns
from weft.signatures.later import Later, overwritten_by
from weft.signatures.signature import Signature
from weft.trace.away import parted
from weft.trace.carry import Carry
from weft.trace.eager import EagerRecorder
from weft.trace.lines import at_line, user_line, where
from weft.trace.recorder import Recorder

from .eager import aside
from .edits import begin
from .stream import Stream
from .where import Place

if TYPE_CHECKING:
    from .handle import Handle


class UnusedEditWarning(UserWarning):
    """An edit that cannot change anything that the block brings back."""


class Block:
    """One block: recorded, run when it closes, its handles filled. See the module's text."""

    _carry: Carry | None = None  # in a session

    def __init__(
        self,
        handle: Handle,
        call: ModelCall | None,
        place: Place,
        *,
        defaults: Mapping[str, Any] | None = None,
        alone: bool = False,
        seed: int | None = None,
        device: torch.device | None = None,
        blocking: bool = True,
        runs: bool = True,
        grad: bool = False,
        eager: bool = False,
    ) -> None:
        self._handle = handle
        self._calls: list[ModelCall] = []
        self._signatures: list[Signature] = []
        self._defaults = dict(defaults or {})  # of every invoke
        self._whole: int | None = None
        self._whole_options: Any = None
        self._place = place
        self._blocking = blocking
        self._runs = runs
        self._alone = alone
        self._grad = grad
        self._device = device
        prefix = self._prefix if blocking else _refuse_look
        kind = EagerRecorder if eager else Recorder
        self._recorder: Recorder = kind(
            None if call is None else self._seen(call),
            run_prefix=prefix if runs else None,
            device=device or _results_on(handle, place),
            was_tuple=handle._was_tuple,
            seed=seed,
            owner=handle._root,
            grad=grad,
        )
        self._recorder.calls, self._recorder.root = self._calls, handle._method
        if call is None and handle._takes_nothing:
            self._recorder.sites.alone = self._without_input  # type: ignore[union-attr]
        self.stream = Stream(self._recorder)
        """`tracer.stream(x)` hands values out as they come to be: see `Stream`."""
        self._frozen: tuple[Graph, dict[str, torch.Tensor]] | None = None
        self._announced: set[tuple[str, int]] = set()
        self.ended: Site | None = None
        """The site at which the forward pass could stop; None if it ran to the end."""
        self.results: dict[str, Any] = {}
        """What was saved, by name, once the block has run."""
        self.stages: dict[str, float] = {}
        """Seconds that each stage took on the server, and the `round trip` as seen from here."""
        self.traffic = Traffic()
        """Bytes that went to the server and came from it, looks included."""
        self.job: Any = None
        """With `blocking=False`: the `Job` (in an `async with` block the `AsyncJob`)."""

    # -- the block ---------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._line = user_line()
        self._recorder.__enter__()
        try:
            self._begin()
        except BaseException as failure:
            self._fail(failure)
            raise
        return self

    def _begin(self) -> None:
        """What the edits of the model do to the input that is meant now."""
        if self._handle._edits and self._recorder.invoke is not None:
            begin(self._recorder, self._handle._edits)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            request = self._closed(error)
            if request is None:
                return
            backend: Any = self._place.backend
            reply = backend.run(request) if self._blocking else backend.submit(request)
        except BaseException as failure:
            self._fail(failure)
            raise
        self._arrived(reply) if self._blocking else self._sent(reply)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """As `__exit__`; a server is awaited without blocking the event loop."""
        if self._place.kind != "server":
            self.__exit__(kind, error, trace)
            return
        try:
            request = self._closed(error)
            if request is None:
                return
            backend: Any = self._place.backend
            ask = backend.arun if self._blocking else backend.asubmit
            reply = await ask(request)
        except BaseException as failure:
            self._fail(failure)
            raise
        self._arrived(reply) if self._blocking else self._sent(reply)

    def _closed(self, error: BaseException | None) -> Request | None:
        """Ends the recording; gives what is to be run, if anything is."""
        recorder = self._recorder
        recorder.__exit__()
        if error is not None:
            recorder.fail(f"{type(error).__name__}: {error}")
            return None
        if not self._calls:
            self._without_input()  # or it says what is missing
        graph, constants = self._frozen = recorder.freeze()
        if self._carry is not None:
            graph = recorder.graph(self._carry.saves())
        if len(self._calls) > 1:
            check_turns(graph, self._index())
        if not self._runs:
            recorder.fail(_scanned())
            return None
        self._warn_unused()
        request = self._request(graph, constants)
        if self._blocking and asks_nothing(request.graph):
            self._arrived(Reply({}))
            return None
        return request

    def _arrived(self, reply: Reply) -> None:
        """The block has run: its handles become tensors."""
        self.ended = reply.ended
        self._note(reply)
        self._left(reply.number)
        self.results = self._recorder.deliver(reply.saved)
        if self._carry is not None:
            self._carry.deliver(reply.saved)

    def _left(self, number: int | None) -> None:
        """In a session on a server: what stays there has a name now."""
        space = self._recorder.space
        if self._carry is not None and space is not None and number is not None:
            self._carry.left(space, number)
            if self._frozen is not None:  # handles lead to the recorder: it must not keep values
                self._frozen = self._frozen[0], dict(self._frozen[1])
                self._recorder.clients.leave()

    def _sent(self, job: Any) -> None:
        """The block is on its way: its handles wait for the job."""
        self.job = self.stream.job = job
        self._left(getattr(self._place.backend, "number", None))
        self._recorder.fail(
            NotFinishedError(
                f"this value has no numbers yet: its block was sent as job {job.id}",
                fix="wait for it: tracer.job.result()",
            )
        )
        job.fills(self._filled, self._fail)

    def _filled(self, reply: Reply) -> dict[str, Any]:
        """What the job brought."""
        self._recorder.failure = None
        self._arrived(reply)
        return self.results

    def _fail(self, failure: BaseException) -> None:
        if self._recorder.open:  # Ctrl-C at a moment before it was closed
            self._recorder.__exit__()
        self._recorder.fail(f"{type(failure).__name__}: {failure}")
        at_line(failure, self._line, "while running the block at")

    def _note(self, reply: Reply) -> None:
        self.stages = dict(reply.stages)
        self.traffic.up += reply.up
        self.traffic.down += reply.down

    def _request(
        self, graph: Graph, constants: dict[str, torch.Tensor], look: bool = False
    ) -> Request:
        if self._place.kind != "here":
            graph, constants = lean(graph, constants)  # what nobody needs does not travel
        call, *further = self._calls
        stays = self._carry is not None and not look
        constants, uses = parted(constants)
        return Request(
            graph,
            constants,
            call.args,
            call.kwargs,
            device=self._device,
            overwritten=self._later(),
            look=look,
            further=tuple([(one.args, one.kwargs) for one in further]),
            alone=self._alone,
            grad=self._grad,
            merger=self._handle._merger() if further else None,
            listen=None if look else self.stream.listen,
            uses=uses,
            keeps=self._carry.stays() if stays else frozenset(),  # type: ignore[union-attr]
        )

    def _prefix(self, graph: Graph, constants: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Runs what is recorded so far, for a number that the block needs."""
        if len(self._calls) > 1:
            check_turns(graph, self._index())
        if self._place.kind == "server":
            self._announce()
        request = self._request(silent(graph), constants, look=True)
        here = self._place.kind == "here"
        try:
            with aside(self._handle._weights) if here else nullcontext():
                reply = self._place.backend.run(request)
        except Exception as failure:
            at_line(failure, user_line(), "while running what the block has recorded so far, for")
            raise
        self._note(reply)
        return reply.saved

    def _announce(self) -> None:
        """Says that a look goes to a server: once for each of the user's lines."""
        line = user_line()
        if line in self._announced:
            return
        self._announced.add(line)
        text = (
            f"a number is needed here, so what the block has recorded so far goes to "
            f"{self._place.text} for it; torch.where and .save() need no extra round trip"
        )
        warnings.warn_explicit(text, RemoteLookWarning, *line, registry=_WARNED)

    def _warn_unused(self) -> None:
        for line in self._recorder.unused_edits():
            _warn(f"the edit at {line} fires after everything that is saved: it has no effect")

    def _index(self) -> Callable[[Site], int]:
        """When a site fires."""
        return firing_index(self._signatures)

    def _later(self) -> Later:
        """What happens to sites later on."""
        return overwritten_by(*self._signatures)

    # -- its inputs --------------------------------------------------------------------------

    def _seen(self, call: ModelCall) -> Signature:
        """A new call of this block; what its sites look like."""
        handle = self._handle
        if self._runs and self._place.kind == "here":
            call = call.to(handle._weights.device())
        signature = handle._signatures.for_call(call.args, dict(call.kwargs))
        self._calls.append(call)
        self._signatures.append(signature)
        return signature

    def _add(self, call: ModelCall, how: Any = None) -> int:
        """A new invoke; its number. `how` its tokens are chosen a generation knows."""
        return self._recorder.invokes.add(self._seen(call))  # type: ignore[union-attr]

    def _without_input(self) -> None:
        """The block is one call without an input, where the model can be called so."""
        number = self._add(self._handle._prepare((), self._defaults))
        self._recorder.invokes.stay(number)  # type: ignore[union-attr]
        self._begin()


def lean(
    graph: Graph, constants: Mapping[str, torch.Tensor]
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The graph without what nothing needs, and the constants that are left."""
    graph = folded(prune(graph))
    kept = [node.key for node in graph.nodes if isinstance(node, Const)]
    return graph, {key: constants[key] for key in kept}


def firing_index(signatures: Sequence[Signature]) -> Callable[[Site], int]:
    """The position of a site in the firing order of its invoke."""
    return lambda site: signatures[site.invoke].site(site.path, site.port, site.call).index


def _scanned() -> FailedRunError:
    return FailedRunError(
        "this value has no numbers: its block was only scanned",
        fix="use model.trace(...), which runs the block",
    )


def _results_on(handle: Handle, place: Place) -> torch.device | None:
    """Where results of a run in this process lie: with the weights. None: on the CPU."""
    weights = handle._weights
    if place.kind != "here" or not weights.are_loaded:
        return None
    found = weights.device()
    return None if found.type == "meta" else found


def _refuse_look(graph: Graph, constants: dict[str, torch.Tensor]) -> dict[str, Any]:
    raise LookError(
        "a number is needed here, and this block is only sent, not waited for",
        line=where(user_line()),
        fix="leave out blocking=False, or keep the branch in the graph with torch.where",
    )


_WARNED: dict[Any, Any] = {}
"""Lines that were warned, so that each is once."""


def _warn(message: str) -> None:
    file, line = user_line()
    warnings.warn_explicit(message, UnusedEditWarning, file, line, registry=_WARNED)
