"""The table of layers that returned tuples in transformers 4, against the models as they run
today."""

import pytest
import torch
from torch import nn

from tests.families import zoo
from weft.families.names import RETURNED_TUPLE_BEFORE, returned_tuple_before

STILL_TUPLES = {"gptj", "bloom"}


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_layer_in_the_table_returns_a_bare_tensor_today(name):
    net, seen = zoo.build(name), []
    layer = net.get_submodule(zoo.paths(name).layer(0))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    net(torch.tensor(zoo.tokens(4)))
    assert isinstance(seen[0], tuple) == (name in STILL_TUPLES)
    assert returned_tuple_before(layer) == (name not in STILL_TUPLES)
    assert returned_tuple_before(type(layer)) == returned_tuple_before(layer)


def test_other_modules_are_not_in_the_table():
    assert not returned_tuple_before(nn.Linear(2, 2))
    assert not returned_tuple_before(zoo.build("gpt2").transformer.h[0].attn)


def test_every_name_in_the_table_is_a_class_of_transformers():
    # A layer that was renamed would be a line that does nothing.
    from pathlib import Path

    import transformers.models as models

    sources = "".join(
        path.read_text() for path in Path(models.__file__).parent.glob("*/modeling_*.py")
    )
    gone = {name for name in RETURNED_TUPLE_BEFORE if f"\nclass {name}(" not in sources}
    assert not gone
