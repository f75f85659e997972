"""What a server removes, and what it must not; keys and ids too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.jobs import CANCEL, FINISHED, PRICED, job
from weft.service.jobs.life import Job
from weft.service.store import sweep as sweeping
from weft.service.store.folder import FolderObjects
from weft.service.store.ids import new_id, new_token
from weft.service.store.interface import Key, Ledger, Objects, Question
from weft.service.store.keys import digest, find, new_key, same
from weft.service.store.memory import MemoryLedger, MemoryObjects
from weft.service.store.sqlite import open_ledger
from weft.service.store.sweep import Swept, recover, sweep
from weft.settings import Settings

SETTINGS = Settings(keep_seconds=10_000.0)

Store = tuple[Ledger, Objects]


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
        made: Store = MemoryLedger(SETTINGS), MemoryObjects()
    else:
        made = open_ledger(tmp_path / "x", SETTINGS), FolderObjects(tmp_path / "objects")
    yield made
    for part in made:
        part.close()


def written(store: Store, seconds: float) -> float:
    """The time so many seconds after the youngest object was written."""
    _, objects = store
    return max(objects.touched(name) or 0.0 for name in objects.names("")) + seconds


def enter(store: Store, created: float, **fields) -> Job:
    ledger, objects = store
    new = job(created, **fields)
    for digest_ in new.constants:
        objects.put(f"constants/{new.owner}/{digest_}", b"")
    objects.put(f"submits/{new.id}", b"")
    return ledger.submit(new, 100)[0]


def finish(store: Store, new: Job, now: float) -> None:
    ledger, objects = store
    ledger.step(new.id, PRICED, now)
    begun = ledger.claim("queued", [new.model], "w", now, now + 10.0)
    assert begun is not None and begun.id == new.id
    objects.put(f"results/{new.id}", b"result")
    ledger.step(new.id, FINISHED, now, begun.token)


# -- the start of a server -----------------------------------------------------------------------


def test_claims_of_the_last_run_are_taken_back(store):
    ledger, objects = store
    one, two = enter(store, 1.0), enter(store, 2.0)
    ledger.step(one.id, PRICED, 3.0)
    ledger.claim("queued", ["tiny"], "w", 4.0, 1e12)
    ledger.claim("received", ["tiny"], "c", 4.0, 1e12)
    assert recover(ledger, objects, 5.0) == Swept(lost=2)
    states = [(found.id, found.state, found.token) for found in ledger.unfinished()]
    assert states == [(one.id, "queued", None), (two.id, "received", None)]
    assert len(objects.names("submits/")) == 2


def test_questions_of_the_last_run_are_dropped(store):
    ledger, objects = store
    ledger.ask(Question("q", "TokensQuery", "ann", b"", created=4.0))
    recover(ledger, objects, 5.0)
    assert ledger.next_question() is None


def test_requests_that_were_never_acknowledged_go_after_a_minute(store):
    ledger, objects = store
    kept = enter(store, 1.0)
    objects.put("submits/never", b"")
    recover(ledger, objects, written(store, 50.0))
    assert len(objects.names("submits/")) == 2
    assert recover(ledger, objects, written(store, 70.0)).objects == 1
    assert objects.names("submits/") == [f"submits/{kept.id}"]


def test_results_of_jobs_that_are_gone_go(store):
    ledger, objects = store
    done = enter(store, 1.0)
    finish(store, done, 2.0)
    objects.put("results/gone", b"")
    recover(ledger, objects, written(store, 70.0))
    assert objects.names("results/") == [f"results/{done.id}"]


def test_the_result_of_a_job_that_ended_without_it_goes(store):
    """A worker was killed after it had written the result, and the job was cancelled then."""
    ledger, objects = store
    new = enter(store, 1.0)
    objects.put(f"results/{new.id}", b"result")
    ledger.step(new.id, CANCEL, 2.0)
    recover(ledger, objects, written(store, 50.0))
    assert objects.names("results/") == [f"results/{new.id}"]
    recover(ledger, objects, written(store, 70.0))
    assert objects.names("results/") == []


def test_the_request_of_a_job_that_is_over_goes(store):
    ledger, objects = store
    finish(store, enter(store, 1.0), 2.0)
    assert len(objects.names("submits/")) == 1
    recover(ledger, objects, written(store, 70.0))
    assert objects.names("submits/") == []


def test_a_result_that_waits_for_its_last_step_stays(store):
    """A worker was killed between writing the result and saying so."""
    ledger, objects = store
    new = enter(store, 1.0)
    objects.put(f"results/{new.id}", b"result")
    recover(ledger, objects, written(store, 70.0))
    assert objects.get(f"results/{new.id}") == b"result"


# -- from time to time ---------------------------------------------------------------------------


def test_a_job_is_kept_with_its_result_for_as_long_as_was_said(store):
    ledger, objects = store
    old, new, waiting = enter(store, 1.0), enter(store, 2.0), enter(store, 3.0)
    now = written(store, 20_000.0)
    finish(store, old, now - 10_001.0)
    finish(store, new, now - 9_999.0)
    assert sweep(ledger, objects, now, SETTINGS).jobs == 1
    assert ledger.job(old.id) is None and ledger.notes(old.id) == []
    assert objects.names("results/") == [f"results/{new.id}"]
    assert objects.names("submits/") == [f"submits/{waiting.id}"]
    assert ledger.job(new.id) is not None and ledger.job(waiting.id) is not None


def test_constants_stay_while_a_job_waits_for_them_or_somebody_asks_for_them(store):
    ledger, objects = store
    one, two, three = "1" * 64, "2" * 64, "3" * 64
    enter(store, 1.0, constants=(one,))
    ledger.step(enter(store, 2.0, constants=(two,)).id, CANCEL, 3.0)
    objects.put(f"constants/bob/{one}", b"")
    objects.put(f"constants/ann/{three}", b"")
    sweep(ledger, objects, written(store, 9_990.0), SETTINGS)
    assert len(objects.names("constants/")) == 4
    now = written(store, 10_010.0)
    sweep(ledger, objects, now, SETTINGS)
    assert objects.names("constants/") == [f"constants/ann/{one}"]


def test_a_constant_that_is_asked_for_again_stays(store, monkeypatch):
    ledger, objects = store
    objects.put("constants/ann/a", b"")
    now = written(store, 10_010.0)
    monkeypatch.setattr(type(objects), "touched", lambda self, name: now - 1.0)
    sweep(ledger, objects, now, SETTINGS)
    assert objects.names("constants/") == ["constants/ann/a"]


def test_a_constant_has_time_to_be_used_however_short_jobs_are_kept(store):
    ledger, objects = store
    objects.put("constants/ann/a", b"")
    short = Settings(keep_seconds=0.0)
    sweep(ledger, objects, written(store, sweeping.UNSENT - 60.0), short)
    assert objects.names("") == ["constants/ann/a"]
    sweep(ledger, objects, written(store, sweeping.UNSENT + 60.0), short)
    assert objects.names("") == []


def test_questions_that_nobody_waits_for_go(store):
    ledger, objects = store
    for id, created in (("old", 100.0), ("new", 300.0)):
        ledger.ask(Question(id, "TokensQuery", "ann", b"", created=created))
    sweep(ledger, objects, 200.0 + sweeping.UNANSWERED, SETTINGS)
    assert ledger.next_question().id == "new"
    assert ledger.next_question() is None


def test_to_sweep_twice_is_to_sweep_once(store):
    ledger, objects = store
    finish(store, enter(store, 1.0), 2.0)
    now = written(store, 70.0)
    assert sweep(ledger, objects, now, SETTINGS) == Swept(jobs=1)
    assert sweep(ledger, objects, now, SETTINGS) == Swept()
    assert objects.names("") == []


# -- keys ----------------------------------------------------------------------------------------


def test_a_key_is_found_by_itself_only(store):
    ledger, _ = store
    key, other = new_key(), new_key()
    ledger.add_key(Key("ann", digest(key), 1.0))
    assert find(ledger, key) == Key("ann", digest(key), 1.0)
    for text in (other, key[:-1], key + "x", key + "\n", "", "weft_", digest(key), "é" * 48):
        assert find(ledger, text) is None
    ledger.revoke(digest(key), 2.0)
    assert find(ledger, key) is None


def test_keys_are_long_and_each_is_another():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"weft_[A-Za-z0-9_-]{43}", key) for key in keys)


def test_a_digest_is_sha_256():
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest("") == empty
    assert same("", empty) and not same("x", empty) and not same("", "é")


# -- ids -----------------------------------------------------------------------------------------


@given(st.floats(0, 4e9), st.floats(0, 4e9))
def test_ids_sort_by_time(one, other):
    a, b = new_id(one), new_id(other)
    assert re.fullmatch(r"[a-z0-9]{26}", a)
    assert a != b
    if int(one * 1e6) != int(other * 1e6):
        assert (a < b) == (one < other)


def test_a_time_that_has_no_place_in_an_id():
    for now in (-1.0, 1e12):
        with pytest.raises(ValueError, match="microseconds"):
            new_id(now)


def test_tokens_are_each_another():
    assert len({new_token() for _ in range(1000)}) == 1000
