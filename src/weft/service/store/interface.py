"""What a store does. SQLite and a folder do it on one machine; `memory` is the fake.

Two halves: `Ledger` holds rows (jobs, events, keys, questions, cards), `Objects` holds bytes
(graphs, constants, results). Each call is one transaction: it happened or it did not, whoever is
killed when, and what it wrote outlives every process. Submissions, steps, keys and objects outlive
a power cut too, from the moment that the call returns; claims, renewals, notes, questions and
prices from the next of those on, as they are worth nothing without the processes that such a cut
ends, or are found out once more.

Several processes share one store: the gateway submits and reads, the checker claims jobs in
`received`, workers claim jobs in `queued`. Who has a claim holds a token; a step under a token that
is no longer the job's raises `LostClaimError`, so that a process that was given up for dead can
change nothing any more.

A ledger is opened with the `Settings` it needs (`attempts`, `keep_seconds`) and, if wanted, a
`Carry`: it is called after each step, when that step is durable, with what `life` commands besides
notes (whom to wake, what to drop). `shell.Shell` is one. All calls may come from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import BinaryIO, Protocol

from msgspec import Struct

from weft.errors import LimitError
from weft.service.jobs.life import Command, Job
from weft.service.jobs.life import Event as LifeEvent
from weft.service.jobs.scopes import USUAL
from weft.service.store.kept import KeptRows
from weft.service.store.models import ModelRows
from weft.service.store.sessions import SessionRows
from weft.service.store.tallies import TallyRows
from weft.service.store.usage import UsageRows

Carry = Callable[[Job, tuple[Command, ...]], None]


class LostClaimError(Exception):
    """The job was taken from this worker, which must drop it."""


class QueueFullError(LimitError):
    """As many of an owner's jobs wait as may wait at once."""


class Note(Struct, frozen=True):
    """One entry of a job's replayable stream. `seq` counts from 1 within the job."""

    seq: int
    kind: str  # "state", "log", "progress", "end"
    data: bytes  # the event's JSON


class Key(Struct, frozen=True):
    """An API key at rest: `digest` is the SHA-256 of the key, `owner` who it stands for.

    Keys of one owner share its jobs, its place in the queue and what is counted of it. Each has its
    own `scopes` (`jobs.scopes`), `models` (ids that it may use; none: all), `weight` in the queue
    and `limits` (settings that are others for it).
    """

    owner: str
    digest: str
    created: float
    revoked: float | None = None
    scopes: tuple[str, ...] = USUAL
    models: tuple[str, ...] = ()
    expires: float | None = None
    weight: float = 1.0
    limits: dict[str, float] = {}
    used: float | None = None  # when it was used last, to a minute or so


class Question(Struct, frozen=True):
    """Something the gateway cannot know without torch: `kind` is the name of the asking message."""

    id: str
    kind: str
    owner: str
    body: bytes
    answer: bytes | None = None
    ok: bool = False
    created: float = 0.0


class Card(Struct, frozen=True):
    """A model as the checker published it. `state`: `loading`, `ready` or `failed`."""

    model: str
    state: str
    fingerprint: str = ""
    card: bytes = b""  # wire ModelCard, msgpack
    tables: bytes = b""  # signatures, as bytes
    reason: str | None = None


class Ledger(ModelRows, KeptRows, SessionRows, UsageRows, TallyRows, Protocol):
    """Rows. Those of models and memory stand in `models`, those of jobs that are over in `kept`,
    of sessions in `sessions`, of what was used in `usage`."""

    # -- jobs --------------------------------------------------------------------------------

    def submit(self, job: Job, limit: int) -> tuple[Job, bool]:
        """Adds a job; or gives the one of the same owner and request id, and False.

        Raises `QueueFullError` when `limit` jobs of the owner wait already. Where the job was not
        added, the object `submits/<id>` written for it is nobody's: delete it.
        """
        ...

    def job(self, id: str) -> Job | None: ...

    def find(self, owner: str, request_id: str) -> Job | None:
        """The job of this owner and request id."""
        ...

    def jobs(self, owner: str, limit: int = 100, before: str | None = None) -> list[Job]:
        """An owner's jobs, newest first; `before` is the last id of the page before.

        Ids sort by time (`ids.new_id`).
        """
        ...

    def step(self, id: str, event: LifeEvent, now: float, token: str | None = None) -> Job:
        """Takes a job one step (`life.step`), and notes its state for those who follow it.

        Raises `IllegalStepError`; `NoSuchError` where there is no such job; with `token`,
        `LostClaimError` if the job is gone or has another.
        """
        ...

    def step_all(
        self, steps: Iterable[tuple[str, LifeEvent, str | None]], now: float
    ) -> list[Job | Exception]:
        """As `step`, for several jobs (id, event, token) at once: what it returns or raises of
        each. One that cannot be done is no matter to the others."""
        ...

    def claim(
        self,
        stage: str,
        models: Iterable[str],
        holder: str,
        now: float,
        until: float,
        *,
        lane: str | None = None,
        tokens: int | None = None,
        peak: int | None = None,
        beyond: int | None = None,
    ) -> Job | None:
        """Gives the next job in `stage` (`received` or `queued`) of these models to `holder`.

        With `lane` only one of that lane, with `tokens` and `peak` only one that fits into so many,
        with `beyond` only one whose peak is more than that.
        Next is in the order of `jobs.fair`, an owner's own jobs in that in which they came. Owners
        of whom `running_jobs` run already are passed over. A queued job becomes `running`; a
        received one stays so, and is the holder's until `until`. A queued job that comes `after`
        another one is not given before that one is over. One whose turn it is to run, and whose key
        has used up its `run_seconds_per_day`, is not given to anybody: it has failed (`days`).
        """
        ...

    def claim_all(
        self,
        stage: str,
        models: Iterable[str],
        holder: str,
        now: float,
        until: float,
        most: int,
        *,
        lane: str | None = None,
        tokens: int | None = None,
        peak: int | None = None,
    ) -> list[Job]:
        """As `claim`, at most so many times at once; `tokens` and `peak` are for all together.

        One that was lost before is the last of them: whoever holds it should have done the others,
        which it may be the end of.
        """
        ...

    def renew(self, id: str, token: str, until: float) -> bool:
        """Keeps a claim. False: the job is to be cancelled. Raises `LostClaimError`."""
        ...

    def release(self, holder: str | None, now: float) -> list[Job]:
        """Takes back all claims of a holder that died (None: of everybody), as `Lost`."""
        ...

    def expire(self, now: float) -> list[Job]:
        """Takes back claims whose time is over, as `Lost`."""
        ...

    def remove(self, id: str) -> None:
        """Removes a job that is over. Raises `NotFinishedError`; no error where there is none."""
        ...

    def unfinished(self) -> list[Job]:
        """All jobs that are not over, oldest first."""
        ...

    def ahead(self, id: str) -> int:
        """How many jobs of the same model come before one that waits, in fair order as things
        stand, or run."""
        ...

    def counts(self) -> dict[tuple[str, str], int]:
        """Jobs by (model, state), finished ones left out."""
        ...

    # -- what followers see --------------------------------------------------------------------

    def note(self, id: str, token: str, kind: str, data: bytes) -> int:
        """Appends to the stream of a job under a claim; returns its number.

        Durable when the next step of the job is. Raises `LostClaimError`.
        """
        ...

    def notes(self, id: str, after: int = 0, limit: int = 1000) -> list[Note]:
        """The stream, from the first note beyond `after`. Its last note is the only `end`."""
        ...

    def latest(self, ids: Collection[str]) -> dict[str, int]:
        """The number of the last note of each of these jobs; one that is gone is not in it."""
        ...

    # -- keys ----------------------------------------------------------------------------------

    def add_key(self, key: Key) -> None: ...

    def key(self, digest: str) -> Key | None:
        """The key. None: there is none, or it is revoked."""
        ...

    def keys(self) -> list[Key]:
        """All keys, oldest first, revoked ones too."""
        ...

    def revoke(self, digest: str, now: float) -> None:
        """Raises `NoSuchError`."""
        ...

    def use_key(self, digest: str, now: float) -> None:
        """Notes when a key was used last. No error where there is none."""
        ...

    # -- questions -----------------------------------------------------------------------------

    def ask(self, question: Question) -> None: ...

    def next_question(self) -> Question | None:
        """The next question that nobody has taken, which is then taken.

        Owners take turns: it is the oldest of the one whose turn was longest ago.
        """
        ...

    def reopen_questions(self) -> None:
        """Who had taken questions died: those without an answer can be taken once more.

        Once only: a question may be what it died of.
        """
        ...

    def answer(self, id: str, answer: bytes, ok: bool) -> None:
        """No error where the question is gone: nobody waits any more."""
        ...

    def take_answer(self, id: str) -> Question | None:
        """A question that has its answer; it is then gone. None while there is none."""
        ...

    def withdraw(self, id: str) -> None:
        """Nobody waits for the answer to a question any more: it is gone, and nobody takes it."""
        ...

    def drop_questions(self, before: float) -> None: ...

    # -- models --------------------------------------------------------------------------------

    def put_card(self, card: Card) -> None: ...

    def card(self, model: str) -> Card | None: ...

    def cards(self) -> list[Card]: ...

    def drop_cards(self) -> None: ...

    def close(self) -> None: ...


class Objects(Protocol):
    """Bytes under names such as `results/<job>`. A name is written once: the first whole one stays.

    Names are made of `[A-Za-z0-9_-]+` parts with `/` between; anything else raises ValueError.
    """

    def put(self, name: str, data: bytes | BinaryIO, *, durable: bool = True) -> bool:
        """Writes all of it or nothing, durable on return. False: it was there already.

        With `durable=False` it may be durable only with what is written to the ledger next. A file
        is read from where it stands to its end, piece by piece.
        """
        ...

    def get(self, name: str) -> bytes:
        """Raises KeyError."""
        ...

    def size(self, name: str) -> int | None:
        """None: it is not there."""
        ...

    def stream(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` up to `end`, in pieces. Raises KeyError, at the call.

        An `end` beyond the object is its end.
        """
        ...

    def delete(self, name: str) -> None:
        """No error where there is nothing."""
        ...

    def names(self, prefix: str) -> list[str]:
        """All names that begin so, sorted; `prefix` is a folder with its `/`, or empty."""
        ...

    def touch(self, name: str) -> bool:
        """Says that the object is still wanted (`sweep` goes by it). False: it is not there."""
        ...

    def touched(self, name: str) -> float | None:
        """When it was written or touched last, in seconds since 1970. None: it is not there."""
        ...

    def close(self) -> None: ...
