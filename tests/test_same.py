"""What counts as the same, and above all what does not."""

from __future__ import annotations

import pytest
import torch

from weft.testing.same import bitwise, bounded, moves

NAN = float("nan")


def test_bits() -> None:
    bitwise(torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]))
    for one, other in (
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23])),
        (torch.tensor([1.0]), torch.tensor([1.0]).double()),
        (torch.tensor([1]), torch.tensor([[1]])),
        ([torch.tensor([1])], []),
    ):
        with pytest.raises(AssertionError):
            bitwise(one, other)


def test_single_precision_is_bound_to_the_largest_number() -> None:
    right = torch.tensor([1000.0, 1.0, NAN])
    assert bounded(right + torch.tensor([0.0, 0.005, 0.0]), right) == pytest.approx(0.5, rel=0.01)
    for wrong in (right + torch.tensor([0.02, 0.0, 0.0]), right.nan_to_num(0.0)):
        with pytest.raises(AssertionError):
            bounded(wrong, right)


@pytest.fixture
def halves() -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers in float32, and as they are rounded."""
    exact = torch.randn(4, 64)
    return exact, (exact + 0.01 * torch.randn(4, 64)).bfloat16()


def off(exact: torch.Tensor, plain: torch.Tensor, factor: float) -> torch.Tensor:
    """So many times as far off."""
    return (exact + factor * (plain - exact)).bfloat16()


def test_half_precision_is_bound_in_the_mean(halves) -> None:
    exact, plain = halves
    assert bounded(plain, plain, exact) == pytest.approx(1 / 1.5)
    assert bounded(off(exact, plain, -1.2), plain, exact) < 1  # another rounding is no worse
    with pytest.raises(AssertionError, match="beyond the bound"):
        bounded(off(exact, plain, 1.8), plain, exact)


def test_half_precision_is_bound_where_it_is_worst(halves) -> None:
    exact, plain = halves
    worst = float((plain - exact).abs().max())
    for factor, is_fine in ((2.0, True), (3.5, False)):
        got = plain.clone()
        got[0, 0] = exact[0, 0] + factor * worst
        if is_fine:
            bounded(got, plain, exact)
        else:
            with pytest.raises(AssertionError, match="beyond the bound"):
                bounded(got, plain, exact)


def test_half_precision_needs_a_reference(halves) -> None:
    exact, plain = halves
    with pytest.raises(ValueError, match="reference"):
        bounded(plain, plain)
    with pytest.raises(AssertionError):
        bounded(off(exact, plain, NAN), plain, exact)


def test_an_edit_shows_or_does_not(halves) -> None:
    exact, plain = halves
    moves(exact + 1, exact)
    moves(plain + 1, plain)
    for one, other in ((exact + 1e-4, exact), (plain, plain)):
        with pytest.raises(AssertionError, match="does not show"):
            moves(one, other)
