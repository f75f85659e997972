"""`Experiment`: a recorded graph with its constants, to keep.

with model.trace(prompt) as tracer:
    model.model.layers[2].output.save("h")
tracer.graph.save("read.weft")

again = weft.Experiment.load("read.weft")
again.run(model, "another prompt")["h"]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weft.engine.admit import admit
from weft.engine.generation import Samplings
from weft.engine.known import Known
from weft.errors import GraphError
from weft.families.call import ModelCall
from weft.graph.check import MAX_NODES, check
from weft.graph.loops import is_of_steps
from weft.graph.node import AnyNode, Apply, Backward, Fill, Graph, Param, Read, Skip, Write
from weft.graph.passes import invokes_of
from weft.graph.show import show
from weft.kernels.frames import to_frame, to_tensor
from weft.trace.lines import at_line, lined, user_line
from weft.wire.codec import content_hash, decode_experiment, encode
from weft.wire.messages import Generation, Limits

if TYPE_CHECKING:
    from .handle import Handle


LIMITS = Limits(
    nodes=MAX_NODES,
    price_seconds=float("inf"),
    **{
        name: sys.maxsize
        for name in Limits.__struct_fields__
        if name not in ("nodes", "price_seconds")
    },
)
"""On one's own machine an experiment may take what it takes."""


def vet(graph: Graph, calls: Sequence[ModelCall], known: Known, sampling: Samplings = None) -> None:
    """Raises what a server would for a graph that does not fit the model or itself.

    A graph from a file is a stranger's. Its sizes need not be the recorded ones.
    """
    call, *further = calls
    admit(graph, call, known, LIMITS, strict=False, further=further, sampling=sampling)


def refuse_generation(graph: Graph) -> None:
    """Raises `GraphError` for the graph of a generation of which nothing else is known."""
    if is_of_steps(graph):
        raise GraphError(
            "this experiment was recorded in a generation, and it is not known in which: its file "
            "is an older one",
            fix="open a block of model.generate(...) with the same lines and max_new_tokens=",
        )


def check_paths(graph: Graph, paths: Iterable[str]) -> None:
    """Raises `GraphError` where the graph names a module that is none of these."""
    known = set(paths)
    for node in graph.nodes:
        for path in _paths_of(node):
            if path not in known:
                at = graph.where[node.at] if graph.where else None
                raise GraphError(
                    f"the graph is for another model: no {path!r} here",
                    line=at,
                    fix="run it on the model that it was recorded on",
                )


def _paths_of(node: AnyNode) -> list[str]:
    """The modules that a node names."""
    if isinstance(node, (Read, Write, Fill, Skip)):
        return [node.site.path]
    if isinstance(node, Backward):
        return [site.path for site in node.since]
    if isinstance(node, Apply):
        return [node.path]
    return [node.path.rpartition(".")[0]] if isinstance(node, Param) else []


class Experiment:
    """A graph and its constants; `print` shows it, `run` draws it through a model again."""

    def __init__(
        self,
        graph: Graph,
        constants: dict[str, torch.Tensor],
        generations: Sequence[Generation] = (),
    ) -> None:
        check(graph)
        self.generations = tuple(generations[: 1 + max(invokes_of(graph), default=0)])
        """How tokens were chosen, of each invoke, if it was recorded in a generation."""
        self.graph = graph
        self.constants = constants

    @classmethod
    @lined
    def load(cls, path: str | Path) -> Experiment:
        """Reads a graph file. Raises `GraphError` for anything else; never unpickles."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise GraphError(
                f"{path} cannot be read: {error.strerror}",
                fix="give the path of a file that Experiment.save wrote",
            ) from None
        graph, frames, generations = decode_experiment(data)
        constants = {key: to_tensor(frame) for key, frame in frames.items()}
        return cls(graph, constants, generations)

    def save(self, path: str | Path) -> None:
        """Writes one file (safetensors) with the graph and its constants."""
        Path(path).write_bytes(encode(self.graph, self._frames(), self.generations))

    @property
    def hash(self) -> str:
        """SHA-256 of what the graph does and of its constants; lines and files do not count."""
        return content_hash(self.graph, self._frames())

    def run(self, model: Handle, *inputs: Any, **options: Any) -> dict[str, Any]:
        """Draws the graph through `model` on other inputs; returns what it saves, by name: what the
        block had as `tracer.results`. (What a dict or tuple gained after it was saved is under
        `name+`: the graph does not say where in it.)

        `inputs` and `options` are those of `model.trace`; of an experiment with several invokes
        one input for each of them; one of a generation takes the options of `model.generate`, each
        by default as it was recorded, the seed too. What it streams nobody hears. Guards are
        checked again (`GuardError`); a graph that read a size as a number refuses another size
        (`GraphError` with the line).
        Whoever the graph is from, it is checked against the model before anything runs (`vet`).
        """
        try:
            return model._rerun(self, inputs, options)
        except Exception as failure:
            at_line(failure, user_line(), "while running the experiment at")
            raise

    def _frames(self) -> dict[str, Any]:
        return {key: to_frame(tensor) for key, tensor in self.constants.items()}

    def __len__(self) -> int:
        return len(self.graph.nodes)

    def __str__(self) -> str:
        return show(self.graph)

    def __repr__(self) -> str:
        return f"<Experiment of {len(self)} nodes>\n{self}"
