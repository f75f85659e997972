"""`StandIn`: in the place of a module's `forward` while somebody may want another one there.

No hook can keep a forward from being called, or call another one. So while a run with skips or
with sites inside a forward is on its way, a `StandIn` stands in the `forward` of each module
concerned. It asks whose call this is: any other run's, and anybody else's, goes through to the
module's own forward. The last that needs it takes it away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

NOTHING: Any = object()
Ask = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""`ask(module, args, kwargs)`: what a call gives, or `NOTHING` where it is somebody else's."""


class StandIn:
    """In the place of a module's `forward`."""

    def __init__(self, module: Any) -> None:
        self.users: dict[Ask, int] = {}
        self.asks: tuple[Ask, ...] = ()
        self.before = module.__dict__.get("forward")  # of accelerate, say
        """What stood in the module itself; None where its class has the forward."""
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for ask in self.asks:
            found = ask(self._module, args, kwargs)
            if found is not NOTHING:
                return found
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self._module).forward(self._module, *args, **kwargs)


_LOCK = threading.Lock()


def stand_in(module: Any, ask: Ask) -> None:
    """From here on `ask` decides what calls of the module give, until `stand_down`."""
    with _LOCK:
        there = module.__dict__.get("forward")
        if not isinstance(there, StandIn):
            there = module.__dict__["forward"] = StandIn(module)
        there.users[ask] = there.users.get(ask, 0) + 1
        there.asks = tuple(there.users)


def stand_down(module: Any, ask: Ask) -> None:
    """Undoes one `stand_in`; the last leaves the module as it was."""
    with _LOCK:
        there = module.__dict__.get("forward")
        if not isinstance(there, StandIn) or ask not in there.users:
            return
        there.users[ask] -= 1
        if not there.users[ask]:
            del there.users[ask]
            there.asks = tuple(there.users)
        if not there.asks:
            del module.__dict__["forward"]
            if there.before is not None:
                module.__dict__["forward"] = there.before


def forward_of(module: Any) -> Any:
    """The module's own forward, as it is called: a bound method of its class, as a rule."""
    there = module.__dict__.get("forward")
    if isinstance(there, StandIn):
        there = there.before
    return MethodType(type(module).forward, module) if there is None else there
