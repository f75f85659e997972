"""The lanes: where, and beside whom, the block of a case runs.

    with Local(subject).block(subject.give(row)) as tracer:      # the block has this input
        h = lane.model.get(path).output.save()

- `local`: on the module, in this process;
- `remote`: the same source over HTTP, on a live server in this process;
- `beside`: as an invoke between others of one block, whose hidden states are NaN and 1e30: between
  two, in case 7 among 31.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

import weft
from tests.families import zoo

from .models import Given, Subject

NAMES = ("local", "remote", "beside")
NEIGHBOURS = {float("nan"): zoo.tokens(21, seed=5)[0], 1e30: zoo.tokens(3, seed=6)[0]}
"""What neighbours multiply their hidden states with, and their prompts."""


def hidden(value: Any) -> Any:
    """The hidden states in what a layer returns."""
    return value[0] if isinstance(value, tuple) else value


class Lane:
    """How a block is opened. `model` is the handle whose sites are used in it."""

    name = "local"
    shapes = ""
    """Why the shapes of a pass are not those of the prompt alone; empty where they are."""
    crowded = ""
    """The same, where several blocks are on their way at once."""

    def __init__(self, subject: Subject, model: Any) -> None:
        self.subject = subject
        self.model = model

    def layer(self, number: int) -> Any:
        return self.model.get(self.subject.paths.layer(number))

    def answering(self, number: int) -> Any:
        return self.model.get(self.subject.answering(number))

    def block(self, given: Given, **options: Any) -> AbstractContextManager[Any]:
        """One block with this input."""
        args, kwargs = given
        return self.model.trace(*args, **kwargs, **options)

    def generation(self, row: Sequence[int], **options: Any) -> AbstractContextManager[Any]:
        """One block that generates from this prompt."""
        return self.model.generate(torch.tensor([list(row)]), **options)

    @contextmanager
    def several(self, **options: Any) -> Iterator[Any]:
        """One block that takes several inputs by `tracer.invoke`."""
        with self.model.trace(**options) as tracer:
            yield tracer


class Local(Lane):
    """The module itself."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject, weft.LanguageModel(subject.net))


class Remote(Lane):
    """A server that has the model; the handle has no weights."""

    name = "remote"
    crowded = "jobs that wait on a server share a pass; with `alone=True` all bits are the same"

    def __init__(self, subject: Subject, id: str, url: str) -> None:
        super().__init__(subject, weft.LanguageModel(id, remote=url))


class Beside(Lane):
    """An invoke between two others."""

    name = "beside"
    shapes = "one pass computes its rows together with the neighbours'"

    def __init__(self, local: Lane) -> None:
        super().__init__(local.subject, local.model)

    @contextmanager
    def block(self, given: Given, **options: Any) -> Iterator[Any]:
        args, kwargs = given
        with self.several(**options) as tracer, tracer.invoke(*args, **kwargs):
            yield tracer

    @contextmanager
    def several(self, **options: Any) -> Iterator[Any]:
        with self.model.trace(**options) as tracer:
            first, last = NEIGHBOURS
            self._neighbour(tracer, first, self.layer)
            yield tracer
            self._neighbour(tracer, last, self.layer)

    @contextmanager
    def generation(self, row: Sequence[int], **options: Any) -> Iterator[Any]:
        first, last = NEIGHBOURS
        with self.model.generate(**options) as tracer:
            self._neighbour(tracer, first, self.answering)
            with tracer.invoke(torch.tensor([list(row)])):
                yield tracer
            self._neighbour(tracer, last, self.answering)

    def _neighbour(self, tracer: Any, factor: float, layer: Callable[[int], Any]) -> None:
        args, kwargs = self.subject.give(NEIGHBOURS[factor])
        with tracer.invoke(*args, **kwargs):
            hidden(layer(0).output)[:] *= factor
            hidden(layer(-1).output).save()


class Places:
    """The lanes of each subject, made when they are asked for; `server` is needed for `remote`."""

    def __init__(self, server: Any = None) -> None:
        self._server = server
        self._lanes: dict[tuple[str, torch.dtype], dict[str, Lane]] = {}

    def lane(self, subject: Subject, name: str) -> Lane:
        known = self._lanes.setdefault((subject.name, subject.dtype), {})
        if name not in known:
            known[name] = self._make(subject, name)
        return known[name]

    def _make(self, subject: Subject, name: str) -> Lane:
        if name == "local":
            return Local(subject)
        if name == "beside":
            return Beside(self.lane(subject, "local"))
        if self._server is None:
            raise RuntimeError("the remote lane needs a server")
        id = f"{subject.name}-{str(subject.dtype)[6:]}"
        self._server.add(id, subject.net)
        return Remote(subject, id, self._server.url)

    def close(self, subject: Subject) -> None:
        """Lets go of a subject's handles, and takes its model from the server."""
        lanes: Sequence[str] = tuple(self._lanes.pop((subject.name, subject.dtype), {}))
        if "remote" in lanes:
            self._server.remove(f"{subject.name}-{str(subject.dtype)[6:]}")
