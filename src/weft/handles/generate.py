"""`Generator`: one `with model.generate(...)` block.

with model.generate("The Eiffel Tower is in", max_new_tokens=5) as tracer:
    model.transformer.h[5].mlp.output[:] += direction      # at every step
    for step in tracer.iter[1:3]:
        h = model.transformer.h[8].output.save()           # of steps 1 and 2
    ids = tracer.result.save()                             # [batch, prompt + new]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from weft.client.backend import Request
from weft.client.travel import chosen_how
from weft.engine import steps
from weft.engine.forecast import Foreseen, forecast_steps, sizes
from weft.engine.generation import steps_of
from weft.engine.stepping import Stepping, sharer
from weft.engine.turns import Forward, turns_for
from weft.errors import InputError, UnknownOptionError, WeftError
from weft.families.call import ModelCall
from weft.families.encoded import generation_of
from weft.families.forward import TENSOR_NAMES
from weft.families.sampling import Sampling
from weft.graph.inside import Place, inside_of_graph
from weft.graph.node import Graph
from weft.graph.passes import prune
from weft.kernels.aval import Aval, contiguous
from weft.run.estimate import Estimate, estimate
from weft.signatures.signature import Signature
from weft.trace.lines import user_line, where
from weft.trace.steps import Chosen, Steps
from weft.wire.messages import Generation

from .chosen import OF_INVOKES, Choices, How
from .options import check_place, kept, split
from .session import join, remote_of
from .tracer import Tracer
from .where import Place as Where

if TYPE_CHECKING:
    from .handle import Handle


class Generator(Tracer):
    """What `model.generate(...)` gives: a block whose model runs once for each new token."""

    def __init__(
        self,
        handle: Handle,
        call: ModelCall | None,
        place: Where,
        choices: Choices,
        **options: Any,
    ) -> None:
        self.sampling = choices.sampling
        """How tokens are chosen, where an invoke does not say otherwise."""
        self._choices = choices
        self._steps: Any = None
        self._turns = turns_for(handle._signatures, handle._facts)
        super().__init__(handle, call, place, **options)
        recorder = self._recorder
        self._steps = recorder.steps = Steps(
            recorder,
            self._count,
            self._signature_at,
            self._ids_at,
            cached=self.sampling.use_cache,
            forward=self._forward_at,
        )

    # -- steps -------------------------------------------------------------------------------

    @property
    def iter(self) -> Iter:
        """The steps of the generation: `for step in tracer.iter[1:4]:`, `iter[2]`, `iter[[0, 3]]`,
        `iter[:]`. The body is recorded once for each, `step` is an int; step 0 is the prompt's
        forward, and each step makes one token. `with tracer.iter[2]:` is a single one."""
        return Iter(self._steps)

    def all(self) -> Steppings:
        """All steps: `tracer.iter[:]`."""
        return self.iter[:]

    def next(self, step: int = 1) -> Generator:
        """From this line on, outside of loops, the sites of the next step are meant (or of one
        `step` further on)."""
        self._steps.move(step)
        return self

    @property
    def result(self) -> Any:
        """The ids of prompt and answer, `[batch, pos]`, as `transformers`' `generate` returns them.

        They are there when the generation is over: in the block they can only be saved.
        """
        return self._steps.result()

    def plan(self) -> Estimate:
        """What the recorded graph costs at all steps, beyond the model's own work: by line, by
        site, and in all; and which invokes share steps."""
        graph = prune(self._frozen[0] if self._frozen is not None else self._recorder.graph())
        net = self._handle._weights.skeleton()
        ones = [Foreseen(*one) for one in zip(self._calls, self._samplings, strict=True)]
        passes = forecast_steps(graph, ones, None if self._alone else self._sharer(), net)
        return estimate(graph, self._index(), passes, sizes(net))

    # -- what a block asks of its model --------------------------------------------------------

    _opened_by = "generate"
    _of_invokes = OF_INVOKES

    def _split(self, options: dict[str, Any]) -> tuple[How | None, dict[str, Any]]:
        try:
            return self._choices.split(options)
        except WeftError as error:
            raise error.at(where(user_line()))  # noqa: B904 (it is the same error)

    def _add(self, call: ModelCall, how: How | None = None) -> int:
        number = len(self._calls)
        self._choices.note(number, how)
        seeds = self._recorder.operations.seeds
        seeds.pop(number, None)
        if how is not None and how.seed is not None:
            seeds[number] = how.seed
        return super()._add(call, how)

    @property
    def _samplings(self) -> list[Sampling]:
        """How the tokens of each invoke are chosen."""
        return [self._choices.of(invoke) for invoke in range(len(self._calls))]

    def _count(self, invoke: int) -> int:
        """How many steps an invoke can have."""
        return steps_of(self._calls[invoke], self._choices.of(invoke))

    def _how(self) -> tuple[Generation, ...]:
        each = enumerate(self._samplings)
        return tuple([chosen_how(replace(s, max_new_tokens=self._count(n))) for n, s in each])

    def _seen(self, call: ModelCall) -> Signature:
        handle = self._handle
        try:
            steps_of(call, self._choices.of(len(self._calls)))
        except WeftError as error:
            raise error.at(where(user_line()))  # noqa: B904 (it is the same error)
        if self._runs and self._place.kind == "here":
            call = call.to(handle._weights.device())
        self._calls.append(call)
        signature = self._signature_at(len(self._calls) - 1, 0)
        self._signatures.append(signature)
        return signature

    def _signature_at(
        self, invoke: int, step: int, sources: Iterable[Place] = (), cached: bool = False
    ) -> Signature:
        sampling = self._choices.of(invoke)
        sampling = replace(sampling, use_cache=True) if cached else sampling
        return self._turns.at(self._calls[invoke], sampling, step, sources)

    def _forward_at(self, invoke: int, step: int) -> Forward:
        return Forward(self._turns, self._calls[invoke], self._choices.of(invoke), step)

    def _ids_at(self, invoke: int) -> Aval:
        call = self._calls[invoke]
        length = self._choices.of(invoke).longest(call.begun)
        return contiguous((call.batch or 1, length), torch.int64)

    def _index(self) -> Any:
        return self._steps.time

    def _request(
        self, graph: Graph, constants: dict[str, torch.Tensor], look: bool = False
    ) -> Request:
        request = super()._request(graph, constants, look)
        each = self._samplings
        pairs = list(zip(self._calls, each, strict=True))

        def decoders(net: torch.nn.Module) -> Sequence[Any]:
            return [generation_of(net, call, how, self._tokenizer(how)) for call, how in pairs]

        told = steps.Steps(self._turns, self._calls, each, inside_of_graph(graph)).told()
        return replace(
            request,
            decoders=decoders,
            sampling=tuple(each),
            sharer=self._sharer(),
            overwritten=told,
        )

    def _sharer(self) -> Stepping | None:
        several = len(self._calls) > 1
        return sharer(self._handle._signatures, self._handle._facts) if several else None

    def _tokenizer(self, sampling: Sampling) -> Any:
        return self._handle.tokenizer if sampling.stop_strings else None


class Iter:
    """`tracer.iter`: choose steps with `[...]`; without, all of them."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __getitem__(self, chosen: Chosen) -> Steppings:
        return Steppings(self._steps, chosen)

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])


class Steppings:
    """Some steps: to go through with `for`, or, of a single one, with `with`."""

    def __init__(self, steps: Steps, chosen: Chosen) -> None:
        self._steps = steps
        self._chosen = chosen
        self._open: Any = None

    def __iter__(self) -> Iterator[int]:
        return self._steps.each(self._chosen)

    def __enter__(self) -> int:
        numbers = self._steps.numbers(self._chosen)
        if len(numbers) != 1:
            raise self._steps.recorder.refusal(
                f"a `with` block runs once, and these are {len(numbers)} steps",
                "write a loop: `for step in tracer.iter[...]:`; outside of loops an edit acts at "
                "every step anyway",
            )
        self._open = self._steps.at(numbers[0])
        return self._open.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


def open_generator(handle: Any, inputs: tuple, options: dict[str, Any]) -> Generator:
    """`LanguageModel.generate`."""
    if "use_cache" not in handle._facts.takes:
        raise InputError(
            f"a model of type {handle._facts.model_type!r} cannot generate: it gives no next token",
            line=where(user_line()),
            fix="trace it: model.trace(...)",
        )
    own, rest = split(options)
    place = handle._places.pick(remote_of(handle, own.remote))
    if own.grad:
        raise UnknownOptionError(
            "grad=True: there are no gradients in a generation",
            fix="generate first, and trace what came out: model.trace(ids, grad=True)",
        )
    check_place(own, place)
    place = kept(own, place)
    tensors = {name: rest.pop(name) for name in TENSOR_NAMES if name in rest}
    choices = Choices(rest, own.seed, handle._generation_defaults())
    several = handle._is_empty(inputs, tensors)
    generator = Generator(
        handle,
        None if several else handle._prepare(inputs, tensors),
        place,
        choices,
        defaults=tensors if several else None,
        alone=own.alone,
        seed=own.seed,
        device=own.device,
        blocking=own.blocking,
        eager=own.eager,
    )
    join(generator, place)
    return generator
