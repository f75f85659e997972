"""Sessions on a live server: what stays there, what travels, and what becomes of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.client.live import DOOR, soon
from weft.errors import (
    FailedRunError,
    LimitError,
    ModelNotReadyError,
    NotSavedError,
    SessionLostError,
)
from weft.handles.session import Session
from weft.testing.same import bitwise, moves
from weft.testing.service import serve

WIDE = 1000


def wide_net() -> nn.Sequential:
    """Its activations are larger than all that a request says besides."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, WIDE), nn.ReLU(), nn.Linear(WIDE, 2)).eval()


@pytest.fixture(scope="module")
def wide() -> nn.Sequential:
    return wide_net()


@pytest.fixture(scope="module")
def _server(wide: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        limits: Any = {"session_bytes": 300_000, "sessions": 2, "session_seconds": 60.0}
        with serve({"wide": wide}, **limits) as server:
            yield server


@pytest.fixture
def there(_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server of small limits."""
    monkeypatch.setenv("WEFT_HOST", _server.url)
    monkeypatch.setenv("WEFT_KEY", _server.key)
    return _server


@pytest.fixture
def model(there: Any) -> Any:
    return weft.Model("wide", remote=there.url)


def rooms(server: Any) -> Any:
    return server._workers["wide"].worker._rooms


def kept(server: Any) -> list[Any]:
    """What the worker keeps, of all sessions."""
    return [one for room in rooms(server)._rooms.values() for one in room.values]


def again(server: Any) -> None:
    """Another worker, which has kept nothing."""
    server.add("wide", server._workers["wide"].worker._net)


def room_of(session: Session) -> Any:
    (room,) = session._rooms.values()
    return room


def traffic(session: Session) -> int:
    return room_of(session).number


# -- what stays, and what travels ------------------------------------------------------------------


def test_values_stay_and_only_what_is_looked_at_travels(model, wide, there, x) -> None:
    with torch.no_grad():
        hidden = wide[1](wide[0](x))
        expected = wide[2](hidden * 2)
    with model.session() as session:
        with model.trace(x) as first:
            h = model[1].output
        assert repr(h).startswith(f"float32[3, {WIDE}]") and "on the server" in repr(h)
        with model.trace(x) as second:
            model[1].output = h * 2
            out = model.output.save()
        assert type(out) is torch.Tensor
        assert traffic(session) == 2
        for tracer in (first, second):
            assert tracer.traffic.up + tracer.traffic.down < hidden.nbytes
        assert h._real is None
        bitwise(h + 0, hidden)
        assert traffic(session) == 3
        bitwise(h + 0, hidden)  # it is here now
        assert traffic(session) == 3
    bitwise(out, expected)
    with pytest.raises(NotSavedError):
        h + 1
    soon(lambda: not len(rooms(there)))


def test_nothing_waits_until_a_number_is_needed(gated: Any, x: Any) -> None:
    with DOOR.closed(), gated.session() as session:
        total = 0
        for _ in range(5):
            with gated.trace(x):
                total = total + gated[1].output.sum()
        DOOR.reached.wait()
        assert traffic(session) == 5  # all of them are sent, the first one runs
        DOOR.open()
        looked = total.item()
    with torch.no_grad():
        one = gated_sum(x)
    assert looked == pytest.approx(5 * one, rel=1e-6)


def gated_sum(x: torch.Tensor) -> float:
    from tests.client.live import gated_net

    return float(gated_net()[0](x).sum())


def test_what_nobody_holds_any_more_goes(model, there, x) -> None:
    with model.session() as session:
        h = 0
        for _ in range(6):
            with model.trace(x):
                h = h + model[1].output
            gc.collect()
        float(h.sum())  # the last request has run; the next one tells of what was dropped
        with model.trace(x):
            y = model.output
        y.sum().item()
        assert len(session) <= 2
        soon(lambda: len(kept(there)) <= 3)  # those of earlier sessions may be about to go
    del h, y


def test_a_graph_that_went_before_goes_as_its_hash(model, there, x) -> None:
    ups = []
    with model.session() as session:
        for number in range(3):
            with model.trace(x) as tracer:
                h = model[1].output
                for _ in range(30):
                    h = h * 1.5
                h.sum().save()
            ups.append(tracer.traffic.up)
            if number == 1:  # what the gateway remembers is not durable
                there._app.gateway.graphs.__init__()
        room = room_of(session)
    assert ups[1] < ups[0] / 2
    assert ups[2] > ups[0]  # first as a hash, then whole
    assert room._graphs


def test_a_value_that_a_later_trace_writes_into_stays_there(model, wide, x) -> None:
    with torch.no_grad():
        old, new = wide[1](wide[0](x)), wide[1](wide[0](-x))
    with model.session():
        with model.trace(x):
            h = model[1].output
            same = model[1].output
        with model.trace(-x):
            h[:, 0] = model[1].output[:, 0]
        assert h._real is None
        mine, other = h + 0, same + 0
    expected = old.clone()
    expected[:, 0] = new[:, 0]
    bitwise(mine, expected)
    bitwise(other, old)


def test_with_asyncio(model, wide, x) -> None:
    """A task's traces are its session's; the loop goes on while one is awaited."""
    import asyncio

    async def main() -> Any:
        with model.session() as session:
            async with model.trace(x):
                h = model[1].output
            async with model.trace(x):
                model[1].output = h * 2
                out = model.output.save()
            return out, traffic(session)

    out, requests = asyncio.run(main())
    with torch.no_grad():
        bitwise(out, wide[2](wide[1](wide[0](x)) * 2))
    assert requests == 2


def test_a_request_that_was_refused_is_none_of_the_session(model, there, x, monkeypatch) -> None:
    with model.session() as session:
        with model.trace(x):
            h = model[1].output
        monkeypatch.setattr(there._app.gateway, "draining", True)
        monkeypatch.setattr(session._rooms and room_of(session).server, "settings", _quick())
        with pytest.raises(ModelNotReadyError), model.trace(x):
            model[1].output = h
            model.output.save()
        monkeypatch.undo()
        assert traffic(session) == 1
        bitwise(h + 0, h + 0)


def _quick() -> Any:
    return weft.settings.Settings(retry_seconds=0.0)


def test_a_job_of_a_session(model, wide, x) -> None:
    """`blocking=False`: its saves come when they are asked for, what is held stays."""
    with torch.no_grad():
        hidden = wide[1](wide[0](x))
    with model.session():
        with model.trace(x, blocking=False) as tracer:
            h = model[1].output
            out = model.output.save()
        with model.trace(x):
            model[1].output = h * 0
            zero = model.output.save()
        assert tracer.job.result() and type(out) is torch.Tensor
        bitwise(h + 0, hidden)
    with torch.no_grad():
        bitwise(out, wide(x))
        bitwise(zero, wide[2](hidden * 0))


# -- training --------------------------------------------------------------------------------------


class Low(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.down = nn.Parameter(torch.randn(WIDE, 2) / 30)
        self.up = nn.Parameter(torch.zeros(2, WIDE))

    def forward(self, h: Any) -> Any:
        return h + (h @ self.down) @ self.up


MAKERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.1}]),
    "LBFGS": None,
}


def by_hand(net: nn.Module, x: torch.Tensor, make: Any, steps: int) -> tuple[Low, Any, list[Any]]:
    low, losses = Low(), []
    optimizer = make([*low.parameters()])
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net[2](low(net[1](net[0](x)).detach())).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    net.zero_grad()
    return low, optimizer, losses


def trained(model: Any, x: Any, make: Any, steps: int, look: Any = None) -> Any:
    low, losses, ups = Low(), [], []
    with model.session() as session:
        optimizer = make([*low.parameters()])
        for number in range(steps):
            optimizer.zero_grad()
            with model.trace(x) as tracer:
                model[1].output = low(model[1].output)
                loss = model.output.square().sum()
                loss.backward()
            optimizer.step()
            losses.append(loss)
            ups.append(tracer.traffic.up)
            if look is not None:
                look(number, low, optimizer)
        requests = traffic(session)
        losses = [loss + 0 for loss in losses]
    return low, optimizer, losses, ups, requests


@pytest.mark.parametrize("name", [name for name in MAKERS if MAKERS[name] is not None])
def test_parameters_are_trained_there(name, model, wide, there, x) -> None:
    """A request for each block and one for each step; parameters go up once, and come back once."""
    make, steps = MAKERS[name], 4
    low, optimizer, losses, ups, requests = trained(model, x, make, steps)
    theirs, expected, numbers = by_hand(wide, x, make, steps)
    bitwise(losses, numbers)
    bitwise([*low.parameters()], [*theirs.parameters()])
    moves(low.up.detach(), Low().up.detach())
    assert requests == 2 * steps
    assert ups[0] > low.down.nbytes > max(ups[1:])
    for mine, other in zip(low.parameters(), theirs.parameters(), strict=True):
        bitwise(mine.grad, other.grad)
        assert optimizer.state[mine].keys() == expected.state[other].keys()
        for key, value in optimizer.state[mine].items():
            if isinstance(value, torch.Tensor):
                bitwise(value, expected.state[other][key])
    soon(lambda: not len(rooms(there)))


def test_a_parameter_that_is_looked_at_comes_home(model, wide, x) -> None:
    """And goes on from there, also where it was changed by hand."""
    seen: list[Any] = []

    def look(number: int, low: Low, optimizer: Any) -> None:
        if number == 1:
            seen.append(low.up.detach().clone())
        if number == 2:
            with torch.no_grad():
                low.up.mul_(0.5)
            seen.append({key: dict(one) for key, one in optimizer.state_dict()["state"].items()})

    low, *_ = trained(model, x, MAKERS["AdamW"], 5, look)
    theirs, steps = Low(), []
    optimizer = MAKERS["AdamW"]([*theirs.parameters()])
    for number in range(5):
        optimizer.zero_grad()
        hidden = wide[1](wide[0](x)).detach()
        wide[2](theirs(hidden)).square().sum().backward()
        optimizer.step()
        look_at = seen
        steps.append(theirs.up.detach().clone())
        if number == 2:
            state = optimizer.state_dict()["state"]
            bitwise(look_at[1][0]["exp_avg"], state[0]["exp_avg"])
            with torch.no_grad():
                theirs.up.mul_(0.5)
    wide.zero_grad()
    bitwise(seen[0], steps[1])
    bitwise([*low.parameters()], [*theirs.parameters()])


def test_what_is_no_step_of_the_table_is_taken_here(model, wide, x) -> None:
    """Clipping looks at gradients; an optimiser of one's own, and LBFGS, run here."""

    class Mine(torch.optim.SGD):
        pass

    def run(model_like: Any, forward: Any) -> Low:
        low = Low()
        first = Mine([*low.parameters()], lr=0.1)
        second = torch.optim.AdamW([*low.parameters()], lr=0.01)
        for optimizer in (first, second, first, second):
            optimizer.zero_grad(set_to_none=optimizer is first)
            forward(low)
            nn.utils.clip_grad_norm_(low.parameters(), 0.5)
            optimizer.step()
        last = torch.optim.LBFGS([*low.parameters()], lr=0.1, max_iter=2)

        def closure() -> Any:
            last.zero_grad()
            return forward(low)

        last.step(closure)
        return low

    def there(low: Low) -> Any:
        with model.trace(x):
            model[1].output = low(model[1].output)
            loss = model.output.square().sum()
            loss.backward()
        return loss

    def here(low: Low) -> Any:
        loss = wide[2](low(wide[1](wide[0](x)).detach())).square().sum()
        loss.backward()
        return loss

    with model.session():
        mine = run(model, there)
    theirs = run(wide, here)
    wide.zero_grad()
    bitwise([*mine.parameters()], [*theirs.parameters()])


def test_steps_in_several_places(model, wide, there, x) -> None:
    """Here, in the session of one model and in that of another; numbers changed by hand."""
    there.add("other", wide_net())
    other, local = weft.Model("other", remote=there.url), weft.Model(wide)

    def traced(where: Any) -> Any:
        def forward(low: Low) -> None:
            with where.trace(x):
                where[1].output = low(where[1].output)
                where.output.square().sum().backward()

        return forward

    def by_hand(low: Low) -> None:
        wide[2](low(wide[1](wide[0](x)).detach())).square().sum().backward()

    def run(first: Any, second: Any, third: Any) -> Low:
        low = Low()
        optimizer = torch.optim.SGD(low.parameters(), lr=0.01, momentum=0.9)
        for forward in (first, second, third, first, first):
            optimizer.zero_grad()
            forward(low)
            optimizer.step()
        low.up.data = low.up.data * 0.5
        with torch.no_grad():
            low.down.mul_(2)
        optimizer.zero_grad()
        first(low)
        third(low)
        optimizer.step()
        return low

    try:
        with model.session() as session:
            mine = run(traced(model), traced(local), traced(other))
            assert len(session._rooms) == 2
    finally:
        there.remove("other")
    theirs = run(by_hand, by_hand, by_hand)
    wide.zero_grad()
    bitwise([*mine.parameters()], [*theirs.parameters()])


def test_an_input_that_is_trained(model, wide, x) -> None:
    """It is read for each trace; its gradient and its steps are there all the same."""
    mine, theirs = nn.Parameter(x.clone()), nn.Parameter(x.clone())
    with model.session():
        optimizer = torch.optim.SGD([mine], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with model.trace(mine):
                model.output.square().sum().backward()
            optimizer.step()
    optimizer = torch.optim.SGD([theirs], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        wide(theirs).square().sum().backward()
        optimizer.step()
    wide.zero_grad()
    bitwise(mine, theirs)
    moves(mine, x)


def test_schedules_and_saved_states(model, wide, x) -> None:
    def run(forward: Any) -> tuple[Low, list[Any]]:
        low, seen = Low(), []
        optimizer = torch.optim.AdamW(low.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(4):
            optimizer.zero_grad()
            forward(low)
            optimizer.step()
            schedule.step()
            if step == 1:
                seen = [one.clone() for one in low.state_dict().values()]
        return low, seen

    def there(low: Low) -> None:
        with model.trace(x):
            model[1].output = low(model[1].output)
            model.output.square().sum().backward()

    def here(low: Low) -> None:
        wide[2](low(wide[1](wide[0](x)).detach())).square().sum().backward()

    with model.session():
        mine, seen = run(there)
    theirs, expected = run(here)
    wide.zero_grad()
    bitwise([*mine.parameters()], [*theirs.parameters()])
    bitwise(seen, expected)


def test_gradients_add_up_until_they_are_cleared(model, wide, x) -> None:
    v = torch.zeros(WIDE, requires_grad=True)
    v.grad = torch.ones(WIDE)
    with model.session():
        for scale in (1, 2, 3):
            with model.trace(x * scale):
                model[1].output = model[1].output + v
                model.output.sum().backward()
        assert v.grad is not None
        summed = v.grad + 0
        v.grad = None
        with model.trace(x):
            (model[1].output * v).sum().backward()
        last = v.grad + 0
    (one,) = torch.autograd.grad(wide[2](wide[1](wide[0](x)).detach() + v).sum(), [v])
    bitwise(summed, ((torch.ones(WIDE) + one) + one) + one)
    with torch.no_grad():
        assert torch.allclose(last, wide[1](wide[0](x)).sum(0), atol=1e-5)


def test_what_was_computed_here_gets_its_gradient_here(model, wide, x) -> None:
    """A tensor with a history, and one in whose gradient somebody is interested."""
    w = torch.full((WIDE,), 0.1, requires_grad=True)
    seen: list[Any] = []
    w.register_hook(lambda grad: seen.append(grad.clone()))
    with model.session() as session:
        with model.trace(x):
            model[1].output = model[1].output * (w * 2)
            model.output.sum().backward()
        assert type(w.grad) is torch.Tensor and len(seen) == 1
        assert traffic(session) == 1
    (one,) = torch.autograd.grad(wide[2](wide[1](wide[0](x)).detach() * (w * 2)).sum(), [w])
    bitwise(w.grad, one)


# -- what goes wrong -------------------------------------------------------------------------------


def bad(model: Any) -> Any:
    """A value that there is not; only the run can know."""
    return torch.nn.functional.embedding(
        (model[1].output.sum() * 0 + 99).long(), model[2].weight[:, :2]
    )


def test_an_error_of_a_trace_that_nobody_waits_for(model, wide, x) -> None:
    """Its values say so, and what was made of them; everything else goes on."""
    with pytest.raises(IndexError), model.session() as session:
        with model.trace(x):
            good = model[1].output
        with model.trace(x):
            worse = bad(model)
        with model.trace(x):
            _of_it = worse + 1
        with model.trace(x):
            model[1].output = good * 2
            out = model.output.save()
        with torch.no_grad():
            bitwise(out, wide[2](wide[1](wide[0](x)) * 2))
        assert traffic(session) == 4  # and it is told of when the session ends


def test_an_error_that_was_looked_at_is_told_once(model, x) -> None:
    with model.session():
        with model.trace(x):
            worse = bad(model)
        with pytest.raises(FailedRunError, match="out of range"):
            worse + 1
        with pytest.raises(FailedRunError, match="out of range"), model.trace(x):
            (model[1].output.sum() + worse.sum()).save()


def test_a_user_s_own_error_is_not_hidden(model, x) -> None:
    with pytest.raises(KeyError) as caught, model.session():
        with model.trace(x):
            bad(model)
            h = model[1].output
        raise KeyError("mine")
    assert "mine" in str(caught.value)
    with pytest.raises(NotSavedError):
        h + 1


def test_what_a_session_may_keep(model, x) -> None:
    with model.session():
        with model.trace(x):
            h = model[1].output  # 12 kB
        with pytest.raises(LimitError, match="session_bytes"), model.trace(x):
            large = [model[1].output * n for n in range(30)]
            model.output.save()
        with pytest.raises(LimitError, match="session_bytes"):
            many = []
            for n in range(30):
                with model.trace(x):
                    many.append(model[1].output * n)
                    model.output.save()
        assert (h + 0).shape == (3, WIDE)
    assert large


def test_how_many_sessions_a_key_may_have(model, there, x) -> None:
    made = [weft.client.session.SessionBackend(model._places.pick(None).backend) for _ in range(3)]

    def ask(room: Any) -> None:
        with model.trace(x) as tracer:
            model.output.save()
            tracer._place = weft.handles.where.Place(room, "server", "there")

    try:
        for room in made[:2]:
            ask(room)
        there.settings
        with pytest.raises(LimitError, match="sessions"):
            made[2].server.settings = weft.settings.Settings(retry_seconds=0.0)
            ask(made[2])
    finally:
        for room in made:
            room.close()


# -- what dies -------------------------------------------------------------------------------------


def test_another_worker_makes_the_values_again(model, wide, there, x) -> None:
    """Between traces: those that are wanted, from what they were made of."""
    with model.session():
        with model.trace(x):
            h = model[1].output
        with model.trace(x):
            g = h * 2
            gone = h * 3
        del gone
        again(there)
        with model.trace(x):
            model[1].output = g
            out = model.output.save()
        again(there)
        bitwise(h + 0, wide[1](wide[0](x)).detach())
    with torch.no_grad():
        bitwise(out, wide[2](wide[1](wide[0](x)) * 2))


def test_training_goes_on_at_another_worker(model, wide, there, x) -> None:
    def look(number: int, low: Low, optimizer: Any) -> None:
        if number in (1, 2):
            again(there)

    low, _, losses, _, requests = trained(model, x, MAKERS["AdamW"], 4, look)
    theirs, _, numbers = by_hand(wide, x, MAKERS["AdamW"], 4)
    bitwise(losses, numbers)
    bitwise([*low.parameters()], [*theirs.parameters()])
    assert requests == 8


def test_values_that_cannot_be_made_again_are_lost_by_name(model, there, x) -> None:
    with model.session() as session:
        with model.trace(x):
            h = model[1].output
        with model.trace(x):
            saved = model.output.save()
        job = there.ledger.find("local", f"{room_of(session)._info.id}-1")
        again(there)
        there.objects.delete(f"submits/{job.id}")
        with pytest.raises(SessionLostError, match="request 1 of the session"):
            h + 1
        with model.trace(x):  # what does not need it still runs
            model.output.save()
    assert saved.shape == (3, 2)


def test_parameters_that_cannot_come_home(model, there, x) -> None:
    low = Low()
    before = [one.detach().clone() for one in low.parameters()]
    with pytest.raises(SessionLostError) as caught, model.session() as session:
        optimizer = torch.optim.SGD(low.parameters(), lr=0.1)
        with model.trace(x):
            model[1].output = low(model[1].output)
            model.output.square().sum().backward()
        optimizer.step()
        there.ledger.end_session(room_of(session)._info.id, 0.0)
    assert "2 tensors" in "".join(caught.value.__notes__)
    bitwise([*low.parameters()], before)


def test_a_session_that_was_ended_from_elsewhere(model, there, x) -> None:
    with model.session() as session:
        with model.trace(x):
            h = model[1].output
        there.ledger.end_session(room_of(session)._info.id, 0.0)
        with pytest.raises(SessionLostError, match="it was closed"), model.trace(x):
            model[1].output = h
            model.output.save()
        with pytest.raises(SessionLostError, match="lost"):
            h + 1
