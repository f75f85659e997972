"""`tracer.cache(...)`: what many modules give and take, as plain hooks on them see it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.language.hooks import with_hooks
from tests.language.test_early_exit import counting
from weft.errors import (
    FailedRunError,
    NotReachedError,
    OutsideTraceError,
    RecordingError,
    UnknownOptionError,
    UnknownPathError,
)
from weft.testing.same import bitwise


def flat(value):
    """The tensors of a structure, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in flat(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in flat(item)]
    return []


def outputs(subject, paths=None, ids=None, **changes):
    """What hooks on these modules (all of them) see, by path; edits by path."""
    if paths is None:
        paths = [path for path, _ in subject.net.named_modules()]
    hooks = {f"{path}.output": changes.get(path) for path in paths}
    seen = with_hooks(subject.net, hooks, subject.ids if ids is None else ids)
    return {path: seen[f"{path}.output"] for path in paths if f"{path}.output" in seen}


def test_all_modules_by_default(subject):
    expected = outputs(subject)
    with subject.model.trace(subject.ids) as tracer:
        cache = tracer.cache()
    assert set(cache.keys()) == set(expected)
    assert len(cache) == len(expected) and set(cache) == set(expected)
    for path, value in expected.items():
        bitwise(flat(cache[path].output), flat(value))
        assert type(cache[path].output) is type(value) or not isinstance(value, torch.Tensor)


def test_chosen_modules_by_path_and_by_attribute(subject):
    paths = [subject.paths.layer(0), subject.paths.mlp(1)]
    expected = outputs(subject, paths)
    layers = subject.paths.layer_list
    with subject.model.trace(subject.ids) as tracer:
        cache = tracer.cache(modules=[paths[0], subject.model.get(paths[1])])
    assert list(cache.keys()) == paths
    bitwise(flat(cache[paths[0]].output), flat(expected[paths[0]]))
    branch = cache
    for name in layers.split("."):
        branch = getattr(branch, name)
    bitwise(flat(branch[0].output), flat(expected[paths[0]]))
    assert len(branch) == len(subject.layer_list) and paths[0] in cache and layers not in cache


def test_inputs_too(subject):
    path = subject.paths.layer(1)
    seen = with_hooks(subject.net, {f"{path}.inputs": None, f"{path}.input": None}, subject.ids)
    with subject.model.trace(subject.ids) as tracer:
        cache = tracer.cache(modules=path, inputs=True)
    bitwise(cache[path].input, seen[f"{path}.input"])
    args, kwargs = cache[path].inputs
    bitwise(flat((args, kwargs)), flat(seen[f"{path}.inputs"]))
    assert isinstance(args, tuple) and isinstance(kwargs, dict)


def test_structures_are_the_modules_own(gpt2):
    with gpt2.model.trace(gpt2.ids) as tracer:
        cache = tracer.cache()
    result = cache[""].output
    bitwise(result.logits, gpt2.baseline)
    assert type(result).__name__ == "CausalLMOutputWithCrossAttentions"
    attention = cache["transformer.h.0.attn"].output
    assert isinstance(attention, tuple) and attention[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_is_cast_exactly(gpt2, dtype):
    expected = outputs(gpt2, ["transformer.h.1"])["transformer.h.1"]
    with gpt2.model.trace(gpt2.ids) as tracer:
        cache = tracer.cache("transformer.h.1", dtype=dtype)
        whole = tracer.cache("transformer.wte", inputs=True, dtype=dtype, name="ids")
    assert cache["transformer.h.1"].output.dtype == dtype
    bitwise(cache["transformer.h.1"].output, expected.to(dtype))
    assert whole["transformer.wte"].input.dtype == torch.int64  # no number of tokens is rounded


def test_a_device(gpt2):
    with gpt2.model.trace(gpt2.ids) as tracer:
        cache = tracer.cache("transformer.h.1", device="cpu")
        away = tracer.cache("transformer.h.1", device="meta")
    assert cache["transformer.h.1"].output.device.type == "cpu"
    assert away["transformer.h.1"].output.device.type == "meta"


def test_edits_are_in_it_wherever_the_line_stands(gpt2):
    """What is cached is what the model went on with."""
    edits = {"transformer.h.0": lambda h: h * 2, "transformer.h.1": lambda h: h * 0}
    paths = ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    expected = outputs(gpt2, paths, **edits)
    h = gpt2.model.transformer.h
    with gpt2.model.trace(gpt2.ids) as tracer:
        early = tracer.cache(paths)
        h[0].output *= 2
        h[1].output = h[1].output * 0
        late = tracer.cache(paths)
    for cache in (early, late):
        bitwise([cache[path].output for path in paths], list(expected.values()))


def test_skipped_modules(gpt2):
    h = gpt2.model.transformer.h
    with gpt2.model.trace(gpt2.ids) as tracer:
        cache = tracer.cache()
        h[1].skip(h[1].input * 2)
    assert "transformer.h.1" in cache and "transformer.h.1.mlp" not in cache
    assert "transformer.h.0.mlp" in cache
    bitwise(cache["transformer.h.1"].output, cache["transformer.h.0"].output * 2)
    with pytest.raises(NotReachedError) as caught, gpt2.model.trace(gpt2.ids) as tracer:
        tracer.cache("transformer.h.1.mlp")
        h[1].skip(h[1].input)
    assert "h.1 is skipped" in caught.value.message


def test_a_stop_leaves_the_rest_out(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        cache = tracer.cache()
        gpt2.model.transformer.h[0].output.save()
        tracer.stop()
    assert ran == [0]
    assert "transformer.h.0.mlp" in cache and "transformer.h.1" not in cache
    bitwise(cache["transformer.h.0"].output, outputs(gpt2)["transformer.h.0"])
    with pytest.raises(KeyError, match=r"transformer\.h\.1 is not in this cache"):
        cache["transformer.h.1"]


def test_the_pass_ends_after_the_last_cached_module(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        tracer.cache(["transformer.h.1", "transformer.h.0"])
    assert ran == [0, 1]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.never = nn.Linear(3, 3)
        self.tied = self.lin

    def forward(self, x):
        return self.lin(self.tied(x))


def test_a_module_that_is_called_twice(place):
    net = Twice()
    model = weft.Model(net)
    x = torch.randn(2, 3)
    with model.trace(x) as tracer:
        cache = tracer.cache(inputs=True)
    once = net.lin(x).detach()
    for path in ("lin", "tied"):  # two names of one module
        bitwise(cache[path].calls[0].output, once)
        bitwise(cache[path].calls[1].input, once)
        bitwise(cache[path].calls[1].output, net.lin(once).detach())
    with pytest.raises(AttributeError, match=r"called 2 times.*\.calls\[0\]\.output"):
        _ = cache["lin"].output
    assert "never" not in cache


def test_in_an_invoke(gpt2):
    a, b = gpt2.ids, gpt2.ids[:, :4]
    with gpt2.model.trace() as tracer:
        with tracer.invoke(a):
            one = tracer.cache("transformer.h.1")
        with tracer.invoke(b):
            two = tracer.cache("transformer.h.1")
    for cache, ids in ((one, a), (two, b)):
        expected = outputs(gpt2, ["transformer.h.1"], ids)["transformer.h.1"]
        assert cache["transformer.h.1"].output.shape == expected.shape
        torch.testing.assert_close(cache["transformer.h.1"].output, expected)


def test_it_is_one_save_by_name(gpt2):
    with gpt2.model.trace(gpt2.ids) as tracer:
        cache = tracer.cache("transformer.h.1")
        second = tracer.cache("transformer.h.0")
        third = tracer.cache("transformer.h.2", name="mine")
    assert tracer.results == {"cache": cache, "cache.2": second, "mine": third}
    found = tracer.graph.run(gpt2.model, gpt2.ids)
    assert list(found["cache"]) == ["transformer.h.1.output"]
    bitwise(found["cache"]["transformer.h.1.output"], cache["transformer.h.1"].output)


def test_again_and_again_with_other_inputs(gpt2):
    for length in (3, 9, 3, 5):
        ids = gpt2.ids[:, :length]
        with gpt2.model.trace(ids) as tracer:
            cache = tracer.cache(dtype=torch.float64)
        expected = outputs(gpt2, ids=ids)
        bitwise(cache["transformer.h.2"].output, expected["transformer.h.2"].double())


def test_the_roots_own_name_of_other_libraries(gpt2):
    with gpt2.model.trace(gpt2.ids) as tracer:
        cache = tracer.cache()
    bitwise(cache["model.transformer.h.1"].output, cache["transformer.h.1"].output)
    bitwise(cache.model.transformer.h[1].output, cache["transformer.h.1"].output)


# -- refusals --------------------------------------------------------------------------------------


def test_what_is_wrong_is_said(model, ids):
    with pytest.raises(UnknownPathError, match=r"transformer\.hh"), model.trace(ids) as tracer:
        tracer.cache("transformer.hh")
    with pytest.raises(UnknownPathError, match="no module of"), model.trace(ids) as tracer:
        tracer.cache([nn.Linear(1, 1)])
    with pytest.raises(UnknownOptionError, match="floating dtype"), model.trace(ids) as tracer:
        tracer.cache(dtype=torch.int8)
    with pytest.raises(TypeError), model.trace(ids) as tracer:
        tracer.cache(output=False)
    with pytest.raises(RecordingError, match="named 'h'"), model.trace(ids) as tracer:
        model.lm_head.output.save("h")
        tracer.cache(name="h")


def test_a_module_that_never_runs(place):
    model, match = weft.Model(Twice()), "never is never called"
    with pytest.raises(NotReachedError, match=match), model.trace(torch.ones(1, 3)) as tracer:
        tracer.cache("never")


def test_inside_its_block_it_is_empty(model, ids):
    with pytest.raises(RecordingError) as caught, model.trace(ids) as tracer:
        cache = tracer.cache()
        _ = cache.transformer.h[0].output
    assert "read inside its block" in caught.value.message


def test_after_a_block_that_failed(model, ids):
    with pytest.raises(ZeroDivisionError), model.trace(ids) as tracer:
        cache = tracer.cache()
        1 / 0
    with pytest.raises(FailedRunError, match="ZeroDivisionError"):
        cache.keys()


def test_outside_of_all_invokes(gpt2):
    with pytest.raises(OutsideTraceError), gpt2.model.trace() as tracer:
        with tracer.invoke(gpt2.ids):
            pass
        tracer.cache()


def test_it_cannot_be_written_to(model, ids):
    with model.trace(ids) as tracer:
        cache = tracer.cache("transformer.h.0")
    with pytest.raises(AttributeError, match="cannot be assigned"):
        cache.transformer = 3
    with pytest.raises(AttributeError, match=r"tracer\.cache\(inputs=True\)"):
        _ = cache["transformer.h.0"].input
