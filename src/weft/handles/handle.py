"""`Handle`: what `LanguageModel` and `Model` share: the tree, tracing, running again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from weft.client.backend import Backend, Request
from weft.client.catalog import Wanted
from weft.client.local import LocalBackend
from weft.engine.known import Known
from weft.engine.merging import Merger
from weft.engine.weights import weights_mark
from weft.errors import InputError, UnknownOptionError
from weft.families.call import ModelCall
from weft.families.names import returned_tuple_before
from weft.graph.node import Graph
from weft.graph.passes import invokes_of
from weft.signatures.expressions import Formulas
from weft.signatures.later import overwritten_by
from weft.signatures.layouts import Point
from weft.signatures.signature import Signatures
from weft.trace.aliases import Rename, rename_tree
from weft.trace.lines import lined
from weft.trace.tree import Module, Root

from . import edits
from .again import generate_again
from .experiment import Experiment, check_paths, refuse_generation, vet
from .grid import SEQUENCES, Grid, refuse_single
from .methods import by_method
from .options import OWN_OPTIONS, ROOT_OPTIONS, check_place, check_rerun, kept, split
from .outright import outright
from .reached import reached
from .served import Served
from .session import Session, join, open_session, remote_of
from .sweep import Sweep
from .tracer import Tracer
from .weights import Fingerprints, Weights
from .where import InPlaces, Places, Remote, checked


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
        rename: Rename | None = None,
    ) -> None:
        module = weights.skeleton()
        super().__init__(Root(weights.skeleton, weights.loaded), "", module)
        signatures = Signatures(weights.skeleton, weights.loaded, state=weights.state)
        inside = (signatures if served is None else served.known.signatures).inside
        self._root.listing, self._root.learn = inside.listing, inside.learn
        wanted = self._wanted if served is None else served.wanted
        self.__dict__.update(
            _weights=weights,
            _signatures=signatures if served is None else served.known.signatures,
            _was_tuple=frozenset(
                path for path, one in module.named_modules() if returned_tuple_before(one)
            ),
            _edits=(),
            _is_served=served is not None,
            _methods={},
            _family=family,
            _fingerprints=Fingerprints(weights),
            _places=Places(
                InPlaces(family, wanted, self._known, weights.loaded),
                backend or LocalBackend(weights.loaded),
                remote,
            ),
        )
        if rename:
            rename_tree(self, rename)

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
        raise UnknownOptionError(
            f"{type(self).__name__} takes no inputs", fix="use weft.LanguageModel or weft.Model"
        )

    _method: str | None = None  # the method that its blocks call; None: the forward
    _own_options = frozenset((*OWN_OPTIONS, *ROOT_OPTIONS))
    _takes_nothing = True  # whether the model can be called without an input

    def _is_empty(self, inputs: tuple, options: dict[str, Any]) -> bool:
        """Whether no input was given. Raises where the options alone are wrong."""
        return not inputs and not options

    def _merger(self) -> Merger | None:
        """Who says which invokes may share a forward; None where none may."""
        return None

    def _together(self, calls: list[ModelCall], options: dict[str, Any]) -> ModelCall:
        """The call of all inputs of these calls at once. A family's own."""
        raise UnknownOptionError(
            f"{type(self).__name__} puts no inputs together", fix="use a block for each input"
        )

    def _formulas(self, call: ModelCall) -> tuple[Formulas, Point] | None:
        """What says where rows lie in the sites of a call; None where nothing does."""
        return self._signatures.formulas(call.args, dict(call.kwargs))

    @lined
    def trace(self, *inputs: Any, trace: bool = True, fn: Any = None, **options: Any) -> Tracer:
        """Opens a block in which the inside of one forward pass can be read and changed.

        inputs: what the model is given (see the class); none in a block of several inputs, each
        with its own `with tracer.invoke(...):` (see `Tracer.invoke`).
        seed: makes random draws of the block repeatable; device: where results shall live (the
        default is the CPU).
        remote: where the block runs; the default is what the handle was opened with.
            False           here
            True            on the configured server: `WEFT_HOST`, the configuration file, or the
                            only one of this user that runs on this machine
            "http://..."    on that server
            "local"         here, as a server would: all but the network
            "auto"          on the configured server, if it is there and has the model; else here
        alone: True gives each invoke a forward pass of its own, for numbers that are to the bit
        those of the input alone.
        grad: True keeps what autograd knows, for a `backward()` of your own after the block: saved
        tensors stay connected to the weights and to client tensors. Only where the block runs here;
        a `backward()` inside the block needs no such option, and runs anywhere.
        blocking: True waits for the results. False only sends the block: `tracer.job` is a
        `weft.Job`, whose `result()` fetches what it saves; in such a block a look raises
        `LookError`.
        keep_seconds: how long a server is to keep the job and its result after its end; by default
        as long as it keeps any (`job.status().expires` says).
        eager: True shows numbers while the block is written: `print(h)`, an f-string and a debugger
        do, and an operation that fails raises at its line. The results are the same. Only where the
        block runs here; for finding out what goes wrong, not for speed (see docs/debugging.md).
        fn: another method of the model whose call the block is, by its name or itself: "encode".
        It is given the inputs as they are; `model.input` and `model.output` are its own. Only here.
        trace: False opens no block, and returns what the model returns, edits of this handle
        included: plain tensors in the model's own structure.
        All other options are the family's own; an unknown one raises `UnknownOptionError`.

        On a server what the block saves arrives bit for bit as it was there; errors of the run are
        raised where the block closes, as subclasses of `RemoteError`, the model's own exceptions as
        what they are, too (`RunError` that is an `IndexError`). Ctrl-C cancels the job.
        `async with` is the same without blocking the event loop (a look inside the block does).
        """
        handle = by_method(self, fn)
        if trace is not True:
            return outright(handle, trace, inputs, options)
        return handle._open(inputs, options, runs=True)

    def scan(self, *inputs: Any, fn: Any = None, **options: Any) -> Tracer:
        """As `trace`, but only records: shapes and `tracer.plan()`, no weights, no run.

        It takes the same options; as nothing runs, `remote` has no effect and `blocking=False` is
        refused.
        """
        return by_method(self, fn)._open(inputs, options, runs=False)

    @lined
    def sweep(self, *inputs: Any, batch: int | str = "auto", **options: Any) -> Any:
        """One experiment at every point of a grid: `sweep(prompt, f, layer=range(12), ...)`.

            def patch(tracer, layer, position):
                layers[layer].output[:, position] = clean[layer][:, position]
                return model.lm_head.output[0, -1, token]

            effect = model.sweep(prompt, patch, layer=range(12), position=range(9))

        inputs: what `trace` takes, and last a function `f(tracer, **point)`, whose lines are those
        of a block: `trace(prompt)` at each point gives the same. It returns a tensor, or a dict of
        named tensors; the sweep returns a `Labelled` tensor, or a dict of them, of the coordinates'
        dimensions and then the tensor's own. `f` may be called more than once for a point.
        batch: the most points in one pass; "auto" asks free memory (`sweep_bytes` of the settings).
        options: coordinates (lists or ranges); all others are those of `trace`.
        Raises `SweepError`, which has the other points' results, where points fail.
        """
        return self._sweep(inputs, batch, options).run()

    def _sweep(self, inputs: tuple, batch: int | str, options: dict[str, Any]) -> Sweep:
        given = {name: options[name] for name in options if self._is_coordinate(name, options)}
        own, rest = split({name: options[name] for name in options if name not in given})
        if not own.blocking or own.grad or own.eager:
            chosen = {"grad=True": own.grad, "eager=True": own.eager, "blocking=False": True}
            name = next(name for name, is_so in chosen.items() if is_so)
            raise UnknownOptionError(
                f"{name}: a sweep waits for its results, which are numbers", fix="leave it out"
            )
        function: Any = inputs[-1] if inputs else None
        refuse_single(function, rest)
        grid = Grid(given)
        grid.check(function)
        place = self._places.pick(remote_of(self, own.remote))
        call = self._prepare(inputs[:-1], rest)
        if place.kind == "here":
            call = call.to(self._weights.device())

        def opened() -> Tracer:
            options: Any = {"alone": own.alone, "seed": own.seed, "device": own.device}
            return Tracer(self, None, place, **options)

        return Sweep(self, call, opened, function, grid, batch)

    def _is_coordinate(self, name: str, options: dict[str, Any]) -> bool:
        """Whether a keyword of a sweep is a coordinate, and not an option of `trace`."""
        value = options[name]
        several = isinstance(value, SEQUENCES) and not isinstance(value, torch.Tensor)
        return several and name not in OWN_OPTIONS

    @lined
    def edit(self, *inputs: Any, inplace: bool = False, **options: Any) -> edits.Edit:
        """Opens a block of changes with which every later trace of the edited handle begins.

            with model.edit() as edited:
                model.model.layers[2].mlp.output[:] *= 0.5
            with edited.trace(prompt):          # as if the line stood first in this block
                ...

        The block holds writes, edits in place and skips of the model's sites; it brings nothing
        back. inplace: True changes this handle; else it stays as it is, and `edited` is another one
        on the same weights. Edits of an edited handle come after those it has.
        Sizes of batch and length are open: an edit acts on any input, and one that cannot is
        refused with its line, here where that shows, else in the trace. inputs, options: an example
        of what it is for, where an edit depends on one prompt's size, and for modules of which no
        input is known (`weft.Model`).
        Tensors of yours are taken by value when the block closes; parameters (that require
        gradients) are followed: each trace takes their values and gives them their gradients.
        """
        if not isinstance(inplace, bool):
            fix = "leave it out, or give inplace=True to change this handle"
            raise UnknownOptionError(f"inplace is True or False, not {inplace!r}", fix=fix)
        return edits.Edit(self, edits.calls_for(self, inputs, options), inplace)

    def session(self, *, remote: Remote = None) -> Session:
        """Opens a session: its blocks share values without `.save()`.

            with model.session():
                with model.trace(a):
                    h = model.model.layers[1].output
                with model.trace(b):
                    model.model.layers[1].output = h

        Each block runs when it closes. What a variable still holds then can be used in later blocks
        and between them, until the session ends. remote: False or "local", for all blocks in it.
        """
        return open_session(self, remote)

    def clear_edits(self) -> None:
        """Forgets all edits of this handle; others on the same model keep theirs."""
        self.__dict__["_edits"] = ()

    @lined
    def save_edits(self, path: str | Path) -> None:
        """Writes all edits of this handle to one graph file, parameters as they are now."""
        edits.save_edits(self, path)

    @lined
    def load_edits(
        self, path: str | Path, *inputs: Any, inplace: bool = False, **options: Any
    ) -> Handle:
        """A handle with the edits of a file after its own; with `inplace` this one.

        Raises `EditError` for edits of another model, `GraphError` and its kin for what is no such
        file: whoever it is from, it is checked before anything is done with it. inputs, options: an
        example, as for `edit`.
        """
        made = edits.load_edits(self, path, edits.calls_for(self, inputs, options))
        edited = self if inplace else edits.twin(self)
        edited.__dict__["_edits"] = (*edited._edits, made)
        return edited

    def _examples(self, options: dict[str, Any]) -> list[ModelCall]:
        """Calls of two sizes that stand for any input, where a family has them."""
        return []

    def dispatch(self) -> torch.nn.Module:
        """Loads the weights now, if they are not there yet, and returns the module itself."""
        return self._weights.loaded()

    @lined
    def _open(self, inputs: tuple, options: dict[str, Any], runs: bool) -> Tracer:
        own, rest = split(options)
        remote = remote_of(self, own.remote)
        place = self._places.pick(remote if runs else _checked(remote))
        check_place(own, place, runs)
        place = kept(own, place) if runs else place
        several = self._is_empty(inputs, rest)
        tracer = Tracer(
            self,
            None if several else self._prepare(inputs, rest),
            place,
            defaults=rest if several else None,
            alone=own.alone,
            grad=own.grad,
            seed=own.seed,
            device=own.device,
            blocking=own.blocking,
            eager=own.eager,
            runs=runs,
        )
        if runs:
            join(tracer, place)
        return tracer

    def _rerun(self, experiment: Experiment, inputs: tuple, options: dict[str, Any]) -> Any:
        """`Experiment.run`."""
        if experiment.graph.root != self._method:
            return by_method(self, experiment.graph.root)._rerun(experiment, inputs, options)
        if experiment.generations:
            return generate_again(self, experiment, inputs, options)
        own, rest = split(options)
        check_rerun(own)
        refuse_generation(experiment.graph)
        check_paths(experiment.graph, self._root.paths)
        place = self._places.pick(remote_of(self, own.remote))
        check_place(own, place)
        calls = self._calls_again(experiment.graph, inputs, rest)
        if place.kind == "here":
            calls = [call.to(self._weights.device()) for call in calls]
        call, *further = calls
        graph, constants = edits.before(self, calls, experiment.graph, experiment.constants)
        graph = _seeded(graph, own.seed)
        if place.kind == "here":
            vet(graph, calls, self._known())
        seen = self._signatures.inside.seen(self._signatures, graph, calls)
        request = Request(
            graph,
            constants,
            call.args,
            call.kwargs,
            strict=False,
            device=own.device,
            overwritten=overwritten_by(*seen),
            further=tuple([(one.args, one.kwargs) for one in further]),
            alone=own.alone,
            grad=own.grad,
            merger=self._merger() if further else None,
        )
        return reached(graph, place.backend.run(request).saved)

    def _calls_again(self, graph: Graph, inputs: tuple, options: dict[str, Any]) -> list[ModelCall]:
        """The call of each invoke of a graph that is run on other inputs."""
        count = 1 + max(invokes_of(graph), default=0)
        if count == 1:
            return [self._prepare(inputs, options)]
        if len(inputs) != count:
            raise InputError(
                f"the experiment has {count} invokes, and {len(inputs)} inputs were given",
                fix="give one for each (a tuple where a module takes several arguments); for an "
                "empty invoke the list of all",
            )
        given = [one if isinstance(one, tuple) else (one,) for one in inputs]
        return [self._prepare(one, options) for one in given]


def _checked(remote: Remote) -> bool:
    """Where a block does not run, no place is looked for; a wrong one is refused all the same."""
    checked(remote)
    return False


def _seeded(graph: Graph, seed: int | None) -> Graph:
    return graph if seed is None else replace(graph, seed=seed)
