"""What shares a tensor with what: edits in place reach all of it, assignments only their port."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.language.hooks import with_hooks
from weft.errors import ReadOnlyError
from weft.testing.same import bitwise, moves


def zero(x):
    x[:] = 0


def test_an_edit_of_gpt2s_norm_input_also_changes_the_residual(model, net, ids, gpt2):
    """`ln_1.input` and what is added after attention are the same tensor."""
    with model.trace(ids):
        model.transformer.h[1].ln_1.input[:] = 0
        edited = model.lm_head.output.save()
    with model.trace(ids):
        model.transformer.h[1].ln_1.input = 0 * model.transformer.h[1].ln_1.input
        assigned = model.lm_head.output.save()
    key = "transformer.h.1.ln_1.input"
    bitwise(edited, with_hooks(net, {key: zero}, ids).result.logits)
    bitwise(assigned, with_hooks(net, {key: lambda x: 0 * x}, ids).result.logits)
    moves(edited, assigned)
    moves(edited, gpt2.baseline)


def test_the_output_of_a_layer_is_the_input_of_the_next(subject):
    first, second = subject.layer_list[0], subject.layer_list[1]
    with subject.model.trace(subject.ids) as tracer:
        first.output[:, -1] *= 3
        read = second.input.save()
        logits = tracer.result.logits.save()

    def edit(h):
        h[:, -1] *= 3

    keys = [f"{subject.paths.layer(0)}.output", f"{subject.paths.layer(1)}.input"]
    seen = with_hooks(subject.net, {keys[0]: edit, keys[1]: None}, subject.ids)
    bitwise([read, logits], [seen[keys[1]], seen.result.logits])


@pytest.mark.parametrize("edits", [1, 2], ids=["one handle", "two handles"])
def test_an_edit_never_changes_what_an_earlier_site_gave(subject, edits):
    """Two sites, one storage: the save at the first keeps its value, in either order of lines."""
    first, second = subject.layer_list[0], subject.layer_list[1]
    key = f"{subject.paths.layer(0)}.output"
    expected = with_hooks(subject.net, {key: None}, subject.ids)[key]
    with subject.model.trace(subject.ids) as tracer:
        above = first.output.save()
        kept = second.input.save()
        for _ in range(edits):
            second.input[:] = 0
        below = first.output.save()
        sliced = first.output[:, -1].save()
        computed = (first.output * 2).save()
        tracer.result.logits.save()
    bitwise([above, below, sliced, computed], [expected, expected, expected[:, -1], expected * 2])
    bitwise(kept, expected)


@pytest.mark.parametrize("edits", [1, 2], ids=["one handle", "two handles"])
def test_a_value_of_an_earlier_site_used_after_a_later_edit_of_its_storage(model, net, ids, edits):
    """`h0` is read at layer 0, its tensor is edited at layer 1's input, then h0 is used at 2."""
    with model.trace(ids):
        h0 = model.transformer.h[0].output
        for _ in range(edits):
            model.transformer.h[1].input[:] = 0
        model.transformer.h[2].output = h0
        logits = model.lm_head.output.save()
    kept = []
    hooks = {
        "transformer.h.0.output": lambda h: kept.append(h.clone()),
        "transformer.h.1.input": zero,
        "transformer.h.2.output": lambda h: kept[0],
    }
    bitwise(logits, with_hooks(net, hooks, ids).result.logits)


H0, H1, H2 = (f"transformer.h.{i}.output" for i in range(3))


def test_a_value_written_to_two_sites_is_two_tensors(model, net, ids):
    with model.trace(ids):
        value = model.transformer.h[0].output * 2
        model.transformer.h[1].output = value
        model.transformer.h[2].output = value
        model.transformer.h[1].output[:] = 0
        after = model.transformer.h[2].output.save()
        mine = value.save()
        logits = model.lm_head.output.save()
    kept = []
    hooks = {H0: lambda h: kept.append(h * 2), H1: torch.zeros_like, H2: lambda h: kept[0].clone()}
    seen = with_hooks(net, hooks, ids)
    bitwise([after, mine, logits], [kept[0], kept[0], seen.result.logits])


def test_a_value_written_to_two_sites_that_the_model_adds_to(v):
    """What the model gets is its own: it adds to it in place, and the second site does not see."""
    net = Adds()
    model = weft.Model(net)
    with model.trace(X):
        value = model.first.input * 2
        model.first.output = value
        model.last.output = value
        mine = value.save()
        read = model.first.output.save()
        out = model.output.save()
    bitwise([mine, read, out], [X * 2, X * 2, X * 2 + 1])


class Adds(nn.Module):
    """Changes in place what its parts give."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Identity(), nn.Identity()

    def forward(self, x):
        h = self.first(x + 0)
        h += 1
        h = self.last(h)
        h += 1
        return h


def test_an_edit_of_a_written_value_does_not_follow_it_into_the_site(model, net, ids):
    with model.trace(ids):
        value = model.transformer.h[0].output * 2
        model.transformer.h[1].output = value
        value.zero_()
        after = model.transformer.h[1].output.save()
        zeros = value.save()
        logits = model.lm_head.output.save()
    kept = []
    hooks = {H0: lambda h: kept.append(h * 2), H1: lambda h: kept[0].clone()}
    seen = with_hooks(net, hooks, ids)
    bitwise([after, logits], [kept[0], seen.result.logits])
    assert not zeros.any()


def test_an_edit_of_a_site_does_not_change_the_value_that_was_written_to_it(model, net, ids):
    with model.trace(ids):
        value = model.transformer.h[0].output * 2
        model.transformer.h[1].output = value
        model.transformer.h[1].output[:, 0] = 0
        mine = value.save()
        logits = model.lm_head.output.save()
    kept = []

    def edit(h):
        h = kept[0].clone()
        h[:, 0] = 0
        return h

    seen = with_hooks(net, {H0: lambda h: kept.append(h * 2), H1: edit}, ids)
    bitwise([mine, logits], [kept[0], seen.result.logits])


def test_an_edit_of_a_written_value_at_the_moment_of_writing(model, net, ids):
    with model.trace(ids):
        value = model.transformer.h[1].input * 2
        model.transformer.h[1].output = value
        value -= model.transformer.h[1].output
        zeros = value.save()
        logits = model.lm_head.output.save()
    kept = []
    hooks = {
        "transformer.h.1.input": lambda h: kept.append(h * 2),
        H1: lambda h: kept[0].clone(),
    }
    bitwise(logits, with_hooks(net, hooks, ids).result.logits)
    assert not zeros.any()


def test_a_constant_written_to_a_site_is_not_the_users_tensor(v):
    net, constant = Adds(), torch.ones(2, 3)
    model = weft.Model(net)
    with model.trace(X):
        model.first.output = constant
        out = model.output.save()
    bitwise([constant, out], [torch.ones(2, 3), torch.ones(2, 3) + 2])


class Shares(nn.Module):
    """`twin` and `same` get and give the same tensor; `flat` a view of it."""

    def __init__(self):
        super().__init__()
        self.make, self.same, self.twin, self.flat = (nn.Identity() for _ in range(4))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        h = self.make(x * 2)
        same = self.same(h)
        flat = self.flat(h.view(-1))
        return self.twin(h) + same, flat, h


X = torch.arange(1.0, 7).reshape(2, 3)


@pytest.mark.parametrize("path", ["make", "same", "twin", "flat"])
@pytest.mark.parametrize("port", ["input", "output"])
def test_an_edit_in_place_is_seen_by_all_that_shares_the_tensor(path, port):
    net = Shares()
    model = weft.Model(net)
    with model.trace(X) as tracer:
        site = model.get(path)
        (site.input if port == "input" else site.output)[-1:] = 7
        result = [part.save() for part in tracer.result]

    def edit(x):
        x[-1:] = 7

    bitwise(result, list(with_hooks(net, {f"{path}.{port}": edit}, X).result))


@pytest.mark.parametrize("path", ["make", "same", "twin", "flat"])
@pytest.mark.parametrize("port", ["input", "output"])
def test_an_assignment_is_seen_at_its_port_alone(path, port):
    net = Shares()
    model = weft.Model(net)
    with model.trace(X) as tracer:
        site = model.get(path)
        setattr(site, port, getattr(site, port) * 5)
        result = [part.save() for part in tracer.result]
    bitwise(result, list(with_hooks(net, {f"{path}.{port}": lambda x: x * 5}, X).result))


def test_edits_of_two_sites_on_one_tensor_both_act():
    net = Shares()
    model = weft.Model(net)
    with model.trace(X) as tracer:
        model.twin.input[0] += 1
        model.make.output[:] *= 10
        model.same.output[1] -= 3
        between = model.flat.input.save()
        result = [part.save() for part in tracer.result]

    def times(x):
        x *= 10

    def minus(x):
        x[1] -= 3

    def plus(x):
        x[0] += 1

    hooks = {
        "make.output": times,
        "same.output": minus,
        "flat.input": None,
        "twin.input": plus,
    }
    seen = with_hooks(net, hooks, X)
    bitwise([between, result], [seen["flat.input"], list(seen.result)])


def test_a_weight_that_a_module_hands_out_is_not_changed():
    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.inner = Inner(self.weight)

        def forward(self, x):
            return x * self.inner()

    class Inner(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self):
            return self.weight

    net = Gives()
    model = weft.Model(net)
    with pytest.raises(ReadOnlyError, match=r"inner\.output"), model.trace(X):
        model.inner.output[:] = 5
        model.output.save()
    with model.trace(X):
        model.inner.output = model.inner.output * 5
        model.inner.output[0] += 1
        got = model.output.save()
    assert (net.weight == 1).all()
    bitwise(got, X * torch.tensor([6.0, 5.0, 5.0]))


def test_a_list_of_edits_leaves_the_weights_and_the_input_alone(subject):
    before = {name: p.clone() for name, p in subject.net.state_dict().items()}
    with subject.model.trace(subject.ids) as tracer:
        subject.model.get(subject.paths.embedding).output[:] = 1
        subject.model.get(subject.paths.norm).output[:] = 1
        subject.model.lm_head.input[:] *= 2
        tracer.result.logits.save()
    after = subject.net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
