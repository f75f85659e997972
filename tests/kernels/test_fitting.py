"""What may be put into a tensor in place: refused before anything runs where PyTorch refuses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from weft.errors import WriteMismatchError
from weft.graph.ops import EFFECTS, OPS
from weft.kernels.abstract import DataDependentError, evaluate
from weft.kernels.aval import aval_of

from .compare import foreseen, real
from .opdb import DTYPES, REFUSALS, Sample, tensors_in

NUMBERS = (2, 2.5, 2j, True, -1)
OF_NUMBERS = (
    *("out of bounds", "shape of the mask", "less than 'to'"),
    *("Dimension out of range", "all elements of"),
)
"""What PyTorch says of the numbers and shapes of these calls, which is not foreseen here."""


def changed(arg: Any, dtype: Callable[[int], torch.dtype | None], at: list[int]) -> Any:
    """A structure whose tensors, by their number, have other dtypes."""
    if isinstance(arg, Tensor):
        at[0] += 1
        return arg.to(dtype(at[0] - 1) or arg.dtype)
    if type(arg) in (tuple, list):
        return type(arg)([changed(item, dtype, at) for item in arg])
    if isinstance(arg, dict):
        return {key: changed(value, dtype, at) for key, value in arg.items()}
    return arg


def variants(sample: Sample) -> Iterator[Sample]:
    """The call with another dtype of the target, or of all else, and with other numbers."""
    for dtype in DTYPES:
        at = [0]
        first = changed(sample.args, lambda n, d=dtype: None if n else d, at)
        yield replace(sample, args=first)
        at = [0]
        args = changed(sample.args, lambda n, d=dtype: d if n else None, at)
        kwargs = changed(sample.kwargs, lambda n, d=dtype: d, at)
        yield replace(sample, args=args, kwargs=kwargs)
        for number in NUMBERS:
            given = [type(arg) in (int, float, complex, bool) for arg in first]
            if any(given):
                pairs = zip(first, given, strict=True)
                yield replace(
                    sample, args=tuple([number if is_one else arg for arg, is_one in pairs])
                )


def kind_of(sample: Sample) -> tuple[Any, ...]:
    """Calls of one kind are alike in all that decides on dtypes."""
    tensors = tensors_in((sample.args, sample.kwargs))
    plain = [repr(arg) for arg in sample.args if not tensors_in(arg)]
    return sample.name, *[(t.dtype, t.dim()) for t in tensors], *plain


def test_what_torch_refuses_in_place_is_refused_before(drawn: list[Sample]) -> None:
    """The oracle is PyTorch with numbers, for each operation in place and dtypes of all kinds."""
    effects = [
        one for sample in drawn if OPS[sample.name].kind in EFFECTS for one in variants(sample)
    ]
    wrong, refusals = {}, 0
    for kind, sample in {kind_of(one): one for one in effects}.items():
        said = refused = None
        try:
            real(sample)
        except REFUSALS as error:
            said = str(error)
        try:
            foreseen(sample)
        except DataDependentError:
            continue
        except WriteMismatchError as error:
            refused = error
        except REFUSALS:  # of shapes, mostly
            continue
        refusals += refused is not None
        if said is None and refused is not None:
            wrong[kind] = f"refused without need: {refused}"
        if said is not None and refused is None and not any(told in said for told in OF_NUMBERS):
            wrong[kind] = f"not refused: {said}"
    assert wrong == {}
    assert refusals > 500


LONG = aval_of(torch.zeros(2, 9, dtype=torch.int64))
FLOAT = aval_of(torch.zeros(2, 9))
HALF = aval_of(torch.zeros(2, 9, dtype=torch.float16))


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("Tensor.add_", (LONG, 1.5), "result type Float can't be cast"),
        ("Tensor.mul_", (LONG, FLOAT), "result type Float can't be cast"),
        ("Tensor.add_", (FLOAT, 1j), "result type ComplexFloat can't be cast"),
        ("Tensor.__setitem__", (LONG, (0, LONG), FLOAT), "dtypes match"),
    ],
)
def test_a_refusal_names_operation_target_and_way_out(name: str, args: tuple, says: str) -> None:
    with pytest.raises(WriteMismatchError, match=says) as caught:
        evaluate(name, args, {})
    assert f"torch.{name} cannot put its result into {args[0]!r}" in caught.value.message
    assert "convert the tensor first" in (caught.value.fix or "")


@pytest.mark.parametrize("target", [FLOAT, HALF])
def test_numbers_of_another_kind_go_into_floats(target: Any) -> None:
    for other in (LONG, FLOAT, HALF, 3, 2.5, True):
        assert evaluate("Tensor.mul_", (target, other), {}).writes == (0,)


def test_the_users_random_numbers_stay() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    for name in [op.name for op in OPS.values() if op.kind == "random_writes"]:
        evaluate(name, (FLOAT, 0.5) if name == "Tensor.geometric_" else (FLOAT,), {})
    assert torch.equal(torch.rand(3), expected)
