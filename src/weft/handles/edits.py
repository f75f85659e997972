"""Edits: changes of a model that every later trace begins with.

    with model.edit() as edited:
        model.model.layers[2].mlp.output[:] *= 0.5

    with edited.trace(prompt):                     # as if the line stood first in this block
        logits = model.lm_head.output.save()

An edit is a graph with its constants (`Experiment`). A handle has a tuple of them; `replay` records
them anew at the beginning of each block, with the shapes of its input, so that running a block
knows nothing of edits: here, on a server, in an invoke.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weft.engine.steps import Steps
from weft.errors import EditError, GraphError, InputError, UnknownOptionError
from weft.families.call import ModelCall
from weft.graph.join import joined
from weft.graph.node import Const, Fill, Graph, Skip, Write
from weft.graph.passes import prune
from weft.kernels.frames import to_frame, to_tensor
from weft.trace.edits import check_edit, replay
from weft.trace.lines import user_line, where
from weft.trace.recorder import Recorder
from weft.trace.steps import Steps as Recorded
from weft.wire.codec import decode_edits, encode_edits

from .experiment import Experiment, vet

if TYPE_CHECKING:
    from .handle import Handle


class Edit:
    """What `model.edit()` gives; `with` it as the edited handle."""

    def __init__(self, handle: Handle, calls: Sequence[ModelCall], inplace: bool) -> None:
        """`calls`: what shapes are recorded with, and others that the edit must fit as well."""
        self._handle = handle
        self._calls = calls
        self._edited = handle if inplace else twin(handle)
        self._recorder = _recorder(handle, calls[0], _refuse_look)

    def __enter__(self) -> Handle:
        self._recorder.__enter__()
        return self._edited

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        recorder = self._recorder
        recorder.__exit__()
        recorder.fail("an edit is only recorded: it acts in traces of the edited model")
        if error is not None:
            return
        recorder.clients.check()
        made = _made(recorder)
        if any(isinstance(node, (Write, Fill, Skip)) for node in made.graph.nodes):
            edits = (*self._edited._edits, made)
            try_out(self._handle, edits, self._calls)
            self._edited.__dict__["_edits"] = edits


def twin(handle: Handle) -> Handle:
    """Another handle on the same model, whose edits are its own."""
    other = object.__new__(type(handle))
    other.__dict__.update(handle.__dict__)
    return other


def calls_for(handle: Handle, inputs: tuple, options: dict[str, Any]) -> list[ModelCall]:
    """Of what shape an edit is recorded: that of the user's example, else of no input's."""
    own = sorted(options.keys() & handle._own_options)
    if own:
        raise UnknownOptionError(
            f"{own[0]} is an option of traces, not of an edit",
            line=where(user_line()),
            fix=f"give it to trace: edited.trace(..., {own[0]}=...)",
        )
    if not handle._is_empty(inputs, options):
        return [handle._prepare(inputs, options)]
    examples = handle._examples(options)
    if not examples:
        raise InputError(
            "an edit of this model needs an input to learn shapes from",
            fix="show one: model.edit(x); other sizes may come later",
        )
    return examples


def try_out(handle: Handle, edits: Sequence[Experiment], calls: Sequence[ModelCall]) -> None:
    """Raises `EditError` where edits do not go together, or do not fit one of the calls."""
    for call in calls:
        recorder = _recorder(handle, call)
        with recorder:
            begin(recorder, edits)


def begin(recorder: Recorder, edits: Sequence[Experiment]) -> None:
    """What each block of an edited handle begins with, at the sites that are meant now."""
    for edit in edits:
        replay(recorder, edit.graph, edit.constants)


def before(
    handle: Handle,
    calls: Sequence[ModelCall],
    graph: Graph,
    constants: dict[str, torch.Tensor],
    steps: Steps | None = None,
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """An experiment that is run again, with the edits of the handle before it; in a generation
    they act at all of its `steps`."""
    if not handle._edits:
        return graph, constants
    seed = graph.seed
    recorder = Recorder(None, owner=handle._root, was_tuple=handle._was_tuple, seed=seed)
    recorder.calls = list(calls)
    if steps is not None:
        cached = steps.sampling[0].use_cache
        recorder.steps = Recorded(
            recorder, steps.count, steps.at, steps.ids, cached, steps.forward_at
        )
        each = [one.seed for one in steps.sampling]
        own = {n: other for n, other in enumerate(each) if other not in (None, seed)}
        recorder.operations.seeds.update(own)
    invokes: Any = recorder.invokes
    with recorder:
        for number, call in enumerate(calls):
            if steps is None:
                signature = handle._signatures.for_call(call.args, dict(call.kwargs))
            else:
                signature = steps.at(number, 0)
            with invokes.opened(invokes.add(signature)):
                begin(recorder, handle._edits)
    first = prune(recorder.graph()), recorder.clients.constants
    return joined(first, (graph, constants))


def _recorder(handle: Handle, call: ModelCall, look: Any = None) -> Recorder:
    """A recorder for sites as they are in this call; it never runs."""
    signature = handle._signatures.for_call(call.args, dict(call.kwargs))
    was_tuple = handle._was_tuple
    made = Recorder(signature, run_prefix=look, owner=handle._root, was_tuple=was_tuple)
    made.calls = [call]
    return made


def _refuse_look(graph: Graph, constants: dict[str, torch.Tensor]) -> dict[str, Any]:
    raise EditError(
        "an edit holds for every input, so no number can be looked at in it",
        line=where(user_line()),
        fix="keep the branch in the graph with torch.where",
    )


def _made(recorder: Recorder) -> Experiment:
    """What was recorded, as an edit. Raises `EditError` for what cannot be one."""
    if recorder.clients.dirty:
        client = next(iter(recorder.clients.dirty.values()))
        raise EditError(
            "an edit writes into a tensor of yours, which it would do in every trace",
            line=where(recorder.line_of(client._at)),
            fix="write into a value: torch.zeros_like(h), or tensor + torch.zeros_like(h)",
        )
    check_edit(Graph(tuple(recorder.nodes), tuple([where(line) for line in recorder.lines])))
    graph = prune(recorder.graph())
    return Experiment(graph, _constants(recorder, graph))


def _constants(recorder: Recorder, graph: Graph) -> dict[str, torch.Tensor]:
    """The tensors of the user in an edit: by value, but for parameters, which he trains."""
    clients = {recorder.nodes[one._ref.node].key: one for one in recorder.clients.taken.values()}  # type: ignore[union-attr]
    found: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if not isinstance(node, Const):
            continue
        tensor = clients[node.key].tensor
        if tensor.requires_grad and not tensor.is_leaf:
            raise EditError(
                "an edit uses a tensor that was computed from parameters outside of it, which "
                "would not follow them when they are trained",
                line=graph.where[node.at],
                fix="compute it from values, (h @ a) @ b instead of h @ (a @ b); or .detach() it",
            )
        kept = tensor if tensor.requires_grad else recorder.clients.constants[node.key].clone()
        found[node.key] = kept
    return found


# -- files ---------------------------------------------------------------------------------------


def save_edits(handle: Handle, path: str | Path) -> None:
    """All edits of a handle as one graph file, which names the model that they are for."""
    if not handle._edits:
        raise EditError("the model has no edits to save", fix="make some: with model.edit(): ...")
    graph, constants = handle._edits[0].graph, handle._edits[0].constants
    for edit in handle._edits[1:]:
        graph, constants = joined((graph, constants), (edit.graph, edit.constants))
    frames = {key: to_frame(tensor) for key, tensor in constants.items()}
    Path(path).write_bytes(encode_edits(graph, frames, _fingerprint(handle)))


def load_edits(handle: Handle, path: str | Path, calls: Sequence[ModelCall]) -> Experiment:
    """The edits of a file, checked as a stranger's."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise GraphError(
            f"{path} cannot be read: {error.strerror}", fix="name a file of model.save_edits(path)"
        ) from None
    graph, frames, fingerprint = decode_edits(data)
    if fingerprint != _fingerprint(handle):
        raise EditError(
            f"the edits in {path} are for another model than this one",
            fix="load them on the model (architecture, configuration, dtype) that they were "
            "saved from",
        )
    check_edit(graph)
    if not any(isinstance(node, (Write, Fill, Skip)) for node in graph.nodes):
        raise EditError(f"{path} holds no edits", fix="save some first: edited.save_edits(path)")
    graph = prune(graph)  # what nothing needs is not looked at when it is checked
    vet(graph, calls[:1], handle._known())
    kept = {node.key for node in graph.nodes if isinstance(node, Const)}
    made = Experiment(graph, {key: to_tensor(frames[key]) for key in kept})
    try_out(handle, (*handle._edits, made), calls)
    return made


def _fingerprint(handle: Handle) -> str:
    return handle._places.wanted().fingerprint
