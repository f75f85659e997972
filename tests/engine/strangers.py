"""Requests of many users on one model, as they come to a worker, and what each gives alone.

    made = Requests(zoo.build("llama", max_position_embeddings=256), paths)
    asked = made.ask(lambda model: ...)        # one block, run alone; what it gave is `asked.alone`
    found = made.together([asked, ...])        # one list: `Drawn`, an error, or None

The blocks are written with the public API and travel as bytes, as they would to a server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import weft
from tests.engine.bench import limits
from tests.families import zoo
from weft.client import loopback
from weft.engine.draw import Drawn, overwritten_by
from weft.engine.merging import merger_of
from weft.engine.opened import Opened
from weft.engine.party import Entry, Found, draw_together
from weft.engine.rolling import Decode
from weft.engine.stepping import sharer_of
from weft.kernels.frames import to_tensor
from weft.wire.structures import build


@dataclass(eq=False)
class Asked:
    """One request, what it saved alone, or the error that it ended with."""

    opened: Opened
    strict: bool
    alone: dict[str, Any] | None
    error: BaseException | None = None


class Requests:
    """See the module's text."""

    def __init__(self, net: nn.Module, monkeypatch: Any) -> None:
        self.net = net
        self.model = weft.LanguageModel(net, remote="local")
        self.known: Any = None
        self._seen: list[tuple[Opened, bool]] = []
        draw = loopback.draw

        def hears(net: nn.Module, opened: Opened, **options: Any) -> Drawn:
            self._seen.append((opened, options["strict"]))
            return draw(net, opened, **options)

        def told(known: Any, *calls: Any, **options: Any) -> Any:
            self.known = known
            return overwritten_by(known, *calls, **options)

        monkeypatch.setattr(loopback, "draw", hears)
        monkeypatch.setattr(loopback, "overwritten_by", told)

    def ask(self, block: Callable[[Any], Any]) -> Asked:
        """Runs a block alone."""
        try:
            tracer = block(self.model)
            alone = {name: _plain(value) for name, value in tracer.results.items()}
        except weft.WeftError as error:
            opened, strict = self._seen.pop()
            return Asked(opened, strict, None, error)
        opened, strict = self._seen.pop()
        assert not self._seen
        return Asked(opened, strict, alone)

    def together(self, asked: Sequence[Asked], **options: Any) -> list[Found]:
        merger = merger_of(self.known)
        assert merger is not None
        return draw_together(self.net, [self.entry(one, **options) for one in asked], merger)

    def decode(self) -> Decode:
        stepping = sharer_of(self.known)
        assert stepping is not None
        return Decode(self.net, stepping, self.known.tokenizer)

    def entry(self, asked: Asked, **options: Any) -> Entry:
        opened = asked.opened
        told = overwritten_by(
            self.known, *opened.calls, graph=opened.graph, sampling=opened.sampling
        )
        return Entry(opened, limits(), told, asked.strict, **options)


def _plain(value: Any) -> Any:
    """A copy, on the CPU, where what was saved comes back to."""
    return value.cpu().clone() if isinstance(value, torch.Tensor) else value


def saved(found: Found) -> dict[str, Any]:
    """What a job brought back, by name."""
    assert isinstance(found, Drawn), found
    tensors = {name: to_tensor(frame) for name, frame in found.frames.items()}
    rows = found.manifest.saved
    return {name: build(value, lambda ref: tensors[str(ref.node)]) for name, value in rows}


def ids(length: int, seed: int, rows: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, zoo.VOCAB, (rows, length), generator=draw)


# -- what people do ------------------------------------------------------------------------------


class Experiments:
    """Blocks on a model of the zoo; `number` makes each another one. `options` are of `trace`."""

    def __init__(self, name: str, **options: Any) -> None:
        self.paths = zoo.paths(name)
        self.options = options

    def layer(self, model: Any, number: int) -> Any:
        return model.get(self.paths.layer(number % zoo.LAYERS))

    def head(self, model: Any) -> Any:
        return model.get(self.paths.head)

    def read(self, model: Any, length: int, number: int) -> Any:
        with model.trace(ids(length, number), **self.options) as tracer:
            self.layer(model, number).output[:, -2:].save("h")
            model.get(self.paths.mlp(number)).output.mean(-1).save("mean")
            self.head(model).output[:, -1].save("logits")
        return tracer

    def early(self, model: Any, length: int, number: int) -> Any:
        """Needs the first layer only."""
        with model.trace(ids(length, number), **self.options) as tracer:
            self.layer(model, 0).output.save("h")
        return tracer

    def fill(self, model: Any, length: int, number: int) -> Any:
        with model.trace(ids(length, number), **self.options) as tracer:
            self.layer(model, number).output[:, -1] *= 0.5 + number / 10
            self.layer(model, number + 1).output[:, 0].save("h")
            self.head(model).output[:, -1].save("logits")
        return tracer

    def write(self, model: Any, length: int, number: int) -> Any:
        mlp = model.get(self.paths.mlp(number))
        with model.trace(ids(length, number), **self.options) as tracer:
            mlp.output = mlp.output.flip(1) + number
            self.head(model).output[:, -1].softmax(-1).save("p")
        return tracer

    def patch(self, model: Any, length: int, number: int) -> Any:
        with model.trace(**self.options) as tracer:
            with tracer.invoke(ids(length, number)):
                clean = self.layer(model, number).output[:, -1]
            with tracer.invoke(ids(length + 2, number + 1)):
                self.layer(model, number).output[:, 1] = clean
                self.head(model).output[:, -1].save("logits")
        return tracer

    def lens(self, model: Any, length: int, number: int) -> Any:
        norm = model.get(self.paths.norm)
        with model.trace(ids(length, number), **self.options) as tracer:
            states = [self.layer(model, n).output[:, -1] for n in range(zoo.LAYERS)]
            for n, state in enumerate(states):
                self.head(model)(norm(state)).argmax(-1).save(f"l{n}")
        return tracer

    def steer(self, model: Any, length: int, number: int) -> Any:
        direction = torch.randn(32, generator=torch.Generator().manual_seed(number))
        with model.trace(ids(length, number, rows=2), **self.options) as tracer:
            self.layer(model, number).output += 0.3 * direction
            self.head(model).output[:, -1].save("logits")
        return tracer

    def draws(self, model: Any, length: int, number: int) -> Any:
        with model.trace(ids(length, number), seed=number, **self.options) as tracer:
            h = self.layer(model, number).output
            h += torch.randn_like(h)
            tracer.log("mean", h.mean())
            self.head(model).output[:, -1].save("logits")
        return tracer


KINDS = ("read", "fill", "write", "patch", "lens", "steer", "draws", "early")


class Generations:
    """Generations on a model of the zoo; `number` makes each another one."""

    def __init__(self, name: str, **options: Any) -> None:
        self.paths = zoo.paths(name)
        self.options = options

    def block(self, model: Any, number: int) -> Any:
        """One of some kinds, with a length, a sampler and a seed of its own."""
        kind = GENERATED[number % len(GENERATED)]
        return getattr(self, kind)(model, number)

    def _how(self, number: int) -> dict[str, Any]:
        how: dict[str, Any] = {"max_new_tokens": 1 + (5 * number) % 7, **self.options}
        if number % 3:
            how |= {"do_sample": True, "seed": number, "temperature": 0.7 + number % 4 / 4}
        if number % 5 == 0:
            how["eos_token_id"] = [number % zoo.VOCAB, 7, 11, 40, 90]
        return how

    def _ids(self, number: int) -> torch.Tensor:
        return ids(2 + (3 * number) % 9, number, rows=1 + (number % 7 == 0))

    def layer(self, model: Any, number: int) -> Any:
        return model.get(self.paths.layer(number % zoo.LAYERS))

    def plain(self, model: Any, number: int) -> Any:
        with model.generate(self._ids(number), **self._how(number)) as tracer:
            tracer.result.save("ids")
        return tracer

    def steered(self, model: Any, number: int) -> Any:
        """At every step."""
        with model.generate(self._ids(number), **self._how(number)) as tracer:
            self.layer(model, number).output[:, -1] *= 1.5
            tracer.result.save("ids")
        return tracer

    def read(self, model: Any, number: int) -> Any:
        """At the prompt and at every step, as far as there are any."""
        with model.generate(self._ids(number), **self._how(number)) as tracer:
            states, logits = weft.save([]), weft.save([])
            for _ in tracer.iter[:]:
                states.append(self.layer(model, number).output[:, -1])
                logits.append(model.get(self.paths.head).output[:, -1].argmax(-1))
            tracer.result.save("ids")
        return tracer

    def pinned(self, model: Any, number: int) -> Any:
        """An edit of one step only, and nobody wants the tokens."""
        how = self._how(number) | {"max_new_tokens": 6}
        how.pop("eos_token_id", None)
        with model.generate(self._ids(number), **how) as tracer:
            with tracer.iter[2]:
                mlp = model.get(self.paths.mlp(number))
                mlp.output = mlp.output + 0.5
            with tracer.iter[3]:
                self.layer(model, number).output[:, -1].save("h")
        return tracer

    def ends(self, model: Any, number: int) -> Any:
        """All of the prompt's positions, and an edit of what the head is given of it."""
        head = model.get(self.paths.head)
        with model.generate(self._ids(number), **self._how(number)) as tracer:
            with tracer.iter[0]:
                h = self.layer(model, number).output
                h[:, 0] += 0.5
                h.save("h")
                head.input *= 1.5
                head.output = head.output.flip(-1)
                head.output.save("logits")
            tracer.result.save("ids")
        return tracer

    def stopped(self, model: Any, number: int) -> Any:
        """Ends itself where its numbers say so."""
        with model.generate(self._ids(number), **self._how(number)) as tracer:
            tracer.stop_if(model.get(self.paths.head).output[:, -1].argmax(-1).sum() % 3 == 0)
            tracer.result.save("ids")
        return tracer

    def two(self, model: Any, number: int) -> Any:
        """Two generations of one request."""
        with model.generate(**self._how(number)) as tracer:
            with tracer.invoke(self._ids(number)):
                self.layer(model, number).output[:, -1] *= 0.8
                tracer.result.save("first")
            with tracer.invoke(self._ids(number + 1)):
                tracer.result.save("second")
        return tracer


GENERATED = ("plain", "steered", "read", "pinned", "ends", "stopped", "two")
