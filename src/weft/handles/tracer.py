"""`Tracer`: what can be said in one `with model.trace(...)` block, beside its modules' sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from weft.errors import UnknownOptionError, WeftError
from weft.families.call import ModelCall
from weft.run.estimate import Estimate
from weft.trace.away import fetched
from weft.trace.caches import Cache, Spec, paths_of
from weft.trace.lines import user_line, where
from weft.wire.messages import Generation

from .block import Block, lean
from .experiment import Experiment
from .invoke import Invoke, mask_of
from .planning import estimated


class Tracer(Block):
    """What `model.trace(...)` gives. Its block is recorded, and runs when it closes."""

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
        refused with both lines. options: the family's own, and in a generation those of `generate`
        (`temperature`, `max_new_tokens`, `seed`, ...), which hold over the block's; options of the
        whole block (`device`, `remote`, ...) belong to `trace`.
        """
        self._check_invoke(options)
        how, options = self._split(options)
        options = {**self._defaults, **options}
        if self._handle._is_empty(inputs, options):
            return Invoke(self, None, options, how)
        if self._whole is not None:
            raise self._recorder.refusal(
                "an invoke with an input was opened after an empty one, which shows all of them",
                "open the empty one last",
            )
        try:
            return Invoke(self, self._handle._prepare(inputs, options), options, how)
        except WeftError as error:
            raise error.at(where(user_line()))  # noqa: B904 (it is the same error)

    def _check_invoke(self, options: Mapping[str, Any]) -> None:
        if self._recorder.invokes is None:
            raise self._recorder.refusal(
                "tracer.invoke was used in a block that has an input already",
                "open the block without one, `with model.trace() as tracer:`, and give each "
                "input to an invoke",
            )
        own = sorted(options.keys() & self._handle._own_options - self._of_invokes)
        if own:
            raise UnknownOptionError(
                f"{own[0]} is an option of the whole block, not of one invoke",
                line=where(user_line()),
                fix=f"give it to {self._opened_by}: model.{self._opened_by}({own[0]}=...)",
            )

    _opened_by = "trace"
    _of_invokes: frozenset[str] = frozenset()  # options of a block that an invoke may have, too

    def _split(self, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The options of an invoke: how its tokens are chosen, in a generation, and all others."""
        return None, options

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
        """Prints text and values as soon as they exist, in the order of the block's lines.

        In a generation the lines of an invoke come step by step: text alone belongs to the step
        that it stands in, and outside of loops to step 0; with values it comes at every step.
        """
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
                f"dtype is a floating dtype of torch, not {dtype!r}",
                line=where(user_line()),
                fix="dtype=torch.float16, or leave it out to keep what the model has",
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
        kept = {key: tensor.clone() for key, tensor in fetched(constants).items()}
        return Experiment(graph, kept, self._how())

    def _how(self) -> tuple[Generation, ...]:
        """How tokens are chosen, of each invoke, in a generation."""
        return ()

    def plan(self) -> Estimate:
        """What the recorded graph costs, before it runs: by line, by site, and in all.

        `print` shows it, a notebook too: sites, operations, flops, bytes, peak memory, where the
        pass ends, and which invokes share one.
        """
        graph = self._frozen[0] if self._frozen is not None else self._recorder.graph()
        return estimated(self._handle, graph, self._calls, self._signatures, self._alone)
