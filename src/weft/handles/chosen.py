"""How tokens are chosen in a block of `model.generate`: the block's options, and an invoke's own.

with model.generate(max_new_tokens=8) as tracer:
    with tracer.invoke(a):                                       # the block's
        one = tracer.result.save()
    with tracer.invoke(b, do_sample=True, seed=3, max_new_tokens=5):
        two = tracer.result.save()                               # as in a block with these options
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from weft.errors import UnknownOptionError
from weft.families.forward import TENSOR_NAMES
from weft.families.sampling import Sampling, sampling_of

from .options import check_seed

OF_INVOKES = frozenset(("seed",))
"""The options of a block itself that an invoke of a generation may have, too."""

_LENGTHS = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))


class How(NamedTuple):
    """How the tokens of one invoke are chosen. `seed` keys its other draws, if it has its own."""

    sampling: Sampling
    seed: int | None


class Choices:
    """The options of a block, `given` by its user, and those of its invokes.

    Raises `UnknownOptionError` as `sampling_of` does. `defaults` are the model's own.
    """

    def __init__(self, given: Mapping[str, Any], seed: int | None, defaults: Any) -> None:
        self._defaults = defaults
        keyed = seed if seed is not None else int(torch.randint(2**62, ()))
        self._given = {**given, "seed": keyed}
        self.sampling = sampling_of(self._given, defaults)
        """Of the block."""
        self._own: dict[int, Sampling] = {}

    def split(self, options: Mapping[str, Any]) -> tuple[How | None, dict[str, Any]]:
        """The options of an invoke: how its tokens are chosen, if it says so, and its tensors."""
        tensors = {name: options[name] for name in TENSOR_NAMES if name in options}
        own = {name: value for name, value in options.items() if name not in tensors}
        return (self._how(own) if own else None), tensors

    def _how(self, own: dict[str, Any]) -> How:
        check_seed(own.get("seed"))
        given = {**self._given, **own}
        if own.get("seed", 0) is None:
            given["seed"] = self._given["seed"]
        for length, new in _LENGTHS:
            if own.get(length) is not None and new not in own:
                given[new] = None  # the block's would hide it
        found = sampling_of(given, self._defaults)
        if found.use_cache != self.sampling.use_cache:
            raise UnknownOptionError(
                "use_cache is an option of the whole block, not of one invoke",
                fix=f"give it to generate: model.generate(use_cache={own['use_cache']})",
            )
        return How(found, own.get("seed"))

    def note(self, invoke: int, how: How | None) -> None:
        """What this invoke says of itself, if anything."""
        self._own.pop(invoke, None)
        if how is not None:
            self._own[invoke] = how.sampling

    def of(self, invoke: int) -> Sampling:
        """How the tokens of an invoke are chosen."""
        return self._own.get(invoke, self.sampling)
