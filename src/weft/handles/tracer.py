"""`Tracer`: one `with model.trace(...)` block, from recording to results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from weft.client.backend import Reply, Request
from weft.client.core import Traffic
from weft.errors import (
    LookError,
    NotFinishedError,
    RemoteLookWarning,
    UnknownOptionError,
    WeftError,
)
from weft.families.call import ModelCall
from weft.graph.node import Const, Graph
from weft.graph.passes import asks_nothing, prune
from weft.graph.site import Site
from weft.run.price import Price, price
from weft.run.turns import check_turns
from weft.signatures.later import overwritten_by
from weft.signatures.signature import Signature
from weft.trace.caches import Cache, Spec, paths_of
from weft.trace.lines import user_line, where
from weft.trace.recorder import Recorder

from .experiment import Experiment
from .invoke import Invoke, mask_of
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
    ) -> None:
        self._handle = handle
        self._calls: list[ModelCall] = []
        self._signatures: list[Signature] = []
        self._defaults = dict(defaults or {})  # of every invoke
        self._whole: int | None = None
        self._whole_options: dict[str, Any] = {}
        self._place = place
        self._blocking = blocking
        self._runs = runs
        self._alone = alone
        self._grad = grad
        self._device = device
        prefix = self._prefix if blocking else _refuse_look
        self._recorder = Recorder(
            None if call is None else self._seen(call),
            run_prefix=prefix if runs else None,
            device=device,
            was_tuple=handle._was_tuple,
            seed=seed,
            owner=handle._root,
            grad=grad,
        )
        self._recorder.calls = self._calls
        if call is None and handle._takes_nothing:
            self._recorder.sites.alone = self._without_input  # type: ignore[union-attr]
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
        if not self._calls:
            self._without_input()  # or it says what is missing
        graph, constants = self._frozen = recorder.freeze()
        if len(self._calls) > 1:
            check_turns(graph, firing_index(self._signatures))
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
        call, *further = self._calls
        return Request(
            graph,
            constants,
            call.args,
            call.kwargs,
            device=self._device,
            overwritten=overwritten_by(*self._signatures),
            look=look,
            further=tuple([(one.args, one.kwargs) for one in further]),
            alone=self._alone,
            grad=self._grad,
            merger=self._handle._merger() if further else None,
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

    # -- several inputs ----------------------------------------------------------------------

    def invoke(self, *inputs: Any, **options: Any) -> Invoke:
        """One of several inputs of a block that was opened without one: `model.trace()`.

        with model.trace() as tracer:
            with tracer.invoke(a):          # inside, the sites are those of `a` alone
                h = layer.output.save()
            with tracer.invoke([b, c]):
                layer.output[:] = h
            with tracer.invoke():           # all of them, as trace([a, b, c]) shows them; the last
                logits = model.lm_head.output.save()

        Inside, shapes, numbers, looks and random draws are those of the input alone. Values flow
        between invokes in any order, and it does not matter which stands first: forwards run, or
        wait, so that every value is there in time. Edits that need each other in a circle are
        refused with both lines. options: the family's own; options of the whole block (`seed`,
        `device`, `remote`, ...) belong to `trace`.
        """
        self._check_invoke(options)
        options = {**self._defaults, **options}
        if self._handle._is_empty(inputs, options):
            return Invoke(self, None, options)
        if self._whole is not None:
            raise self._recorder.refusal(
                "an invoke with an input was opened after an empty one, which shows all of them",
                "open the empty one last",
            )
        return Invoke(self, self._handle._prepare(inputs, options), options)

    def _check_invoke(self, options: Mapping[str, Any]) -> None:
        if self._recorder.invokes is None:
            raise self._recorder.refusal(
                "tracer.invoke was used in a block that has an input already",
                "open the block without one, `with model.trace() as tracer:`, and give each "
                "input to an invoke",
            )
        own = sorted(options.keys() & self._handle._own_options)
        if own:
            raise UnknownOptionError(
                f"{own[0]} is an option of the whole block, not of one invoke",
                line=where(user_line()),
                fix=f"give it to trace: model.trace({own[0]}=...)",
            )

    def _seen(self, call: ModelCall) -> Signature:
        """A new call of this block; what its sites look like."""
        handle = self._handle
        if self._runs and self._place.kind == "here":
            call = call.to(handle._weights.device())
        signature = handle._signatures.for_call(call.args, dict(call.kwargs))
        self._calls.append(call)
        self._signatures.append(signature)
        return signature

    def _add(self, call: ModelCall) -> int:
        """A new invoke; its number."""
        return self._recorder.invokes.add(self._seen(call))  # type: ignore[union-attr]

    def _without_input(self) -> None:
        """The block is one call without an input, where the model can be called so."""
        number = self._add(self._handle._prepare((), self._defaults))
        self._recorder.invokes.stay(number)  # type: ignore[union-attr]

    def _call_now(self) -> ModelCall:
        """The call whose sites are meant on this line."""
        recorder = self._recorder
        if recorder.invoke is None:
            raise recorder.refusal(
                "this block has several inputs, and it is not said which is meant",
                "ask inside an invoke, or the invoke itself: `with tracer.invoke(p) as one: "
                "one.lengths`",
            )
        return self._calls[recorder.invoke]

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

    def cache(
        self,
        modules: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        inputs: bool = False,
        name: str | None = None,
    ) -> Cache:
        """Saves what modules return, and with `inputs` what they take: `cache[path].output`.

        modules: paths or modules; the default is every module that runs. What is in it is what the
        model went on with, whatever the block has changed, and wherever this line stands. Keys are
        paths; `cache.model.layers[0].output` is the same entry. dtype: floating tensors are cast to
        it where the model runs; device: where they are afterwards. name: of the save; the default
        is "cache".
        """
        recorder = self._recorder
        if recorder.invoke is None:
            recorder.sites.state("", "inputs", None)  # says what is missing, or makes it
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UnknownOptionError(
                f"dtype is a floating dtype of torch, not {dtype!r}", line=where(user_line())
            )
        spec = Spec(paths_of(self._handle, modules), bool(inputs), dtype)
        found = Cache(
            recorder,
            self._handle,
            recorder.saves.reserve(name, "cache"),
            spec,
            None if device is None else torch.device(device),
        )
        recorder.caches.append(found)
        return found

    def barrier(self, count: int | None = None) -> Callable[..., None]:
        """Does nothing: values flow between invokes without barriers. For ported scripts."""
        return lambda *_, **__: None

    def stop(self) -> None:
        """Ends the model's pass here: once all sites named above this line have fired.

        What was saved and exists by then is delivered; any other save is marked: using it raises
        `NotReachedError`, it is not in `results`, and lists given to `weft.save` go without it.
        In an invoke it ends the pass of this invoke.
        """
        self._recorder.stop()

    def stop_if(self, condition: Any) -> None:
        """As `stop`, if `condition` (one number, or a truth value) is true when the model runs.

        It stays in the graph: nothing is looked at while recording.
        """
        self._recorder.stop(condition)

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Real tokens per row; None where the input is not tokens."""
        return self._call_now().lengths

    @property
    def mask(self) -> torch.Tensor:
        """`[batch, pos]`, True at real tokens."""
        return mask_of(self._call_now())

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
        return price(prune(graph), firing_index(self._signatures))


def lean(
    graph: Graph, constants: Mapping[str, torch.Tensor]
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The graph without what nothing needs, and the constants that are left."""
    graph = prune(graph)
    kept = [node.key for node in graph.nodes if isinstance(node, Const)]
    return graph, {key: constants[key] for key in kept}


def firing_index(signatures: Sequence[Signature]) -> Callable[[Site], int]:
    """The position of a site in the firing order of its invoke."""
    return lambda site: signatures[site.invoke].site(site.path, site.port, site.call).index


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
