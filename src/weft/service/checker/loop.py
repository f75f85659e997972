"""The checker: the part of the server that knows models without their weights.

It publishes each model as data (card and signature tables), prices the jobs that came in, and
answers what the gateway cannot know without torch. What it needs of a job is its row and the
objects that the row names; what it finds out goes back into the ledger.

    checker = Checker(ledger, objects, bells, {"tiny": known}, settings)
    checker.mark("tiny", "ready")          # once a worker has its weights
    checker.run()                          # until `stop()`, from another thread
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from weft.engine.admit import admit
from weft.engine.generation import pass_cost, prompt_cost
from weft.engine.known import Known
from weft.engine.lanes import lane_of
from weft.engine.leaving import Leaving
from weft.engine.opened import Opened, open_submit
from weft.engine.publish import answer, card
from weft.errors import (
    LimitError,
    ModelNotReadyError,
    OtherModelError,
    ServerError,
    WeftError,
    WrongModelError,
)
from weft.graph.node import Save
from weft.service.jobs.life import Event, Failed, Job, Priced, Refused
from weft.service.jobs.usage import day_of
from weft.service.store.bells import Bells
from weft.service.store.interface import Card, Ledger, Objects, Question
from weft.service.store.life_signs import Sign
from weft.service.store.requests import constant_type, limits_of, submit_of
from weft.service.store.said import check_space, still_held
from weft.settings import Settings
from weft.wire.messages import (
    ApplyQuery,
    LanguageInputs,
    SignatureQuery,
    SourceQuery,
    Submit,
    TokensQuery,
    decode,
    encode,
)
from weft.wire.reports import report_of

from .bounds import Bounds, Unbounded

POLL = 0.5
"""How long a lost ring may cost."""
CLAIMS = 8
"""So many jobs are claimed at once."""
HELD_SECONDS = 0.02
"""A verdict is written down with those after it, unless it is older when the next job begins."""
LONG_NODES = 300
"""What other jobs' verdicts do not wait for."""
QUERIES: dict[str, type] = {
    kind.__name__: kind for kind in (SignatureQuery, SourceQuery, ApplyQuery, TokensQuery)
}

LOG = logging.getLogger("weft.checker")


@dataclass
class Model:
    """One model as the checker has it. `known` is None until it has been looked at.

    `worker` is the state of the process with its weights; `reason` is why that one failed, `broken`
    why this one cannot know the model.
    """

    known: Known | None = None
    worker: str = "loading"
    reason: str | None = None
    broken: str | None = None
    weights: tuple[bool, int] = (True, 0)  # whether they may leave; if not, bytes a day
    card: bytes = b""
    passes: int = -1
    published: Card | None = None

    @property
    def why(self) -> str | None:
        return self.broken or self.reason

    @property
    def state(self) -> str:
        if self.broken is not None or self.worker == "failed":
            return "failed"
        return "loading" if self.known is None else self.worker


class Checker:
    """See the module's text. Its models may be added and removed from other threads."""

    def __init__(
        self,
        ledger: Ledger,
        objects: Objects,
        bells: Bells,
        models: Mapping[str, Known],
        settings: Settings,
        *,
        holder: str = "checker",
        bounds: Bounds | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ledger
        self._objects = objects
        self._bells = bells
        self._settings = settings
        self._holder = holder
        self._bounds = bounds or Unbounded()
        self._clock = clock
        self._lock = threading.RLock()
        self._models: dict[str, Model] = {}
        self._stopping = False
        self._replied = False  # the last thing that was done
        self._claimed: deque[Job] = deque()
        self._found: list[tuple[Job, Event]] = []  # verdicts that are not in the ledger yet
        self._found_at = 0.0
        for id, known in models.items():
            self.add(id, known)

    # -- models ----------------------------------------------------------------------------------

    def add(
        self, id: str, known: Known | None = None, weights: tuple[bool, int] | None = None
    ) -> None:
        """Has a model from now on; without `known` it is still loading.

        `weights`: whether they may leave, and if not, how many bytes a day; else as the settings
        say.
        """
        with self._lock:
            model = self._models.setdefault(id, Model())
            settings = self._settings
            model.weights = weights or (settings.weights_leave, settings.weights_bytes)
            if known is not None:
                self._learn_from_before(id, known)
                model.known, model.card = known, encode(card(known, id))
            self._publish(id)
        self._bells.checker.ring()

    def mark(self, id: str, state: str, reason: str | None = None) -> None:
        """Says how the worker of a model is: `cold`, `loading`, `ready` or `failed`."""
        with self._lock:
            model = self._models.setdefault(id, Model())
            model.worker, model.reason = state, reason
            self._publish(id)
        self._bells.checker.ring()

    def fail(self, id: str, reason: str) -> None:
        """Says that the model cannot be known, and why."""
        with self._lock:
            self._models.setdefault(id, Model()).broken = reason
            self._publish(id)
        self._bells.checker.ring()

    def remove(self, id: str) -> None:
        """Has a model no longer. Its card stays in the ledger."""
        with self._lock:
            self._models.pop(id, None)

    def _learn_from_before(self, id: str, known: Known) -> None:
        """What a checker before this one found out about the same model."""
        before = self._ledger.card(id)
        if before is not None and before.fingerprint == known.fingerprint and before.tables:
            known.signatures.add_bytes(before.tables)

    def _publish(self, id: str) -> None:
        """Writes the model's row in the ledger, if there is anything new to say."""
        model = self._models[id]
        known = model.known
        if known is None and model.state == "loading" and self._ledger.card(id) is not None:
            return  # a checker before this one has said more, and it still holds
        row = Card(model=id, state=model.state, reason=model.why)
        if known is not None:
            model.passes = known.signatures.passes
            row = Card(
                model=id,
                state=model.state,
                fingerprint=known.fingerprint,
                card=model.card,
                tables=known.signatures.to_bytes(),
                reason=model.why,
            )
        if row != model.published:
            self._ledger.put_card(row)
            model.published = row
            self._bells.gateway.ring()

    def _publish_news(self) -> None:
        """Writes the tables of models about which something was found out."""
        with self._lock:
            for id, model in self._models.items():
                if model.known is not None and model.known.signatures.passes != model.passes:
                    self._publish(id)

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Does what there is to do, and waits for more. Returns when a bound was met, too: then
        the process is to be replaced."""
        sign = Sign(self._ledger, "checker", self._clock)
        try:
            while not (self._stopping or self._bounds.tripped):
                sign.give()
                if not self.turn():
                    self._bells.checker.wait(POLL)
        finally:
            self._write_down()

    def stop(self) -> None:
        """Lets `run` return after what it has in hand."""
        self._stopping = True
        self._bells.checker.ring()

    def turn(self) -> bool:
        """Does one thing, if there is one. Questions come first, as somebody waits with his line;
        but after one a job does, so that many questions do not keep all jobs waiting."""
        kinds = (self._check_next, self._reply_next)
        done = any(act() for act in (kinds if self._replied else kinds[::-1]))
        if done:
            self._publish_news()
        return done

    def _reply_next(self) -> bool:
        question = self._ledger.next_question()
        if question is not None:
            self._write_down()
            self.reply(question)
            self._replied = True
        return question is not None

    def _check_next(self) -> bool:
        if not self._claimed:
            self._claimed.extend(self._claim())
        if not self._claimed:
            return False
        job = self._claimed.popleft()
        if self._has_to_be_written(job):
            self._write_down()
        self._judge(job)
        if not self._claimed:
            self._write_down()
        self._replied = False
        return True

    def _claim(self) -> list[Job]:
        """The next jobs. One that was lost with a checker before comes last, as it may be what that
        died of."""
        with self._lock:
            known = [id for id, m in self._models.items() if m.known and m.state != "failed"]
            failed = [id for id, model in self._models.items() if model.state == "failed"]
        now = self._clock()
        until = now + (2 + CLAIMS) * self._settings.price_seconds + self._settings.lease_seconds
        for stage, models in (("received", known + failed), ("queued", failed)):
            if models:
                jobs = self._ledger.claim_all(stage, models, self._holder, now, until, CLAIMS)
                if jobs:
                    return jobs
        return []

    # -- jobs ------------------------------------------------------------------------------------

    def check(self, job: Job) -> None:
        """Prices one claimed job, or refuses it."""
        self._judge(job)
        self._write_down()

    def _judge(self, job: Job) -> None:
        event = self._verdict(job)
        if event is not None:
            self._found_at = self._found_at if self._found else time.monotonic()
            self._found.append((job, event))

    def _has_to_be_written(self, job: Job) -> bool:
        """Whether what was found out must be in the ledger before this job is looked at: it may
        be long, or the end of this process once more, or hang on what others have taken away."""
        if not self._found:
            return False
        late = time.monotonic() - self._found_at > HELD_SECONDS
        taken = any(isinstance(event, Priced) and event.weights for _, event in self._found)
        return late or taken or job.pricings > 1 or job.nodes > LONG_NODES

    def _write_down(self) -> None:
        """Writes what was found out into the ledger: in one transaction, as a writer waits his turn
        among the threads of the gateway and the workers."""
        found, self._found = self._found, []
        if not found:
            return
        steps = [(job.id, event, job.token) for job, event in found]
        said = self._ledger.step_all(steps, self._clock())
        for (job, _), one in zip(found, said, strict=True):
            if isinstance(one, Exception):
                LOG.info("job %s went on without the checker: %s", job.id, one)

    def _verdict(self, job: Job) -> Event | None:
        refused = Failed if job.state == "running" else Refused
        try:
            self._check_pricings(job)
            with self._bounds(self._settings.price_seconds, "pricing the graph"):
                return self._priced(job)
        except WeftError as error:
            return refused(encode(report_of(error, job.id), "json"))
        except Exception:
            if not still_held(self._ledger, job):
                return None  # it was cancelled, and its request is gone
            LOG.exception("job %s failed in the checker itself", job.id)
            error = ServerError("the server made a mistake while it priced the graph")
            return refused(encode(report_of(error, job.id), "json"))

    def _check_pricings(self, job: Job) -> None:
        """A graph that ended the checker again and again is not tried for ever."""
        if job.pricings > max(2, self._settings.attempts - 1):
            raise LimitError(
                f"pricing the graph took more than the server gives it: {job.pricings - 1} times "
                "the process that did so was ended",
                fix="record less in one block",
            )

    def _priced(self, job: Job) -> Priced:
        known = self._known(job.model)
        submit = submit_of(self._objects, job)
        fetch = partial(constant_type, self._objects, job.owner)
        opened = open_submit(submit, fetch, known, numbers=False)
        limits, strict = limits_of(self._settings, job), submit.strict
        graph, sampling = opened.graph, opened.sampling
        leaving = self._leaving(job, submit, opened)
        price = admit(
            graph,
            opened.call,
            known,
            limits,
            strict,
            opened.further,
            sampling,
            opened.keeps,
            leaving,
        )
        runs = price.sites or sampling is not None or submit.seat is None
        cost = float(price.flops)
        if runs:
            cost += prompt_cost(known, opened.calls) + pass_cost(known, opened.calls, sampling)
        lane = lane_of(known, opened, price)._asdict()
        if job.session:
            lane["lane"] = ""  # what it leaves behind is its session's
        if submit.seat is not None:
            lane["lane"] = ""  # requests of a session run alone
        self._check_space(job.model, lane["peak"])
        return Priced(
            price=encode(price, "json"),
            cost=cost,
            names=_saves(opened),
            weights=leaving.told,
            **lane,
        )

    def _check_space(self, model: str, peak: int) -> None:
        """Refuses what the model's worker could never hold. One that was not there yet looks
        itself."""
        space = self._ledger.space(model)
        if space is not None:
            check_space(space, peak)

    def _leaving(self, job: Job, submit: Submit, opened: Opened) -> Leaving:
        """What may leave of the job's model, and what has left to its owner today."""
        with self._lock:
            model = self._models.get(job.model)
        if model is None:
            raise WrongModelError(f"this server has no model {job.model!r} any more")
        leave, most = model.weights
        used, today = 0, day_of(self._clock())
        if not leave:
            rows = self._ledger.usage(job.owner, today, today)
            used = sum(row.weights for row in rows if row.model == job.model)
        return Leaving(
            leave,
            most,
            used,
            chosen=_chosen(submit),
            held=frozenset(submit.seat.uses if submit.seat is not None else ()),
            stays=opened.keeps,
        )

    def _known(self, id: str) -> Known:
        with self._lock:
            model = self._models.get(id)
        if model is None:
            raise WrongModelError(f"this server has no model {id!r} any more")
        if model.state == "failed":
            raise ModelNotReadyError(
                f"{id} could not be loaded by the server: {model.why}",
                fix="the server's operator has to look at it",
            )
        if model.known is None:
            raise ModelNotReadyError(f"{id} is still loading", fix="ask again in a moment")
        return model.known

    # -- questions -------------------------------------------------------------------------------

    def reply(self, question: Question) -> None:
        """Answers one question, with what was asked for or with an `ErrorReport`."""
        try:
            with self._bounds(self._settings.price_seconds, "answering it"):
                told, ok = self._answered(question), True
        except WeftError as error:
            told, ok = report_of(error, question.id), False
        except Exception:
            LOG.exception("question %s failed in the checker itself", question.id)
            error = ServerError("the server made a mistake while it answered")
            told, ok = report_of(error, question.id), False
        self._ledger.answer(question.id, encode(told), ok)
        self._bells.gateway.ring()

    def _answered(self, question: Question) -> Any:
        query: Any = decode(question.body, QUERIES[question.kind])
        known = self._known(query.model)
        theirs = getattr(query, "fingerprint", known.fingerprint)
        if theirs != known.fingerprint:
            raise OtherModelError(f"{query.model} on this server has another fingerprint")
        return answer(known, query)


def _chosen(submit: Submit) -> bool:
    """Whether the client's own numbers, and not tokens, go into the model."""
    inputs = (submit.inputs, *submit.further)
    return not all(
        isinstance(one, LanguageInputs) and not {"inputs_embeds"} & set(one.given) for one in inputs
    )


def _saves(opened: Opened) -> tuple[str, ...]:
    saves = [node.name for node in opened.graph.nodes if isinstance(node, Save)]
    return tuple([name for name in saves if name not in opened.keeps])
