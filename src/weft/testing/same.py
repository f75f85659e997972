"""What "the same" means, in one place: every comparison of numbers in the tests goes through here.

- `bitwise`: the same kernels on the same shapes, so the same bits.
- `bounded`: float32 within 1e-5 of the tensor's largest magnitude; half precision as close to a
  float32 reference as the plain run is, times 1.5 in the mean (the root of the mean square), and
  times 3 where it is farthest: which single number is rounded worst is chance.
- `greedy`: the same most likely tokens, except where the best two are closer than the bound.
- `moves`: an edit that a test makes is seen in the output, by at least 100 times the bound (half
  precision: 10). Without it a comparison of two runs that both lost the edit would pass.

All take tensors, or equal nestings of lists, tuples and dicts of tensors, and raise
`AssertionError` with the place and size of the largest difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

FLOAT32_PART = 1e-5
"""The bound for float32, as a part of the largest magnitude."""

HALF_FACTOR = 1.5
"""How much farther from a float32 reference half precision may be than the plain run: in the
mean."""

HALF_WORST = 3.0
"""The same of the number that is farthest from it."""

MOVES_FACTOR = 100
"""How many bounds an edit in a test must move a float32 output."""

HALF_MOVES_FACTOR = 10
"""The same for half precision, where 100 bounds would be 40 % of the output."""

_HALF = (torch.bfloat16, torch.float16)
_PARTS = {torch.float64: FLOAT32_PART, torch.float32: FLOAT32_PART}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bitwise(got: Any, expected: Any) -> None:
    """Raises unless dtype, shape and every bit agree (a NaN equals the same NaN)."""
    for where, one, other in _pairs(got, expected):
        if not torch.equal(_bits(one), _bits(other)):
            raise AssertionError(f"{where}not bitwise the same: {_difference(one, other)}")


def bounded(got: Any, expected: Any, reference: Any = None) -> float:
    """Raises unless `got` is within the bound of `expected`, the plain run; returns the largest
    part of the bound that a tensor used, 0 to 1.

    Half precision needs `reference`, the same computed in float32: `got` may be `HALF_FACTOR` times
    as far from it as `expected` is, and no number more than `HALF_WORST` times as far as any of
    `expected`. Integers and truth values must be equal.
    """
    used, references = 0.0, _leaves(reference) if reference is not None else iter(())
    for where, one, other in _pairs(got, expected):
        true = next(references, None)
        if not _is_floating(one):
            bitwise(one, other)
            continue
        error, allowed = _error(one, other, true)
        if not error <= allowed:
            raise AssertionError(
                f"{where}beyond the bound: off by {error:.3g}, allowed {allowed:.3g}; "
                f"{_difference(one, other)}"
            )
        used = max(used, error / allowed if error else 0.0)
    return used


def greedy(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises unless logits `[..., vocab]` have the same most likely tokens.

    Where the best two of `expected` are closer than the bound, either of them will do.
    """
    best = expected.topk(2, -1)
    gap = (best.values[..., 0] - best.values[..., 1]).float()
    tokens, wanted = got.argmax(-1), best.indices[..., 0]
    tie = (gap <= bound(expected)) & (tokens == best.indices[..., 1])
    wrong = (tokens != wanted) & ~tie
    if bool(wrong.any()):
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"another token at {first}: {int(tokens[first])} instead of {int(wanted[first])}, "
            f"which leads by {float(gap[first]):.3g} (bound {bound(expected):.3g})"
        )


def moves(edited: Any, base: Any) -> None:
    """Raises unless an edit moved every tensor by many bounds (`MOVES_FACTOR`)."""
    for where, one, other in _pairs(edited, base):
        factor = HALF_MOVES_FACTOR if other.dtype in _HALF else MOVES_FACTOR
        moved, needed = _distance(one, other), factor * bound(other)
        if not moved >= needed:
            raise AssertionError(
                f"{where}the edit does not show: moved by {moved:.3g}, needed {needed:.3g}"
            )


def bound(tensor: torch.Tensor) -> float:
    """The largest difference that counts as the same: a part of the largest magnitude.

    For half precision, where `bounded` measures against a reference, a part that its rounding of
    single numbers stays below: 2**-8 for bfloat16, 2**-11 for float16.
    """
    if not _is_floating(tensor):
        return 0.0
    part = _PARTS.get(tensor.dtype) or torch.finfo(tensor.dtype).eps / 2
    return part * _largest(tensor)


def _error(got: torch.Tensor, expected: torch.Tensor, true: Any) -> tuple[float, float]:
    """How far off, and how far off is allowed."""
    if got.dtype not in _HALF:
        return _distance(got, expected), bound(expected)
    if true is None:
        raise ValueError("half precision is compared against a float32 reference: give one")
    mean = _mean_distance(got, true), HALF_FACTOR * _mean_distance(expected, true)
    worst = _distance(got, true), HALF_WORST * _distance(expected, true)
    return mean if mean[0] * worst[1] > worst[0] * mean[1] else worst


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; infinite where only one has a NaN or an infinity."""
    a, b = one.detach().double(), other.detach().double()
    odd = ~(a.isfinite() & b.isfinite())
    agree = (a == b) | (a.isnan() & b.isnan())
    if bool((odd & ~agree).any()):
        return float("inf")
    return float((a - b).abs().masked_fill(odd, 0).max()) if a.numel() else 0.0


def _mean_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The root of the mean squared difference of numbers that are finite in both."""
    gaps = one.detach().double() - other.detach().double()
    gaps = gaps[gaps.isfinite()]
    return float(gaps.square().mean().sqrt()) if gaps.numel() else 0.0


def _largest(tensor: torch.Tensor) -> float:
    finite = tensor.detach().double().nan_to_num(0.0, 0.0, 0.0)
    return float(finite.abs().max()) if tensor.numel() else 0.0


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().contiguous()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.view(_INTEGERS[plain.element_size()]) if plain.dtype != torch.bool else plain


def _difference(one: torch.Tensor, other: torch.Tensor) -> str:
    """The place and the two numbers of the largest difference."""
    if not one.numel():
        return "both are empty"
    gaps = (one.detach().double() - other.detach().double()).abs().nan_to_num(float("inf"))
    place = tuple(int(i) for i in torch.unravel_index(gaps.argmax(), gaps.shape))
    count = int((gaps > 0).sum())
    return (
        f"{count} of {gaps.numel()} numbers differ, the most at {list(place)}: "
        f"{one[place].item():.8g} and {other[place].item():.8g}"
    )


def _pairs(got: Any, expected: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(where, tensor, tensor) for two equal structures of tensors of equal shape and dtype."""
    yield from _walk(got, expected, "")


def _walk(got: Any, expected: Any, at: str) -> Iterator[tuple[str, Any, Any]]:
    where = f"{at}: " if at else ""
    if isinstance(expected, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            raise AssertionError(f"{where}a {type(got).__name__} instead of a tensor")
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise AssertionError(f"{where}{_kind(got)} instead of {_kind(expected)}")
        yield where, got, expected
        return
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        if list(got) != list(expected):
            raise AssertionError(f"{where}keys {list(got)} instead of {list(expected)}")
        for key in expected:
            yield from _walk(got[key], expected[key], f"{at}[{key!r}]")
        return
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
        if len(got) != len(expected):
            raise AssertionError(f"{where}{len(got)} items instead of {len(expected)}")
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            yield from _walk(one, other, f"{at}[{index}]")
        return
    raise AssertionError(f"{where}{type(got).__name__} instead of {type(expected).__name__}")


def _leaves(item: Any) -> Iterator[torch.Tensor]:
    return (tensor for _, tensor, _ in _walk(item, item, ""))


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
