"""What comes over connections that break: events, results, uploads; and what is told meanwhile."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from typing import Any

import pytest
import torch

import weft
from tests.client.live import DOOR, MOMENT, PATIENCE, Proxy, held, soon
from weft.client import progress
from weft.errors import ResultChangedError
from weft.testing.same import bitwise
from weft.wire.messages import EndEvent, StateEvent

COLUMNS = 250_000
LARGE = 24 * COLUMNS * 4
"""Bytes of what `outer` saves: beyond the size from which a result goes to the disk first."""


@pytest.fixture
def far(proxy: Proxy, net: Any) -> Any:
    """A handle on the module whose blocks go through the proxy."""
    return weft.Model(net, remote=True)


def outer(model: Any, **options: Any) -> Any:
    """A block that saves something large: `[24, COLUMNS]`."""
    with model.trace(ROW, **options) as tracer:
        h = model[1].output.flatten()
        (h[:, None] + torch.zeros(h.shape[0], COLUMNS)).save("all")
    return tracer


ROW = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def whole(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.flatten()[:, None].expand(-1, COLUMNS)


# -- events --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 150, 400, 500, 700, 1000])
def test_a_block_goes_on_where_its_events_broke(
    proxy: Proxy, far: Any, live: Any, x: Any, hidden: Any, capsys: Any, cut: int
) -> None:
    with far.trace(x):
        far[1].output.save()  # the handshake is made
    capsys.readouterr()
    before = len(live.ledger.jobs("local", limit=10_000))
    proxy.cuts = [cut, cut // 2 + 200]
    with far.trace(x) as tracer:
        for number in range(20):
            tracer.log("line", number, far[0].output[0, 0] * 0)
        h = far[1].output.save()
    bitwise(h, hidden)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [str(number) for number in range(20)]
    assert len(live.ledger.jobs("local", limit=10_000)) == before + 1
    assert len(proxy.cuts) < 2


def test_events_of_a_job_are_told_once_each_over_many_connections(
    proxy: Proxy, far: Any, live: Any, x: Any
) -> None:
    with far.trace(x, blocking=False) as tracer:
        tracer.log("line", far[0].output[0, 0])
        far[1].output.save()
    tracer.job.wait()
    straight = list(weft.Job.get(tracer.job.id, live.url).events())
    proxy.cuts, connections = [450, 470, 600, 300, 700], proxy.connections
    assert list(tracer.job.events()) == straight
    assert isinstance(straight[0], StateEvent) and isinstance(straight[-1], EndEvent)
    assert proxy.connections > connections and len(proxy.cuts) < 5


def test_blocks_one_after_another_come_over_one_connection(
    proxy: Proxy, far: Any, x: Any, hidden: Any
) -> None:
    for turn in range(4):
        with far.trace(x):
            h = far[1].output.save()
        bitwise(h, hidden)
        if not turn:
            connections = proxy.connections  # that of the handshake, and what came beside it
    assert proxy.connections == connections


# -- results -------------------------------------------------------------------------------------


def test_a_large_result_goes_on_where_it_broke(proxy: Proxy, far: Any, whole: Any) -> None:
    tracer = outer(far, blocking=False)
    tracer.job.wait()
    before = proxy.down
    proxy.cuts = [LARGE // 3, LARGE // 4, 1000, LARGE // 5]
    bitwise(tracer.job.result("all"), whole)
    assert not proxy.cuts
    assert LARGE <= proxy.down - before <= LARGE + (4 << 20)  # what had come did not come again


def test_with_asyncio_too(proxy: Proxy, far: Any, whole: Any) -> None:
    async def main() -> None:
        async with far.trace(ROW, blocking=False) as tracer:
            h = far[1].output.flatten()
            large = (h[:, None] + torch.zeros(h.shape[0], COLUMNS)).save()
        await tracer.job.wait()
        before = proxy.down
        proxy.cuts = [LARGE // 3, 1000, LARGE // 2]
        await tracer.job.result()
        bitwise(large, whole)
        assert not proxy.cuts and proxy.down - before <= LARGE + (4 << 20)

    asyncio.run(main())


def test_a_large_save_of_many_goes_on_where_it_broke(proxy: Proxy, far: Any, whole: Any) -> None:
    with far.trace(ROW, blocking=False) as tracer:
        h = far[1].output.flatten()
        for number in range(3):
            (h[:, None] * number + h.new_zeros(24, COLUMNS)).save(f"save {number}")
    tracer.job.wait()
    elsewhere, before = weft.Job.get(tracer.job.id), proxy.down
    proxy.cuts = [LARGE // 3, 1000, LARGE // 3]
    bitwise(elsewhere.result("save 1"), whole)
    assert not proxy.cuts
    assert LARGE <= proxy.down - before <= LARGE + (4 << 20)


def test_what_is_not_what_the_server_said_is_refused(live: Any, net: Any, whole: Any) -> None:
    model = weft.Model(net, remote=live.url)
    tracer = outer(model, blocking=False)
    assert tracer.job.wait().state == "done"
    name = f"results/{tracer.job.id}"
    data = bytearray(b"".join(live.objects.stream(name)))
    data[-1] ^= 1
    live.objects.delete(name)
    live.objects.put(name, bytes(data))
    with pytest.raises(ResultChangedError, match="SHA-256") as caught:
        tracer.job.result()
    assert caught.value.code == "result-changed"


def test_one_save_of_many_comes_alone(proxy: Proxy, far: Any, hidden: Any) -> None:
    with far.trace(ROW, blocking=False) as tracer:
        h = far[1].output.save("small")
        (h.flatten()[:, None] + torch.zeros(24, COLUMNS)).save("large")
    tracer.job.wait()
    before = proxy.down
    elsewhere = weft.Job.get(tracer.job.id)
    bitwise(elsewhere.result("small"), hidden)
    assert proxy.down - before < 10_000


# -- bars ----------------------------------------------------------------------------------------


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_show_what_is_large_both_ways(
    live: Any, net: Any, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LARGE", 4 << 20)
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    model = weft.Model(net, remote=live.url)
    with model.trace(x):
        (model[1].output.sum() + torch.randn(6 << 20 >> 2)).save()
    assert "upload" in screen.getvalue() and "result" not in screen.getvalue()
    outer(model)
    assert "result" in screen.getvalue()


# -- asyncio -------------------------------------------------------------------------------------


def test_the_event_loop_goes_on_while_a_block_is_awaited(gated: Any, x: Any) -> None:
    async def opener() -> None:
        await asyncio.to_thread(DOOR.reached.wait, PATIENCE)
        DOOR.open()

    async def main() -> None:
        task = asyncio.create_task(opener())
        async with gated.trace(x):
            h = gated[1].output.save()
        assert task.done()
        assert type(h) is torch.Tensor and h.shape == (3, 8)

    with DOOR.closed():
        asyncio.run(main())


def test_async_jobs_from_being_sent_to_their_results(live: Any, gated: Any, x: Any) -> None:
    async def main() -> None:
        async with gated.trace(x, blocking=False) as tracer:
            tracer.log("here", gated[0].output[0, 0])
            h = gated[1].output.save("h")
        job = tracer.job
        assert isinstance(job, weft.AsyncJob)
        await asyncio.to_thread(DOOR.reached.wait, PATIENCE)
        assert (await job.status()).state == "running"
        DOOR.open()
        kinds = [type(event).__name__ async for event in job.events()]
        assert kinds[0] == "StateEvent" and kinds[-1] == "EndEvent" and "LogEvent" in kinds
        assert (await job.result("h")) is h and type(h) is torch.Tensor
        again = await weft.AsyncJob.get(job.id, live.url)
        bitwise(await again.result("h"), h)
        await again.delete()
        with pytest.raises(weft.RemoteError):
            await job.status()

    with DOOR.closed():
        asyncio.run(main())


def test_many_async_blocks_at_once(live: Any, net: Any, x: Any, hidden: Any) -> None:
    model = weft.Model(net, remote=live.url)

    async def one(number: int) -> None:
        async with model.trace(x):
            h = (model[1].output * number).save()
        bitwise(h, hidden * number)

    async def main() -> None:
        await asyncio.gather(*[one(number) for number in range(16)])

    asyncio.run(main())


def test_a_task_that_is_cancelled_cancels_its_job(live: Any, monkeypatch: Any) -> None:
    slow = weft.Model("slow", remote=live.url)

    async def block() -> None:
        async with slow.trace(torch.ones(2)) as tracer:
            tracer.log("begun", slow[0].input)
            weft.save([slow[n].output for n in range(100)], name="all")

    async def main() -> None:
        task = asyncio.create_task(block())
        await asyncio.to_thread(begun.wait, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    begun = threading.Event()
    monkeypatch.setattr("builtins.print", lambda *text, **_: begun.set())
    with DOOR.closed(MOMENT):
        asyncio.run(main())
        job = live.ledger.jobs("local")[0]
        assert weft.Job.get(job.id, live.url).wait().state == "cancelled"


def test_an_async_block_that_fails_raises_as_any_other(live: Any, net: Any, x: Any) -> None:
    model = weft.Model(net, remote=live.url)

    async def main() -> None:
        with pytest.raises(IndexError, match="out of bounds"):
            async with model.trace(x):
                model[1].output[torch.tensor([7])].save()

    asyncio.run(main())


def test_readers_that_leave_early_leave_nothing_open(gated: Any, x: Any) -> None:
    with DOOR.closed():
        with gated.trace(x, blocking=False) as tracer:
            gated[1].output.save()
        tracer.job.status()
        before = sockets()
        for _ in range(5):
            for event in tracer.job.events():
                assert isinstance(event, StateEvent)
                break
        soon(lambda: sockets() <= before + 1)
    tracer.job.wait()


def sockets() -> int:
    return sum("socket:" in str(one) for one in held())
