"""Every operation has a price, and products cost what torch's own counter says."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from weft.errors import UnsupportedOperationError
from weft.graph.ops import IN_GRAPHS, OPS
from weft.kernels.abstract import DataDependentError, Outcome, evaluate
from weft.kernels.aval import aval_of
from weft.kernels.cost import RULES, Cost, cost
from weft.kernels.table import FUNCTIONS

from .compare import abstract, foreseen
from .opdb import REFUSALS, Sample, tensors_in

COUNTED = """
    mm bmm matmul addmm baddbmm nn.functional.linear einsum linalg.multi_dot tensordot
    nn.functional.scaled_dot_product_attention conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d
"""


def priced(sample: Sample) -> tuple[Cost, Outcome] | None:
    """The price of a call, where its shapes are known."""
    try:
        outcome = foreseen(sample)
    except (UnsupportedOperationError, DataDependentError, *REFUSALS):
        return None
    return cost(sample.name, abstract(sample.args), abstract(sample.kwargs), outcome), outcome


def counted(sample: Sample) -> int:
    """What torch's counter says of the call."""
    sample = sample.copy()
    with FlopCounterMode(display=False) as counter, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        FUNCTIONS[sample.name](*sample.args, **sample.kwargs)
    return counter.get_total_flops()


def test_every_operation_has_a_price(drawn: list[Sample]) -> None:
    seen, wrong = set(), []
    for sample in drawn:
        found = priced(sample)
        if found is None:
            continue
        price, outcome = found
        made = [leaf for leaf in outcome.leaves if leaf.alias is None]
        touched = sum(leaf.aval.nbytes for leaf in made)
        tensors = tensors_in((sample.args, sample.kwargs))
        touched += sum(tensors[i].nbytes for i in outcome.writes)
        elements = sum(leaf.aval.nbytes // leaf.aval.dtype.itemsize for leaf in made)
        if type(price.flops) is not int or price.bytes_written != touched:
            wrong.append((sample.name, price, touched))
        if price.flops < elements and tensors and all(t.numel() for t in tensors):
            wrong.append((sample.name, price, elements))
        seen.add(sample.name)
    assert wrong == []
    priceless = {op.name for op in OPS.values() if op.kind in IN_GRAPHS} - seen
    assert priceless == NEVER_FORESEEN


# These always need numbers first; they are priced when these are known.
NEVER_FORESEEN = {
    *("nonzero", "argwhere", "masked_select", "bincount", "linalg.lstsq"),
    *("unique", "unique_consecutive", "Tensor.unique", "Tensor.unique_consecutive"),
}


def test_products_cost_what_torch_counts(drawn: list[Sample]) -> None:
    exact, dear = set(), []
    for sample in drawn:
        found = priced(sample)
        flops = counted(sample) if found else 0
        if not found or not flops:
            continue
        if found[0].flops < flops:
            dear.append((sample.name, found[0].flops, flops))
        if found[0].flops == flops:
            exact.add(sample.name)
    assert dear == []
    assert exact >= set(COUNTED.split())


def test_views_are_free_and_copies_are_not() -> None:
    h = aval_of(torch.zeros(4, 6))
    for name, args in (("Tensor.__getitem__", (h, 0)), ("transpose", (h, 0, 1)), ("detach", (h,))):
        assert cost(name, args, {}, evaluate(name, args, {})) == Cost(0, 0)
    assert cost("clone", (h,), {}, evaluate("clone", (h,), {})).bytes_written == 96
    in_place = evaluate("Tensor.add_", (h, 1), {})
    assert cost("Tensor.add_", (h, 1), {}, in_place).bytes_written == 96


def test_sorting_costs_more_than_touching_and_less_than_a_decomposition() -> None:
    h = aval_of(torch.zeros(512, 512))
    flops = {
        name: cost(name, (h,), {}, evaluate(name, (h,), {})).flops
        for name in ("relu", "sort", "fft.fft", "linalg.svd")
    }
    assert sorted(flops, key=flops.__getitem__) == ["relu", "sort", "fft.fft", "linalg.svd"]


@pytest.mark.parametrize(
    ("equation", "shapes", "flops"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], 2 * 2 * 3 * 4 * 5),
        ("...i,ji->...j", [(2, 3, 4), (5, 4)], 2 * 2 * 3 * 4 * 5),
        ("i,j->ij", [(3,), (4,)], 2 * 3 * 4),
    ],
)
def test_einsum_multiplies_the_sizes_of_its_letters(
    equation: str, shapes: list[tuple[int, ...]], flops: int
) -> None:
    args = (equation, *(aval_of(torch.zeros(shape)) for shape in shapes))
    assert cost("einsum", args, {}, evaluate("einsum", args, {})).flops == flops


def test_rules_name_operations_of_the_table() -> None:
    assert set(RULES) <= set(OPS)
