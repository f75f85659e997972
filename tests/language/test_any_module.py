"""`Model`: any module with tensor inputs, whatever it takes and gives."""

from __future__ import annotations

import dataclasses
from collections import namedtuple

import pytest
import torch
from torch import nn

import weft
from tests.language.hooks import hook_count, with_hooks
from weft.errors import InputError, NotReachedError, RecordingError, WeftError
from weft.testing.same import bitwise

X = torch.arange(1.0, 9).reshape(2, 4)


class Calls(nn.Module):
    """`function(self, *args, **kwargs)` as a forward, over children."""

    def __init__(self, function, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def test_a_sequential_is_read_and_edited(mlp):
    model = weft.Model(mlp)
    with model.trace(X):
        hidden = model[1].output.save()
        model[1].output[:, 3] = 5
        out = model.output.save()
        last = model[-1].output.save()

    def edit(h):
        h[:, 3] = 5

    plain = with_hooks(mlp, {"1.output": None}, X)["1.output"]
    expected = with_hooks(mlp, {"1.output": edit}, X).result
    bitwise([hidden, out, last], [plain, expected, expected])
    assert len(model) == 3 and hook_count(mlp) == 0


def test_a_path_with_numbers_is_reached_by_text(mlp):
    model = weft.Model(mlp)
    assert model["1"] is model[1] is model.get("1")


def test_tensors_by_position_and_by_keyword():
    net = Calls(lambda self, a, b, *, c: self.inner(a + b) * c, inner=nn.Identity())
    model = weft.Model(net)
    with model.trace(X, b=X * 2, c=torch.tensor(3.0)):
        args, kwargs = model.inputs
        first, second, third = args[0].save(), kwargs["b"].save(), kwargs["c"].save()
        model.inputs[1]["b"] = kwargs["b"] * 10
        out = model.output.save()
    bitwise([first, second, third, out], [X, X * 2, torch.tensor(3.0), (X + X * 20) * 3])


def test_edits_in_place_do_not_reach_the_users_tensors():
    net = Calls(lambda self, a, b: self.inner(a, b), inner=Calls(lambda self, a, b: a + b))
    model, a, b = weft.Model(net), X.clone(), X.clone()
    with model.trace(a, b=b):
        args, _ = model.inner.inputs
        args[0][:] = 5
        args[1].mul_(0)
        out = model.output.save()
    bitwise([a, b, out], [X, X, torch.full_like(X, 5)])


def test_numbers_none_and_text_are_options_of_the_forward():
    def forward(self, x, scale=1.0, mode=None):
        return self.inner(x) * scale if mode == "scaled" else self.inner(x)

    model = weft.Model(Calls(forward, inner=nn.Identity()))
    with model.trace(X, 2.0, mode="scaled"):
        out = model.output.save()
    bitwise(out, X * 2)
    with model.trace(X, 2.0):
        out = model.output.save()
    bitwise(out, X)


Named = namedtuple("Named", "low high")


@dataclasses.dataclass
class Record:
    low: torch.Tensor
    high: torch.Tensor
    name: str = "r"


RESULTS = {
    "tuple": (lambda x: (x, x + 1), lambda out: (out[0], out[1])),
    "list": (lambda x: [x, x + 1], lambda out: (out[0], out[1])),
    "dict": (lambda x: {"a": x, "b": x + 1}, lambda out: (out["a"], out["b"])),
    "named tuple": (lambda x: Named(x, x + 1), lambda out: (out.low, out.high)),
    "dataclass": (lambda x: Record(x, x + 1), lambda out: (out.low, out.high)),
    "nested": (lambda x: {"a": [x, (x + 1, 3)]}, lambda out: (out["a"][0], out["a"][1][0])),
    "topk": (lambda x: torch.topk(x, 2), lambda out: (out.values, out.indices)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_every_structure(name):
    make, parts = RESULTS[name]
    net = Calls(lambda self, x: make(self.inner(x)), inner=nn.Identity())
    model = weft.Model(net)
    with model.trace(X):
        assert isinstance(model.output, type(make(X)))
        first, _ = parts(model.output)
        first[0] = 0
        got = [part.save() for part in parts(model.output)]
    expected = list(parts(make(X.clone())))
    expected[0][0] = 0
    bitwise(got, expected)


# A module that is called several times, never, or stands in several places


def twice(self, x):
    return self.inner(self.inner(x) + 1)


def test_a_module_called_twice_has_numbered_calls():
    torch.manual_seed(0)
    net = Calls(twice, inner=nn.Linear(4, 4))
    model = weft.Model(net)
    with model.trace(X):
        assert len(model.inner.calls) == 2
        first = model.inner.calls[0].output.save()
        into = model.inner.calls[1].input.save()
        model.inner.calls[1].output[:, 0] = 9
        last = model.inner.calls[-1].output.save()
        out = model.output.save()
    with torch.no_grad():
        one = net.inner(X)
        two = net.inner(one + 1)
    bitwise([first, into], [one, one + 1])
    two[:, 0] = 9
    bitwise([last, out], [two, two])


def test_an_edit_of_one_call_is_not_one_of_the_other():
    torch.manual_seed(0)
    net = Calls(twice, inner=nn.Linear(4, 4))
    model = weft.Model(net)
    with model.trace(X):
        model.inner.calls[0].output = model.inner.calls[0].output * 0
        out = model.output.save()
    with torch.no_grad():
        bitwise(out, net.inner(torch.ones(2, 4)))


def test_without_a_number_a_module_called_twice_is_ambiguous():
    model = weft.Model(Calls(twice, inner=nn.Linear(4, 4)))
    with pytest.raises(RecordingError, match="2 times") as caught, model.trace(X):
        model.inner.output
    assert ".calls[0]" in str(caught.value.fix)
    with pytest.raises(IndexError, match="2 times"), model.trace(X):
        model.inner.calls[2]


def test_a_late_edit_between_calls_is_refused():
    model = weft.Model(Calls(twice, inner=nn.Linear(4, 4)))
    with pytest.raises(WeftError), model.trace(X):
        model.inner.calls[0].output = model.inner.calls[1].output


def test_a_module_that_is_never_called_says_so():
    model = weft.Model(Calls(lambda self, x: x, idle=nn.Linear(4, 4)))
    with pytest.raises(NotReachedError, match="never called"), model.trace(X):
        model.idle.output
    with model.trace(X):
        got = model.idle(model.input).save()  # applying it is something else
    assert got.shape == (2, 4)


def test_a_module_in_two_places_is_one_module():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    net = Calls(lambda self, x: self.b(self.a(x) + 1), a=shared, b=shared)
    model = weft.Model(net)
    with model.trace(X):
        first, second = model.a.calls[0].output.save(), model.b.calls[1].output.save()
    with torch.no_grad():
        bitwise([first, second], [shared(X), shared(shared(X) + 1)])


def test_a_shared_module_called_through_one_name_is_read_through_the_other():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    net = Calls(lambda self, x: self.b(x), a=shared, b=shared)
    model = weft.Model(net)
    with model.trace(X):
        by_a, by_b = model.a.output.save(), model.b.output.save()
    bitwise(by_a, by_b)


# Habits of modules


def test_a_module_in_training_mode_draws_as_it_would_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model = weft.Model(net)
    torch.manual_seed(3)
    with model.trace(X):
        out = model.output.save()
    torch.manual_seed(3)
    with torch.no_grad():
        bitwise(out, net(X))


def test_buffers_change_as_they_would_alone():
    one, two = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    with weft.Model(one).trace(X) as tracer:
        tracer.result.save()
    two(X)
    bitwise(one.running_mean, two.running_mean)
    assert int(one.num_batches_tracked) == int(two.num_batches_tracked) == 1


def test_a_forward_that_branches_on_values():
    net = Calls(lambda self, x: self.big(x) if x.sum() > 0 else self.small(x),
                big=nn.Identity(), small=nn.Identity())  # fmt: skip
    model = weft.Model(net)
    with model.trace(X):
        got = model.big.output.save()
    bitwise(got, X)
    with pytest.raises(NotReachedError), model.trace(X):
        model.small.output
    with model.trace(-X):
        got = model.small.output.save()
    bitwise(got, -X)


def test_the_users_own_hooks_stay_and_act_first(mlp):
    mine = mlp[1].register_forward_hook(lambda module, args, output: output * 2)
    try:
        model = weft.Model(mlp)
        with model.trace(X):
            got = model[1].output.save()
        assert hook_count(mlp) == 1
        bitwise(got, with_hooks(mlp, {"1.output": None}, X)["1.output"])
    finally:
        mine.remove()


def test_gradients_are_off_in_a_run_and_as_before_after_it(mlp):
    model = weft.Model(mlp)
    with model.trace(X.clone().requires_grad_()):
        got = model.output.save()
    assert not got.requires_grad and torch.is_grad_enabled()
    mlp(X).sum().backward()
    assert mlp[0].weight.grad is not None


def test_a_run_inside_no_grad_and_inference_mode(mlp):
    model = weft.Model(mlp)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, model.trace(X):
            model[1].output[:, 0] = 1
            got = model.output.save()

    def edit(h):
        h[:, 0] = 1

    bitwise(got.clone(), with_hooks(mlp, {"1.output": edit}, X).result)


def test_what_is_no_module_is_refused():
    with pytest.raises(InputError, match="Module"):
        weft.Model("gpt2")


def test_convolutions_and_images():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    model, image = weft.Model(net), torch.randn(2, 3, 8, 8)
    with model.trace(image):
        channels = model[0].output.mean((0, 2, 3)).save()
        model[0].output[:, 1] = 0
        out = model.output.save()

    def edit(h):
        h[:, 1] = 0

    plain = with_hooks(net, {"0.output": None}, image)["0.output"]
    bitwise(channels, plain.mean((0, 2, 3)))
    bitwise(out, with_hooks(net, {"0.output": edit}, image).result)


@pytest.mark.parametrize("edited", [False, True])
def test_a_call_that_the_fake_pass_did_not_make_is_another_site(edited):
    """What a module keeps to itself may decide how often it calls another."""
    turns = [1]

    def forward(self, x):
        for _ in range(turns[0]):
            x = self.inner(x + 1)
        return x

    net = Calls(forward, inner=nn.Linear(4, 4))
    model = weft.Model(net)
    with model.trace(X):
        model.inner.output.save()
    turns[0] = 2
    with model.trace(X), torch.no_grad():
        if edited:
            model.inner.output[:] = 0
        first, last = model.inner.output.save(), model.output.save()
    with torch.no_grad():
        expected = torch.zeros(2, 4) if edited else net.inner(X + 1)
        bitwise(first, expected)
        bitwise(last, net.inner(expected + 1))
