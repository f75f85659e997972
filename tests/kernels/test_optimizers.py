"""A step of an optimiser as an operation is the step that `torch.optim` takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weft.errors import GraphError
from weft.graph.ops import OPS
from weft.kernels.execute import call
from weft.kernels.optimizers import HOW, OPTIMIZERS, layout, options_of
from weft.testing.same import bitwise

CASES: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{}, {"lambd": 0.1, "t0": 1.0}],
    "Adadelta": [{}, {"rho": 0.5, "maximize": True}],
    "Adagrad": [{}, {"initial_accumulator_value": 0.5, "lr_decay": 0.1}],
    "Adam": [{}, {"amsgrad": True, "betas": (0.5, 0.9)}, {"decoupled_weight_decay": True}],
    "AdamW": [{}, {"lr": 0.1, "weight_decay": 0.3, "amsgrad": True}],
    "Adamax": [{}, {"eps": 0.1}],
    "NAdam": [{}, {"momentum_decay": 0.1}],
    "RAdam": [{}, {"weight_decay": 0.1}],
    "RMSprop": [{}, {"momentum": 0.5, "centered": True}],
    "Rprop": [{}, {"step_sizes": (1e-3, 1.0)}],
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
}
ALL = [(name, options) for name, each in CASES.items() for options in each]


def test_every_class_of_the_table_is_tried() -> None:
    assert set(CASES) == OPTIMIZERS == {name[6:] for name in OPS if name.startswith("optim.")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), ALL, ids=lambda value: str(value))
def test_steps_are_those_of_the_class(name: str, options: dict, dtype: torch.dtype) -> None:
    """Seven steps of two parameters, to the bit; nothing that is given is changed."""
    kind = getattr(torch.optim, name)
    torch.manual_seed(0)
    mine = [torch.randn(3, 4, dtype=dtype), torch.randn((), dtype=dtype)]
    states: list[list[torch.Tensor]] = [[], []]
    theirs = [one.clone() for one in mine]
    optimizer = kind(theirs, **options)
    for _ in range(7):
        grads = [torch.randn_like(one) for one in mine]
        given = [*mine, *grads, *states[0], *states[1]]
        before = [one.clone() for one in given]
        found = call(f"optim.{name}", (mine, grads, states), options)
        bitwise(given, before)
        for one, grad in zip(theirs, grads, strict=True):
            one.grad = grad.clone()
        optimizer.step()
        size = len(found) // 2
        mine, states = [found[0], found[size]], [found[1:size], found[size + 1 :]]
        bitwise(mine, theirs)
        for state, one in zip(states, theirs, strict=True):
            bitwise(state, [*optimizer.state[one].values()])


def test_a_state_from_elsewhere_is_gone_on_with() -> None:
    """What an optimiser has done by hand before."""
    p, q = torch.randn(4), torch.randn(4)
    q.copy_(p)
    hand = torch.optim.Adam([p], lr=0.1)
    p.grad = torch.ones(4)
    hand.step()
    state = [*hand.state[p].values()]
    found = call("optim.Adam", ([p], [p.grad], [state]), {"lr": 0.1})
    hand.step()
    bitwise(found[0], p)


def test_a_step_cannot_be_told_how() -> None:
    for name in OPTIMIZERS:
        assert not options_of(getattr(torch.optim, name)) & HOW


P, G = torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        (([P], [G], [[]]), {"fused": True}, "no option 'fused'"),
        (([P], [G], [[]]), {"lr": P}, "numbers"),
        (([P], [G], [[]]), {"lr": "fast"}, "numbers"),
        (([P], [G], []), {}, "one gradient and one state"),
        (([], [], []), {}, "one gradient and one state"),
        ((P, G, [[]]), {}, "takes lists"),
        (([P], [G], P), {}, "takes lists"),
        (([P], [torch.ones(4)], [[]]), {}, "like its parameter"),
        (([P.long()], [G.long()], [[]]), {}, "floating"),
        (([P], [3], [[]]), {}, "are tensors"),
        (([P], [G], [[P, P, P]]), {}, "the state is not"),
        (([P], [G], [[torch.tensor(1.0), P]]), {}, "the state is not"),
    ],
)
def test_what_is_no_step_is_refused(args: Any, options: Any, says: str) -> None:
    with pytest.raises(GraphError, match=says):
        call("optim.Adam", args, options)


def test_the_state_is_known_before_there_is_one() -> None:
    names = [entry.name for entry in layout(torch.optim.Adam, torch.float32, {"amsgrad": True})]
    assert names == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert [entry.like for entry in layout(torch.optim.Adam, torch.float32, {})] == [
        False,
        True,
        True,
    ]
