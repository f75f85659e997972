"""What backwards cost: counted, as in `play`, on shapes alone.

A backward does about twice what was done to make its losses. Where its gradients have gradients
too, what it does itself counts among that from then on: each such backward may triple it. Until the
last of them has run, everything that was made since is still there.
"""

from __future__ import annotations

from typing import Any

from weft.graph.node import Grad
from weft.kernels.aval import Aval, contiguous

from .steps import Step


class Backwards:
    """The backwards of one play."""

    def __init__(self, play: Any) -> None:
        self._play = play
        self._left = len(play.plan.backwards)
        self._held: list[int] = []  # slots that nobody names any more, but autograd
        self._of: dict[int, Aval] = {}  # slot -> what its gradient looks like
        self._spent = 0
        self._again = 0  # of that, what can be differentiated again
        self.model = 0
        """What the model's own pass costs."""

    def drop(self, slot: int) -> None:
        """A value that no step needs any more."""
        if self._left:
            self._held.append(slot)
        else:
            self._play.memory.died(slot)

    def over(self) -> None:
        """A backward has run."""
        self._left -= 1
        if not self._left:
            for slot in self._held:
                self._play.memory.died(slot)
            self._held.clear()

    def cost(self, step: Step) -> int:
        """Operations that a backward takes."""
        play = self._play
        for index in step.arrivals:
            slot = play.plan.steps[index].of
            aval = play.env[slot]
            self._of[slot] = contiguous(tuple(aval.shape), aval.dtype)
        cost = 2 * (play.flops - self._spent + self._again + self.model)
        self._spent += cost
        if step.node.create:
            self._again += cost
        return cost

    def gradient(self, step: Step) -> Aval:
        """What a gradient looks like."""
        assert step.kind is Grad
        return self._of[step.of]

    def of(self, step: Step) -> Aval:
        """What the gradient that a step replaces looks like."""
        return self._of[step.of]
