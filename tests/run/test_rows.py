"""Rows: a piece is private, has the strides it has alone, and is written back to its place only."""

from __future__ import annotations

import pytest
import torch

from weft.run.rows import Piece

B, S = 5, 7
"""Rows and positions of the shared forward."""


def piece(dims, shape, stride=None, rows=(1, 3), length=4):
    made = torch.empty(shape)
    return Piece(dims, rows, length, B, S, shape, stride or made.stride())


HIDDEN = (("B",), ("S",), ())
CASES = {
    "hidden states": (HIDDEN, (B, S, 3), (2, 4, 3), lambda x: x[1:3, :4]),
    "heads first": ((("B",), (), ("S",), ()), (B, 2, S, 3), (2, 2, 4, 3), lambda x: x[1:3, :, :4]),
    "a pattern": (
        (("B",), (), ("S",), ("S",)),
        (B, 2, S, S),
        (2, 2, 4, 4),
        lambda x: x[1:3, :, :4, :4],
    ),
    "rows of experts": (
        (("B", "S"), ()),
        (B * S, 3),
        (8, 3),
        lambda x: x.view(B, S, 3)[1:3, :4].reshape(8, 3),
    ),
    "rows of heads": (
        (("B", 2), ("S",), ()),
        (B * 2, S, 3),
        (4, 4, 3),
        lambda x: x.view(B, 2, S, 3)[1:3, :, :4].reshape(4, 4, 3),
    ),
    "one number for each": ((("B",),), (B,), (2,), lambda x: x[1:3]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_cut_is_the_invokes_own_part(name):
    dims, size, shape, expected = CASES[name]
    whole = torch.randn(size)
    cut = piece(dims, shape).cut(whole)
    assert torch.equal(cut, expected(whole))
    assert cut.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    assert cut.untyped_storage().nbytes() == cut.nbytes


@pytest.mark.parametrize("name", CASES)
def test_what_is_put_changes_nothing_else(name):
    dims, size, shape, expected = CASES[name]
    whole = torch.randn(size)
    before = whole.clone()
    value = torch.randn(shape)
    piece(dims, shape).put(whole, value)
    assert torch.equal(expected(whole), value)
    piece(dims, shape).put(whole, expected(before))
    assert torch.equal(whole, before)


def test_a_tensor_of_other_sizes_is_refused():
    """Rows are not cut out of what the formulas do not describe."""
    one = piece((("B",), ("S",), ()), (2, 3, 4))
    for size in ((B + 1, S, 4), (B, S - 1, 4), (B * S, 4)):
        with pytest.raises((ValueError, RuntimeError)):
            one.cut(torch.randn(size))


def test_a_cut_has_the_strides_that_it_has_alone():
    """Heads that alone are a transposed view of a contiguous tensor."""
    alone = torch.randn(2, 4, 2, 3).transpose(1, 2)
    whole = torch.randn(B, 2, S, 3)
    dims = (("B",), (), ("S",), ())
    cut = piece(dims, (2, 2, 4, 3), alone.stride()).cut(whole)
    assert cut.stride() == alone.stride()
    assert torch.equal(cut, whole[1:3, :, :4])


def test_between_the_elements_of_a_cut_there_are_no_old_numbers():
    """Alone it is a slice of a wider tensor, so its memory has gaps: they hold zeros."""
    alone = torch.randn(2, 4, 9)[:, :, :3]
    cut = piece(HIDDEN, (2, 4, 3), alone.stride()).cut(torch.full((B, S, 3), 7.0))
    assert cut.stride() == alone.stride()
    memory = torch.empty(0).set_(cut.untyped_storage())
    assert memory.sum() == 7.0 * cut.numel()


def test_a_part_of_a_transposed_tensor():
    whole = torch.randn(S, B, 3).transpose(0, 1)
    one = piece(HIDDEN, (2, 4, 3))
    assert torch.equal(one.cut(whole), whole[1:3, :4])
    one.put(whole, torch.zeros(2, 4, 3))
    assert not whole[1:3, :4].any() and whole[0].all()
