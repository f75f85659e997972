"""`module.skip(value)`: the module does not run, its output is the value.

The oracle is the bare module in which the forward of a module was replaced by hand, with hooks.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import weft
from tests.language.hooks import hook_count, with_hooks
from weft.errors import (
    GraphError,
    LateEditError,
    NotReachedError,
    OutsideTraceError,
    RecordingError,
    WeftError,
    WriteMismatchError,
)
from weft.testing.same import bitwise, moves


def replaced(net, forwards, *args, hooks=None, **kwargs):
    """`net(*args)` on a copy in which modules, by path, have other forwards."""
    twin = copy.deepcopy(net)
    for path, forward in forwards.items():
        twin.get_submodule(path).forward = forward
    return with_hooks(twin, hooks or {}, *args, **kwargs)


@contextlib.contextmanager
def counting(net):
    """The paths of the modules whose forward is called, by the class's own forward."""
    ran, handles = [], []
    for path, module in net.named_modules():
        hook = lambda *_, path=path: ran.append(path)
        handles.append(module.register_forward_hook(hook))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def layer_of(subject, number):
    return subject.model.get(subject.paths.layer(number))


# -- values ----------------------------------------------------------------------------------------


def test_a_layer_is_left_out(subject):
    path = subject.paths.layer(1)
    expected = replaced(subject.net, {path: lambda h, *_, **__: h}, subject.ids)
    with subject.model.trace(subject.ids) as tracer:
        layer = layer_of(subject, 1)
        layer.skip(layer.input)
        logits = tracer.result.logits.save()
    bitwise(logits, expected.result.logits)
    moves(logits, subject.baseline)


def test_a_mlp_gives_what_was_computed(subject):
    path = subject.paths.mlp(1)
    key = f"{path}.output"
    width = with_hooks(subject.net, {key: None}, subject.ids)[key].shape[-1]

    def given(h, *_, **__):
        return h.mean(-1, keepdim=True).expand(*h.shape[:-1], width) * 0.5 + 1

    expected = replaced(subject.net, {path: given}, subject.ids, hooks={key: None})
    with subject.model.trace(subject.ids) as tracer:
        mlp = subject.model.get(path)
        mlp.skip(given(mlp.input))
        inside = mlp.output.save()
        logits = tracer.result.logits.save()
    bitwise(inside, expected[key])
    bitwise(logits, expected.result.logits)


def test_attention_returns_a_tuple(subject):
    path = subject.paths.attention(1)
    seen = with_hooks(subject.net, {f"{path}.output": None}, subject.ids)
    rest = seen[f"{path}.output"][1:]
    given = torch.zeros_like(seen[f"{path}.output"][0])
    expected = replaced(subject.net, {path: lambda *_, **__: (given, *rest)}, subject.ids)
    with subject.model.trace(subject.ids) as tracer:
        subject.model.get(path).skip((given, *rest))
        logits = tracer.result.logits.save()
    bitwise(logits, expected.result.logits)


Pair = namedtuple("Pair", "low high")


@dataclass
class Both:
    low: torch.Tensor
    high: torch.Tensor
    note: str = "x"


class Returns(nn.Module):
    """Gives two tensors in a structure, counts its calls, and has a module inside."""

    def __init__(self, make):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.make = make

    def forward(self, x):
        y = self.inner(x)
        return self.make(y, y + 1)


class Takes(nn.Module):
    def __init__(self, make, take):
        super().__init__()
        self.one = Returns(make)
        self.take = take

    def forward(self, x):
        found = self.one(x)
        low, high = self.take(found)
        return low * 2 + high, type(found) is type(self.one.make(x, x))


STRUCTURES = {
    "tuple": (lambda a, b: (a, b), tuple),
    "with plain": (lambda a, b: (a, None, b), lambda t: (t[0], t[2])),
    "list": (lambda a, b: [a, b], tuple),
    "dict": (lambda a, b: {"low": a, "high": b}, lambda d: (d["low"], d["high"])),
    "nested": (lambda a, b: ((a,), {"x": [b]}), lambda t: (t[0][0], t[1]["x"][0])),
    "named tuple": (Pair, lambda p: (p.low, p.high)),
    "dataclass": (Both, lambda p: (p.low, p.high)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_is_the_modules_own(name):
    make, take = STRUCTURES[name]
    net = Takes(make, take)
    model = weft.Model(net)
    x = torch.randn(2, 3)
    with model.trace(x):
        h = model.one.input
        model.one.skip(make(h * 3, h - 1))
        out, same_type = model.output
        out = out.save()
    bitwise(out, x * 3 * 2 + (x - 1))
    assert same_type is True


def test_a_model_output(gpt2):
    """The whole body returns one; what it is given in its place is one too."""
    path = "transformer"
    hidden = torch.linspace(-1, 1, 9 * 32).reshape(1, 9, 32)
    with gpt2.model.trace(gpt2.ids) as tracer:
        body = gpt2.model.transformer
        found = {"last_hidden_state": hidden}
        body.skip(found)
        logits = tracer.result.logits.save()
        inside = body.output.last_hidden_state.save()
    with torch.no_grad():
        bitwise(logits, gpt2.net.lm_head(hidden))
    bitwise(inside, hidden)
    assert path == body.path


def test_a_module_that_returns_nothing(place):
    class Silent(nn.Module):
        def forward(self, x):
            return None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.silent, self.lin = Silent(), nn.Linear(2, 2)

        def forward(self, x):
            self.silent(x)
            return self.lin(x)

    net = Net()
    model = weft.Model(net)
    x = torch.ones(1, 2)
    with model.trace(x):
        model.silent.skip(None)
        out = model.output.save()
    bitwise(out, net(x).detach())


def test_a_floating_dtype_is_cast_as_in_a_write(gpt2):
    given = torch.linspace(-1, 1, 9 * 32, dtype=torch.float64).reshape(1, 9, 32)
    path = "transformer.h.1.mlp"
    expected = replaced(gpt2.net, {path: lambda h: given.float()}, gpt2.ids)
    with gpt2.model.trace(gpt2.ids) as tracer:
        gpt2.model.transformer.h[1].mlp.skip(given)
        logits = tracer.result.logits.save()
    bitwise(logits, expected.result.logits)


def test_the_value_is_taken_at_its_line(gpt2):
    """Later edits of the tensor that was given do not reach the model."""
    expected = replaced(gpt2.net, {"transformer.h.1.mlp": lambda h: h * 2}, gpt2.ids)
    with gpt2.model.trace(gpt2.ids) as tracer:
        mlp = gpt2.model.transformer.h[1].mlp
        given = mlp.input * 2
        mlp.skip(given)
        given[:] = 0
        logits = tracer.result.logits.save()
    bitwise(logits, expected.result.logits)


def test_the_given_output_is_edited_and_the_input_stays(gpt2):
    """The model has a tensor of its own: an edit of it in place changes nothing else."""
    expected = replaced(gpt2.net, {"transformer.h.1": lambda h, *_, **__: h * 0}, gpt2.ids)
    with gpt2.model.trace(gpt2.ids) as tracer:
        layer = gpt2.model.transformer.h[1]
        before = layer.input.save()
        layer.skip(layer.input)
        layer.output[:] = 0
        logits = tracer.result.logits.save()
    bitwise(logits, expected.result.logits)
    assert before.abs().max() > 0.1


def test_an_edit_of_the_input_comes_first(gpt2):
    expected = replaced(gpt2.net, {"transformer.h.1": lambda h, *_, **__: h * 3}, gpt2.ids)
    with gpt2.model.trace(gpt2.ids) as tracer:
        layer = gpt2.model.transformer.h[1]
        layer.input = layer.input * 3
        layer.skip(layer.input)
        logits = tracer.result.logits.save()
    bitwise(logits, expected.result.logits)


def test_several_modules_and_other_sites(gpt2):
    forwards = {"transformer.h.0.mlp": lambda h: h * 2, "transformer.h.2.mlp": lambda h: h * 0}
    keys = {"transformer.h.1.output": lambda h: h * 1.5, "transformer.h.2.input": None}
    expected = replaced(gpt2.net, forwards, gpt2.ids, hooks=keys)
    with gpt2.model.trace(gpt2.ids) as tracer:
        h = gpt2.model.transformer.h
        h[2].mlp.skip(h[2].mlp.input * 0)
        h[1].output *= 1.5
        h[0].mlp.skip(h[0].mlp.input * 2)
        got = h[2].input.save()
        logits = tracer.result.logits.save()
    bitwise(got, expected["transformer.h.2.input"])
    bitwise(logits, expected.result.logits)


def test_a_value_of_an_earlier_layer(gpt2):
    early = with_hooks(gpt2.net, {"transformer.h.0.mlp.output": None}, gpt2.ids)
    given = early["transformer.h.0.mlp.output"]
    expected = replaced(gpt2.net, {"transformer.h.2.mlp": lambda h: given}, gpt2.ids)
    with gpt2.model.trace(gpt2.ids) as tracer:
        h = gpt2.model.transformer.h
        h[2].mlp.skip(h[0].mlp.output)
        logits = tracer.result.logits.save()
    bitwise(logits, expected.result.logits)


# -- cost ------------------------------------------------------------------------------------------


def test_nothing_inside_runs(gpt2):
    with counting(gpt2.net) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        layer = gpt2.model.transformer.h[1]
        layer.skip(layer.input)
        tracer.result.logits.save()
    assert not [path for path in ran if path.startswith("transformer.h.1.")]
    assert "transformer.h.0.mlp" in ran and "transformer.h.2.mlp" in ran


def test_the_modules_own_forward_is_not_called(place):
    called = []

    class Costly(nn.Module):
        def forward(self, x):
            called.append(type(x))  # shapes are learnt with tensors of another type
            return x * 2

    net = nn.Sequential(nn.Linear(2, 2), Costly())
    model = weft.Model(net)
    x = torch.ones(5, 2)
    with model.trace(x):
        model[1].skip(model[1].input + 1)
        out = model.output.save()
    assert torch.Tensor not in called
    bitwise(out, (net[0](x) + 1).detach())


def test_the_pass_ends_where_nothing_is_left(gpt2):
    with counting(gpt2.net) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        h = gpt2.model.transformer.h
        h[1].skip(h[1].input * 2)
        got = h[1].output.save()
    assert str(tracer.ended) == "transformer.h.1.output"
    assert not [path for path in ran if path.startswith(("transformer.h.2", "transformer.h.1."))]
    seen = with_hooks(gpt2.net, {"transformer.h.0.output": None}, gpt2.ids)
    bitwise(got, seen["transformer.h.0.output"] * 2)


def test_nothing_is_left_of_it(gpt2):
    layer = gpt2.net.transformer.h[1]
    for _ in range(3):
        with gpt2.model.trace(gpt2.ids):
            gpt2.model.transformer.h[1].skip(gpt2.model.transformer.h[1].input)
            gpt2.model.lm_head.output.save()
        assert "forward" not in vars(layer)
    with contextlib.suppress(Exception), gpt2.model.trace(gpt2.ids):
        gpt2.model.transformer.h[1].skip(gpt2.model.transformer.h[1].input)
        (gpt2.model.lm_head.output[:, torch.tensor([99])]).save()
    assert "forward" not in vars(layer)
    assert hook_count(gpt2.net) == 0


# -- calls -----------------------------------------------------------------------------------------


class Shares(nn.Module):
    """`lin` is called inside `block`, and again behind it; `block` twice."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.block = nn.Sequential(self.lin, nn.Tanh())

    def forward(self, x):
        x = self.block(x)
        x = self.lin(x)
        return self.block(x)


def test_calls_keep_their_numbers(place):
    net = Shares()
    model = weft.Model(net)
    x = torch.randn(2, 3)
    with model.trace(x):
        model.block.calls[0].skip(model.block.calls[0].input * 2)
        second = model.lin.calls[1].output.save()
        third = model.lin.calls[2].input.save()
        out = model.output.save()
    with torch.no_grad():
        lin = net.lin(x * 2)
        bitwise(second, lin)
        bitwise(third, lin)
        bitwise(out, net.block(lin))


def test_of_a_module_with_several_calls_one_is_named(place):
    model = weft.Model(Shares())
    match = r"called 2 times.*\.skip is ambiguous"
    with pytest.raises(RecordingError, match=match), model.trace(torch.ones(1, 3)):
        model.block.skip(model.block.calls[0].input)


def test_inner_calls_of_the_skipped_call_only(place):
    model = weft.Model(Shares())
    with pytest.raises(NotReachedError, match="block is skipped"), model.trace(torch.ones(1, 3)):
        model.block.calls[1].skip(model.block.calls[1].input)
        model.lin.calls[1].output.save()
        model.lin.calls[2].output.save()


def test_each_invoke_has_its_own(gpt2):
    a, b = gpt2.ids, gpt2.ids[:, :5]
    path = "transformer.h.1"
    with gpt2.model.trace() as tracer:
        with tracer.invoke(a):
            gpt2.model.transformer.h[1].skip(gpt2.model.transformer.h[1].input)
            one = tracer.result.logits.save()
        with tracer.invoke(b):
            inner = gpt2.model.transformer.h[1].mlp.output.save()
            two = tracer.result.logits.save()
    bitwise(one, replaced(gpt2.net, {path: lambda h, *_, **__: h}, a).result.logits)
    seen = with_hooks(gpt2.net, {f"{path}.mlp.output": None}, b)
    bitwise(inner, seen[f"{path}.mlp.output"])
    bitwise(two, seen.result.logits)


def test_a_value_of_another_invoke(gpt2):
    a, b = gpt2.ids, gpt2.ids.flip(1)
    other = with_hooks(gpt2.net, {"transformer.h.2.mlp.output": None}, b)
    given = other["transformer.h.2.mlp.output"]
    expected = replaced(gpt2.net, {"transformer.h.1.mlp": lambda h: given}, a)
    with gpt2.model.trace() as tracer:
        with tracer.invoke(a):
            place = gpt2.model.transformer.h[1].mlp
            logits = None
        with tracer.invoke(b):
            late = gpt2.model.transformer.h[2].mlp.output
        with tracer.invoke(a):
            place.skip(late)
            logits = tracer.result.logits.save()
    bitwise(logits, expected.result.logits)


def test_eight_threads_skip_different_layers(gpt2):
    """While one skips a layer, the others run through it."""
    expected = {
        number: replaced(
            gpt2.net, {f"transformer.h.{number}.mlp": lambda h: h * 2}, gpt2.ids
        ).result.logits
        for number in range(3)
    }
    wrong, start = [], threading.Barrier(8)

    def work(number):
        try:
            start.wait(60)
            for turn in range(6):
                which = (number + turn) % 4
                with gpt2.model.trace(gpt2.ids, alone=True) as tracer:
                    if which < 3:
                        mlp = gpt2.model.transformer.h[which].mlp
                        mlp.skip(mlp.input * 2)
                    logits = tracer.result.logits.save()
                bitwise(logits, expected.get(which, gpt2.baseline))
        except BaseException as error:  # noqa: BLE001 (told to the main thread)
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not [m for m in gpt2.net.modules() if "forward" in vars(m)]


def test_a_saved_experiment_skips_on_other_inputs(gpt2, tmp_path):
    with gpt2.model.trace(gpt2.ids) as tracer:
        gpt2.model.transformer.h[1].skip(gpt2.model.transformer.h[1].input)
        gpt2.model.lm_head.output.save("logits")
    tracer.graph.save(tmp_path / "skip.weft")
    shown = str(tracer.graph)
    assert "skip transformer.h.1 = %" in shown
    other = torch.tensor([[5, 6, 7]])
    again = weft.Experiment.load(tmp_path / "skip.weft").run(gpt2.model, other)
    expected = replaced(gpt2.net, {"transformer.h.1": lambda h, *_, **__: h}, other)
    bitwise(again["logits"], expected.result.logits)


def test_a_look_before_and_a_branch(gpt2):
    with gpt2.model.trace(gpt2.ids) as tracer:
        mlp = gpt2.model.transformer.h[1].mlp
        if mlp.input.abs().max() > 0:
            mlp.skip(mlp.input)
        logits = tracer.result.logits.save()
    expected = replaced(gpt2.net, {"transformer.h.1.mlp": lambda h: h}, gpt2.ids)
    bitwise(logits, expected.result.logits)


# -- refusals --------------------------------------------------------------------------------------


def _after_skip(model, use):
    layer = model.transformer.h[1]
    layer.skip(layer.input)
    use(layer)


def _set_inner(layer):
    layer.mlp.output = layer.input


def _edit_inner(layer):
    layer.mlp.output[:] = 0


@pytest.mark.parametrize(
    "use", [lambda layer: layer.mlp.output, lambda layer: layer.ln_1.input, _set_inner, _edit_inner]
)
def test_an_inner_site_is_refused_at_its_line(model, ids, use):
    with pytest.raises(NotReachedError) as caught, model.trace(ids):
        _after_skip(model, use)
    assert "transformer.h.1 is skipped, at" in caught.value.message
    assert "layer.skip(layer.input)" in caught.value.message
    assert "use(layer)" not in caught.value.line or "layer" in caught.value.line


def _inner_first(h):
    h[1].mlp.output.save()
    h[1].skip(h[1].input)


def _output_first(h):
    h[1].output.save()
    h[1].skip(h[1].input)


def _edited_first(h):
    h[1].output[:] = 0
    h[1].skip(h[1].input)


def _twice(h):
    h[1].skip(h[1].input)
    h[1].skip(h[1].input)


def _inner_skip_first(h):
    h[1].mlp.skip(h[1].mlp.input)
    h[1].skip(h[1].input)


def _inner_skip_later(h):
    h[1].skip(h[1].input)
    h[1].mlp.skip(h[0].mlp.output)


def _later_value(h):
    h[1].skip(h[2].input)


def _inner_value(h):
    h[1].skip(h[1].mlp.output)


def _seen_later(h):
    if h[2].output.sum() > 1e9:
        return
    h[1].skip(h[1].input)


def _wrong_shape(h):
    h[1].skip(h[1].input[:, :2])


def _wrong_structure(h):
    h[1].skip((h[1].input,))


def _no_tensor(h):
    h[1].skip(3)


def _integers(h):
    h[1].skip(h[1].input.long())


REFUSED = {
    "inner first": (_inner_first, RecordingError, "skipped after transformer.h.1.mlp.output"),
    "output first": (_output_first, RecordingError, "skipped after transformer.h.1.output"),
    "edited first": (_edited_first, RecordingError, "skipped after transformer.h.1.output"),
    "twice": (_twice, RecordingError, "skipped twice"),
    "inner skip first": (_inner_skip_first, RecordingError, "transformer.h.1.mlp"),
    "inner skip later": (_inner_skip_later, NotReachedError, "transformer.h.1 is skipped"),
    "later value": (_later_value, LateEditError, "only after it has begun"),
    "inner value": (_inner_value, (LateEditError, RecordingError), "transformer.h.1"),
    "looked at": (_seen_later, LateEditError, "looked at that comes later"),
    "wrong shape": (_wrong_shape, WriteMismatchError, "float32\\[1, 9, 32\\]"),
    "wrong structure": (_wrong_structure, WriteMismatchError, "a structure with \\[0\\]"),
    "no tensor": (_no_tensor, WriteMismatchError, "a int"),
    "integers": (_integers, WriteMismatchError, "int64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_skipped_is_refused_at_its_line(model, ids, name):
    use, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text) as caught, model.trace(ids):
        use(model.transformer.h)
    assert isinstance(caught.value, WeftError)
    assert caught.value.line is not None and "test_skip.py" in caught.value.line
    assert "skip(" in caught.value.line
    assert caught.value.fix


def test_a_cache_cannot_be_made(gpt2):
    match, ids = "DynamicCache, which a block cannot make", gpt2.ids
    with pytest.raises(RecordingError, match=match), gpt2.model.trace(ids, use_cache=True):
        gpt2.model.transformer.skip({"last_hidden_state": torch.zeros(1, 9, 32)})


def test_outside_a_block(model):
    with pytest.raises(OutsideTraceError, match=r"transformer\.skip was used in no block"):
        model.transformer.skip(torch.ones(1))


def test_outside_all_invokes(gpt2):
    with pytest.raises(OutsideTraceError), gpt2.model.trace() as tracer:
        with tracer.invoke(gpt2.ids):
            h = gpt2.model.transformer.h[1].input
        gpt2.model.transformer.h[1].skip(h)


def test_a_graph_for_another_model_is_refused(gpt2, llama):
    with gpt2.model.trace(gpt2.ids) as tracer:
        gpt2.model.transformer.h[1].skip(gpt2.model.transformer.h[1].input)
        gpt2.model.lm_head.output.save("x")
    with pytest.raises(GraphError, match=r"transformer\.h\.1"):
        tracer.graph.run(llama.model, llama.ids)
