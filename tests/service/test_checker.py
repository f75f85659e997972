"""The checker: what it prices, refuses, publishes and answers; and the bounds of its process."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.run.graphs import Builder
from tests.service.shop import MODEL, Shop, X, reads
from weft.client.travel import pack_inputs
from weft.engine.admit import admit
from weft.engine.opened import open_submit
from weft.engine.publish import know
from weft.errors import (
    GraphError,
    LimitError,
    ModelNotReadyError,
    OtherModelError,
    ServerError,
    UnknownPathError,
)
from weft.graph.node import Ref
from weft.service.checker.loop import Checker
from weft.service.fleet.child import reason_of
from weft.service.jobs.life import Cancel, Job, Leased
from weft.service.store.interface import Question
from weft.service.store.requests import constant_type, submit_of
from weft.signatures import reading
from weft.signatures.signature import Signatures
from weft.wire import frames
from weft.wire.messages import (
    Applied,
    ApplyQuery,
    ErrorReport,
    Layout,
    Limits,
    ModelCard,
    PriceInfo,
    SignatureQuery,
    Tables,
    Tokens,
    TokensQuery,
    decode,
    encode,
)
from weft.wire.reports import error_of

Make = Callable[..., Shop]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Shop] = []

    def new(**settings: Any) -> Shop:
        made.append(Shop(**settings))
        return made[-1]

    yield new
    for one in made:
        one.close()


@pytest.fixture
def shop(make: Make) -> Shop:
    return make()


def checker(shop: Shop, *states: str, known: bool = True) -> Checker:
    """A checker that knows the shop's model, whose worker is in these states one after another."""
    store = shop.ledger, shop.objects, shop.bells
    models = {MODEL: shop.known} if known else {}
    made = Checker(*store, models, shop.settings, clock=shop.clock)
    for state in states or ("ready",):
        made.mark(MODEL, state)
    return made


# -- pricing -------------------------------------------------------------------------------------


def test_a_job_is_priced_and_waits_for_a_worker(shop: Shop) -> None:
    job = shop.received(reads("last"))
    shop.bells.worker(MODEL).drain()
    assert checker(shop).turn()
    queued = shop.job(job)
    assert (queued.state, queued.names, queued.token) == ("queued", ("h",), None)
    assert shop.bells.worker(MODEL).drain()
    shop.one()
    assert torch.equal(shop.saved(job)["h"], shop.last())


def test_the_price_is_that_of_the_engine(shop: Shop) -> None:
    built = Builder()
    h = built.read("first", (3, 8))
    built.save("h", built.call("matmul", h, built.const(torch.ones(8, 1000))))
    job = shop.received(built)
    checker(shop).turn()
    fetch = lambda digest: constant_type(shop.objects, "ann", digest)
    opened = open_submit(_submit_again(shop, job), fetch, shop.known, numbers=False)
    limits = Limits(**{n: getattr(shop.settings, n) for n in Limits.__struct_fields__})
    expected = admit(opened.graph, opened.call, shop.known, limits, True)
    price = decode(shop.job(job).price or b"", PriceInfo, "json")
    assert price == expected
    assert price.flops >= 2 * 3 * 8 * 1000
    assert price.saved_bytes == 4 * 3 * 1000
    parameters = sum(one.numel() for one in shop.net.parameters())
    assert shop.job(job).cost == float(price.flops) + 2 * parameters * len(X)


def _submit_again(shop: Shop, job: Job) -> Any:
    return submit_of(shop.objects, job)


def test_a_graph_that_does_not_fit_the_model_is_refused_at_the_users_line(shop: Shop) -> None:
    built = Builder()
    h = built.read("first", (3, 8))
    built.save("h", built.call("matmul", h, built.const(torch.ones(7, 7))))
    job = shop.received(built)
    checker(shop).turn()
    assert shop.end(job).state == "failed"
    error = shop.error(job)
    assert isinstance(error, GraphError)
    assert "user.py:102" in str(error)
    assert shop.objects.names("submits/") == []


def test_a_graph_beyond_a_limit_is_refused_with_its_name(make: Make) -> None:
    shop = make(flops=100)
    built = Builder()
    h = built.read("first", (3, 8))
    built.save("h", built.call("matmul", h, built.const(torch.ones(8, 1000))))
    job = shop.received(built)
    checker(shop).turn()
    error = shop.error(job)
    assert isinstance(error, LimitError) and "flops" in error.message


def test_a_graph_for_another_model_is_refused(shop: Shop) -> None:
    job = shop.received(reads("last"), fingerprint="0" * 64)
    checker(shop).turn()
    assert isinstance(shop.error(job), OtherModelError)


def test_a_model_whose_worker_is_loading_has_its_jobs_priced(shop: Shop) -> None:
    job = shop.received(reads("last"))
    assert checker(shop, "loading").turn()
    assert shop.job(job).state == "queued"


def test_a_model_that_is_not_known_yet_keeps_its_jobs_waiting(shop: Shop) -> None:
    job = shop.received(reads("last"))
    made = checker(shop, "loading", known=False)
    assert not made.turn()
    made.add(MODEL, shop.known)
    assert made.turn()
    assert shop.job(job).state == "queued"


def test_a_model_of_nobodys_keeps_its_jobs_waiting(shop: Shop) -> None:
    job = shop.received(reads("last"), model="other")
    assert not checker(shop).turn()
    assert shop.job(job).state == "received"


def test_a_job_that_ends_the_checker_again_and_again_is_refused(shop: Shop) -> None:
    job = shop.received(reads("last"))
    for _ in range(2):  # each of these dies of it
        shop.ledger.claim("received", [MODEL], "checker", 1.0, 2.0)
        shop.ledger.release("checker", 3.0)
    checker(shop).turn()
    error = shop.error(job)
    assert isinstance(error, LimitError) and "2 times" in error.message


def test_a_mistake_of_the_servers_is_told_without_its_details(shop: Shop, caplog) -> None:
    job = shop.received(reads("last"))
    shop.objects.delete(f"submits/{job.id}")
    with caplog.at_level(logging.ERROR):
        checker(shop).turn()
    error = shop.error(job)
    assert isinstance(error, ServerError)
    assert "KeyError" not in str(error)
    assert "KeyError" in caplog.text and job.id in caplog.text


def test_a_job_that_is_cancelled_while_it_is_priced_stays_so(shop: Shop, monkeypatch) -> None:
    job = shop.received(reads("last"))
    made = checker(shop)

    def cancel_first(*args: Any) -> Any:
        report = encode(ErrorReport(code="cancelled", message="no more"), "json")
        shop.ledger.step(job.id, Cancel(report), shop.clock())
        return admit(*args)

    monkeypatch.setattr("weft.service.checker.loop.admit", cancel_first)
    assert made.turn()
    assert shop.end(job).state == "cancelled"
    assert not made.turn()


def test_a_job_that_is_cancelled_before_it_is_read_is_no_mistake(shop: Shop, caplog) -> None:
    job = shop.received(reads("last"))
    made = checker(shop)
    (claimed,) = made._claim()
    report = encode(ErrorReport(code="cancelled", message="no more"), "json")
    shop.ledger.step(job.id, Cancel(report), shop.clock())  # and its request is gone
    assert claimed is not None
    made.check(claimed)
    assert shop.end(job).state == "cancelled"
    assert caplog.text == ""


def test_jobs_and_questions_of_a_running_checker_are_done(shop: Shop) -> None:
    made = checker(shop)
    thread = threading.Thread(target=made.run)
    thread.start()
    jobs = [shop.received(reads("last")) for _ in range(3)]
    asked(shop, apply_query(shop))
    shop.bells.checker.ring()
    while any(shop.job(job).state != "queued" for job in jobs):
        threading.Event().wait(0.005)
    while shop.ledger.take_answer("q") is None:
        threading.Event().wait(0.005)
    made.stop()
    thread.join(60)
    assert not thread.is_alive()


def test_many_questions_do_not_keep_jobs_waiting(shop: Shop) -> None:
    made = checker(shop)
    for number in range(6):
        query = encode(TokensQuery(model=MODEL, texts=("a",)))
        shop.ledger.ask(Question(f"q{number}", "TokensQuery", "eve", query, created=float(number)))
    jobs = [shop.received(reads("last")) for _ in range(2)]
    for _ in range(4):
        assert made.turn()
    assert [shop.job(job).state for job in jobs] == ["queued", "queued"]
    assert sum(shop.ledger.take_answer(f"q{number}") is not None for number in range(6)) == 2


# -- what is written down together -----------------------------------------------------------------


@pytest.fixture
def written(shop: Shop, monkeypatch) -> list[list[str]]:
    """The jobs of each transaction in which verdicts are written down."""
    found: list[list[str]] = []
    step_all = shop.ledger.step_all

    def noting(steps: Any, now: float) -> Any:
        steps = list(steps)
        found.append([id for id, _, _ in steps])
        return step_all(steps, now)

    monkeypatch.setattr(shop.ledger, "step_all", noting)
    monkeypatch.setattr("weft.service.checker.loop.HELD_SECONDS", 1e6)
    return found


def turns(made: Checker) -> int:
    count = 0
    while made.turn():
        count += 1
    return count


def test_verdicts_of_a_batch_are_written_down_together(shop: Shop, written: Any) -> None:
    jobs = [shop.received(reads("last")) for _ in range(11)]
    refused = shop.received(Builder())  # which saves nothing
    made = checker(shop)
    assert turns(made) == 12
    ids = [job.id for job in (*jobs, refused)]
    assert written == [ids[:8], ids[8:]]
    assert {shop.job(job).state for job in jobs} == {"queued"}
    assert shop.job(refused).state == "failed"


def test_one_that_cannot_be_written_down_is_no_matter_to_the_others(shop: Shop, written) -> None:
    first, second, third = [shop.received(reads("last")) for _ in range(3)]
    made = checker(shop)
    assert made.turn() and made.turn()
    assert {shop.job(job).state for job in (first, second)} == {"received"}
    report = encode(ErrorReport(code="cancelled", message="no more"), "json")
    shop.ledger.step(second.id, Cancel(report), shop.clock())
    assert made.turn()
    assert [shop.job(job).state for job in (first, second, third)] == [
        "queued",
        "cancelled",
        "queued",
    ]


def test_verdicts_do_not_wait_for_what_may_be_long(shop: Shop, written: Any, monkeypatch) -> None:
    jobs = [shop.received(reads("last")) for _ in range(3)]
    made = checker(shop)
    monkeypatch.setattr("weft.service.checker.loop.HELD_SECONDS", -1.0)
    assert made.turn() and made.turn()
    assert [shop.job(job).state for job in jobs] == ["queued", "received", "received"]
    monkeypatch.setattr("weft.service.checker.loop.HELD_SECONDS", 1e6)
    monkeypatch.setattr("weft.service.checker.loop.LONG_NODES", -1)
    assert made.turn()
    assert [len(ids) for ids in written] == [1, 1, 1]


def test_verdicts_do_not_wait_for_a_question(shop: Shop, written: Any) -> None:
    jobs = [shop.received(reads("last")) for _ in range(2)]
    made = checker(shop)
    assert made.turn()
    asked(shop, apply_query(shop))
    assert made.turn()
    assert [shop.job(job).state for job in jobs] == ["queued", "received"]


def test_verdicts_are_written_down_before_a_job_that_was_lost(shop: Shop, written: Any) -> None:
    *jobs, lost = [shop.received(reads("last")) for _ in range(3)]
    shop.ledger.step(lost.id, Leased("another", "token", shop.clock() + 1), shop.clock())
    shop.ledger.release("another", shop.clock())
    made = checker(shop)
    states: list[str] = []
    verdict = made._verdict

    def looking(job: Job) -> Any:
        if job.id == lost.id:
            states.extend(shop.job(one).state for one in jobs)
        return verdict(job)

    made._verdict = looking  # type: ignore[method-assign]
    turns(made)
    assert shop.job(lost).pricings == 2
    assert states == ["queued", "queued"]
    assert [len(ids) for ids in written] == [2, 1]


def test_a_checker_that_is_stopped_writes_down_what_it_found(shop: Shop, written: Any) -> None:
    jobs = [shop.received(reads("last")) for _ in range(3)]
    made = checker(shop)
    assert made.turn()
    made.stop()
    made.run()
    assert [shop.job(job).state for job in jobs] == ["queued", "received", "received"]


def test_a_batch_takes_no_more_of_the_weights_than_one_after_another(make: Make) -> None:
    shop = make(weights_leave=False, weights_bytes=40)  # each takes 24
    jobs = [shop.received(reads("last")) for _ in range(3)]
    turns(checker(shop))
    assert sorted(shop.job(job).state for job in jobs) == ["failed", "failed", "queued"]


# -- models that cannot be served ----------------------------------------------------------------


def test_a_model_that_cannot_be_loaded_fails_the_jobs_that_waited_for_it(shop: Shop) -> None:
    received, queued = shop.received(reads("last")), shop.queued(reads("last"))
    made = checker(shop, "loading", known=False)
    made.mark(MODEL, "failed", "its file is broken")
    assert made.turn() and made.turn() and not made.turn()
    for job in (received, queued):
        error = shop.error(job)
        assert isinstance(error, ModelNotReadyError)
        assert "its file is broken" in error.message
        assert shop.end(job).state == "failed"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(2, "No such file or directory", "/srv/models/secret/config.json"), "No such file"),
        (ValueError("bad weights in /srv/models/secret/model.safetensors\nat 7"), "<path>"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_the_reason_names_no_path(error: Exception, told: str) -> None:
    reason = reason_of(error)
    assert told in reason
    assert "secret" not in reason and "\n" not in reason


def test_a_failed_model_is_published_with_its_reason(shop: Shop) -> None:
    made = checker(shop)
    made.mark(MODEL, "failed", "no memory")
    card = shop.ledger.card(MODEL)
    assert card is not None and (card.state, card.reason) == ("failed", "no memory")
    made.mark(MODEL, "ready")
    card = shop.ledger.card(MODEL)
    assert card is not None and (card.state, card.reason) == ("ready", None)
    made.fail(MODEL, "not known")
    card = shop.ledger.card(MODEL)
    assert card is not None and (card.state, card.reason) == ("failed", "not known")


# -- what is published ---------------------------------------------------------------------------


def test_a_model_is_loading_until_it_is_known_and_its_worker_is_ready(shop: Shop) -> None:
    made = checker(shop, "loading", known=False)

    def state() -> str:
        card = shop.ledger.card(MODEL)
        assert card is not None
        return card.state

    assert state() == "loading"
    made.mark(MODEL, "ready")
    assert state() == "loading"
    made.add(MODEL, shop.known)
    assert state() == "ready"


def test_the_card_is_the_model_as_data(shop: Shop) -> None:
    shop.bells.gateway.drain()
    checker(shop)
    row = shop.ledger.card(MODEL)
    assert row is not None and row.fingerprint == shop.known.fingerprint
    card = decode(row.card, ModelCard)
    assert card.info.id == MODEL
    assert card.info.parameters == sum(p.numel() for p in shop.net.parameters())
    assert {"first", "act", "last"} <= {module.path for module in card.modules}
    assert shop.bells.gateway.drain()


def test_what_was_learnt_is_published_and_known_to_the_next_checker(shop: Shop) -> None:
    before = checker(shop)
    empty = shop.ledger.card(MODEL)
    shop.received(reads("last"))
    before.turn()
    learnt = shop.ledger.card(MODEL)
    assert empty is not None and learnt is not None and learnt.tables != empty.tables
    again = know(shop.net)
    assert again.signatures.passes == 0
    store = shop.ledger, shop.objects, shop.bells
    after = Checker(*store, {MODEL: again}, shop.settings)
    after.mark(MODEL, "ready")
    shop.received(reads("last"))
    assert after.turn()
    assert again.signatures.passes == 0, "it learnt anew what was known"


def test_tables_of_another_model_of_that_name_are_not_believed(shop: Shop) -> None:
    first = checker(shop)
    shop.received(reads("last"))
    first.turn()
    other = torch.nn.Sequential(torch.nn.Linear(4, 5))
    known = know(other)
    Checker(shop.ledger, shop.objects, shop.bells, {MODEL: known}, shop.settings)
    row = shop.ledger.card(MODEL)
    assert row is not None and row.fingerprint == known.fingerprint
    assert row.tables == know(other).signatures.to_bytes()


# -- questions -----------------------------------------------------------------------------------


def apply_query(shop: Shop, **changes: Any) -> ApplyQuery:
    """What does `first` give for a `[5, 4]`?"""
    layout = Layout(dtype="float32", shape=(5, 4), stride=(4, 1))
    fields = {"model": MODEL, "fingerprint": shop.known.fingerprint, "path": "first"}
    return ApplyQuery(**fields | changes, layouts=(layout,), args=(Ref(0),))


def asked(shop: Shop, query: Any) -> None:
    kind = type(query).__name__
    shop.ledger.ask(Question("q", kind, "ann", encode(query), created=1.0))


def answered(shop: Shop, query: Any, kind: type) -> Any:
    """What a checker answers; its error is raised."""
    asked(shop, query)
    assert checker(shop).turn()
    found = shop.ledger.take_answer("q")
    assert found is not None and found.answer is not None
    if not found.ok:
        raise error_of(decode(found.answer, ErrorReport))
    return decode(found.answer, kind)


def test_what_a_module_gives_is_answered(shop: Shop) -> None:
    found = answered(shop, apply_query(shop), Applied)
    (told,) = reading.decode(found.data).applied
    ((_, leaf),) = told.leaves
    assert (tuple(leaf.shape), leaf.dtype) == ((5, 8), torch.float32)
    assert shop.bells.gateway.drain()


def test_what_sites_look_like_is_answered(shop: Shop) -> None:
    inputs, tensors = pack_inputs("plain", (torch.zeros(7, 4),), {})
    query = SignatureQuery(
        model=MODEL,
        fingerprint=shop.known.fingerprint,
        inputs=inputs,
        tensors=frames.write(tensors),
    )
    found = answered(shop, query, Tables)
    learnt = Signatures(lambda: shop.net)
    learnt.add_bytes(found.data)
    site = learnt.for_call((torch.zeros(7, 4),), {}).site("first", "output", 0)
    assert learnt.passes == 0
    ((_, leaf),) = site.tensors
    assert tuple(leaf.shape) == (7, 8)


def test_a_question_that_has_no_answer_is_refused(shop: Shop) -> None:
    with pytest.raises(UnknownPathError, match="nowhere"):
        answered(shop, apply_query(shop, path="nowhere"), Applied)


def test_a_question_about_another_model_is_refused(shop: Shop) -> None:
    with pytest.raises(OtherModelError):
        answered(shop, apply_query(shop, fingerprint="0" * 64), Applied)


def test_a_mistake_over_a_question_is_told_without_its_details(shop: Shop, monkeypatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("/srv/secret")

    monkeypatch.setattr("weft.service.checker.loop.answer", broken)
    with pytest.raises(ServerError) as caught:
        answered(shop, apply_query(shop), Applied)
    assert "secret" not in str(caught.value)


def test_questions_come_before_jobs(shop: Shop) -> None:
    job = shop.received(reads("last"))
    asked(shop, apply_query(shop))
    made = checker(shop)
    made.turn()
    assert shop.job(job).state == "received"
    assert shop.ledger.take_answer("q") is not None


def test_tokens_of_a_model_without_a_tokenizer_are_refused(shop: Shop) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        answered(shop, TokensQuery(model=MODEL, texts=("hello",)), Tokens)


# -- bounds --------------------------------------------------------------------------------------

_BOUNDS = """
import sys
from weft.errors import LimitError, TimeLimitError
from weft.service.checker.bounds import ProcessBounds

bounds = ProcessBounds()

def told(work, seconds=0.2):
    try:
        with bounds(seconds, "pricing it"):
            work()
    except LimitError as error:
        return type(error).__name__, error.message
"""


def bounded(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process with bounds of its own, which are its main thread's."""
    command = [sys.executable, "-c", _BOUNDS + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_work_that_takes_too_long_is_interrupted() -> None:
    found = bounded("""
def forever():
    while True:
        try:
            pass
        except Exception:
            pass
print(told(forever), bounds.tripped)
print(told(lambda: None, 20))
""")
    assert found.returncode == 0, found.stderr
    first, second = found.stdout.splitlines()
    assert "TimeLimitError" in first and "price_seconds" in first and first.endswith("True")
    assert second == "None"


def test_an_alarm_that_is_swallowed_sounds_again() -> None:
    found = bounded("""
def stubborn():
    try:
        while True: pass
    except BaseException:
        pass
    while True: pass
print(told(stubborn))
""")
    assert found.returncode == 0, found.stderr
    assert "TimeLimitError" in found.stdout


def test_work_that_takes_too_much_memory_is_refused() -> None:
    found = bounded("""
bounds.limit_memory(64 << 20)
print(told(lambda: bytearray(1 << 30), 20), bounds.tripped)
print(told(lambda: bytearray(1 << 10), 20))
""")
    assert found.returncode == 0, found.stderr
    first, second = found.stdout.splitlines()
    assert "LimitError" in first and "memory" in first and first.endswith("True")
    assert second == "None"


def test_work_that_never_comes_back_ends_the_process() -> None:
    found = bounded("""
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as if it were inside one operation
import time
told(lambda: time.sleep(60), 0.01)
""")
    assert found.returncode == 75


def test_a_checker_that_met_a_bound_ends_to_be_replaced(shop: Shop) -> None:
    made = checker(shop)
    made._bounds.tripped = True
    made.run()  # returns by itself
