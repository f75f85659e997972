"""What every ledger promises, tried on the one in SQLite and on the fake alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tests.service.jobs import (
    CANCEL,
    FAILED,
    FINISHED,
    PRICE,
    PRICED,
    STOPPED,
    job,
    together,
)
from weft.errors import NoSuchError, NotFinishedError
from weft.service.jobs.life import BEGIN, DropSubmit, IllegalStepError, Job, Note, Ring
from weft.service.store.interface import (
    Card,
    Key,
    Ledger,
    LostClaimError,
    Question,
    QueueFullError,
)
from weft.service.store.memory import MemoryLedger
from weft.service.store.sqlite import open_ledger
from weft.settings import Settings
from weft.wire.messages import EndEvent, LogEvent, StateEvent, encode

SETTINGS = Settings(attempts=2, keep_seconds=1000.0)
LOG = encode(LogEvent(text="hello"), "json")

Make = Callable[..., Ledger]


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes the ledger of a test, once or (with another `carry`) instead of the fixture's."""
    made: list[Ledger] = []

    def new(**options) -> Ledger:
        if request.param == "memory":
            ledger: Ledger = MemoryLedger(SETTINGS, **options)
        else:
            ledger = open_ledger(tmp_path / "weft.sqlite", SETTINGS, **options)
        made.append(ledger)
        return ledger

    yield new
    for ledger in made:
        ledger.close()


@pytest.fixture
def ledger(make: Make) -> Ledger:
    return make()


def submitted(ledger: Ledger, created: float = 100.0, **fields) -> Job:
    return ledger.submit(job(created, **fields), 100)[0]


def queued(ledger: Ledger, created: float = 100.0, **fields) -> Job:
    return ledger.step(submitted(ledger, created, **fields).id, PRICED, created + 1.0)


def running(ledger: Ledger, created: float = 100.0, **fields) -> Job:
    """Begun by the worker `w`, which has it until 200."""
    waiting = queued(ledger, created, **fields)
    claimed = ledger.claim("queued", [waiting.model], "w", created + 2.0, 200.0)
    assert claimed is not None and claimed.id == waiting.id
    return claimed


def kinds(ledger: Ledger, id: str) -> list[str]:
    return [note.kind for note in ledger.notes(id)]


# -- submitting and finding ----------------------------------------------------------------------


def test_a_job_is_there_as_it_was_submitted(ledger):
    new = job(constants=("ab" * 32,), look=True, digest="d", names=("é", "\0"))
    assert ledger.submit(new, 1) == (new, True)
    assert ledger.job(new.id) == new
    assert ledger.job("nobody") is None


def test_the_same_request_is_the_same_job(ledger):
    first = submitted(ledger, request_id="r")
    again, is_new = ledger.submit(job(101.0, request_id="r"), 0)
    assert (again, is_new) == (first, False)
    assert ledger.find("ann", "r") == first
    assert len(ledger.jobs("ann")) == 1


def test_the_same_request_of_another_owner_is_another_job(ledger):
    first = submitted(ledger, request_id="r")
    second = submitted(ledger, request_id="r", owner="bob")
    assert first.id != second.id
    assert ledger.find("bob", "r") == second
    assert ledger.find("eve", "r") is None


def test_a_known_request_gives_the_job_as_it_is_now(ledger):
    first = running(ledger, request_id="r")
    assert ledger.submit(job(request_id="r"), 10) == (first, False)


def test_only_so_many_jobs_of_an_owner_wait(ledger):
    running(ledger)
    queued(ledger)
    submitted(ledger)
    with pytest.raises(QueueFullError, match="2 jobs of this key wait already"):
        ledger.submit(job(), 2)
    assert len(ledger.jobs("ann")) == 3
    assert ledger.submit(job(), 3)[1]
    assert ledger.submit(job(owner="bob"), 1)[1]


def test_an_owners_jobs_come_newest_first_in_pages(ledger):
    ids = [submitted(ledger, float(second)).id for second in range(100, 105)]
    submitted(ledger, owner="bob")
    newest = ids[::-1]
    assert [found.id for found in ledger.jobs("ann")] == newest
    first = [found.id for found in ledger.jobs("ann", 2)]
    second = [found.id for found in ledger.jobs("ann", 2, before=first[-1])]
    assert (first, second) == (newest[:2], newest[2:4])
    assert ledger.jobs("ann", 10, before=ids[0]) == []
    assert ledger.jobs("eve") == []


# -- steps ---------------------------------------------------------------------------------------


def test_a_step_is_kept(ledger):
    found = ledger.step(submitted(ledger).id, PRICED, 105.0)
    assert found.state == "queued"
    assert ledger.job(found.id) == found


def test_a_step_that_cannot_be_changes_nothing(ledger):
    before = submitted(ledger)
    with pytest.raises(IllegalStepError):
        ledger.step(before.id, FINISHED, 105.0)
    assert ledger.job(before.id) == before
    assert kinds(ledger, before.id) == ["state"]


def test_a_step_of_no_job(ledger):
    with pytest.raises(NoSuchError, match="nobody"):
        ledger.step("nobody", CANCEL, 1.0)
    with pytest.raises(LostClaimError):
        ledger.step("nobody", FINISHED, 1.0, "token")


def test_a_step_under_another_token_is_refused(ledger):
    begun = running(ledger)
    with pytest.raises(LostClaimError):
        ledger.step(begun.id, FINISHED, 105.0, "another")
    assert ledger.job(begun.id) == begun
    assert ledger.step(begun.id, FINISHED, 105.0, begun.token).state == "done"


def test_who_was_given_up_for_dead_can_change_nothing(ledger):
    old = running(ledger)
    ledger.release("w", 110.0)
    new = ledger.claim("queued", ["tiny"], "w2", 111.0, 300.0)
    assert new is not None and new.token not in (None, old.token)
    for act in (
        lambda: ledger.step(old.id, FINISHED, 112.0, old.token),
        lambda: ledger.renew(old.id, old.token, 500.0),
        lambda: ledger.note(old.id, old.token, "log", LOG),
    ):
        with pytest.raises(LostClaimError):
            act()
    assert ledger.job(new.id) == new


def test_of_several_steps_at_once_each_is_for_itself(make):
    carried: list[str] = []
    ledger = make(carry=lambda job, commands: carried.append(job.id))
    good, other, over = running(ledger), running(ledger), running(ledger)
    ledger.step(over.id, FINISHED, 150.0, over.token)
    carried.clear()
    found = ledger.step_all(
        [
            (good.id, FINISHED, good.token),
            (other.id, FINISHED, "another's"),
            (over.id, FINISHED, None),
            ("nobody", FINISHED, None),
            (other.id, FAILED, other.token),
        ],
        160.0,
    )
    kinds = [getattr(one, "state", type(one).__name__) for one in found]
    assert kinds == ["done", "LostClaimError", "IllegalStepError", "NoSuchError", "failed"]
    assert carried == [good.id, other.id]
    assert [ledger.job(one.id).state for one in (good, other, over)] == ["done", "failed", "done"]
    assert [note.kind for note in ledger.notes(good.id)].count("end") == 1
    assert ledger.step_all([], 170.0) == []


def test_who_is_done_has_no_claim_any_more(ledger):
    begun = running(ledger)
    ledger.step(begun.id, FINISHED, 105.0, begun.token)
    with pytest.raises(LostClaimError):
        ledger.note(begun.id, begun.token, "log", LOG)
    with pytest.raises(LostClaimError):
        ledger.step(begun.id, FAILED, 106.0, begun.token)


def test_commands_are_carried_out_after_each_step_and_only_then(make):
    carried: list[tuple[str, tuple]] = []
    ledger = make(carry=lambda found, commands: carried.append((found.state, commands)))
    begun = running(ledger)
    ledger.note(begun.id, begun.token, "log", LOG)
    with pytest.raises(LostClaimError):
        ledger.step(begun.id, FINISHED, 105.0, "another")
    ledger.submit(replace(begun, id="x"), 10)
    ledger.release("w", 106.0)
    ledger.step(begun.id, CANCEL, 107.0)
    assert carried == [
        ("received", BEGIN),
        ("queued", (Note("state"), Ring("worker"))),
        ("running", (Note("state"),)),
        ("queued", (Note("state"), Ring("worker"))),
        ("cancelled", (Note("end"), DropSubmit(), Ring("gateway"))),
    ]


# -- claims --------------------------------------------------------------------------------------


def test_the_oldest_job_comes_first_whatever_its_model(ledger):
    for created, model in ((103.0, "a"), (101.0, "b"), (102.0, "a"), (100.0, "c")):
        submitted(ledger, created, model=model)
    claimed = [ledger.claim("received", ["a", "b"], "c", 105.0, 110.0) for _ in range(4)]
    assert [found and found.created for found in claimed] == [101.0, 102.0, 103.0, None]


def test_a_claim_of_a_received_job_leaves_it_received(ledger):
    new = submitted(ledger)
    found = ledger.claim("received", ["tiny"], "checker", 105.0, 115.0)
    assert (found.id, found.state, found.pricings) == (new.id, "received", 1)
    assert (found.holder, found.until) == ("checker", 115.0)
    assert ledger.job(new.id) == found
    assert ledger.claim("received", ["tiny"], "checker", 105.0, 115.0) is None


def test_a_claim_of_a_queued_job_begins_it(ledger):
    found = running(ledger)
    assert (found.state, found.attempts, found.holder, found.until) == ("running", 1, "w", 200.0)
    assert ledger.claim("queued", ["tiny"], "w", 105.0, 115.0) is None


def test_there_is_nothing_to_claim(ledger):
    queued(ledger)
    assert ledger.claim("received", ["tiny"], "c", 1.0, 2.0) is None
    assert ledger.claim("queued", ["other"], "c", 1.0, 2.0) is None
    assert ledger.claim("queued", [], "c", 1.0, 2.0) is None
    assert ledger.claim("queued", iter(["other", "tiny"]), "c", 1.0, 2.0) is not None


def test_a_job_that_was_lost_keeps_its_place(ledger):
    first = running(ledger, 100.0)
    queued(ledger, 101.0)
    ledger.release("w", 110.0)
    again = ledger.claim("queued", ["tiny"], "w2", 111.0, 200.0)
    assert (again.id, again.attempts) == (first.id, 2)


def test_a_renewed_claim_is_not_over(ledger):
    begun = running(ledger)
    assert ledger.renew(begun.id, begun.token, 500.0)
    assert ledger.expire(400.0) == []
    assert ledger.job(begun.id) == replace(begun, until=500.0)


def test_to_renew_tells_that_the_job_is_to_be_cancelled(ledger):
    begun = running(ledger)
    ledger.step(begun.id, CANCEL, 105.0)
    assert not ledger.renew(begun.id, begun.token, 500.0)
    assert ledger.step(begun.id, STOPPED, 106.0, begun.token).state == "cancelled"
    with pytest.raises(LostClaimError):
        ledger.renew(begun.id, begun.token, 500.0)


def test_claims_whose_time_is_over_are_taken_back(ledger):
    begun = running(ledger)
    priced = submitted(ledger, 101.0)
    ledger.claim("received", ["tiny"], "c", 102.0, 300.0)
    assert ledger.expire(200.0) == []
    (lost,) = ledger.expire(200.5)
    assert (lost.id, lost.state, lost.token) == (begun.id, "queued", None)
    assert ledger.job(begun.id) == lost
    assert ledger.job(priced.id).holder == "c"


def test_claims_of_one_holder_or_of_all_are_taken_back(ledger):
    mine = running(ledger, 100.0)
    other = submitted(ledger, 101.0)
    ledger.claim("received", ["tiny"], "c", 102.0, 300.0)
    waiting = queued(ledger, 103.0)
    assert ledger.release("nobody", 104.0) == []
    assert [found.id for found in ledger.release("w", 104.0)] == [mine.id]
    assert [found.id for found in ledger.release(None, 105.0)] == [other.id]
    assert ledger.release(None, 106.0) == []
    states = {found.id: found.state for found in ledger.unfinished()}
    assert states == {mine.id: "queued", other.id: "received", waiting.id: "queued"}


def test_a_job_that_kills_its_workers_fails_at_last(ledger):
    begun = running(ledger)
    for _ in range(SETTINGS.attempts - 1):
        ledger.release(None, 110.0)
        ledger.claim("queued", ["tiny"], "w", 111.0, 120.0)
    (lost,) = ledger.expire(130.0)
    assert (lost.state, lost.attempts) == ("failed", SETTINGS.attempts)
    end = msgspec.json.decode(ledger.notes(begun.id)[-1].data, type=EndEvent)
    assert end.job.error is not None
    assert end.job.error.code == "worker-lost"
    assert end.job.error.message == (
        f"the worker that had job {begun.id} died or fell silent, 2 times"
    )


# -- who waits -----------------------------------------------------------------------------------


def test_how_many_come_before_a_job(ledger):
    first = running(ledger, 100.0)
    submitted(ledger, 101.0)
    mine = queued(ledger, 102.0)
    queued(ledger, 103.0)
    queued(ledger, 100.5, model="other")
    ledger.step(queued(ledger, 101.5).id, CANCEL, 105.0)
    assert ledger.ahead(mine.id) == 2
    assert ledger.ahead(first.id) == 0
    assert ledger.ahead("nobody") == 0


def test_jobs_are_counted_by_model_and_state(ledger):
    begun = running(ledger)
    submitted(ledger, 101.0)
    submitted(ledger, 102.0)
    queued(ledger, 103.0, model="other")
    assert ledger.counts() == {
        ("tiny", "running"): 1,
        ("tiny", "received"): 2,
        ("other", "queued"): 1,
    }
    ledger.step(begun.id, FINISHED, 105.0, begun.token)
    assert ("tiny", "running") not in ledger.counts()


def test_what_is_not_over_comes_oldest_first(ledger):
    later, earlier = submitted(ledger, 102.0), queued(ledger, 101.0)
    ledger.step(queued(ledger, 100.0).id, CANCEL, 105.0)
    assert [found.id for found in ledger.unfinished()] == [earlier.id, later.id]


# -- notes ---------------------------------------------------------------------------------------


def test_the_stream_of_a_job_has_no_holes_and_one_end(ledger):
    begun = running(ledger)
    assert ledger.note(begun.id, begun.token, "log", LOG) == 4
    assert ledger.note(begun.id, begun.token, "progress", b"{}") == 5
    ledger.release("w", 110.0)
    again = ledger.claim("queued", ["tiny"], "w", 111.0, 200.0)
    ledger.step(again.id, FINISHED, 112.0, again.token)
    notes = ledger.notes(begun.id)
    assert [note.seq for note in notes] == list(range(1, 9))
    assert [note.kind for note in notes] == [
        *("state", "state", "state", "log", "progress", "state", "state", "end")
    ]
    assert notes[3].data == LOG
    states = [msgspec.json.decode(n.data, type=StateEvent) for n in notes if n.kind == "state"]
    assert [(event.state, event.attempts) for event in states] == [
        *(("received", 0), ("queued", 0), ("running", 1), ("queued", 1), ("running", 2))
    ]


def test_the_stream_can_be_read_on_from_anywhere(ledger):
    begun = running(ledger)
    for _ in range(5):
        ledger.note(begun.id, begun.token, "log", LOG)
    assert [note.seq for note in ledger.notes(begun.id, after=6)] == [7, 8]
    assert [note.seq for note in ledger.notes(begun.id, after=2, limit=3)] == [3, 4, 5]
    assert ledger.notes(begun.id, after=8) == []
    assert ledger.notes("nobody") == []


def test_the_end_tells_the_job_as_its_owner_sees_it(ledger):
    begun = running(ledger)
    ledger.step(begun.id, FINISHED, 110.0, begun.token)
    end = msgspec.json.decode(ledger.notes(begun.id)[-1].data, type=EndEvent)
    assert (end.job.id, end.job.state, end.job.price) == (begun.id, "done", PRICE)
    assert end.job.stages == {"price": 1.0, "queue": 1.0, "run": 8.0}
    assert end.job.expires == 110.0 + SETTINGS.keep_seconds
    assert end.job.result is not None
    assert (end.job.result.bytes, end.job.result.names) == (7, ("h", "logits"))


# -- what goes -----------------------------------------------------------------------------------


def test_jobs_that_ended_long_ago_are_forgotten_with_their_notes(ledger):
    old = ledger.step(submitted(ledger, request_id="r").id, CANCEL, 110.0)
    new = ledger.step(submitted(ledger).id, CANCEL, 120.0)
    waiting = submitted(ledger, 1.0)
    assert ledger.forget(110.0, 0.0) == []
    assert ledger.forget(115.0, 0.0) == [old]
    assert ledger.job(old.id) is None
    assert ledger.notes(old.id) == []
    assert {found.id for found in ledger.jobs("ann")} == {new.id, waiting.id}
    assert ledger.submit(job(request_id="r"), 10)[1], "its request id is free again"


def test_only_a_job_that_is_over_can_be_removed(ledger):
    begun = running(ledger)
    with pytest.raises(NotFinishedError, match="is running"):
        ledger.remove(begun.id)
    ledger.step(begun.id, FINISHED, 110.0, begun.token)
    ledger.remove(begun.id)
    ledger.remove(begun.id)
    assert ledger.job(begun.id) is None
    assert ledger.notes(begun.id) == []


# -- keys ----------------------------------------------------------------------------------------


def test_keys(ledger):
    ann, bob = Key("ann", "d1", 1.0), Key("bob", "d2", 0.5)
    ledger.add_key(ann)
    ledger.add_key(bob)
    assert ledger.key("d1") == ann
    assert ledger.key("d3") is None
    ledger.revoke("d1", 2.0)
    assert ledger.key("d1") is None
    assert ledger.keys() == [bob, replace(ann, revoked=2.0)]
    with pytest.raises(NoSuchError, match="d3"):
        ledger.revoke("d3", 2.0)


def test_what_a_key_may_do_is_kept_with_it(ledger):
    key = Key(
        *("ann", "d1", 1.0),
        scopes=("read", "metrics"),
        models=("tiny", "a/b"),
        expires=9.5,
        weight=2.5,
        limits={"nodes": 10, "queued_jobs": 3},
    )
    ledger.add_key(key)
    assert ledger.key("d1") == key
    ledger.use_key("d1", 7.0)
    ledger.use_key("d2", 7.0)
    assert ledger.keys() == [replace(key, used=7.0)]


# -- questions -----------------------------------------------------------------------------------


def test_a_question_is_taken_once_and_answered_once(ledger):
    first, second = (Question(name, "TokensQuery", "ann", b"?", created=1.0) for name in "ab")
    ledger.ask(first)
    ledger.ask(second)
    assert ledger.take_answer("a") is None
    assert [ledger.next_question() for _ in range(3)] == [first, second, None]
    ledger.answer("a", b"!", True)
    ledger.answer("gone", b"!", True)
    assert ledger.take_answer("a") == replace(first, answer=b"!", ok=True)
    assert ledger.take_answer("a") is None
    ledger.answer("b", b"", False)
    assert ledger.take_answer("b") == replace(second, answer=b"", ok=False)


def test_a_question_whose_taker_died_is_taken_once_more_and_no_more(ledger):
    for name in "ab":
        ledger.ask(Question(name, "TokensQuery", "ann", b"?", created=1.0))
    ledger.next_question()
    ledger.answer("a", b"!", True)
    ledger.next_question()
    for _ in range(2):
        ledger.reopen_questions()
    assert ledger.next_question().id == "b"
    assert ledger.next_question() is None
    ledger.reopen_questions()
    assert ledger.next_question() is None
    ledger.answer("b", b"!", True)
    assert ledger.take_answer("b").answer == b"!"
    assert ledger.take_answer("a").answer == b"!"


def test_the_oldest_question_comes_first_and_old_ones_go(ledger):
    for name, created in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        ledger.ask(Question(name, "TokensQuery", "ann", b"?", created=created))
    assert ledger.next_question().id == "b"
    ledger.drop_questions(3.0)
    ledger.answer("b", b"!", True)
    assert ledger.take_answer("b") is None
    assert ledger.next_question().id == "a"
    assert ledger.next_question() is None


# -- cards ---------------------------------------------------------------------------------------


def test_cards(ledger):
    loading, other = Card("tiny", "loading"), Card("a", "failed", reason="no such file")
    ready = Card("tiny", "ready", "f" * 64, b"card", b"tables")
    for card in (loading, other, ready):
        ledger.put_card(card)
    assert ledger.card("tiny") == ready
    assert ledger.card("b") is None
    assert ledger.cards() == [other, ready]
    ledger.drop_cards()
    assert ledger.cards() == []


# -- several at once -----------------------------------------------------------------------------


def test_eight_threads_claim_each_job_once(ledger):
    ids = {submitted(ledger, 100.0 + n, owner=f"u{n % 3}").id for n in range(200)}
    claimed: list[list[Job]] = [[] for _ in range(8)]

    def claim_all(number: int) -> None:
        while found := ledger.claim("received", ["tiny"], f"c{number}", 500.0, 900.0):
            claimed[number].append(found)

    together(8, claim_all)
    every = [found for mine in claimed for found in mine]
    assert len(every) == 200
    assert {found.id for found in every} == ids
    assert len({found.token for found in every}) == 200
    for number, mine in enumerate(claimed):
        created = [found.created for found in mine]
        assert created == sorted(created), "the oldest comes first"
        assert {found.holder for found in mine} <= {f"c{number}"}


def test_eight_threads_submit_one_request_and_it_is_one_job(ledger):
    answers: list[tuple[Job, bool]] = []
    together(8, lambda _: answers.append(ledger.submit(job(request_id="r"), 10)))
    assert [is_new for _, is_new in answers].count(True) == 1
    assert len({found.id for found, _ in answers}) == 1


def test_the_last_notes_of_several_jobs_are_told_at_once(ledger):
    first, second = running(ledger), running(ledger)
    ledger.note(second.id, second.token, "log", LOG)
    numbers = {one.id: ledger.notes(one.id)[-1].seq for one in (first, second)}
    assert numbers[second.id] == numbers[first.id] + 1
    assert ledger.latest([first.id, "nobody", second.id]) == numbers
    assert ledger.latest([]) == {}


def test_the_limit_holds_when_many_submit_at_once(ledger):
    refused: list[int] = []

    def submit(number: int) -> None:
        try:
            ledger.submit(job(), 5)
        except QueueFullError:
            refused.append(number)

    together(8, submit)
    assert len(refused) == 3
    assert len(ledger.jobs("ann")) == 5


def test_notes_of_eight_threads_are_numbered_without_holes(ledger):
    begun = running(ledger)
    numbers: list[int] = []

    def write(_: int) -> None:
        for _ in range(10):
            numbers.append(ledger.note(begun.id, begun.token, "log", LOG))

    together(8, write)
    assert sorted(numbers) == list(range(4, 84))
    assert [note.seq for note in ledger.notes(begun.id)] == list(range(1, 84))
