"""`evaluate` foresees exactly what the real functions do."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import GraphError, UnsupportedOperationError
from weft.graph.ops import IN_GRAPHS, OPS
from weft.kernels.abstract import (
    DataDependentError,
    OutcomeCache,
    evaluate,
    flatten,
    rebuild,
)
from weft.kernels.aval import aval_of
from weft.kernels.results import tree_of
from weft.kernels.table import FUNCTIONS

from . import opdb
from .compare import differences, distinct, foreseen, real
from .opdb import Sample

# Torch resizes the tensor itself where shapes broadcast; we refuse, as it does elsewhere.
STRICTER = ("Tensor.addbmm_",)

# With inplace=True, with running statistics, with dropout in it, or with a device.
REFUSED_FORMS = {
    *("Tensor.to", "nn.functional.scaled_dot_product_attention"),
    *("nn.functional.batch_norm", "nn.functional.instance_norm"),
    *("nn.functional.embedding", "nn.functional.multi_head_attention_forward"),
    *(f"nn.functional.{name}" for name in ("dropout", "dropout1d", "dropout2d", "dropout3d")),
    *(f"nn.functional.{name}" for name in ("alpha_dropout", "rrelu", "relu", "relu6", "selu")),
    *(f"nn.functional.{name}" for name in ("celu", "elu", "leaky_relu", "mish", "silu")),
    *(f"nn.functional.{name}" for name in ("hardsigmoid", "hardswish", "hardtanh", "threshold")),
}

DATA_DEPENDENT = {
    *("nonzero", "argwhere", "masked_select", "bincount", "linalg.lstsq", "tensor_split"),
    *("unique", "unique_consecutive", "Tensor.unique", "Tensor.unique_consecutive", "narrow"),
    *("nn.functional.one_hot", "repeat_interleave", "where", "Tensor.where"),
    *("Tensor.__getitem__", "Tensor.split"),
}


def wrong(sample: Sample, device: str = "cpu") -> list[str]:
    """What `evaluate` gets wrong of a call, in words."""
    result, after, writes = real(sample, device)
    try:
        return differences(foreseen(sample), result, after, writes)
    except DataDependentError as error:
        return [] if sample.name in DATA_DEPENDENT else [repr(error)]
    except UnsupportedOperationError as error:
        return [] if sample.name in REFUSED_FORMS else [repr(error)]
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return [] if sample.name in STRICTER else [repr(error)]


def check(samples: list[Sample]) -> Counter[str]:
    """Checks every call, and counts those of each operation."""
    failures = {sample.name: problems for sample in samples if (problems := wrong(sample))}
    assert failures == {}
    return Counter(sample.name for sample in samples)


def test_every_operation_does_what_was_foreseen(drawn: list[Sample]) -> None:
    seen = check(drawn)
    kinds = IN_GRAPHS | {"plain"}
    assert [op.name for op in OPS.values() if op.kind in kinds and op.name not in seen] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_operation_does_what_was_foreseen_in_many_samples() -> None:
    check(distinct(opdb.calls(12)))


@pytest.mark.gpu
@pytest.mark.timeout(900)  # many kernels are compiled on their first use
def test_every_operation_does_what_was_foreseen_on_a_gpu(drawn: list[Sample]) -> None:
    failures, missing = {}, Counter()
    for sample in drawn:
        try:
            problems = wrong(sample, "cuda")
        except (NotImplementedError, RuntimeError) as error:
            if "not implemented for" in str(error):  # CUDA has no kernel of this dtype
                missing[sample.name] += 1
                continue
            problems = [repr(error)]
        if problems:
            failures[sample.name] = problems
    print(f"\nno kernel: {dict(missing)}")
    assert failures == {}
    assert missing.total() < len(drawn) // 10


# Torch checks these on real tensors only (most are checks of numbers).
LATER = {
    *("Tensor.uniform_", "complex", "cov", "masked_scatter", "conv1d", "conv2d", "conv3d"),
    *("gather", "index_add", "scatter", "scatter_add", "multinomial", "bucketize"),
}


def test_errors_of_torch_come_when_evaluated() -> None:
    foretold, late = 0, set()
    for sample in opdb.errors():
        try:
            foreseen(sample)
        except (*opdb.REFUSALS, DataDependentError):
            foretold += 1
        else:
            late.add(sample.name)
    assert foretold > 300
    assert late <= LATER


def test_looks_need_numbers() -> None:
    x = torch.ones(1)
    for op in OPS.values():
        if op.kind == "look":
            with pytest.raises(DataDependentError):
                evaluate(op.name, (aval_of(x),), {})


def test_hints_return_the_tensor_itself() -> None:
    x = torch.ones(2)
    for op in OPS.values():
        if op.kind == "hint":
            assert evaluate(op.name, (aval_of(x),), {}).leaves[0].same == 0
            assert FUNCTIONS[op.name](x) is x


H = aval_of(torch.zeros(2, 9, 8))
MASK = aval_of(torch.zeros(2, 9, dtype=torch.bool))
NUMBER = aval_of(torch.tensor(3))
IDS = aval_of(torch.tensor([[1, 2]]))
WEIGHT = aval_of(torch.zeros(9, 8))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("Tensor.__getitem__", (H, MASK)),
        ("Tensor.__getitem__", (H, (MASK, 0))),
        ("Tensor.__getitem__", (H, slice(None, NUMBER))),
        ("nonzero", (H,)),
        ("where", (MASK,)),
        ("arange", (NUMBER,)),
        ("full", ((2,), NUMBER)),
        ("repeat_interleave", (H, NUMBER)),
        ("nn.functional.one_hot", (IDS,)),
        ("Tensor.item", (NUMBER,)),
    ],
)
def test_what_depends_on_numbers_says_so(name: str, args: tuple) -> None:
    with pytest.raises(DataDependentError):
        evaluate(name, args, {})


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("Tensor.data_ptr", (H,), {}),
        ("no_such_operation", (H,), {}),
        ("add", (H, 1), {"out": H}),
        ("zeros", (3,), {"device": "cuda"}),
        ("randn", (3,), {"generator": object()}),
        ("zeros", (3,), {"layout": torch.sparse_coo}),
        ("Tensor.to", (H, "cuda"), {}),
        ("Tensor.to", (H, torch.device("cpu")), {}),
        ("Tensor.to", (H, 0), {}),
        ("Tensor.type", (H, "torch.cuda.FloatTensor"), {}),
        ("Tensor.type", (H,), {}),
        ("mvlgamma", (H, 10**9), {}),
        ("nn.functional.multi_head_attention_forward", (H,), {"dropout_p": 0.1}),
        ("nn.functional.relu", (H, True), {}),
        ("nn.functional.relu", (H,), {"inplace": True}),
        ("nn.functional.embedding", (IDS, WEIGHT, None, 1.0), {}),
        ("nn.functional.scaled_dot_product_attention", (H, H, H), {"dropout_p": 0.1}),
        ("nn.functional.scaled_dot_product_attention", (H, H, H, None, 0.1), {}),
        ("nn.functional.batch_norm", (WEIGHT, WEIGHT, WEIGHT, None, None, True), {}),
    ],
)
def test_forms_outside_the_table_are_refused(name: str, args: tuple, kwargs: dict) -> None:
    with pytest.raises(UnsupportedOperationError):
        evaluate(name, args, kwargs)


def test_errors_of_torch_come_through() -> None:
    with pytest.raises(RuntimeError, match="2D"):
        evaluate("mm", (H, H), {})
    with pytest.raises(IndexError):
        evaluate("sum", (H, 7), {})
    with pytest.raises(TypeError):
        evaluate("Tensor.__rfloordiv__", (H, "text"), {})
    with pytest.raises(RuntimeError):
        evaluate("Tensor.__setitem__", (H, MASK, aval_of(torch.zeros(5, 7))), {})


def test_results_are_bounded() -> None:
    with pytest.raises(GraphError, match="8589934592 at most"):
        evaluate("Tensor.expand", (aval_of(torch.zeros(1)), 2**34), {})
    with pytest.raises(GraphError, match="10 at most"):
        evaluate("add", (H, 1), {}, limit=10)
    with pytest.raises(GraphError, match="tensors"):
        evaluate("unbind", (aval_of(torch.zeros(1).expand(2**17)),), {})


def test_evaluation_changes_no_state() -> None:
    before = torch.get_rng_state()
    with torch.inference_mode():
        outcome = evaluate("Tensor.normal_", (H,), {})
    evaluate("nn.functional.dropout", (H,), {})
    evaluate("randn", (4,), {})
    assert outcome.writes == (0,)
    assert outcome.leaves[0].same == 0
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_structures_are_rebuilt_with_their_types() -> None:
    x = torch.randn(3, 4)
    for result in (
        x,
        torch.topk(x, 2),
        torch.split(x, 2),
        [x, x],
        x.shape,
        None,
        torch.linalg.qr(x),
        torch.aminmax(x),
        (x, [x, (x,)], 3),
    ):
        again = rebuild(tree_of(result), flatten(result))
        assert type(again) is type(result)
        assert [id(t) for t in flatten(again)] == [id(t) for t in flatten(result)]
    assert torch.topk(x, 2)._fields if hasattr(torch.topk(x, 2), "_fields") else True
    assert torch.equal(rebuild(tree_of(torch.topk(x, 2)), [x, x]).values, x)


def test_the_cache_forgets_the_older_half() -> None:
    cache = OutcomeCache(bound=4)
    outcome = evaluate("add", (H, 1), {})
    for key in range(5):
        cache.put(key, outcome)
    assert len(cache) == 3
    assert cache.get(0) is None
    assert cache.get(4) is outcome


# Indexing has more forms than any list of samples.

SHAPE = (3, 4, 2)


@st.composite
def indices(draw: st.DrawFn, masks: bool) -> object:
    """An index into a tensor of `SHAPE`: numbers, slices, None, ellipsis, index tensors, masks."""
    parts: list[object] = []
    dim, length = 0, draw(st.integers(1, 3))
    while dim < length:
        size = SHAPE[dim]
        kind = draw(st.sampled_from(("int", "slice", "list", "none", "mask" if masks else "int")))
        if kind == "none":
            parts.append(None)
            continue
        dim += 1
        if kind == "int":
            parts.append(draw(st.integers(-size, size - 1)))
        elif kind == "slice":
            bounds = st.none() | st.integers(-size, size)
            parts.append(slice(draw(bounds), draw(bounds), draw(st.sampled_from((None, 1, 2)))))
        elif kind == "list":
            parts.append(
                torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2)))
            )
        else:
            flags = st.lists(st.booleans(), min_size=size, max_size=size).filter(
                lambda f: sum(f) == 2
            )
            parts.append(torch.tensor(draw(flags)))
    if dim < 3 and draw(st.booleans()):
        parts.append(...)
    return tuple(parts) if len(parts) > 1 or draw(st.booleans()) else parts[0]


@settings(max_examples=300, deadline=None)
@given(indices(masks=False))
def test_reading_by_index(index: object) -> None:
    sample = Sample("Tensor.__getitem__", (torch.randn(SHAPE), index), {}, "drawn")
    assert wrong(sample) == []


@settings(max_examples=300, deadline=None)
@given(indices(masks=True), st.sampled_from(("number", "scalar", "full")))
def test_writing_by_index(index: object, value: str) -> None:
    x = torch.randn(SHAPE)
    new = {"number": 1.0, "scalar": torch.tensor(2.0), "full": torch.randn(x[index].shape)}[value]  # type: ignore[index]
    assert wrong(Sample("Tensor.__setitem__", (x, index, new), {}, "drawn")) == []
