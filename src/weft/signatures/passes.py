"""`Passes`: the exact passes of one model, fake where that can be, and how many there were."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from weft.errors import RecordingError

from .ghost import without_hooks
from .learn import Table, learn, learn_by_running, weights_of
from .second import Pair, learn_second, learn_second_by_running
from .telling import Telling


class Passes:
    """Runs the module that `provider()` gives. `real()` gives it with weights, or there is none.

    `device` is where the model will run (default: where the weights are, or the CPU for weights on
    meta). `telling` asks for operations inside forwards, too.
    """

    def __init__(
        self,
        provider: Callable[[], nn.Module],
        real: Callable[[], nn.Module] | None = None,
        device: torch.device | str | None = None,
        telling: Telling | None = None,
    ) -> None:
        self._module = provider
        self._telling = telling
        self._real = real
        self._device = None if device is None else torch.device(device)
        self.count = 0

    def device_of(self, module: nn.Module) -> torch.device:
        """Where the module will run."""
        if self._device is not None:
            return self._device
        kinds = [t.device for t in weights_of(module) if t.device.type != "meta"]
        return kinds[0] if kinds else torch.device("cpu")

    def try_(self, args: tuple, kwargs: dict, contrary: int | None = None) -> Table | None:
        """A fake pass, or None where it fails. Nobody hears of it if a look is made contrary."""
        self.count += 1
        try:
            place = self.device_of(self._module())
            module = without_hooks(self._module())
            if contrary is None:
                return learn(module, args, kwargs, place, telling=self._telling)
            with _without_logs():
                return learn(module, args, kwargs, place, True, contrary, self._telling)
        except Exception:  # noqa: BLE001 (sizes that nobody asked for may well be refused)
            return None

    def must(self, args: tuple, kwargs: dict) -> Table:
        """A pass for what was asked: as fake as it can be. Raises RecordingError."""
        place = self.device_of(self._module())
        module = without_hooks(self._module())
        reasons = []
        for integers in (True, False):
            self.count += 1
            try:
                return learn(module, args, kwargs, place, integers, None, self._telling)
            except Exception as error:  # noqa: BLE001 (a model may raise anything)
                reasons.append(error)
        if self._real is None:
            raise _unlearnable(reasons[0]) from reasons[0]
        try:
            return learn_by_running(self._real(), args, kwargs, self._telling)
        except Exception as error:
            raise _unlearnable(error) from error

    def second(self, pair: Callable[[nn.Module], Pair]) -> Table:
        """The second of two forwards, as fake as it can be. Raises RecordingError."""
        place = self.device_of(self._module())
        module = without_hooks(self._module())
        reasons = []
        for integers in (True, False):
            self.count += 1
            try:
                return learn_second(module, pair, place, integers, self._telling)
            except Exception as error:  # noqa: BLE001 (a model may raise anything)
                reasons.append(error)
        if self._real is None:
            raise _unlearnable(reasons[0]) from reasons[0]
        try:
            return learn_second_by_running(self._real(), pair, self._telling)
        except Exception as error:
            raise _unlearnable(error) from error


def _unlearnable(error: BaseException) -> RecordingError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return RecordingError(
        "the shapes inside the model could not be found out: its forward pass failed with "
        f"{type(error).__name__}: {reason}",
        fix="check that the model runs on this input; a forward that branches on values needs "
        "its weights loaded",
    )


@contextmanager
def _without_logs() -> Iterator[None]:
    """A pass with a contrary look must not warn of what is not so."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
