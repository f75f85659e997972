"""A valid call of each operation that a graph may hold, few enough to be made in seconds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache

import torch

from tests.kernels import byhand, opdb
from tests.kernels.compare import allowed, distinct
from tests.kernels.opdb import Sample, tensors_in
from weft.graph.ops import IN_GRAPHS, OPS

ALL = frozenset(name for name, op in OPS.items() if op.kind in IN_GRAPHS)
"""Every operation of the table that can stand in a graph."""

LARGEST = 4096
"""Elements that a tensor of a sample has at most."""


@cache
def samples() -> dict[str, list[Sample]]:
    """Calls by operation; the same at every run."""
    found: dict[str, list[Sample]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in distinct((*_of_torch(), *byhand.calls(), *_others())):
            sizes = [tensor.numel() for tensor in tensors_in((sample.args, sample.kwargs))]
            given = {**sample.kwargs, **dict(enumerate(sample.args))}
            if "out" in given or given.get("inplace"):
                continue
            if sample.name in ALL and allowed(sample) and max(sizes, default=0) <= LARGEST:
                found.setdefault(sample.name, []).append(sample)
    return found


def _of_torch() -> Iterator[Sample]:
    """The first sample that PyTorch's tests have for each of its operators."""
    torch.manual_seed(0)
    for entry in opdb._op_db():
        dtype = next((dtype for dtype in opdb.DTYPES if dtype in entry.dtypes), None)
        if dtype is not None:
            yield from opdb._entry_calls(entry, dtype, 1)


def _others() -> Iterator[Sample]:
    """Of these the first samples have forms that are not in the table, or are large."""
    for dims in (1, 2, 3):
        x = torch.randn(2, 3, *(4,) * dims)
        yield Sample(f"nn.functional.max_pool{dims}d", (x, 2), {}, "by hand")
    x, whole = torch.randn(3, 4), torch.tensor([2, 0, 2, 1])
    for name, args in (
        *((name, (x,)) for name in ("argsort", "argwhere", "msort", "nonzero", "norm", "sort")),
        *((name, (whole,)) for name in ("bincount", "Tensor.unique", "unique")),
        *((name, (whole,)) for name in ("Tensor.unique_consecutive", "unique_consecutive")),
        *((f"nn.functional.{name}", (x,)) for name in ("normalize", "selu")),
        ("nn.functional.one_hot", (whole,)),
        ("masked_select", (x, x > 0)),
        ("linalg.lstsq", (torch.randn(4, 3), torch.randn(4, 2))),
        ("slice_scatter", (x, torch.zeros(3, 2), 1, 1, 3)),
        ("tensordot", (x, torch.randn(4, 2), 1)),
        ("nn.functional.triplet_margin_with_distance_loss", (x, x + 1, x - 1)),
    ):
        yield Sample(name, args, {}, "by hand")
