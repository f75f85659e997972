"""The recorder: operations on `Value`s in one block become the nodes of one graph.

    recorder = Recorder(signature, run_prefix=..., device=...)
    with recorder:                        # binds it to this thread and task
        h = recorder.read("h.5", "output")
        (h * 2).save()
    graph, constants = recorder.freeze()
    recorder.deliver({"line 3": tensor})  # handles become plain tensors

It runs nothing. Where a number is needed while recording (`if h.norm() > 10`), the backend's
`run_prefix(graph, constants)` gets the graph so far. See `looks`, `clients`, `sites`, `saves` for
the parts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from weft.errors import OutsideTraceError, RecordingError
from weft.graph.node import Backward, Bound, Graph, Guard, Log, Mark, Save, Stop
from weft.graph.site import Where
from weft.kernels.table import NAMES

from . import special
from .arguments import Walk, has
from .away import filled
from .caches import Cache
from .clients import Clients
from .current import CURRENT, blocks_here, current, enter_watch, leave_watch
from .cut import refuse_cuts
from .finish import finished
from .given import inputs_that_ask
from .grads import Gradients
from .insides import Insides
from .invokes import Invokes, Outside
from .lines import frames_within, user_line, where
from .looks import Looks
from .operations import KINDS, Operations
from .recording import Recording
from .saves import Saves
from .sites import Sites
from .skips import record_skip, record_stop
from .times import FIRINGS, last_needed
from .value import Sizes, Value, make

if TYPE_CHECKING:
    from weft.signatures.signature import Signature

FACTORIES = frozenset(func for func, name in NAMES.items() if "factory" in KINDS[name])

RunPrefix = Callable[[Graph, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class Recorder(Recording):
    """Records one block. `device` is where results will live."""

    def __init__(
        self,
        signature: Signature | None,
        *,
        run_prefix: RunPrefix | None = None,
        device: torch.device | None = None,
        was_tuple: frozenset[str] = frozenset(),
        seed: int | None = None,
        owner: object = None,
        grad: bool = False,
    ) -> None:
        super().__init__()
        self.signature: Any = signature
        self.invoke: int | None = None if signature is None else 0
        """The invoke whose sites are meant now; None outside of all."""
        self.device = device or torch.device("cpu")
        self.was_tuple = was_tuple
        self.seed = seed
        self.owner = owner
        self.grad = grad
        """Whether what is saved stays connected to the client tensors it was made of."""
        self.entered = False
        self._blocks: set[Recorder] = set()
        self.caches: list[Cache] = []
        self.sources: dict[tuple[str, tuple[str, ...]], Mark] = {}
        """The sources inside of which the block names operations."""
        self.insides: Insides | None = None
        self.calls: Sequence[Any] = ()
        """What the model is called with, for each invoke: `args` and `kwargs`."""
        self._gradients: Gradients | None = None
        self.operations = Operations(self)
        self.clients = Clients(self)
        self.sites = Sites(self) if signature is not None else Outside(self)
        self.looks = Looks(self, run_prefix)
        self.saves = Saves(self)
        self.invokes: Invokes | None = None if signature is not None else Invokes(self)

    # -- the block ---------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        if current() is not None:
            raise RecordingError(
                "a block was opened inside another block",
                line=where(user_line()),
                fix="close the outer block first; a saved tensor can be used in the next one",
            )
        if self.entered:
            raise self.refusal("a block was opened a second time", "call model.trace(...) again")
        self.entered = True
        self.thread = threading.get_ident()
        self._blocks = blocks_here()
        try:
            CURRENT.set(self)
            self.open = True
            enter_watch(self, self._blocks)
        except BaseException:  # Ctrl-C
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.open = False
        try:
            leave_watch(self._blocks)
        finally:
            if CURRENT.get() is self:
                CURRENT.set(None)

    # -- operations --------------------------------------------------------------------------

    def observe(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        """A torch call seen by the mode: ours if it holds a value, a dirty tensor or `Sizes`."""
        if Value in types:
            return self.dispatch(func, args, kwargs)
        if func in special.HOLDS_LISTS and has(Value, args):
            return self.dispatch(func, args, kwargs)
        if func in FACTORIES and self._own_task() and has(Sizes, (args, kwargs)):
            return self.dispatch(func, args, kwargs)
        if self._gradients is not None and self._gradients.concerns(func, args):
            return self._gradients.of_client(args[0])
        if self.clients.dirty and self._touches_dirty(args, kwargs):
            return self.dispatch(func, args, kwargs)
        return func(*args, **kwargs)

    def dispatch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """One torch call that concerns this recorder."""
        if not self.open:
            return self._after(func, args, kwargs)
        if threading.get_ident() != self.thread:
            raise OutsideTraceError(
                "a value was used on another thread than the one that records the block",
                line=where(user_line()),
                fix="open a block of its own on each thread",
            )
        self._refuse_transforms()
        handler = special.HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs)
        name = NAMES.get(func)
        if name is None:
            raise self._unsupported(func)
        return self.operations.record(name, func, args, kwargs)

    # -- sites, weights, modules -------------------------------------------------------------

    def read(self, path: str, port: str, call: int | None = None) -> Any:
        """What a site holds (`port` is `input`, `inputs` or `output`), as handles."""
        if port == "input":
            return self.sites.read_leaf(self.first_input(path, "inputs", call))
        state = self.sites.state(path, port, call)
        got = self.sites.read(state)
        if path in self.was_tuple and isinstance(got, Value) and port == "output":
            got._bare = path
        return got

    def write(self, path: str, port: str, value: Any, call: int | None = None) -> None:
        """`module.<port> = value`."""
        if port == "input":
            self.sites.write_leaf(self.first_input(path, "inputs", call), value)
        else:
            self.sites.write(self.sites.state(path, port, call), value)

    def skip(self, path: str, value: Any, call: int | None = None, port: str = "output") -> None:
        """`module.skip(value)`; `port` is the output of what is skipped."""
        record_skip(self, path, value, call, port)

    def stop(self, condition: Any = True) -> None:
        """`tracer.stop()`, or with a condition `tracer.stop_if(...)`."""
        record_stop(self, condition)

    def move(self, by: int, path: str) -> None:
        """`module.next()`: on to a later step of the generation."""
        if self.steps is None:
            raise self.refusal("this block is a single forward", "use model.generate(...)")
        self.steps.move(by, path)

    def first_input(self, path: str, port: str, call: int | None) -> Any:
        """The leaf that `.input` means."""
        state = self.sites.state(path, port, call)
        first = state.first()
        if first is None:
            raise self.refusal(f"{path} has no tensor among its inputs", "use .inputs")
        return state.tensors[first]

    # -- gradients ---------------------------------------------------------------------------

    @property
    def gradients(self) -> Gradients:
        """The gradients of this recording."""
        if self.steps is not None:
            raise self.steps.no_gradients()
        if self._gradients is None:
            self._gradients = Gradients(self)
        return self._gradients

    def gradient_of(self, value: Value) -> Any:
        """`value.grad`."""
        real = self._real(value)
        return self.gradients.read(value) if real is None else real.grad

    def set_gradient(self, value: Value, new: Any) -> None:
        """`value.grad = new`."""
        real = self._real(value)
        if real is None:
            self.gradients.write(value, new)
        else:
            real.grad = new

    def backward(self, loss: Value, args: tuple, options: dict) -> Any:
        """`loss.backward(...)`."""
        real = self._real(loss)
        if real is None:
            return self.gradients.backward(loss, *args, **options)
        return real.backward(*args, **options)

    def _real(self, value: Value) -> torch.Tensor | None:
        """The tensor of a value; None while its block is recorded."""
        real = filled(value)
        if real is None and not self.open:
            raise self._ended(value)
        if real is None:
            self._refuse_transforms()
        return real

    # -- what values ask ---------------------------------------------------------------------

    def bind(self, value: Value, dims: tuple[int, ...]) -> None:
        """The recording read sizes of `value` as numbers."""
        if value._time < 0 or not self.open:
            return
        for dim in dims:
            key = (value._ref, dim)
            if key not in self.bounds:
                size = int(value._aval.shape[dim])
                self.bounds[key] = Bound(value._ref, dim, size, self.here())

    def handle(self, value: Value) -> Value:
        """Another handle on the same result."""
        return make(self, value._ref, value._aval, value._family, value._time, value._at)

    def number(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor behind `value` now, by a look where it has none yet."""
        if isinstance(value, Value):
            return self.looks.tensor(value)
        return value

    def save_value(self, value: Value, name: str | None) -> Any:
        if not self.open:
            if filled(value) is not None:
                if value._kept is not None:
                    value._kept.settle(value)
                return value
            raise self._ended(value)
        return self.saves.value(value, name)

    def log(self, parts: tuple) -> None:
        """Prints `parts` when they exist, below what was logged before."""
        walk = Walk(self, "log")
        lowered = tuple([walk.lower(part) for part in parts])
        after = None if self.steps is None else self.steps.moment(lowered)
        self.append(Log(parts=lowered, after=after, at=self.here()))

    # -- the end -----------------------------------------------------------------------------

    def freeze(self) -> tuple[Graph, dict[str, torch.Tensor]]:
        """The finished graph and its constants. Call once, when the block has been left."""
        self.clients.check()
        if self._gradients is not None:
            refuse_cuts(self._gradients)
            self._gradients.given.close(inputs_that_ask(self.calls))
        for cache in self.caches:
            cache.close()
        self.saves.close()
        if self.insides is not None:
            self.insides.close()
        return self.graph(), self.clients.constants

    def graph(self, extra: tuple = ()) -> Graph:
        """The graph so far, with `extra` nodes."""
        lines = tuple([where(line) for line in self.lines])
        bounds = tuple(self.bounds.values())
        nodes = (*self.nodes, *extra)
        if self.steps is not None:
            nodes, bounds = self.steps.finished(nodes, bounds)
        if self._gradients is not None:
            nodes, bounds = finished(self._gradients, nodes, bounds)
        sources = tuple(self.sources.values())
        return Graph(nodes, lines, bounds, self.seed, sources=sources, root=self.root)

    def unused_edits(self) -> list[Where]:
        """Lines of edits at sites that fire after all that is brought back."""
        last = self._last_needed()
        return [
            where(self.line_of(at))
            for time, at in self.edits
            if time > last.get(time // FIRINGS, -1)
        ]

    def _last_needed(self) -> Mapping[int, int]:
        """When the last site of each invoke fires that is brought back."""
        if self.invokes is None:
            looked = [time for time, _ in self.looks.seen.values()]
            asked = self._gradients.time if self._gradients is not None else -1
            return {0: max((self.saves.time, asked, *looked))}
        nodes = (*self.nodes, *self.carried)
        return last_needed(nodes, self.invokes.time, (Save, Guard, Log, Stop, Backward))

    def deliver(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Turns saved handles into the plain tensors of `saved`; returns results by name."""
        self.looks.run_prefix = None  # leads to the tracer, and with it to its results
        results = self.saves.deliver(saved)
        for cache in self.caches:
            cache.receive(saved.get(cache._name))
            results[cache._name] = cache
        self.caches.clear()
        if self._gradients is not None:
            self._gradients.given.deliver(saved)
        return results

    def fail(self, cause: BaseException | str) -> None:
        """Marks every handle as never filled."""
        self.failure = cause

    # -- what it does not record -------------------------------------------------------------

    def _after(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A torch call on handles of a block that has ended."""
        reals = special.forward(args), special.forward(kwargs)
        left = special.find_unreal(reals)
        if left is not None:
            raise left._rec._ended(left)
        return func(*reals[0], **reals[1])

    def _refuse_transforms(self) -> None:
        what = special.active_transform()
        if what is None and not torch.is_grad_enabled() and frames_within("utils/checkpoint.py"):
            what = "torch.utils.checkpoint"
        if what is not None:
            raise self._transformed(what)

    def _own_task(self) -> bool:
        return threading.get_ident() == self.thread

    def _touches_dirty(self, args: tuple, kwargs: dict) -> bool:
        found: list[torch.Tensor] = []
        special.tensors_in((args, kwargs), found)
        return any(self.clients.is_dirty(tensor) for tensor in found)
