"""`Tracer`: one `with model.trace(...)` block, from recording to results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from weft.client.backend import Reply, Request
from weft.client.core import Traffic
from weft.errors import LookError, NotFinishedError, RemoteLookWarning, WeftError
from weft.families.call import ModelCall
from weft.graph.node import Const, Graph
from weft.graph.passes import asks_nothing, prune
from weft.graph.site import Site
from weft.run.price import Price, price
from weft.signatures.later import overwritten_by
from weft.signatures.signature import Signature
from weft.trace.lines import user_line, where
from weft.trace.recorder import Recorder

from .experiment import Experiment
from .where import Place

if TYPE_CHECKING:
    from .handle import Handle


class UnusedEditWarning(UserWarning):
    """An edit that cannot change anything that the block brings back."""


class Tracer:
    """What `model.trace(...)` gives. Its block is recorded, and runs when it closes."""

    def __init__(
        self,
        handle: Handle,
        call: ModelCall,
        place: Place,
        *,
        seed: int | None = None,
        device: torch.device | None = None,
        blocking: bool = True,
        runs: bool = True,
    ) -> None:
        self._handle = handle
        self._call = call
        self._place = place
        self._blocking = blocking
        self._runs = runs
        self._signature: Signature = handle._signatures.for_call(call.args, call.kwargs)
        self._device = device
        prefix = self._prefix if blocking else _refuse_look
        self._recorder = Recorder(
            self._signature,
            run_prefix=prefix if runs else None,
            device=device,
            was_tuple=handle._was_tuple,
            seed=seed,
            owner=handle._root,
        )
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

    def __enter__(self) -> Tracer:
        self._line = user_line()
        self._recorder.__enter__()
        return self

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

    async def __aenter__(self) -> Tracer:
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
        graph, constants = self._frozen = recorder.freeze()
        if not self._runs:
            recorder.fail("the block was recorded without being run")
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
        self.results = self._recorder.deliver(reply.saved)

    def _sent(self, job: Any) -> None:
        """The block is on its way: its handles wait for the job."""
        self.job = job
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
        if not isinstance(failure, WeftError) or failure.line is None:
            failure.add_note(f"while running the block at {where(self._line)}")

    def _note(self, reply: Reply) -> None:
        self.stages = dict(reply.stages)
        self.traffic.up += reply.up
        self.traffic.down += reply.down

    def _request(
        self, graph: Graph, constants: dict[str, torch.Tensor], look: bool = False
    ) -> Request:
        if self._place.kind != "here":
            graph, constants = lean(graph, constants)  # what nobody needs does not travel
        return Request(
            graph,
            constants,
            self._call.args,
            self._call.kwargs,
            device=self._device,
            overwritten=overwritten_by(self._signature),
            look=look,
        )

    def _prefix(self, graph: Graph, constants: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Runs what is recorded so far, for a number that the block needs."""
        if self._place.kind == "server":
            self._announce()
        reply = self._place.backend.run(self._request(graph, constants, look=True))
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

    # -- what the block may ask --------------------------------------------------------------

    @property
    def where(self) -> str:
        """Where the block runs: `here`, `here, as a server would`, or a server's address."""
        return self._place.text

    @property
    def result(self) -> Any:
        """The model's own result, as a site: `tracer.result.logits.save()`."""
        return self._handle.output

    def log(self, *parts: Any) -> None:
        """Prints text and values when the values exist."""
        self._recorder.log(parts)

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Real tokens per row; None where the input is not tokens."""
        return self._call.lengths

    @property
    def mask(self) -> torch.Tensor:
        """`[batch, pos]`, True at real tokens."""
        call = self._call
        if call.mask is not None:
            return call.mask
        if call.batch is None or call.length is None:
            raise WeftError("this input has no tokens, so it has no mask")
        return torch.ones(call.batch, call.length, dtype=torch.bool)

    @property
    def graph(self) -> Experiment:
        """The experiment recorded so far; after the block, all of it. A copy, to keep."""
        if self._frozen is not None:
            graph, constants = self._frozen
        else:
            graph, constants = self._recorder.graph(), self._recorder.clients.constants
        self._recorder.clients.check()
        graph, constants = lean(graph, constants)
        return Experiment(graph, {key: tensor.clone() for key, tensor in constants.items()})

    def plan(self) -> Price:
        """What the recorded graph costs, before it runs: sites, operations, bytes, peak memory."""
        graph = self._frozen[0] if self._frozen is not None else self._recorder.graph()
        return price(prune(graph), firing_index(self._signature))


def lean(
    graph: Graph, constants: Mapping[str, torch.Tensor]
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The graph without what nothing needs, and the constants that are left."""
    graph = prune(graph)
    kept = [node.key for node in graph.nodes if isinstance(node, Const)]
    return graph, {key: constants[key] for key in kept}


def firing_index(signature: Signature) -> Callable[[Site], int]:
    """The position of a site in the firing order."""
    return lambda site: signature.site(site.path, site.port, site.call).index


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
