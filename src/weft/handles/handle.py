"""`Handle`: what `LanguageModel` and `Model` share: the tree, tracing, running again."""

from __future__ import annotations

from typing import Any

import torch
from msgspec.structs import replace

from weft.client.backend import Backend, Request
from weft.client.local import LocalBackend
from weft.errors import GraphError, UnknownOptionError
from weft.families.call import ModelCall
from weft.families.names import returned_tuple_before
from weft.graph.node import Apply, Fill, Graph, Param, Read, Write
from weft.signatures.later import overwritten_by
from weft.signatures.signature import Signatures
from weft.trace.tree import Module, Root

from .experiment import Experiment
from .tracer import Tracer
from .weights import Weights

OWN_OPTIONS = ("seed", "device", "remote")


class Handle(Module):
    """A model to experiment on: the root of its own module tree."""

    def __init__(self, weights: Weights, backend: Backend | None = None) -> None:
        module = weights.skeleton()
        super().__init__(Root(weights.skeleton, weights.loaded), "", module)
        self.__dict__.update(
            _weights=weights,
            _backend=backend or LocalBackend(weights.loaded),
            _signatures=Signatures(weights.skeleton, weights.loaded, state=weights.state),
            _was_tuple=frozenset(
                path for path, one in module.named_modules() if returned_tuple_before(one)
            ),
        )

    def _prepare(self, inputs: tuple, options: dict[str, Any]) -> ModelCall:
        """The call of the model's forward for a user's inputs. A family's own."""
        raise UnknownOptionError(f"{type(self).__name__} takes no inputs")

    def trace(self, *inputs: Any, **options: Any) -> Tracer:
        """Opens a block in which the inside of one forward pass can be read and changed.

        inputs: what the model is given (see the class).
        seed: makes random draws of the block repeatable; device: where results shall live (the
        default is the CPU). All other options are the family's own; an unknown one raises
        `UnknownOptionError`.
        """
        return self._open(inputs, options, runs=True)

    def scan(self, *inputs: Any, **options: Any) -> Tracer:
        """As `trace`, but only records: shapes and `tracer.plan()`, no weights, no run."""
        return self._open(inputs, options, runs=False)

    def dispatch(self) -> torch.nn.Module:
        """Loads the weights now, if they are not there yet, and returns the module itself."""
        return self._weights.loaded()

    def _open(self, inputs: tuple, options: dict[str, Any], runs: bool) -> Tracer:
        own, rest = _split(options)
        call = self._prepare(inputs, rest)
        if runs:
            call = call.to(self._weights.device())
        return Tracer(self, call, runs=runs, **own)

    def _rerun(self, experiment: Experiment, inputs: tuple, options: dict[str, Any]) -> Any:
        """`Experiment.run`."""
        own, rest = _split(options)
        self._check_paths(experiment.graph)
        call = self._prepare(inputs, rest).to(self._weights.device())
        signature = self._signatures.for_call(call.args, call.kwargs)
        request = Request(
            _seeded(experiment.graph, own.get("seed")),
            experiment.constants,
            call.args,
            call.kwargs,
            strict=False,
            device=own.get("device"),
            overwritten=overwritten_by(signature),
        )
        saved = self._backend.run(request).saved
        return {name: value for name, value in saved.items() if name[0] != "<"}

    def _check_paths(self, graph: Graph) -> None:
        """Raises `GraphError` where the graph names a module that this model does not have."""
        known = set(self._root.paths)
        for node in graph.nodes:
            path = node.site.path if isinstance(node, (Read, Write, Fill)) else None
            path = node.path if isinstance(node, Apply) else path
            path = node.path.rpartition(".")[0] if isinstance(node, Param) else path
            if path is not None and path not in known:
                at = graph.where[node.at] if graph.where else None
                raise GraphError(f"the graph is for another model: no {path!r} here", line=at)


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of tracing, and those of the family."""
    if not options:
        return {}, options
    rest = {key: value for key, value in options.items() if key not in OWN_OPTIONS}
    if options.get("remote"):
        raise UnknownOptionError(
            "remote= needs the service, which this version does not have yet",
            fix="leave it out, to run on this machine",
        )
    seed, device = options.get("seed"), options.get("device")
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise UnknownOptionError(f"seed is a whole number from 0, not {seed!r}")
    own = {"seed": seed, "device": None if device is None else torch.device(device)}
    return own, rest


def _seeded(graph: Graph, seed: int | None) -> Graph:
    return graph if seed is None else replace(graph, seed=seed)
