"""What a call costs, from its shapes alone: floating point operations and bytes written.

    outcome = evaluate("mm", (a, b), {})
    cost("mm", (a, b), {}, outcome)        # Cost(flops=2 * m * k * n, bytes_written=4 * m * n)

Products, convolutions and attention are counted exactly, as `torch.utils.flop_counter` does.
Decompositions, transforms and sorts follow their textbook growth with a round factor; everything
else touches each element of its largest argument or result a few times. Complex numbers count
four times. A view is free.

A number for budgets and for fairness: not a time, and not a bound on memory inside an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt, prod
from typing import Any, NamedTuple

from .abstract import Outcome
from .aval import Aval
from .forms import avals_in


class Cost(NamedTuple):
    flops: int
    bytes_written: int


class Sizes(NamedTuple):
    """What a rule sees: the tensor arguments, the results, the elements of the largest of them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    avals: list[Aval]
    outs: list[Aval]
    largest: int

    @property
    def out(self) -> int:
        """Elements of the first result."""
        return prod(self.outs[0].shape) if self.outs else 0


Rule = Callable[[Sizes], int]


def module_flops(parameters: int, args: Any, kwargs: Any) -> int:
    """What applying a module costs, nearly: each parameter meets each row of the argument."""
    return 2 * parameters * max(map(_rows, avals_in((args, kwargs))), default=1)


def _rows(aval: Aval) -> int:
    """Vectors in an argument; integers are ids of vectors."""
    floating = aval.dtype.is_floating_point or aval.dtype.is_complex
    return prod(aval.shape[:-1] if floating else aval.shape)


def cost(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], outcome: Outcome) -> Cost:
    """The cost of a call, whose arguments have `Aval`s in place of tensors."""
    avals = avals_in((args, kwargs))
    made = [leaf.aval for leaf in outcome.leaves if leaf.alias is None]
    if not made and not outcome.writes:
        return Cost(0, 0)
    written = sum(aval.nbytes for aval in made) + sum(avals[i].nbytes for i in outcome.writes)
    outs = [leaf.aval for leaf in outcome.leaves]
    largest = max([0, *(prod(aval.shape) for aval in (*avals, *outs))])
    parts = 4 if any(aval.dtype.is_complex for aval in (*avals, *outs)) else 1
    return Cost(parts * rule_of(name)(Sizes(args, kwargs, avals, outs, largest)), written)


def rule_of(name: str) -> Rule:
    """How the flops of an operation are counted."""
    return RULES.get(name) or (_transform if name.startswith("fft.") else _touch)


# Products


def product(first: int) -> Rule:
    """Twice the result times the inner size, the last one of tensor argument `first`."""
    return lambda s: 2 * s.out * _last(s.avals[first])


def _last(aval: Aval) -> int:
    return aval.shape[-1] if aval.shape else 1


def _addbmm(s: Sizes) -> int:
    batch, _, inner = s.avals[1].shape
    return 2 * s.out * batch * inner


def _tensordot(s: Sizes) -> int:
    a, b = (prod(aval.shape) for aval in s.avals)
    return 2 * s.out * isqrt(a * b // max(s.out, 1))


def _chain(s: Sizes) -> int:
    """Left to right; torch takes the best order, which is no dearer."""
    rows = s.avals[0].shape[0] if len(s.avals[0].shape) > 1 else 1
    return 2 * sum(rows * prod(aval.shape) for aval in s.avals[1:])


def _einsum(s: Sizes) -> int:
    """Twice the product of the sizes of all letters."""
    if not isinstance(s.args[0], str):
        return 2 * prod(prod(aval.shape) for aval in s.avals)
    terms = s.args[0].split("->")[0].replace(" ", "").split(",")
    sizes: dict[str, int] = {}
    dots = 1
    for term, aval in zip(terms, s.avals, strict=False):
        left, ellipsis, right = term.partition("...")
        rest = aval.shape[len(left) : len(aval.shape) - len(right)] if ellipsis else ()
        dots = max(dots, prod(rest))
        sizes |= dict(zip(left, aval.shape, strict=False))
        sizes |= dict(zip(reversed(right), reversed(aval.shape), strict=False))
    return 2 * dots * prod(sizes.values())


def _bilinear(s: Sizes) -> int:
    return 2 * s.out * prod(s.avals[2].shape[1:])


def _attention(s: Sizes) -> int:
    """`q [..., l, e]`, `k [..., s, e]`, `v [..., s, f]`."""
    query, key, value = (aval.shape for aval in s.avals[:3])
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _heads(s: Sizes) -> int:
    """Four projections `[l, n, e]` and the attention between them."""
    query, key = s.avals[0].shape, s.avals[1].shape
    length, keys, width = query[0], key[0], query[-1]
    batch = query[1] if len(query) == 3 else 1
    return 4 * batch * width * (2 * (length + keys) * width + length * keys)


def _cell(s: Sizes) -> int:
    """A recurrent cell: both weight matrices times the batch."""
    weights = [aval for aval in s.avals if len(aval.shape) == 2][-2:]
    return 2 * max(s.avals[0].shape[0], 1) * sum(prod(aval.shape) for aval in weights)


def _linear_loss(s: Sizes) -> int:
    return 2 * prod(s.avals[0].shape[:-1]) * prod(s.avals[1].shape) + 5 * s.largest


def _distances(s: Sizes) -> int:
    return 3 * s.out * _last(s.avals[0])


def _covariance(s: Sizes) -> int:
    return 2 * s.out * _last(s.avals[0])


# Convolutions and windows


def _convolution(s: Sizes) -> int:
    weight = s.avals[1].shape
    transposed = bool(s.kwargs.get("transposed", s.args[6] if len(s.args) > 6 else False))
    return _transposed(s) if transposed else 2 * s.out * prod(weight[1:])


def _convolved(s: Sizes) -> int:
    return 2 * s.out * prod(s.avals[1].shape[1:])


def _transposed(s: Sizes) -> int:
    return 2 * prod(s.avals[0].shape) * prod(s.avals[1].shape[1:])


def _conv_tbc(s: Sizes) -> int:
    kernel, channels, _ = s.avals[1].shape
    return 2 * s.out * kernel * channels


def window(rank: int, at: int = 1, key: str = "kernel_size") -> Rule:
    """Each result looks at one window, whose size is argument `at`: one number, or `rank`."""

    def rule(s: Sizes) -> int:
        size = s.kwargs.get(key, s.args[at] if len(s.args) > at else 1)
        return s.largest * (prod(size) if isinstance(size, (tuple, list)) else size**rank)

    return rule


# Algebra, sorts, the rest


def cubic(factor: int) -> Rule:
    """A decomposition of `[..., m, n]`: `factor * batch * m * n * min(m, n)`."""

    def rule(s: Sizes) -> int:
        shapes = [aval.shape for aval in (*s.avals, *s.outs) if len(aval.shape) > 1]
        return factor * max([s.largest, *(prod(shape) * min(shape[-2:]) for shape in shapes)])

    return rule


def _tensor_inverse(s: Sizes) -> int:
    return 3 * isqrt(s.largest) * s.largest


def _transform(s: Sizes) -> int:
    return 5 * s.largest * max(s.largest.bit_length(), 1)


def _sorted(s: Sizes) -> int:
    return 2 * s.largest * max(s.largest.bit_length(), 1)


def _special(s: Sizes) -> int:
    return 50 * s.largest


def _touch(s: Sizes) -> int:
    return 4 * s.largest


_GROUPS: tuple[tuple[Rule, str, str], ...] = (
    (product(0), "", """
        mm bmm matmul mv dot vdot inner linalg.matmul linalg.vecdot nn.functional.linear
    """),
    (product(1), "", "addmm addmv baddbmm Tensor.addmm_ addmv_ Tensor.baddbmm_"),
    (product(1), "Tensor.", "__rmatmul__"),
    (_addbmm, "", "addbmm Tensor.addbmm_"),
    (_tensordot, "", "tensordot"),
    (_chain, "", "linalg.multi_dot"),
    (_einsum, "", "einsum"),
    (_bilinear, "", "bilinear"),
    (_attention, "nn.functional.", "scaled_dot_product_attention"),
    (_heads, "nn.functional.", "multi_head_attention_forward"),
    (_linear_loss, "nn.functional.", "linear_cross_entropy"),
    (_cell, "", "gru_cell lstm_cell rnn_relu_cell rnn_tanh_cell"),
    (_distances, "", "cdist pdist"),
    (_covariance, "", "cov corrcoef"),
    (_convolution, "", "convolution"),
    (_convolved, "", "conv1d conv2d conv3d"),
    (_transposed, "", "conv_transpose1d conv_transpose2d conv_transpose3d"),
    (_conv_tbc, "", "conv_tbc"),
    (window(1), "", "avg_pool1d max_pool1d max_pool1d_with_indices"),
    (window(1), "nn.functional.", "max_pool1d max_pool1d_with_indices"),
    (window(1, at=2), "nn.functional.", "lp_pool1d"),
    (window(2, at=2), "nn.functional.", "lp_pool2d"),
    (window(3, at=2), "nn.functional.", "lp_pool3d"),
    (window(1, key="size"), "nn.functional.", "local_response_norm"),
    (window(2), "", "max_pool2d"),
    (window(2), "nn.functional.", "avg_pool2d max_pool2d max_pool2d_with_indices"),
    (window(3), "", "max_pool3d"),
    (window(3), "nn.functional.", "avg_pool3d max_pool3d max_pool3d_with_indices"),
    (cubic(3), "", """
        cholesky_inverse cholesky_solve det inverse logdet lu_unpack orgqr ormqr slogdet
        triangular_solve
    """),
    (cubic(30), "", "matrix_exp matrix_power nuclear_norm pinverse svd"),
    (cubic(3), "linalg.", """
        cholesky cholesky_ex det householder_product inv inv_ex ldl_factor ldl_factor_ex lstsq lu
        lu_factor lu_factor_ex qr slogdet solve solve_ex solve_triangular
    """),
    (cubic(30), "linalg.", """
        cond eig eigh eigvals eigvalsh matrix_exp matrix_norm matrix_power matrix_rank norm pinv
        svd svdvals
    """),
    (_tensor_inverse, "linalg.", "tensorinv tensorsolve"),
    (_transform, "", "stft Tensor.stft"),
    (_sorted, "", """
        argsort bucketize isin kthvalue median mode msort nanmedian nanquantile quantile
        searchsorted sort topk unique unique_consecutive Tensor.unique Tensor.unique_consecutive
    """),
    (_special, "", """
        digamma igamma igammac lgamma mvlgamma polygamma Tensor.polygamma Tensor.digamma_
        Tensor.igamma_ Tensor.igammac_ Tensor.lgamma_ Tensor.mvlgamma_ Tensor.polygamma_
        special.zeta special.polygamma special.multigammaln special.gammainc special.gammaincc
        special.airy_ai special.bessel_j0 special.bessel_j1 special.bessel_y0 special.bessel_y1
    """),
)  # fmt: skip

RULES: dict[str, Rule] = {
    prefix + name: rule for rule, prefix, names in _GROUPS for name in names.split()
}
