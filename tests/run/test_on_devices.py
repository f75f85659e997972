"""What is done for a model on a GPU, as far as a CPU can tell. The rest is in `tests/gpu`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from weft.families.call import ModelCall
from weft.families.rehearsal import Layout, rehearsal
from weft.families.sampling import Sampling
from weft.handles import block, budget
from weft.signatures import learn
from weft.signatures.shapes import Shapes, copied


def test_inputs_are_foreseen_on_the_models_device() -> None:
    """Fakes can lie on a GPU that is not there."""
    cuda = torch.device("cuda", 0)
    ids = torch.arange(4)[None]
    shapes = Shapes([], cuda)
    found = shapes.fake(ids.float(), cuda)
    assert found.device == cuda
    assert shapes.fake(torch.ones(2)).device.type == "cpu"


def test_a_copied_storage_is_another_one() -> None:
    x = torch.arange(12.0)
    copy = torch.empty(0).set_(copied(x[4:].untyped_storage(), torch.device("cpu")))  # type: ignore[call-overload]
    assert copy.tolist() == x.tolist()
    copy += 1
    assert x[0] == 0


def test_inputs_are_copied_to_where_the_weights_are_with_what_they_share() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    weights = [torch.ones(1, device="meta")]
    first, turned = learn._copies([x, x.T], weights)
    assert first.device.type == turned.device.type == "meta"
    assert turned.stride() == x.T.stride()
    assert first.untyped_storage()._cdata == turned.untyped_storage()._cdata
    (here,) = learn._copies([x], [])
    assert here.device.type == "cpu"


def test_the_streams_of_the_weights_devices_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    weight = SimpleNamespace(device=torch.device("cuda", 1))
    kept = torch.random.fork_rng

    def note(devices: Any) -> Any:
        asked.extend(devices)
        return kept(devices=[])

    monkeypatch.setattr(torch.random, "fork_rng", note)
    monkeypatch.setattr(learn, "weights_of", lambda module: [weight, weight])
    before = torch.get_rng_state()
    with learn._draws_kept(nn.Identity()):
        torch.rand(3)
    assert asked == [torch.device("cuda", 1)]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_second_step_of_a_rehearsal_is_where_the_first_is() -> None:
    """Tokens follow the ids, which follow the weights."""
    net = zoo.build("gpt2")
    found = rehearsal(net, Layout(2, 5), Sampling(max_new_tokens=2))
    sampler: Any = found.sampler
    chosen = sampler.choose(torch.ones(2, 5, dtype=torch.int64, device="meta"))
    assert chosen.device.type == "meta"
    assert chosen.shape == (2,)


def test_a_sweep_counts_memory_that_the_allocator_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 0)  # type: ignore[assignment]

    ids = torch.ones(1, 3).as_subclass(Elsewhere)
    call = ModelCall((), {"input_ids": ids})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2000)
    assert budget._free(call) == (1000 + 5000 - 2000) // 4


def test_values_say_where_results_will_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    model = weft.LanguageModel(zoo.build("gpt2"))
    cuda = torch.device("cuda", 0)
    with model.scan([[1, 2, 3]]):
        assert model.transformer.h[0].output.device.type == "cpu"
    recorded = []
    with pytest.raises(RuntimeError, match="enough"), model.trace([[1, 2, 3]]) as tracer:
        monkeypatch.setattr(tracer._recorder, "device", cuda)
        recorded.append(model.transformer.h[0].output.device)
        raise RuntimeError("enough")
    assert recorded == [cuda]
    monkeypatch.setattr(model._weights, "device", lambda: cuda)
    here: Any = SimpleNamespace(kind="here")
    there: Any = SimpleNamespace(kind="server")
    assert block._results_on(model, here) == cuda
    assert block._results_on(model, there) is None
