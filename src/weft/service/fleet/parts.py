"""The nouns of the fleet's decisions (`rules`): parts, what happens to them, what is to be done.

A part is a process that should be there, or could be: the worker of a model that is loaded on
demand is `cold` until somebody needs it. All of it is data, without clock, process or socket.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

Role = Literal["gateway", "checker", "worker"]
Phase = Literal["new", "cold", "starting", "ready", "waiting", "leaving", "unfit", "failed", "gone"]
Mode = Literal["serving", "draining", "ending", "over"]


class Need(Struct, frozen=True):
    """Bytes of memory, of the host and of its device."""

    host: int = 0
    device: int = 0

    def __add__(self, other: Need) -> Need:
        return Need(self.host + other.host, self.device + other.device)

    def __bool__(self) -> bool:
        return bool(self.host or self.device)

    def within(self, budget: Budget) -> bool:
        return (budget.host is None or self.host <= budget.host) and (
            budget.device is None or self.device <= budget.device
        )


class Budget(Struct, frozen=True):
    """Bytes that all workers together may take. None: as much as they like."""

    host: int | None = None
    device: int | None = None


class Resident(Struct, frozen=True):
    """What is known of a worker's model: whether it stays, what it takes, who wants it.

    `need` is what a load takes: as the last one was measured, else estimated; None: nobody knows.
    `holds` is what the process takes now, as measured. `waiting` and `running` count jobs,
    `sessions` what is open there; `used` is when one of them began or ended last. `asked` is since
    when jobs wait for it to be loaded. With `forget` it is gone when its process is.
    """

    pinned: bool = True
    need: Need | None = None
    holds: Need = Need()
    waiting: int = 0
    running: int = 0
    sessions: int = 0
    used: float = 0.0
    asked: float | None = None
    forget: bool = False

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self.sessions)

    @property
    def wanted(self) -> bool:
        return self.pinned or self.waiting > 0 or self.running > 0


class Part(Struct, frozen=True):
    """A process that should be there. `deaths` are those in a row before it was ready."""

    name: str
    role: Role
    phase: Phase = "new"
    deaths: int = 0
    begun: float = 0.0  # when it was started last
    ready_at: float = 0.0
    again: float = 0.0  # when a waiting one is started
    there: bool = False  # whether it has a process, ending or not
    model: Resident = Resident()

    @property
    def alive(self) -> bool:
        return self.phase in ("starting", "ready", "leaving")

    @property
    def claim(self) -> Need:
        """The memory that it has, or is to have in a moment: until its process is gone."""
        if not self.there and self.phase != "waiting":
            return Need()
        return self.model.holds or self.model.need or Need()


class State(Struct, frozen=True):
    """All parts, and how far the fleet is with its own life. `grows`: models may be added."""

    parts: dict[str, Part]
    drain: float
    budget: Budget = Budget()
    grows: bool = False
    mode: Mode = "serving"
    until: float | None = None

    @classmethod
    def of(cls, roles: dict[str, Role], drain: float) -> State:
        return cls({name: Part(name, role) for name, role in roles.items()}, drain)

    def with_part(self, part: Part) -> State:
        return replace(self, parts={**self.parts, part.name: part})

    def without(self, name: str) -> State:
        return replace(self, parts={n: part for n, part in self.parts.items() if n != name})

    def alive(self, *roles: Role) -> list[Part]:
        return [part for part in self.parts.values() if part.alive and part.role in roles]

    def workers(self, *phases: Phase) -> list[Part]:
        workers = [part for part in self.parts.values() if part.role == "worker"]
        return [part for part in workers if not phases or part.phase in phases]


# -- events ----------------------------------------------------------------------------------------


class Begin(Struct, frozen=True):
    """The fleet begins."""


class Ready(Struct, frozen=True):
    """A part says that it can do its work; `took` is what it takes, where that was measured."""

    name: str
    took: Need | None = None


class Unusable(Struct, frozen=True):
    """A worker says that it will never be: its model cannot be loaded."""

    name: str
    reason: str


class Died(Struct, frozen=True):
    """A process ended, whatever the reason."""

    name: str


class Tick(Struct, frozen=True):
    """Time has passed."""


class Stop(Struct, frozen=True):
    """Somebody wants the fleet to end. The second time, now."""


class Demand(Struct, frozen=True):
    """The jobs of one model, its open sessions, and when one of them began or ended last."""

    waiting: int = 0
    running: int = 0
    sessions: int = 0
    used: float = 0.0


class Looked(Struct, frozen=True):
    """How many jobs there are, by part; one that is not named has none."""

    demand: dict[str, Demand]


class Known(Struct, frozen=True):
    """What a load would take, by the size of the weights; a measure is better, where there is."""

    name: str
    need: Need


class Measured(Struct, frozen=True):
    """What a process takes."""

    name: str
    holds: Need


class Limited(Struct, frozen=True):
    """What all workers together may take, from now on."""

    budget: Budget


class Added(Struct, frozen=True):
    """A model was deployed: a new one, or one that is there, perhaps pinned otherwise. One that
    has failed is tried anew."""

    name: str
    pinned: bool
    need: Need | None = None


class Removed(Struct, frozen=True):
    """A model is no more of this server."""

    name: str


class Evicted(Struct, frozen=True):
    """Somebody wants a model out of memory."""

    name: str


Event = (
    Begin
    | Ready
    | Unusable
    | Died
    | Tick
    | Stop
    | Looked
    | Known
    | Measured
    | Limited
    | Added
    | Removed
    | Evicted
)

# -- commands --------------------------------------------------------------------------------------


class Start(Struct, frozen=True):
    """Make the process."""

    name: str


class Drain(Struct, frozen=True):
    """Tell a gateway to take no new jobs."""

    name: str


class Finish(Struct, frozen=True):
    """Tell it to end after what it has in hand."""

    name: str


class Kill(Struct, frozen=True):
    """End it now."""

    name: str


class Release(Struct, frozen=True):
    """Take back what the dead process had claimed."""

    name: str


class Say(Struct, frozen=True):
    """A model's state has changed: `cold`, `loading`, `ready` or `failed`."""

    model: str
    state: str
    reason: str | None = None


class Drop(Struct, frozen=True):
    """Nothing of the model is left: forget that it was there."""

    model: str


class Over(Struct, frozen=True):
    """The fleet ends; with a reason, in failure."""

    reason: str | None = None


Command = Start | Drain | Finish | Kill | Release | Say | Drop | Over
Step = tuple[State, tuple[Command, ...]]
