"""A plain module gets what the user gave."""

import pytest
import torch

from weft.families.any_module import prepare_any


def test_arguments_pass_as_they_are():
    x, scale = torch.randn(3, 5), {"by": 2}
    call = prepare_any((x, 1), {"scale": scale})
    assert call.args[0] is x
    assert call.args[1] == 1
    assert call.kwargs["scale"] is scale
    assert (call.batch, call.length, call.lengths, call.mask) == (3, None, None, None)


@pytest.mark.parametrize(
    ("args", "kwargs", "batch"),
    [
        ((), {}, None),
        ((1, "a"), {}, None),
        ((torch.tensor(1.0),), {}, None),
        (("a",), {"x": torch.zeros(4, 2)}, 4),
    ],
)
def test_the_batch_is_the_first_dimension_of_the_first_tensor(args, kwargs, batch):
    assert prepare_any(args, kwargs).batch == batch


def test_later_changes_of_the_users_dict_do_not_reach_the_call():
    kwargs = {"x": 1}
    call = prepare_any((), kwargs)
    kwargs["x"] = 2
    assert call.kwargs == {"x": 1}
