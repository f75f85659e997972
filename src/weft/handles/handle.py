"""`Handle`: what `LanguageModel` and `Model` share: the tree, tracing, running again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from dataclasses import replace as replaced
from typing import Any

import torch
from msgspec.structs import replace

from weft.client.backend import Backend, Request
from weft.client.catalog import Wanted
from weft.client.local import LocalBackend
from weft.engine.known import Known
from weft.engine.weights import weights_mark
from weft.errors import GraphError, UnknownOptionError
from weft.families.call import ModelCall
from weft.families.names import returned_tuple_before
from weft.graph.node import Apply, Fill, Graph, Param, Read, Write
from weft.signatures.later import overwritten_by
from weft.signatures.signature import Signatures
from weft.trace.tree import Module, Root

from .experiment import Experiment, vet
from .served import Served
from .tracer import Tracer
from .weights import Fingerprints, Weights
from .where import InPlaces, Places, Remote, checked


@dataclass(frozen=True)
class Own:
    """The options of tracing itself; all others are the family's."""

    seed: int | None = None
    device: torch.device | None = None
    remote: Remote = None
    blocking: bool = True


OWN_OPTIONS = tuple(field.name for field in fields(Own))
_NO_OPTIONS = Own()


class Handle(Module):
    """A model to experiment on: the root of its own module tree."""

    def __init__(
        self,
        weights: Weights,
        backend: Backend | None = None,
        *,
        family: str,
        remote: Remote = None,
        served: Served | None = None,
    ) -> None:
        module = weights.skeleton()
        super().__init__(Root(weights.skeleton, weights.loaded), "", module)
        signatures = Signatures(weights.skeleton, weights.loaded, state=weights.state)
        wanted = self._wanted if served is None else served.wanted
        self.__dict__.update(
            _weights=weights,
            _signatures=signatures if served is None else served.known.signatures,
            _was_tuple=frozenset(
                path for path, one in module.named_modules() if returned_tuple_before(one)
            ),
            _family=family,
            _fingerprints=Fingerprints(weights),
            _places=Places(
                InPlaces(family, wanted, self._known, weights.loaded),
                backend or LocalBackend(weights.loaded),
                remote,
            ),
        )

    def _name(self) -> tuple[str | None, bool]:
        """What a server would call the model, and whether that name says which weights it has."""
        return None, False

    def _wanted(self) -> Wanted:
        """Which of a server's models this is."""
        name, strictly = self._name()
        weights = self._weights
        mark = weights_mark(weights.loaded()) if weights.are_loaded else None
        return Wanted(name, self._fingerprints.now(), strictly, mark)

    def _known(self) -> Known:
        """What a server would know of the model, told by this process."""
        return Known(
            skeleton=self._weights.skeleton(),
            signatures=self._signatures,
            family=self._family,
            fingerprint=self._fingerprints.now(),
        )

    def _prepare(self, inputs: tuple, options: dict[str, Any]) -> ModelCall:
        """The call of the model's forward for a user's inputs. A family's own."""
        raise UnknownOptionError(f"{type(self).__name__} takes no inputs")

    def trace(self, *inputs: Any, **options: Any) -> Tracer:
        """Opens a block in which the inside of one forward pass can be read and changed.

        inputs: what the model is given (see the class).
        seed: makes random draws of the block repeatable; device: where results shall live (the
        default is the CPU).
        remote: where the block runs; the default is what the handle was opened with.
            False           here
            True            on the configured server: `WEFT_HOST`, the configuration file, or the
                            only one of this user that runs on this machine
            "http://..."    on that server
            "local"         here, as a server would: all but the network
            "auto"          on the configured server, if it is there and has the model; else here
        blocking: True waits for the results. False only sends the block: `tracer.job` is a
        `weft.Job`, whose `result()` fetches what it saves; in such a block a look raises
        `LookError`.
        All other options are the family's own; an unknown one raises `UnknownOptionError`.

        On a server what the block saves arrives bit for bit as it was there; errors of the run are
        raised where the block closes, as subclasses of `RemoteError`, the model's own exceptions as
        what they are, too (`RunError` that is an `IndexError`). Ctrl-C cancels the job.
        `async with` is the same without blocking the event loop (a look inside the block does).
        """
        return self._open(inputs, options, runs=True)

    def scan(self, *inputs: Any, **options: Any) -> Tracer:
        """As `trace`, but only records: shapes and `tracer.plan()`, no weights, no run.

        It takes the same options; as nothing runs, `remote` has no effect and `blocking=False` is
        refused.
        """
        return self._open(inputs, options, runs=False)

    def dispatch(self) -> torch.nn.Module:
        """Loads the weights now, if they are not there yet, and returns the module itself."""
        return self._weights.loaded()

    def _open(self, inputs: tuple, options: dict[str, Any], runs: bool) -> Tracer:
        own, rest = _split(options)
        place = self._places.pick(own.remote if runs else _checked(own.remote))
        if not own.blocking and place.kind != "server":
            raise UnknownOptionError(
                f"blocking=False: this block runs {place.text}, and is over when it closes",
                fix="leave it out, or run the block on a server with remote=True",
            )
        call = self._prepare(inputs, rest)
        if runs and place.kind == "here":
            call = call.to(self._weights.device())
        return Tracer(
            self, call, place, seed=own.seed, device=own.device, blocking=own.blocking, runs=runs
        )

    def _rerun(self, experiment: Experiment, inputs: tuple, options: dict[str, Any]) -> Any:
        """`Experiment.run`."""
        own, rest = _split(options)
        if not own.blocking:
            raise UnknownOptionError("blocking=False: Experiment.run waits for what it returns")
        self._check_paths(experiment.graph)
        place = self._places.pick(own.remote)
        call = self._prepare(inputs, rest)
        if place.kind == "here":
            call = call.to(self._weights.device())
        graph = _seeded(experiment.graph, own.seed)
        if place.kind == "here":
            vet(graph, call, self._known())
        signature = self._signatures.for_call(call.args, call.kwargs)
        request = Request(
            graph,
            experiment.constants,
            call.args,
            call.kwargs,
            strict=False,
            device=own.device,
            overwritten=overwritten_by(signature),
        )
        saved = place.backend.run(request).saved
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


def _split(options: dict[str, Any]) -> tuple[Own, dict[str, Any]]:
    """Options of tracing, and those of the family."""
    if not options:
        return _NO_OPTIONS, options
    rest = {key: value for key, value in options.items() if key not in OWN_OPTIONS}
    own = Own(**{key: value for key, value in options.items() if key in OWN_OPTIONS})
    seed, device = own.seed, own.device
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise UnknownOptionError(f"seed is a whole number from 0, not {seed!r}")
    if not isinstance(own.blocking, bool):
        raise UnknownOptionError(f"blocking is True or False, not {own.blocking!r}")
    return replaced(own, device=None if device is None else torch.device(device)), rest


def _checked(remote: Remote) -> bool:
    """Where a block does not run, no place is looked for; a wrong one is refused all the same."""
    checked(remote)
    return False


def _seeded(graph: Graph, seed: int | None) -> Graph:
    return graph if seed is None else replace(graph, seed=seed)
