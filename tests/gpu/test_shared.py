"""Requests of several users in one forward and in one decode loop, on a device."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.engine.strangers import KINDS, Asked, Experiments, Generations, Requests, ids, saved
from tests.engine.test_party import enemy, fills, harmless
from tests.engine.test_rolling import schedule
from tests.gpu import place
from tests.gpu.place import DEVICE, IS_CUDA
from weft.engine.draw import Drawn
from weft.engine.kept import Kept
from weft.errors import WorkerMemoryError
from weft.testing.same import bitwise, bounded

pytestmark = pytest.mark.gpu

USERS, POOL, SCHEDULES = 32, 24, 40
SIZES = {"llama": {"max_position_embeddings": 256}, "gpt2": {"n_positions": 256}}


@pytest.fixture(scope="module")
def patching():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", params=SIZES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(family: str, patching) -> Requests:
    found = Requests(place.net(family, **SIZES[family]), patching)
    Kept.of(found.net).stays = True  # as in a worker
    return found


@pytest.fixture(scope="module")
def everyone(family: str, made: Requests) -> list[Asked]:
    """Different graphs on prompts of 5 to 200 tokens."""
    tried = Experiments(family)
    return [
        made.ask(lambda model, n=n: getattr(tried, KINDS[n % 8])(model, 5 + 195 * n // 31, n))
        for n in range(USERS)
    ]


def test_thirty_two_users_in_one_pass(made, everyone):
    found = made.together(everyone)
    merged = [one for one in found if one is not None]
    assert len(merged) >= 0.9 * USERS
    for asked, one in zip(everyone, found, strict=True):
        if one is not None:
            bounded(saved(one), asked.alone)


@pytest.fixture(scope="module")
def beside_a_harmless_one(made, family, everyone) -> list[dict[str, Any]]:
    neighbour = enemy(made, family, harmless)
    return [saved(one) for one in made.together([*everyone[:7], neighbour])[:7]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_of_a_neighbour_reach_nobody(made, family, everyone, value, beside_a_harmless_one):
    found = made.together([*everyone[:7], enemy(made, family, fills(value))])
    assert isinstance(found[7], Drawn)
    for one, expected in zip(found[:7], beside_a_harmless_one, strict=True):
        bitwise(saved(one), expected)


@pytest.mark.skipif(not IS_CUDA, reason="a CPU's memory runs out for everybody")
def test_the_memory_that_a_neighbour_wants(made, family, everyone, beside_a_harmless_one):
    """The device has so much for this process and no more; a neighbour asks for more."""

    def block(model: Any) -> Any:
        with model.trace(ids(9, 77)) as tracer:
            h = Experiments(family).layer(model, 0).output[:, -1, :4]
            large = h.sum().expand(2**20, 2**10).clone()  # 4 GiB
            large.sum().save("s")
        return tracer

    neighbour = made.ask(block)
    assert neighbour.error is None
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((2 << 30) / whole, DEVICE)
    try:
        found = made.together([*everyone[:7], neighbour])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert isinstance(found[7], WorkerMemoryError)
    for one, expected in zip(found[:7], beside_a_harmless_one, strict=True):
        bitwise(saved(one), expected)


def test_nothing_of_the_model_has_changed(made, everyone):
    before = {name: tensor.clone() for name, tensor in made.net.state_dict().items()}
    made.together(everyone[:6])
    bitwise(dict(made.net.state_dict()), before)


def test_generations_that_come_and_go(made, family):
    tried = Generations(family)
    pool = [made.ask(lambda model, n=n: tried.block(model, n)) for n in range(POOL)]
    draw = random.Random(5)
    shared = sum(schedule(made, pool, draw) for _ in range(SCHEDULES))
    assert shared > SCHEDULES  # jobs that had company
