"""A model after each job is what it was before, whether it is walked through anew or not."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

from weft.engine.kept import Kept, SpoiltError


class Notes(nn.Module):
    """Leaves all kinds of traces: an attribute, a buffer bound anew, one changed in place."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.longest = 0
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.longest = max(self.longest, len(x))
        self.scale = torch.full((2,), float(self.longest))
        self.count += 1
        self.seen = x * 2
        return self.inner(x) * self.scale


def told(net):
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return state, net.longest, id(net.scale), id(net.count), "seen" in vars(net)


@pytest.fixture(params=[False, True], ids=["walked each time", "stays"])
def kept(request):
    net = Notes()
    found = Kept.of(net)
    found.stays = request.param
    return net, found


def same(one, other):
    assert one[1:] == other[1:]
    assert all(torch.equal(one[0][name], tensor) for name, tensor in other[0].items())


def test_every_job_meets_the_same_model(kept):
    net, found = kept
    before, results = told(net), []
    for length in (5, 3, 5):
        with found.job(net), torch.no_grad():
            results.append(net(torch.ones(length, 2)))
        same(told(net), before)
    assert torch.equal(results[0], results[2])


def test_what_its_owner_changes_between_jobs_stays(kept):
    net, found = kept
    with found.job(net), torch.no_grad():
        net(torch.ones(4, 2))
    net.more = nn.Linear(2, 2)
    net.longest = 2
    net.scale = torch.zeros(2)
    before = told(net)
    with found.job(net), torch.no_grad():
        net(torch.ones(4, 2))
    same(told(net), before)
    assert isinstance(net.more, nn.Linear)


@pytest.mark.parametrize("change", ["renamed", "gone", "exchanged", "equal"])
def test_what_stands_under_a_name_is_the_very_same_object(kept, change):
    net, found = kept
    net.last = [1.5]
    for _ in range(2):
        was = net.last
        with found.job(net):
            if change == "equal":
                net.last = [1.5]
            elif change == "exchanged":
                net.last, net.longest = net.longest, net.last
            else:
                del net.last
                if change == "renamed":
                    net.final = was  # the last of as many, and the same object
        assert net.last is was and net.longest == 0


def test_a_changed_weight_is_told(kept):
    net, found = kept
    for _ in range(2):
        with found.job(net), torch.no_grad():
            net(torch.ones(1, 2))
    with pytest.raises(SpoiltError), found.job(net), torch.no_grad():
        net.inner.weight.add_(1)


def test_a_failing_job_leaves_nothing_either(kept):
    net, found = kept
    before = told(net)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), found.job(net), torch.no_grad():
            net(torch.ones(7, 2))
            _ = 1 / 0
        same(told(net), before)


def test_nothing_of_a_model_that_does_not_stay_is_held():
    net = copy.deepcopy(Notes())
    with Kept.of(net).job(net), torch.no_grad():
        net(torch.ones(1, 2))
    weight = weakref.ref(net.inner)
    del net
    assert weight() is None
