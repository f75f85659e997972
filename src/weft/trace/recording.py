"""What is recorded, and whose line it was: nodes, lines, and the errors that name them.

`Recorder` adds to it whatever makes nodes; a `Recording` alone says what has become of a value.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from weft.errors import (
    FailedRunError,
    NotFinishedError,
    NotReachedError,
    NotSavedError,
    RecordingError,
    UnsupportedOperationError,
)
from weft.graph.node import AnyNode, Bound, Ref, Save
from weft.graph.site import Where
from weft.kernels.table import reason

from .away import Away, Space, away_of, filled, standing
from .lines import frames_within, user_line, where
from .special import TRANSFORMS
from .trained import trained_here
from .value import Value, short

if TYPE_CHECKING:
    import torch

    from .steps import Steps


class Recording:
    """See the module's text. `failure` says why its values will have no numbers."""

    def __init__(self) -> None:
        self.open = False
        self.failure: BaseException | str | None = None
        self.nodes: list[AnyNode] = []
        self.lines: dict[tuple[str, int] | Where, int] = {}
        self.replayed: int | None = None
        """The line that is meant while the nodes of an edit are recorded anew (`edits`)."""
        self.bounds: dict[tuple[Ref, int], Bound] = {}
        self.edits: list[tuple[int, int]] = []
        self.stops: list[int] = []
        """Lines at which the block ends the pass."""
        self.root: str | None = None
        """The method whose call is recorded; None: the forward."""
        self.steps: Steps | None = None
        """The steps of a generation; None in a single forward."""
        self.made: list[weakref.ref[Value]] | None = None
        """All handles, where a session wants to know who is left (`carry`)."""
        self.space: Space | None = None
        """Where the block runs, if a session there keeps values (`away`)."""
        self.stays: dict[str, torch.Tensor] = {}
        """Saves that stay there: gradients of client tensors."""
        self.carried: tuple[Save, ...] = ()
        """What a session brings back besides what was saved."""

    # -- nodes and lines ---------------------------------------------------------------------

    def append(self, node: AnyNode) -> Ref:
        """Adds a node; returns the reference to its first result."""
        self.nodes.append(node)
        return Ref(len(self.nodes) - 1)

    def line(self) -> tuple[str, int]:
        return user_line()

    def here(self) -> int:
        """The index of the user's current line."""
        if self.replayed is not None:
            return self.replayed
        line = user_line()
        found = self.lines.get(line)
        if found is None:
            found = self.lines[line] = len(self.lines)
        return found

    def line_of(self, at: int) -> tuple[str, int] | Where:
        return list(self.lines)[at]

    def refusal(self, message: str, fix: str) -> RecordingError:
        return RecordingError(message, line=where(user_line()), fix=fix)

    def shown(self, value: Value) -> Any:
        """The numbers of a value for `print` and the like: `eager` has them while recording."""
        return None

    def describe(self, value: Value) -> str:
        node = self.nodes[value._ref.node]
        origin = str(
            getattr(node, "site", "") or getattr(node, "op", "") or node.__class__.__name__
        )
        state = "" if self.open else " (not saved)" if value._away is None else " (on the server)"
        return f"{short(value._aval)} from {origin}{state}, {where(self.line_of(value._at))}"

    # -- errors ------------------------------------------------------------------------------

    def _ended(self, value: Value) -> Exception:
        made = where(self.line_of(value._at))
        if value._missed:
            return self.not_reached("this value was not reached", made)
        return self._without_numbers(made)

    def unfilled(self, name: str, at: int) -> Exception:
        """The error for a cache that is read before it is filled."""
        if self.open:
            return self.refusal(
                f"the cache {name!r} was read inside its block, where it has no tensors yet",
                "read it after the block; inside it read the sites themselves",
            )
        return self._without_numbers(where(self.line_of(at)))

    def _without_numbers(self, made: Where) -> Exception:
        if isinstance(self.failure, (NotFinishedError, FailedRunError)):
            return type(self.failure)(self.failure.message, line=made, fix=self.failure.fix)
        if self.failure is not None:
            return FailedRunError(
                f"this value has no numbers, because its block did not finish: {self.failure}",
                line=made,
                fix="mend the cause and run the block again",
            )
        return NotSavedError(
            "this value was used after its block, but it was not saved",
            line=made,
            fix="add .save() to it in the block",
        )

    def not_reached(self, what: str, line: Any) -> NotReachedError:
        """The error for what a stop has kept from happening."""
        if self.steps is not None and not self.stops:
            return self.steps.not_reached(what, line)
        lines = [str(where(self.line_of(at))) for at in dict.fromkeys(self.stops)]
        return NotReachedError(
            f"{what}: the pass was stopped before it, at {' or '.join(lines) or 'a stop'}",
            line=line,
            fix="move the stop below what is needed",
        )

    def own(self, value: Value) -> Any:
        """`value` as this block may use it: the tensor, where an earlier block has filled it."""
        if value._rec is self:
            return value
        if value._away is not None and value._away.space is self.space:
            return standing(value)
        real = filled(value)
        if real is None:
            raise self._foreign(value)
        return real

    def away(self, tensor: torch.Tensor) -> Away | None:
        """Where the numbers of a client tensor are: in the space in which this block runs; None:
        here, to which they are brought from anywhere else."""
        stands_for, trained = away_of(tensor), trained_here()
        if stands_for is not None or trained is None:
            return stands_for
        found = trained.away_of(tensor)
        if found is not None and found.space is not self.space:
            trained.home(tensor)
            return None
        return found

    def _foreign(self, value: Value) -> Exception:
        other = value._rec
        if not other.open:
            return other._ended(value)
        return self.refusal("a value of another open block was used", "save it there first")

    def _transformed(self, what: str) -> RecordingError:
        return self.refusal(
            f"{what} cannot be recorded: it would act on the recording, not on the numbers",
            "call the function directly in the block, or use the saved tensor after it",
        )

    def _unsupported(self, func: Any) -> Exception:
        if frames_within("_functorch/apis.py"):  # a rule of its own, written in Python, is at work
            return self._transformed(TRANSFORMS)
        shown = getattr(func, "__qualname__", None) or getattr(func, "__name__", repr(func))
        why = reason(func) or "it is not in the operation table"
        return UnsupportedOperationError(
            f"{shown} cannot be recorded: {why}",
            line=where(user_line()),
            fix="use another operation, or save the value and go on after the block",
        )

    def at_line(self, error: RecordingError) -> Exception:
        """A refusal of the kernels, which know no lines, with the user's."""
        return type(error)(error.message, line=where(user_line()), fix=error.fix)
