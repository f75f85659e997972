"""Where weights may not leave: what is refused, what counts, what is free, and how it adds up.

An attacker's ways to a weight are tried on a live server, from user code; the rule itself on graphs
by hand.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import weft
from tests.run.graphs import Builder
from weft.engine.leaving import SEEN, TOUCHED, WEIGHTS, Leaving, Marks
from weft.errors import LimitError
from weft.graph.node import Guard
from weft.service.fleet.keys import add_key
from weft.service.fleet.models import Deployment
from weft.service.jobs.usage import Usage, day_of
from weft.settings import Settings
from weft.testing import tiny_path
from weft.testing.service import Server, serve

MOST = 100_000
PROMPT = "one two three"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve({"tiny": tiny_path()}, find=False, weights_leave=False, weights_bytes=MOST) as one:
        yield one


@pytest.fixture(scope="module")
def keeper(server: Server) -> Iterator[weft.LanguageModel]:
    """A model whose weights stay on its server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEFT_KEY", server.key)
        yield weft.LanguageModel("tiny", remote=server.url)


@pytest.fixture(scope="module")
def wide(keeper: weft.LanguageModel) -> tuple[int, int]:
    """Tokens that there are, and the width of the stream."""
    with keeper.trace(PROMPT):
        logits = keeper.lm_head.output[:, -1].save()
        h = keeper.model.layers[0].output[:, -1].save()
    return logits.shape[-1], h.shape[-1]


def told(server: Server, since: str = "") -> int:
    """Bytes of weights that have left, from a day on."""
    return sum(row.weights for row in server.ledger.usage("local", since))


# -- refused -------------------------------------------------------------------------------------


def _param(model: Any, tracer: Any, wide: Any) -> None:
    model.lm_head.weight.save()


def _part(model: Any, tracer: Any, wide: Any) -> None:
    (model.lm_head.weight[:3].t() * 2 + torch.ones(3)).save()


def _identity(model: Any, tracer: Any, wide: Any) -> None:
    model.lm_head(torch.eye(wide[1])).save()


def _into_mine(model: Any, tracer: Any, wide: Any) -> None:
    mine = torch.zeros(2, wide[1])
    mine[0] = model.lm_head.weight[0]


def _logged(model: Any, tracer: Any, wide: Any) -> None:
    tracer.log("w", model.lm_head.weight[0, 0])


def _streamed(model: Any, tracer: Any, wide: Any) -> None:
    tracer.stream(model.lm_head.weight[0])


def _looked(model: Any, tracer: Any, wide: Any) -> None:
    if model.lm_head.weight[0, 0] > 0:
        model.model.layers[0].output.save()


def _gradient(model: Any, tracer: Any, wide: Any) -> None:
    x = torch.zeros(1, wide[1], requires_grad=True)
    model.lm_head(x)[0, 5].backward()


REFUSED = (_param, _part, _identity, _into_mine, _logged, _streamed, _looked, _gradient)


@pytest.mark.parametrize("block", REFUSED, ids=lambda block: block.__name__)
@pytest.mark.filterwarnings("ignore::weft.errors.RemoteLookWarning")
def test_weights_alone_are_refused_with_the_line(block, keeper, server, wide) -> None:
    before = told(server)
    refused = pytest.raises(LimitError, match="weights_leave is false")
    with refused as found, keeper.trace(PROMPT) as tracer:
        block(keeper, tracer, wide)
    assert "test_weights_leave.py" in (found.value.line or "")
    assert found.value.fix
    assert told(server) == before


# -- counted -------------------------------------------------------------------------------------


def _lens(model: Any, wide: Any) -> int:
    h = model.model.layers[0].output[:, -1]
    model.lm_head(model.model.norm(h)).save()
    return 4 * wide[0]


def _hidden(model: Any, wide: Any) -> int:
    """An activation that makes no difference."""
    h = model.model.layers[0].output[:, -1]
    (h * 0 + model.lm_head.weight[:2]).save()
    return 4 * 2 * wide[1]


def _written(model: Any, wide: Any) -> int:
    """`apply` by another name: an identity goes through the module."""
    model.lm_head.input[0, 0] = torch.eye(wide[1])[0]
    model.lm_head.output[:, 0].save()
    return 4 * wide[0]


def _skipped(model: Any, wide: Any) -> int:
    model.model.layers[1].skip(torch.zeros(1, 4, wide[1]))
    model.lm_head.output[:, 0].save()
    return 4 * wide[0]


def _differentiated(model: Any, wide: Any) -> int:
    h = model.lm_head.input
    model.lm_head.output[0, -1, 5].backward()
    h.grad[:, -1].save()
    return 4 * wide[1]


COUNTED = (_lens, _hidden, _written, _skipped, _differentiated)


@pytest.mark.parametrize("block", COUNTED, ids=lambda block: block.__name__)
def test_what_has_weights_in_it_counts_its_bytes(block, keeper, server, wide) -> None:
    before = told(server)
    with keeper.trace(PROMPT):
        size = block(keeper, wide)
    assert told(server) - before == size > 0


def test_activations_of_embeddings_of_ones_own_count(keeper, server, wide) -> None:
    before = told(server)
    with keeper.trace(inputs_embeds=torch.eye(wide[1])[None, :2]):
        h = keeper.model.layers[0].output.save()
    assert told(server) - before == h.nbytes > 0


def test_what_a_session_keeps_counts_when_it_comes_back(keeper, server) -> None:
    before = told(server)
    with keeper.session():
        with keeper.trace(PROMPT):
            rows = keeper.lm_head.weight[:2] * 1.0
        assert told(server) == before  # it has not left
        with keeper.trace(PROMPT):
            brought = (rows + 0.0).save()
    assert told(server) - before == brought.nbytes > 0


def test_operations_inside_forwards_count(keeper, server) -> None:
    before = told(server)
    with keeper.trace(PROMPT):
        inside = keeper.model.layers[0].mlp.source.self_act_fn_0.output.save()
    assert told(server) - before == inside.nbytes > 0


# -- free ----------------------------------------------------------------------------------------


def test_activations_and_tokens_of_plain_passes_are_free(keeper, server) -> None:
    before = told(server)
    with keeper.trace(PROMPT) as tracer:
        h = keeper.model.layers[1].output
        (h - h.mean(-1, keepdim=True)).save()
        keeper.lm_head.output.save()
        tracer.log("norm", h.norm())
    with keeper.generate(PROMPT, max_new_tokens=3) as tracer:
        tracer.result.save()
    assert told(server) == before


def test_what_is_made_with_weights_counts_as_it_comes_back(keeper, server) -> None:
    before = told(server)
    with keeper.trace(PROMPT):
        h = keeper.model.layers[0].output[:, -1]
        (h @ keeper.lm_head.weight.t()).argmax(-1).save("token")
    assert told(server) - before == 8  # the number that comes back


def test_a_guard_that_would_tell_a_weight_is_refused() -> None:
    """One that does not hold says in its error what the value is."""
    built = Builder()
    built.add(Guard, value=built.param("last.weight", torch.zeros(2, 8)), expected=0.5)
    built.save("h", built.read("first", (3, 8)))
    sizes = [(1, 64), (3, 96)]
    with pytest.raises(LimitError, match="looked at is made of the model's weights alone"):
        Leaving(False, most=1000).check(built.graph(), sizes, 1000)


# -- the budget ----------------------------------------------------------------------------------


def test_a_days_bytes_end(keeper, server, wide) -> None:
    today = day_of(time.time())
    server.ledger.add_usage([Usage(owner="local", day=today, model="tiny", weights=4 * wide[1])])
    left = MOST - told(server, today)
    rows = left // (4 * wide[1]) + 1
    refused = pytest.raises(LimitError, match=f"weights_bytes is {MOST} bytes a day")
    with refused as found, keeper.trace(PROMPT):
        h = keeper.model.layers[0].output[0, -1]
        (h * 0 + torch.ones(rows, 1) * keeper.lm_head.weight[0]).save("many")
    assert f"{left} are left today" in found.value.message and "'many'" in found.value.message
    assert "test_weights_leave.py" in (found.value.line or "")
    assert "tomorrow" in (found.value.fix or "")
    assert told(server, today) == MOST - left  # what is refused does not count


def test_more_than_a_days_bytes_are_no_matter_of_waiting() -> None:
    built = lens(rows=30)
    leaving = Leaving(False, most=100)
    with pytest.raises(LimitError) as found:
        leaving.check(built.graph(), [(2, 120)], 1000)
    assert "tomorrow" not in (found.value.fix or "")


def test_where_weights_may_leave_nothing_is_refused_or_counted() -> None:
    built = Builder()
    built.save("w", built.param("last.weight", torch.zeros(2, 8)))
    leaving = Leaving(True, most=0)
    leaving.check(built.graph(), [(1, 64)], 1000)
    assert leaving.told == 0


# -- what a user reads of a limit ------------------------------------------------------------------


def test_a_users_error_names_the_limit_and_when_to_come_back(server, monkeypatch) -> None:
    key = add_key(server.ledger, "late", time.time(), limits={"run_seconds_per_day": 2})
    today = day_of(time.time())
    server.ledger.add_usage([Usage(owner="late", day=today, model="tiny", seconds=3.0)])
    monkeypatch.setenv("WEFT_KEY", key)
    model = weft.LanguageModel("tiny", remote=server.url)
    refused = pytest.raises(LimitError, match="the limit run_seconds_per_day is 2")
    with refused as found, model.trace(PROMPT):
        model.lm_head.output.save()
    assert "there is room" in (found.value.fix or "")


def test_a_pass_is_charged_for_its_length(server, keeper) -> None:
    def cost(prompt: str) -> float:
        def now() -> float:
            return sum(row.cost for row in server.ledger.usage("local"))

        before = now()
        with keeper.trace(prompt):
            h = keeper.model.layers[0].output.save()
        parameters = sum(one.numel() for one in weft.LanguageModel(tiny_path()).parameters())
        assert now() - before == pytest.approx(2 * parameters * h.shape[1])
        return now() - before

    assert cost("one " * 20) > 4 * cost("one")


# -- the rule, by hand -----------------------------------------------------------------------------


def lens(rows: int = 3) -> Builder:
    built = Builder()
    h = built.read("first", (rows, 8))
    built.save("lens", built.apply("last", h))
    return built


def mark(built: Builder, chosen: bool = False, **held: Any) -> int:
    """Of the last node."""
    graph = built.graph()
    return Marks(graph, chosen, held.get("held", frozenset())).of(graph.nodes[-1])


def test_marks_follow_storage() -> None:
    built = Builder()
    x = built.const(torch.zeros(2, 8))
    row = built.item(x, 0)
    built.call(
        "Tensor.copy_",
        row,
        built.param("last.weight", torch.zeros(2, 8)),
        writes=(row,),
        alias=(row,),
    )
    built.save("x", x)
    assert mark(built) == WEIGHTS


def test_marks_follow_storage_to_views_made_before() -> None:
    built = Builder()
    x = built.const(torch.zeros(2, 8))
    row = built.item(x, 0)
    built.add_(x, built.param("last.weight", torch.zeros(2, 8)))
    built.save("row", row)
    assert mark(built) == WEIGHTS


def test_constants_are_the_clients_own() -> None:
    built = Builder()
    built.save("x", built.add2(built.const(torch.zeros(2)), built.const(torch.ones(2))))
    assert mark(built) == 0


def test_reads_are_free_until_the_client_puts_something_in() -> None:
    built = Builder()
    built.save("h", built.read("first", (3, 8)))
    assert mark(built) == SEEN
    assert mark(built, chosen=True) == SEEN | TOUCHED
    edited = Builder()
    h = edited.read("first", (3, 8))
    edited.write("act", edited.const(torch.zeros(3, 8)))
    edited.save("h", h)
    assert mark(edited) == SEEN | TOUCHED


def test_what_a_session_has_kept_counts() -> None:
    built = Builder()
    x = built.const(torch.zeros(2))
    built.save("x", built.mul(x, 2.0))
    assert mark(built) == 0
    assert mark(built, held=frozenset({"c0"})) == SEEN | WEIGHTS


def test_saves_that_stay_there_do_not_leave() -> None:
    built = Builder()
    built.save("w", built.param("last.weight", torch.zeros(2, 8)))
    leaving = Leaving(False, most=0, stays=frozenset({"w"}))
    leaving.check(built.graph(), [(1, 64)], 1000)
    assert leaving.told == 0


# -- what a deployment says --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, (False, 7)), ({"weights_leave": True}, (True, 7)), ({"weights_bytes": 9}, (False, 9))],
)
def test_a_deployment_says_or_the_settings_do(own: dict[str, Any], expected: Any) -> None:
    settings = Settings(weights_leave=False, weights_bytes=7)
    assert Deployment(id="a", source="a", **own).weights(settings) == expected
