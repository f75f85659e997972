"""`Model(net, batch_dim=)`: in which dimension of the inputs the rows of an empty invoke lie."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import weft
from tests.language.hooks import with_hooks
from weft.errors import InputError, RecordingError, UnknownOptionError, WeftError
from weft.testing.same import bitwise, bounded, moves


class Recurrent(nn.Module):
    """`[time, batch, 4]` to `[time, batch, 2]`, scaled by what is everybody's."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNN(4, 8), nn.Linear(8, 2)

    def forward(self, x, state=None, scale=None, mode="plain"):
        hidden = self.cell(x, None if state is None else state["h"])[0]
        out = self.head(hidden)
        return {"out": out if scale is None else out * scale, "mode": mode}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Recurrent().eval()


@pytest.fixture
def rows():
    torch.manual_seed(1)
    return torch.randn(5, 1, 4), torch.randn(5, 2, 4)


def test_rows_in_the_second_dimension(net, rows):
    model = weft.Model(net, batch_dim=1)
    with model.trace() as tracer:
        alone = []
        for one in rows:
            with tracer.invoke(one):
                alone.append(model.output["out"].save())
        with tracer.invoke():
            hidden = model.cell.output[0].save()
            whole = model.output["out"].save()
    seen = with_hooks(net, {"cell.output": None}, torch.cat(rows, 1))
    bitwise(alone, [with_hooks(net, {}, one).result["out"] for one in rows])
    bitwise([hidden, whole], [seen["cell.output"][0], seen.result["out"]])
    bounded(whole, torch.cat([torch.as_tensor(one) for one in alone], 1))


def test_states_in_a_dict_have_rows_and_a_scale_is_everybodys(net, rows):
    model, scale = weft.Model(net, batch_dim=1), torch.tensor([2.0, 3.0])
    states = [{"h": torch.randn(1, one.shape[1], 8)} for one in rows]
    with model.trace() as tracer:
        for one, state in zip(rows, states, strict=True):
            with tracer.invoke(one, state, scale=scale.clone(), mode="scaled"):
                pass
        with tracer.invoke():
            whole = model.output["out"].save()
    state = {"h": torch.cat([one["h"] for one in states], 1)}
    plain = with_hooks(net, {}, torch.cat(rows, 1), state, scale=scale).result["out"]
    bitwise(whole, plain)
    moves(whole, with_hooks(net, {}, torch.cat(rows, 1), scale=scale).result["out"])


def test_edits_of_the_others_are_shown_where_rows_come_first():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    model, x, y = weft.Model(net, batch_dim=0), torch.randn(2, 4), torch.randn(3, 4)
    with model.trace() as tracer:
        with tracer.invoke(x):
            pass
        with tracer.invoke(y):
            model[1].output[:, 3] = 5
        with tracer.invoke():
            whole = model.output.save()

    def edit(h):
        h[2:, 3] = 5

    bitwise(whole, with_hooks(net, {"1.output": edit}, torch.cat([x, y])).result)


def test_edits_of_the_others_are_refused_where_rows_do_not_come_first(net, rows):
    model = weft.Model(net, batch_dim=1)
    with pytest.raises(RecordingError) as caught, model.trace() as tracer:
        with tracer.invoke(rows[0]):
            model.head.output[:] = 0
        with tracer.invoke(rows[1]):
            pass
        with tracer.invoke():
            model.output["out"].save()
    assert "cannot be shown in the whole batch" in str(caught.value)


class Mean(nn.Module):
    """`[time, batch, 4]` to `[time, 2]`: a site without rows, whose first dimension is time."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x.mean(1))


def test_time_is_not_taken_for_rows_where_there_are_as_many():
    model = weft.Model(Mean(), batch_dim=1)
    with pytest.raises(RecordingError) as caught, model.trace() as tracer:
        with tracer.invoke(torch.randn(3, 3, 4)):
            model.head.output[:] = 0
        with tracer.invoke(torch.randn(3, 3, 4)):
            pass
        with tracer.invoke():
            model.output.save()
    assert "cannot be shown in the whole batch" in str(caught.value)


def test_gradients_of_invokes(net, rows):
    model = weft.Model(net, batch_dim=1)
    with model.trace() as tracer:
        grads = []
        for one in rows:
            with tracer.invoke(one):
                model.output["out"].square().sum().backward()
                grads.append(model.head.input.grad.save())
    for one, grad in zip(rows, grads, strict=True):
        hidden = net.cell(one)[0].detach().requires_grad_()
        (plain,) = torch.autograd.grad(net.head(hidden).square().sum(), hidden)
        bounded(grad, plain)


def test_without_a_batch_dimension_there_are_invokes_but_not_all_at_once(net, rows):
    model = weft.Model(net)
    with model.trace() as tracer:
        with tracer.invoke(rows[0]):
            first = model.cell.output[0]
        with tracer.invoke(rows[0]):
            model.cell.output[0][:] = first * 2
            out = model.output["out"].save()

    def doubled(output):
        output[0].mul_(2)

    bitwise(out, with_hooks(net, {"cell.output": doubled}, rows[0]).result["out"])
    with pytest.raises(InputError) as caught, model.trace() as tracer:
        with tracer.invoke(rows[0]):
            pass
        with tracer.invoke():
            pass
    text = str(caught.value)
    assert re.search(r"test_batch_dim\.py:\d+: with tracer\.invoke\(\)", text)
    assert "weft.Model(net, batch_dim=0)" in text


class Holder:
    """An object of one's own, in which rows may lie."""


HOLDER = Holder()
UNLIKE = {
    "scale": ({"scale": torch.ones(2)}, {"scale": torch.full((2,), 2.0)}),
    "mode": ({"mode": "a"}, {"mode": "b"}),
    "their keywords": ({"mode": "a"}, {}),
    "the keywords of state": ({"state": {"h": None}}, {"state": {}}),
    "state": ({"state": {"h": None}}, {"state": None}),
    "mode ": ({"mode": HOLDER}, {"mode": HOLDER}),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_what_is_no_batch_together_is_refused(what):
    from weft.families.any_module import prepare_any
    from weft.families.together import plain_together

    calls = [prepare_any((torch.ones(5, 1, 4),), kwargs, 1) for kwargs in UNLIKE[what]]
    with pytest.raises(InputError, match=f"they differ in {what.strip()}$|{what.strip()}\n"):
        plain_together(calls, 1)


def test_inputs_without_the_dimension_are_refused():
    from weft.families.any_module import prepare_any
    from weft.families.together import plain_together

    for args in ((torch.ones(3),), (2,)):
        with pytest.raises(InputError, match="dimension 1 of their first tensors"):
            plain_together([prepare_any(args, {}, 1)] * 2, 1)


@pytest.mark.parametrize("wrong", [-1, True, "batch", 0.0])
def test_what_is_no_dimension_is_refused(wrong, net):
    with pytest.raises(
        UnknownOptionError, match="batch_dim is the number of a dimension"
    ) as caught:
        weft.Model(net, batch_dim=wrong)
    assert isinstance(caught.value, WeftError)
