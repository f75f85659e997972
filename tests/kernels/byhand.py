"""Calls of the operations that PyTorch's own operator tests leave out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from weft.graph.ops import OPS

from .opdb import Sample

Args = tuple[Any, ...]


def calls() -> Iterator[Sample]:
    """Every call below, as `Sample`s."""
    torch.manual_seed(1)
    for name, args, kwargs in (
        *_pure(),
        *_optimizers(),
        *_writes(),
        *_random(),
        *_factories(),
        *_plain(),
    ):
        yield Sample(name, args, kwargs, "by hand")


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _c(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64)


def _pure() -> Iterator[tuple[str, Args, dict[str, Any]]]:
    whole = torch.arange(1, 7).reshape(2, 3)
    yield from (
        ("adaptive_max_pool1d", (_x(2, 3, 8), 4), {}),
        ("nn.functional.adaptive_max_pool1d", (_x(2, 3, 8), 4), {}),
        ("nn.functional.adaptive_max_pool2d", (_x(2, 3, 8, 8), 4), {"return_indices": True}),
        ("nn.functional.adaptive_max_pool3d", (_x(2, 3, 8, 8, 8), 4), {}),
        ("tensor_split", (_x(5, 2), 2), {}),
        ("einsum", ("bij,bjk->bik", _x(2, 3, 4), _x(2, 4, 5)), {}),
        ("unbind", (_x(3, 2),), {}),
        ("celu", (_x(3),), {}),
        ("subtract", (_x(3), 2), {}),
        ("conv_tbc", (_x(5, 2, 3), _x(3, 3, 4), _x(4)), {}),
        ("convolution", (_x(1, 2, 5), _x(3, 2, 2), None, (1,), (0,), (1,), False, (0,), 1), {}),
        ("convolution", (_x(1, 2, 5), _x(2, 3, 2), None, (1,), (0,), (1,), True, (0,), 1), {}),
        ("detach_copy", (_x(2, 3).t(),), {}),
        ("embedding", (_x(5, 3), torch.tensor([[0, 4]])), {}),
        ("fake_quantize_per_tensor_affine", (_x(4), 0.1, 0, -128, 127), {}),
        ("frobenius_norm", (_x(2, 3), [1], False), {}),
        ("nuclear_norm", (_x(3, 3),), {}),
        ("norm_except_dim", (_x(2, 3),), {}),
        ("relu", (_x(2, 3),), {}),
        ("selu", (_x(3),), {}),
        ("select_copy", (_x(2, 3), 0, 1), {}),
        ("slice_copy", (_x(2, 3), 1, 0, 2), {}),
        ("split_copy", (_x(4, 3), 2), {}),
        ("slogdet", (_x(3, 3),), {}),
        ("threshold", (_x(3), 0.0, 1.0), {}),
        ("vander", (_x(3),), {}),
        ("view_as_complex_copy", (_x(3, 2),), {}),
        ("view_as_real_copy", (_c(3),), {}),
        ("gru_cell", (_x(2, 3), _x(2, 4), _x(12, 3), _x(12, 4)), {}),
        ("rnn_relu_cell", (_x(2, 3), _x(2, 4), _x(4, 3), _x(4, 4)), {}),
        ("rnn_tanh_cell", (_x(2, 3), _x(2, 4), _x(4, 3), _x(4, 4)), {}),
        ("lstm_cell", (_x(2, 3), (_x(2, 4), _x(2, 4)), _x(16, 3), _x(16, 4)), {}),
        ("max_pool1d", (_x(2, 3, 8), 2), {}),
        ("max_pool1d_with_indices", (_x(2, 3, 8), 2), {}),
        ("max_pool2d", (_x(2, 3, 8, 8), 2), {}),
        ("max_pool3d", (_x(2, 3, 4, 4, 4), 2), {}),
        ("Tensor.__reversed__", (_x(2, 3),), {}),
        ("Tensor.__rfloordiv__", (_x(2, 3), 2.0), {}),
        ("Tensor.__rlshift__", (whole, 2), {}),
        ("Tensor.__rrshift__", (whole, 64), {}),
        ("Tensor.new_tensor", (_x(2), [1.0, 2.0]), {}),
        ("Tensor.type", (_x(2), torch.int64), {}),
        ("Tensor.type_as", (_x(2), whole), {}),
        ("nn.functional.affine_grid", (_x(2, 2, 3), [2, 1, 4, 4]), {}),
        ("nn.functional.fold", (_x(1, 4, 9), (4, 4), (2, 2)), {}),
        ("nn.functional.lp_pool1d", (_x(2, 3, 8), 2.0, 2), {}),
        ("nn.functional.lp_pool2d", (_x(2, 3, 8, 8), 2.0, 2), {}),
        ("nn.functional.lp_pool3d", (_x(2, 3, 4, 4, 4), 2.0, 2), {}),
        ("nn.functional.batch_norm", (_x(2, 3), _x(3), _x(3).abs()), {}),
        ("nn.functional.instance_norm", (_x(2, 3, 4),), {}),
        ("nn.functional.scaled_dot_product_attention", (_x(1, 2, 5, 4),) * 3, {"is_causal": True}),
        ("Tensor.__getitem__", (_x(4, 3), (slice(None), torch.tensor([0, 2]))), {}),
        ("Tensor.__getitem__", (_x(4, 3), (None, ..., -1)), {}),
        ("repeat_interleave", (_x(3), torch.tensor([1, 0, 2])), {"output_size": 3}),
    )
    scales, zeros = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    yield "fake_quantize_per_channel_affine", (_x(2, 3), scales, zeros, 0, -128, 127), {}


def _optimizers() -> Iterator[tuple[str, Args, dict[str, Any]]]:
    """Steps from nothing, and from the state that a step by hand has left."""
    for name in [one for one in OPS if one.startswith("optim.")]:
        kind = getattr(torch.optim, name[6:])
        p, g, options = _x(2, 3), _x(2, 3), {"lr": 0.1, "weight_decay": 0.01}
        if name == "optim.Rprop":
            del options["weight_decay"]
        if name == "optim.SGD":
            options["momentum"] = 0.9
        yield name, ([p], [g], [[]]), options
        by_hand = p.clone()
        by_hand.grad = g
        optimizer = kind([by_hand], **options)
        optimizer.step()
        yield name, ([by_hand], [g], [[*optimizer.state[by_hand].values()]]), options


def _writes() -> Iterator[tuple[str, Args, dict[str, Any]]]:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    yield from (
        ("celu_", (_x(3),), {}),
        ("Tensor.subtract_", (_x(3), 2), {}),
        ("relu_", (_x(2, 3).t(),), {}),
        ("selu_", (_x(3),), {}),
        ("threshold_", (_x(3), 0.0, 1.0), {}),
        ("nn.functional.elu_", (_x(3),), {}),
        ("nn.functional.hardtanh_", (_x(3),), {}),
        ("nn.functional.leaky_relu_", (_x(3),), {}),
        ("Tensor.__setitem__", (_x(2, 3), (slice(None), -1), 0.0), {}),
        ("Tensor.__setitem__", (_x(2, 3), (0, torch.tensor([0, 2])), _x(2)), {}),
        ("Tensor.__setitem__", (_x(2, 3), mask, 1.0), {}),
        ("Tensor.__setitem__", (_x(2, 3), mask, _x(3)), {}),
        ("Tensor.__setitem__", (_x(2, 3, 4), mask, _x(3, 4)), {}),
        ("Tensor.__setitem__", (_x(5, 2), (mask[0].repeat(2)[:5], 1), _x(3)), {}),
        ("Tensor.__setitem__", (_x(2, 3), ..., _x(3)), {}),
        ("index_put_", (_x(2, 3), (mask,), torch.tensor(1.0)), {}),
        ("Tensor.imag.__set__", (_c(3), _x(3)), {}),
        ("Tensor.real.__set__", (_c(3), _x(3)), {}),
        ("Tensor.fill_diagonal_", (_x(3, 3), 1.0), {}),
        ("Tensor.float_power_", (_x(3).double(), 2), {}),
        ("zero_", (_x(3),), {}),
    )


def _random() -> Iterator[tuple[str, Args, dict[str, Any]]]:
    yield from (
        ("binomial", (torch.full((3,), 9.0), torch.full((3,), 0.5)), {}),
        ("poisson", (torch.full((30,), 9.0),), {}),
        ("rand_like", (_x(4, 5),), {}),
        ("rand_like", (_x(4, 5),), {"dtype": torch.float64}),
        ("randn_like", (_x(4, 5).t(),), {}),
        ("randint_like", (_x(4, 5), 9), {}),
        ("randint_like", (_x(4, 5), 2, 9), {}),
        ("normal", (0.0, 1.0, (4, 5)), {}),
        ("normal", (_x(9), torch.full((9,), 2.0)), {}),
        ("bernoulli", (torch.full((40,), 0.5),), {}),
        ("multinomial", (torch.rand(3, 20), 4), {}),
        ("nn.functional.dropout", (_x(4, 5),), {}),
        ("nn.functional.dropout", (_x(4, 5), 0.3), {}),
        ("nn.functional.dropout1d", (_x(8, 5),), {}),
        ("nn.functional.dropout1d", (_x(2, 8, 5),), {}),
        ("nn.functional.dropout2d", (_x(2, 8, 5, 3),), {}),
        ("nn.functional.dropout3d", (_x(2, 8, 5, 3, 2),), {}),
        ("nn.functional.dropout3d", (_x(8, 5, 3, 2),), {}),
        ("nn.functional.alpha_dropout", (_x(4, 5),), {"training": True}),
        ("nn.functional.gumbel_softmax", (_x(4, 5),), {}),
        ("nn.functional.gumbel_softmax", (_x(4, 5),), {"hard": True}),
        ("nn.functional.rrelu", (_x(4, 5),), {"training": True}),
        ("Tensor.bernoulli_", (_x(40),), {}),
        ("Tensor.random_", (_x(4, 5), 100), {}),
    )
    for name in ("uniform_", "normal_", "cauchy_", "exponential_", "log_normal_"):
        yield f"Tensor.{name}", (_x(4, 5),), {}
    yield "Tensor.geometric_", (_x(40), 0.1), {}


def _factories() -> Iterator[tuple[str, Args, dict[str, Any]]]:
    for name in ("bartlett", "blackman", "hamming", "hann", "kaiser"):
        yield f"{name}_window", (5,), {}
    yield from (
        ("fft.fftfreq", (5,), {}),
        ("fft.rfftfreq", (5,), {}),
        ("rand", (4, 5), {}),
        ("randn", ((4, 5),), {}),
        ("randint", (0, 1000, (4, 5)), {}),
        ("randperm", (30,), {}),
    )


def _plain() -> Iterator[tuple[str, Args, dict[str, Any]]]:
    for op in OPS.values():
        if op.kind == "plain":
            pair = op.name in ("is_same_size", "result_type")
            yield op.name, (_x(2, 3).t(),) * (2 if pair else 1), {}
