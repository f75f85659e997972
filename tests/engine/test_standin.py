"""Cards that are none: refused with a reason, or harmless; nothing of a card is ever run."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from tests.engine.served import told
from weft.engine.publish import know
from weft.engine.standin import StandIn, known_of, skeleton_of
from weft.errors import GraphError, MessageError
from weft.wire.messages import ModelCard, ModuleCard, TensorCard


def card(*modules: ModuleCard) -> ModelCard:
    return msgspec.structs.replace(told(know(nn.Linear(2, 2))), modules=modules)


def module(path: str, **fields: Any) -> ModuleCard:
    return ModuleCard(path=path, **({"kind": "Linear"} | fields))


def weight(**fields: Any) -> TensorCard:
    return TensorCard(**({"name": "w", "dtype": "float32", "shape": (2,)} | fields))


ROOT = module("")
ODD = {
    "no module": (),
    "no root": (module("a"),),
    "an orphan": (ROOT, module("a.b")),
    "twice": (ROOT, module("a"), module("a")),
    "a child before its parent": (module("a"), ROOT),
    "an empty name": (ROOT, module("a"), module("a.")),
    "another that is not there": (ROOT, module("a", of="b")),
    "itself": (ROOT, module("a", of="a")),
    "a weight twice": (module("", parameters=(weight(), weight())),),
    "a weight with a dot": (module("", parameters=(weight(name="a.b"),)),),
    "a weight without a name": (module("", parameters=(weight(name=""),)),),
    "a weight that is another": (module("", parameters=(weight(of="v"),)),),
    "a dtype of none": (module("", parameters=(weight(dtype="load"),)),),
    "a shape below zero": (module("", parameters=(weight(shape=(-1,)),)),),
    "a shape beyond all": (module("", parameters=(weight(shape=(2**62, 2**62)),)),),
}


@pytest.mark.parametrize("name", ODD)
def test_a_card_of_no_tree_is_refused(name):
    with pytest.raises(MessageError, match="card"):
        skeleton_of(card(*ODD[name]))


def test_names_in_a_card_are_only_names():
    odd = {"__class__": 1, "forward": 2, "register_forward_hook": 3, "a b": 4, "heads": 5}
    net = skeleton_of(card(module("", kind="os; import sys", plain=odd, rule="exec")))
    assert isinstance(net, StandIn)
    assert type(net).__name__ == "Module"
    assert net.heads == 5
    assert "a b" not in vars(net)
    assert "__class__" not in vars(net)
    assert callable(net.forward) and callable(net.register_forward_hook)
    assert net.weft_rule is None


def test_details_cannot_act_on_a_terminal():
    net = skeleton_of(card(module("", details="\x1b[2Jeps=1\n")))
    assert repr(net).isprintable()


def test_tables_of_a_server_that_are_none_are_refused():
    told_of = told(know(nn.Linear(2, 2)))
    for data in (b"x", b"\x80\x05N.", b"\x28\xb5\x2f\xfd" + b"\0" * 40):
        with pytest.raises(GraphError):
            known_of(told_of, data, None)  # type: ignore[arg-type]


def test_tied_weights_are_one_tensor():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    stand_in: Any = skeleton_of(told(know(net)))
    assert stand_in["a"].weight is stand_in["b"].weight
    assert stand_in["a"].bias is not stand_in["b"].bias
    assert isinstance(stand_in["a"].weight, nn.Parameter)
    assert not isinstance(torch.empty(0), nn.Parameter)
