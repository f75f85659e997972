"""`Tracer`: one `with model.trace(...)` block, from recording to results."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from weft.client.backend import Request
from weft.errors import WeftError
from weft.families.call import ModelCall
from weft.graph.node import Const, Graph
from weft.graph.passes import prune
from weft.graph.site import Site
from weft.run.price import Price, price
from weft.signatures.later import overwritten_by
from weft.signatures.signature import Signature
from weft.trace.lines import user_line, where
from weft.trace.recorder import Recorder

from .experiment import Experiment

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
        *,
        seed: int | None = None,
        device: torch.device | None = None,
        runs: bool = True,
    ) -> None:
        self._handle = handle
        self._call = call
        self._runs = runs
        self._signature: Signature = handle._signatures.for_call(call.args, call.kwargs)
        self._device = device
        self._recorder = Recorder(
            self._signature,
            run_prefix=self._prefix if runs else None,
            device=device,
            was_tuple=handle._was_tuple,
            seed=seed,
            owner=handle._root,
        )
        self._frozen: tuple[Graph, dict[str, torch.Tensor]] | None = None
        self.ended: Site | None = None
        """The site at which the forward pass could stop; None if it ran to the end."""
        self.results: dict[str, Any] = {}
        """What was saved, by name, once the block has run."""

    # -- the block ---------------------------------------------------------------------------

    def __enter__(self) -> Tracer:
        self._line = user_line()
        self._recorder.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        recorder = self._recorder
        recorder.__exit__()
        if error is not None:
            recorder.fail(f"{type(error).__name__}: {error}")
            return
        try:
            graph, constants = self._frozen = recorder.freeze()
            if not self._runs:
                recorder.fail("the block was recorded without being run")
                return
            self._warn_unused()
            reply = self._ask(graph, constants)
        except BaseException as failure:
            recorder.fail(f"{type(failure).__name__}: {failure}")
            if not isinstance(failure, WeftError):
                failure.add_note(f"while running the block at {where(self._line)}")
            raise
        self.ended = reply.ended
        self.results = recorder.deliver(reply.saved)

    def _ask(self, graph: Graph, constants: dict[str, torch.Tensor], strict: bool = True) -> Any:
        request = Request(
            graph,
            constants,
            self._call.args,
            self._call.kwargs,
            strict=strict,
            device=self._device,
            overwritten=overwritten_by(self._signature),
        )
        return self._handle._backend.run(request)

    def _prefix(self, graph: Graph, constants: dict[str, torch.Tensor]) -> dict[str, Any]:
        return self._ask(graph, constants).saved

    def _warn_unused(self) -> None:
        for line in self._recorder.unused_edits():
            _warn(f"the edit at {line} fires after everything that is saved: it has no effect")

    # -- what the block may ask --------------------------------------------------------------

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
        graph = prune(graph)
        kept = [node.key for node in graph.nodes if isinstance(node, Const)]
        return Experiment(graph, {key: constants[key].clone() for key in kept})

    def plan(self) -> Price:
        """What the recorded graph costs, before it runs: sites, operations, bytes, peak memory."""
        graph = self._frozen[0] if self._frozen is not None else self._recorder.graph()
        return price(prune(graph), firing_index(self._signature))


def firing_index(signature: Signature) -> Callable[[Site], int]:
    """The position of a site in the firing order."""
    return lambda site: signature.site(site.path, site.port, site.call).index


_WARNED: dict[Any, Any] = {}
"""Lines that were warned, so that each is once."""


def _warn(message: str) -> None:
    file, line = user_line()
    warnings.warn_explicit(message, UnusedEditWarning, file, line, registry=_WARNED)
