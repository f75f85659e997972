"""What goes up to a live server, measured on the wire; and looks, which are jobs of their own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import weft
from tests.client.live import Proxy
from weft.client import close
from weft.errors import GuardError, LookError, RemoteLookWarning
from weft.testing.same import bitwise, bounded

SIZE = 1 << 20
"""Bytes of a constant that is uploaded on its own."""


class Coder(torch.nn.Module):
    """A sparse autoencoder of one's own: `[..., 8]` to `[..., 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, SIZE // 32)
        self.down = torch.nn.Linear(SIZE // 32, 8)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(h)))


# -- constants -----------------------------------------------------------------------------------


def test_constants_go_up_once(proxy: Proxy, net: Any, x: Any, hidden: Any) -> None:
    model, coder = weft.Model(net, remote=True), Coder().requires_grad_(False)
    with torch.no_grad():
        expected = coder(coder(hidden))
    weights = sum(p.nbytes for p in coder.parameters())

    def coded() -> tuple[torch.Tensor, int, Any]:
        before = proxy.up
        with model.trace(x) as tracer:
            h = coder(coder(model[1].output)).save()  # used twice, sent once
        return h, proxy.up - before, tracer.traffic

    h, sent, traffic = coded()
    bounded(h, expected)
    assert weights < sent < weights + 20_000 and weights < traffic.up < sent
    h, sent, traffic = coded()
    bounded(h, expected)
    assert sent < 20_000 and traffic.up < sent
    close()  # as another process would come: it asks what is there
    h, sent, _ = coded()
    bounded(h, expected)
    assert sent < 20_000


def test_constants_with_the_same_numbers_are_one(proxy: Proxy, net: Any, x: Any) -> None:
    model, large = weft.Model(net, remote=True), torch.randn(SIZE // 4)
    before = proxy.up
    with model.trace(x):
        ((model[1].output.sum() + large) * large.clone()).save()
    assert SIZE < proxy.up - before < SIZE + 20_000


def test_small_constants_cost_their_own_size(proxy: Proxy, net: Any, x: Any, hidden: Any) -> None:
    model, v = weft.Model(net, remote=True), torch.linspace(0, 1, 8)
    with model.trace(x):
        model[1].output.save()
    before = proxy.up
    with model.trace(x):
        h = (model[1].output + v).save()
    bitwise(h, hidden + v)
    assert proxy.up - before < 2_500


def test_a_constant_that_the_server_dropped_goes_up_again(
    live: Any, net: Any, x: Any, hidden: Any
) -> None:
    model, large = weft.Model(net, remote=live.url), torch.randn(SIZE // 4)
    for _ in range(2):
        with model.trace(x):
            h = (model[1].output.sum() + large).save()
        bounded(h, hidden.sum() + large)
        for name in live.objects.names("constants/"):
            live.objects.delete(name)


def test_nothing_that_was_not_asked_for_comes_back(proxy: Proxy, net: Any, x: Any) -> None:
    model = weft.Model(net, remote=True)
    with model.trace(x):
        model[1].output.save()
    before = proxy.down
    with model.trace(x):
        wide = model[1].output.flatten()[:, None] + torch.zeros(24, 100_000)
        wide.sum().save()
    assert proxy.down - before < 10_000


# -- looks ---------------------------------------------------------------------------------------


def jobs(live: Any) -> list[Any]:
    """The server's jobs, newest first."""
    return live.ledger.jobs("local", limit=10_000)


def test_a_look_is_a_priced_job_of_its_own(live: Any, net: Any, x: Any, hidden: Any) -> None:
    model, before = weft.Model(net, remote=live.url), len(jobs(live))
    announced = pytest.warns(RemoteLookWarning, match="a number is needed here")
    with announced as caught, model.trace(x) as tracer:
        h = model[1].output
        total = float(h.sum())
        largest = h.max().item()
        if h[0, 0] > -1:
            h = h * 2
        h.save("h")
    assert total == pytest.approx(float(hidden.sum())) and largest == float(hidden.max())
    bitwise(tracer.results["h"], hidden * 2)
    new = jobs(live)[: len(jobs(live)) - before]
    assert [job.look for job in new] == [False, True, True, True]
    assert all(job.state == "done" and job.price for job in new)
    looked = weft.Job.get(new[1].id, live.url).status()
    assert looked.look and looked.price is not None and looked.price.sites == 1
    here = [w for w in caught if w.category is RemoteLookWarning]
    assert {w.filename for w in here} == {__file__}
    assert len({w.lineno for w in here}) == len(here) == 3


def test_a_look_is_announced_once_for_its_line(live: Any, net: Any, x: Any) -> None:
    model, before = weft.Model(net, remote=live.url), len(jobs(live))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with model.trace(x):
            h = model[1].output
            rows = [float(h[number].sum()) for number in range(3)]
            h.save()
    assert len(rows) == 3 and len(jobs(live)) - before == 4
    assert [w.category for w in caught] == [RemoteLookWarning]


@pytest.mark.parametrize("remote", [False, "local"])
def test_looks_here_are_not_announced(net: Any, x: Any, hidden: Any, remote: Any) -> None:
    model = weft.Model(net, remote=remote)
    with model.trace(x):  # a warning would be an error
        total = float(model[1].output.sum())
    assert total == pytest.approx(float(hidden.sum()))


def test_print_does_not_look(live: Any, net: Any, x: Any, capsys: Any) -> None:
    model, before = weft.Model(net, remote=live.url), len(jobs(live))
    with model.trace(x):
        h = model[1].output
        print(h)
        h.save()
    assert "float32[3, 8]" in capsys.readouterr().out
    assert len(jobs(live)) == before + 1


def test_a_block_that_is_only_sent_cannot_look(live: Any, net: Any, x: Any) -> None:
    model, before = weft.Model(net, remote=live.url), len(jobs(live))
    refused = pytest.raises(LookError, match="blocking=False")
    with refused as caught, model.trace(x, blocking=False):
        float(model[1].output.sum())
    assert __file__ in str(caught.value.line)
    assert len(jobs(live)) == before


@pytest.mark.filterwarnings("ignore::weft.errors.RemoteLookWarning")
def test_a_branch_that_another_run_would_not_take_fails_there(live: Any, net: Any, x: Any) -> None:
    model = weft.Model(net, remote=live.url)
    with model.trace(x) as tracer:
        h = model[1].output
        if h.sum() < 100:
            h.save("h")
    with pytest.raises(GuardError) as caught:
        tracer.graph.run(model, x * 1000, remote=live.url)
    assert caught.value.code == "guard" and __file__ in str(caught.value.line)


@pytest.mark.filterwarnings("ignore::weft.errors.RemoteLookWarning")
def test_a_look_whose_job_fails_raises_at_its_line(live: Any, net: Any, x: Any) -> None:
    model, index = weft.Model(net, remote=live.url), torch.tensor([7])
    with pytest.raises(IndexError, match="out of bounds"), model.trace(x):
        float(model[1].output[index].sum())
    with model.trace(x):
        model[1].output.save()
