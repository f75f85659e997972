"""`weft serve MODEL --device cuda`: a worker process with the weights on the GPU."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.gpu.place import DEVICE
from weft.engine.weights import weights_mark
from weft.testing import tiny_path
from weft.testing.process import served
from weft.testing.same import bitwise

pytestmark = pytest.mark.gpu

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def server():
    with served(f"tiny={tiny_path()}", options=("--device", str(DEVICE))) as running:
        yield running


@pytest.fixture(scope="module")
def here():
    return weft.LanguageModel(tiny_path(), device_map=str(DEVICE))


@pytest.fixture
def there(server):
    return weft.LanguageModel("tiny", remote=server.url)


def steered(model, v, **options):
    with model.trace(TEXT, **options) as tracer:
        model.model.layers[1].output[:, -1] += v
        model.model.layers[2].output.save("h")
        model.lm_head.output.save("logits")
    return tracer.results


def test_the_same_numbers_as_here(here, there):
    v = torch.linspace(-1, 1, 128).half()
    one, other = steered(here, v), steered(there, v)
    assert one["h"].device == DEVICE
    for name in one:
        assert other[name].device.type == "cpu"
        bitwise(other[name], one[name].cpu())
    assert steered(there, v, device=DEVICE)["h"].device == DEVICE


def test_a_vector_on_the_device_travels(here, there):
    v = torch.linspace(-1, 1, 128, device=DEVICE).half()
    bitwise(steered(there, v)["logits"], steered(here, v)["logits"].cpu())


def test_gradients_and_generations(here, there):
    found = []
    for model in (here, there):
        v = torch.zeros(128, dtype=torch.float16, requires_grad=True)
        with model.trace(TEXT):
            model.model.layers[1].output[:, -1] += v
            model.lm_head.output[0, -1].float().log_softmax(-1)[7].backward()
        with model.generate(TEXT, max_new_tokens=4) as tracer:
            model.model.layers[1].output[:, -1] *= 1.5
            ids = tracer.result.save()
        found.append((v.grad, ids.cpu()))
    bitwise(found[1], found[0])


def test_invokes_and_sweeps(here, there):
    def point(tracer, layer, strength):
        model.model.layers[layer].output[:, -1] *= strength
        return model.lm_head.output[0, -1]

    found = []
    for model in (here, there):
        found.append(model.sweep(TEXT, point, layer=range(4), strength=[0.5, 2.0]).values.cpu())
    a, b = found
    assert float((a - b).double().abs().max()) <= 2**-8 * float(a.double().abs().max())


def test_weights_are_what_they_were(here, there):
    def plain():
        with there.trace(TEXT):
            logits = there.lm_head.output.save()
        return logits

    before = plain()
    steered(there, torch.ones(128).half())
    bitwise(plain(), before)
    copy = weft.LanguageModel(tiny_path(), device_map=str(DEVICE))
    assert weights_mark(here.dispatch()) == weights_mark(copy.dispatch())
    with here.trace(TEXT):
        logits = here.lm_head.output.save()
    bitwise(before, logits.cpu())


def test_an_index_that_stops_the_device(server, there):
    """On a GPU that ends the process's use of it: the job fails with the user's line, a new worker
    takes the next one."""
    with there.trace(TEXT):
        before = there.lm_head.output.save()
    with pytest.raises(Exception) as caught, there.trace(TEXT):
        far = there.lm_head.output[:, -1].argmax(-1) + 100_000
        there.model.norm.output.index_select(1, far).save()
    assert "index" in str(caught.value).lower()
    with there.trace(TEXT):
        after = there.lm_head.output.save()
    bitwise(after, before)
