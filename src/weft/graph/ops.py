"""The closed operation table: every function that a graph may call, by name, and what kind it is.

A name is the dotted public name below `torch`: `add`, `nn.functional.gelu`, `Tensor.T.__get__`.
The table is data: it imports no torch, resolves nothing and runs nothing (see `weft.kernels`).
A name that is not in `OPS` cannot be in a graph, whoever wrote the graph.

    OPS["softmax"].kind            # "pure"
    is_effect("Tensor.add_")       # True: it changes an argument
    EXCLUDED["Tensor.data_ptr"]    # "it reaches the memory behind a tensor"

A method that is not listed is the torch function of its name (`Tensor.softmax` is `softmax`), and
`ALIASES` names further spellings of an operation with the same call convention.

`torch.tensor`, `as_tensor` and `from_numpy` are not here: what they make is client data, which
becomes a constant of the graph.
"""

from __future__ import annotations

from msgspec import Struct

KINDS = {
    "pure": "computes its results from its arguments and changes nothing",
    "writes": "changes an argument in place",
    "random": "draws numbers",
    "random_writes": "fills an argument in place with drawn numbers",
    "factory": "makes a tensor from plain values",
    "random_factory": "makes a tensor of drawn numbers from plain values",
    "plain": "returns no tensor, and depends on shape and dtype only",
    "look": "returns numbers of the tensor, so these must be known",
    "asked": "answered by who records: the device, and whether gradients are wanted",
    "hint": "asks for a device: returns the tensor itself",
}

EFFECTS = frozenset({"writes", "random_writes"})
RANDOM = frozenset({"random", "random_writes", "random_factory"})
IN_GRAPHS = frozenset({"pure", "factory"}) | EFFECTS | RANDOM


class Op(Struct, frozen=True):
    """One operation: its name and its kind (a key of `KINDS`)."""

    name: str
    kind: str


def is_effect(name: str) -> bool:
    """Whether the operation changes an argument, so that it may not be left out or moved."""
    return OPS[name].kind in EFFECTS


def is_random(name: str) -> bool:
    """Whether the operation draws numbers."""
    return OPS[name].kind in RANDOM


# Kind, prefix, names.
_TABLE = (
    ("pure", "", """
        abs acos acosh adaptive_avg_pool1d adaptive_max_pool1d add addbmm addcdiv addcmul addmm
        addmv addr adjoint alias_copy all amax amin aminmax angle any argmax argmin argsort argwhere
        asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d baddbmm bilinear
        bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
        bitwise_xor block_diag bmm broadcast_tensors broadcast_to bucketize cartesian_prod cat cdist
        ceil celu channel_shuffle cholesky_inverse cholesky_solve chunk clamp clamp_max clamp_min
        clone column_stack complex conj_physical constant_pad_nd conv1d conv2d conv3d conv_tbc
        conv_transpose1d conv_transpose2d conv_transpose3d convolution copysign corrcoef cos cosh
        cosine_similarity count_nonzero cov cross cummax cummin cumprod cumsum cumulative_trapezoid
        deg2rad det detach detach_copy diag diag_embed diagflat diagonal diagonal_copy
        diagonal_scatter diff digamma dist div dot dsplit dstack einsum embedding eq erf erfc erfinv
        exp exp2 expand_copy expm1 fake_quantize_per_channel_affine fake_quantize_per_tensor_affine
        fill flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac frexp
        frobenius_norm full_like gather gcd ge gradient group_norm gru_cell gt hardshrink
        heaviside histc hsplit hstack hypot i0 igamma igammac imag index_add index_copy index_fill
        index_put index_reduce index_select inner inverse isclose isfinite isin isinf isnan isneginf
        isposinf isreal kron kthvalue layer_norm lcm ldexp le lerp lgamma log log10 log1p log2
        log_softmax logaddexp logaddexp2 logcumsumexp logdet logical_and logical_not logical_or
        logical_xor logit logsumexp lstm_cell lt lu_unpack masked_fill masked_scatter masked_select
        matmul matrix_exp matrix_power max max_pool1d max_pool1d_with_indices max_pool2d max_pool3d
        maximum mean median meshgrid min minimum mm mode movedim msort mul mv mvlgamma nan_to_num
        nanmean nanmedian nanquantile nansum narrow narrow_copy ne neg nextafter nonzero
        nonzero_static norm norm_except_dim nuclear_norm ones_like orgqr ormqr outer
        pairwise_distance pdist permute permute_copy pinverse pixel_shuffle pixel_unshuffle polar
        polygamma positive pow prelu prod put quantile rad2deg ravel real reciprocal relu remainder
        renorm repeat_interleave reshape resolve_conj resolve_neg rms_norm rnn_relu_cell
        rnn_tanh_cell roll rot90 round rsqrt rsub scatter scatter_add scatter_reduce searchsorted
        select select_copy select_scatter selu sgn sigmoid sign signbit sin sinc sinh slice_copy
        slice_scatter slogdet softmax sort split split_copy split_with_sizes split_with_sizes_copy
        sqrt square squeeze squeeze_copy stack std std_mean stft sub subtract sum svd swapaxes
        swapdims t t_copy take take_along_dim tan tanh tensor_split tensordot threshold tile topk
        trace transpose transpose_copy trapezoid triangular_solve tril triu trunc unbind unbind_copy
        unflatten unfold_copy unique unique_consecutive unravel_index unsqueeze unsqueeze_copy
        vander var var_mean vdot view_as_complex view_as_complex_copy view_as_real view_as_real_copy
        view_copy vsplit vstack where xlogy zeros_like
    """),
    ("pure", "Tensor.", """
        H.__get__ T.__get__ mH.__get__ mT.__get__ __getitem__ __lshift__ __reversed__ __rfloordiv__
        __rlshift__ __rmatmul__ __rmod__ __rpow__ __rrshift__ __rshift__ __rtruediv__
        bfloat16 bool broadcast_to byte cdouble cfloat chalf char contiguous count_nonzero double
        dsplit expand expand_as flip float half hsplit int long new_full new_ones new_tensor
        new_zeros norm permute polygamma repeat reshape reshape_as short split squeeze stft
        sum_to_size tile to type type_as unfold unique unique_consecutive view view_as vsplit where
    """),
    ("pure", "nn.functional.", """
        adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool1d_with_indices
        adaptive_max_pool2d adaptive_max_pool2d_with_indices adaptive_max_pool3d
        adaptive_max_pool3d_with_indices affine_grid avg_pool2d avg_pool3d batch_norm
        binary_cross_entropy binary_cross_entropy_with_logits celu cosine_embedding_loss
        cross_entropy elu embedding fold gelu glu grid_sample group_norm hardsigmoid hardswish
        hardtanh hinge_embedding_loss huber_loss instance_norm interpolate kl_div l1_loss layer_norm
        leaky_relu linear linear_cross_entropy local_response_norm log_softmax logsigmoid lp_pool1d
        lp_pool2d lp_pool3d margin_ranking_loss max_pool1d max_pool1d_with_indices max_pool2d
        max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool1d max_unpool2d
        max_unpool3d mish mse_loss multi_head_attention_forward multi_margin_loss
        multilabel_margin_loss multilabel_soft_margin_loss nll_loss normalize one_hot pad
        poisson_nll_loss relu relu6 rms_norm scaled_dot_product_attention selu silu smooth_l1_loss
        soft_margin_loss softmax softmin softplus softshrink softsign tanhshrink threshold
        triplet_margin_loss triplet_margin_with_distance_loss unfold
    """),
    ("pure", "linalg.", """
        cholesky cholesky_ex cond cross det diagonal eig eigh eigvals eigvalsh householder_product
        inv inv_ex ldl_factor ldl_factor_ex lstsq lu lu_factor lu_factor_ex matmul matrix_exp
        matrix_norm matrix_power matrix_rank multi_dot norm pinv qr slogdet solve solve_ex
        solve_triangular svd svdvals tensorinv tensorsolve vander vecdot vector_norm
    """),
    ("pure", "fft.", """
        fft fft2 fftn fftshift hfft hfft2 hfftn ifft ifft2 ifftn ifftshift ihfft ihfft2 ihfftn irfft
        irfft2 irfftn rfft rfft2 rfftn
    """),
    ("pure", "special.", """
        airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 digamma entr erf erfc erfcx erfinv
        exp2 expit expm1 gammainc gammaincc gammaln i0 i0e i1 i1e log1p log_ndtr log_softmax
        logit logsumexp modified_bessel_i0 modified_bessel_i1 modified_bessel_k0
        modified_bessel_k1 multigammaln ndtr ndtri polygamma psi round
        scaled_modified_bessel_k0 scaled_modified_bessel_k1 sinc softmax spherical_bessel_j0
        xlog1py xlogy zeta
    """),
    ("pure", "optim.", """
        ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD
    """),
    ("writes", "", """
        abs_ acos_ acosh_ addmv_ asin_ asinh_ atan_ atanh_ ceil_ celu_ clamp_ clamp_max_ clamp_min_
        conj_physical_ cos_ cosh_ deg2rad_ erf_ erfc_ exp2_ exp_ expm1_ fill_ floor_ frac_ gcd_ i0_
        index_put_ lcm_ ldexp_ log10_ log1p_ log2_ log_ logit_ nan_to_num_ neg_ rad2deg_ reciprocal_
        relu_ round_ rsqrt_ selu_ sigmoid_ sin_ sinc_ sinh_ sqrt_ square_ tan_ tanh_ threshold_
        trunc_ xlogy_ zero_
    """),
    ("writes", "nn.functional.", "elu_ hardtanh_ leaky_relu_"),
    ("writes", "Tensor.", """
        __ilshift__ __irshift__ __setitem__ imag.__set__ real.__set__
        add_ addbmm_ addcdiv_ addcmul_ addmm_ addr_ atan2_ baddbmm_ bitwise_and_ bitwise_left_shift_
        bitwise_not_ bitwise_or_ bitwise_right_shift_ bitwise_xor_ copy_ copysign_ cumprod_ cumsum_
        digamma_ div_ eq_ erfinv_ fill_diagonal_ float_power_ floor_divide_ fmod_ ge_ gt_ heaviside_
        hypot_ igamma_ igammac_ index_add_ index_copy_ index_fill_ index_reduce_ le_ lerp_ lgamma_
        logical_and_ logical_not_ logical_or_ logical_xor_ lt_ masked_fill_ masked_scatter_ mul_
        mvlgamma_ ne_ nextafter_ polygamma_ pow_ put_ remainder_ renorm_ scatter_ scatter_add_
        scatter_reduce_ sgn_ sign_ sub_ subtract_ tril_ triu_
    """),
    ("random", "", """
        bernoulli binomial multinomial normal poisson rand_like randint_like randn_like
    """),
    ("random", "nn.functional.", """
        alpha_dropout dropout dropout1d dropout2d dropout3d gumbel_softmax rrelu
    """),
    ("random_writes", "Tensor.", """
        bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_
    """),
    ("factory", "", """
        arange bartlett_window blackman_window eye full hamming_window hann_window kaiser_window
        linspace logspace ones scalar_tensor tril_indices triu_indices zeros
    """),
    ("factory", "fft.", "fftfreq rfftfreq"),
    ("random_factory", "", "rand randint randn randperm"),
    ("plain", "", """
        is_complex is_conj is_floating_point is_inference is_neg is_same_size is_signed numel
        result_type
    """),
    ("plain", "Tensor.", """
        __len__ dim dim_order dtype.__get__ element_size is_contiguous is_mkldnn.__get__
        is_nested.__get__ is_quantized.__get__ is_sparse.__get__ is_sparse_csr.__get__
        itemsize.__get__ layout.__get__ nbytes.__get__ ndim.__get__ ndimension nelement
        shape.__get__ size storage_offset stride
    """),
    ("look", "", "allclose equal is_nonzero"),
    ("look", "Tensor.", """
        __array__ __bool__ __complex__ __contains__ __float__ __index__ __int__ __long__ __nonzero__
        item numpy tolist
    """),
    ("asked", "", "get_device"),
    ("asked", "Tensor.", """
        device.__get__ is_cpu.__get__ is_cuda.__get__ is_ipu.__get__ is_leaf.__get__
        is_maia.__get__ is_meta.__get__ is_mps.__get__ is_mtia.__get__ is_pinned
        is_vulkan.__get__ is_xla.__get__ is_xpu.__get__ requires_grad.__get__
    """),
    ("hint", "Tensor.", "cpu cuda ipu mtia pin_memory xpu"),
)  # fmt: skip

# Other spellings: prefix of both sides, then `spellings = name` per line. Two change the meaning:
# `empty` and its kin are zeros here, and `conj` computes at once (no lazily conjugated views).
_ALIASES = (
    ("", """
        absolute = abs
        arccos = acos
        arccosh = acosh
        arcsin = asin
        arcsinh = asinh
        arctan = atan
        arctan2 = atan2
        arctanh = atanh
        clip = clamp
        concat concatenate = cat
        conj = conj_physical
        divide true_divide = div
        empty = zeros
        empty_like = zeros_like
        fix = trunc
        ger = outer
        greater = gt
        greater_equal = ge
        less = lt
        less_equal = le
        moveaxis = movedim
        multiply = mul
        negative = neg
        not_equal = ne
        row_stack = vstack
        trapz = trapezoid
        arccos_ = acos_
        arccosh_ = acosh_
        arcsin_ = asin_
        arcsinh_ = asinh_
        arctan_ = atan_
        arctanh_ = atanh_
        clip_ = clamp_
        fix_ = trunc_
        negative_ = neg_
    """),
    ("Tensor.", """
        new_empty = new_zeros
        __idiv__ __itruediv__ divide_ true_divide_ = div_
        __iadd__ = add_
        __iand__ = bitwise_and_
        __ifloordiv__ = floor_divide_
        __imod__ = remainder_
        __imul__ multiply_ = mul_
        __ior__ = bitwise_or_
        __ipow__ = pow_
        __isub__ = sub_
        __ixor__ = bitwise_xor_
        __rdiv__ = __rtruediv__
        arctan2_ = atan2_
        greater_ = gt_
        greater_equal_ = ge_
        less_ = lt_
        less_equal_ = le_
        not_equal_ = ne_
    """),
)  # fmt: skip

# Methods that are a torch function under another name.
_METHODS = """
    __abs__ = abs
    __add__ __radd__ = add
    __and__ __rand__ = bitwise_and
    __div__ __truediv__ = div
    __eq__ = eq
    __floordiv__ = floor_divide
    __ge__ = ge
    __gt__ = gt
    __invert__ = bitwise_not
    __iter__ = unbind
    __le__ = le
    __lt__ = lt
    __matmul__ = matmul
    __mod__ = remainder
    __mul__ __rmul__ = mul
    __ne__ = ne
    __neg__ = neg
    __or__ __ror__ = bitwise_or
    __pos__ = positive
    __pow__ = pow
    __rsub__ = rsub
    __sub__ = sub
    __xor__ __rxor__ = bitwise_xor
    absolute_ = abs_
    data.__get__ = detach
    imag.__get__ = imag
    real.__get__ = real
"""

# Reason, prefix, names. A reason continues the sentence "torch.<name> cannot be recorded: ...".
_EXCLUDED = (
    ("it hands back memory that nothing has written; use torch.zeros", "", """
        empty_permuted empty_quantized empty_strided Tensor.new Tensor.new_empty_strided
    """),
    ("it reaches the memory behind a tensor", "Tensor.", """
        __cuda_array_interface__.__get__ __dlpack__ __dlpack_device__ _base.__get__ _cdata.__get__
        _version.__get__ const_data_ptr data_ptr is_set_to is_shared record_stream set_
        share_memory_ storage storage_type untyped_storage
    """),
    ("it can reach memory beside the tensor; use unfold or indexing", "", """
        as_strided as_strided_ as_strided_copy as_strided_scatter
    """),
    ("it uses numbers as addresses without checking them", "", """
        ctc_loss embedding_bag lu_solve linalg.lu_solve linalg.ldl_solve nn.functional.ctc_loss
        nn.functional.embedding_bag
    """),
    ("the size of its result is not bounded by its arguments", "", "combinations histogramdd"),
    ("it runs for as long as a number in its arguments says", "special.", """
        chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v
        chebyshev_polynomial_w hermite_polynomial_h hermite_polynomial_he
        laguerre_polynomial_l legendre_polynomial_p shifted_chebyshev_polynomial_t
        shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v
        shifted_chebyshev_polynomial_w
    """),
    ("it changes the tensor's own shape; use the twin without the underscore", "Tensor.", """
        resize resize_ resize_as squeeze_ swapaxes_ swapdims_ t_ transpose_ unsqueeze_
    """),
    ("it changes the tensor's own shape; use a new tensor", "", """
        resize_as_ resize_as_sparse_ Tensor.sparse_resize_ Tensor.sparse_resize_and_clear_
    """),
    ("it rebinds the tensor; use copy_", "Tensor.", "data.__set__ module_load"),
    ("a graph keeps no history of a value; use .grad, .backward() and torch.autograd.grad", "", """
        detach_ Tensor.backward Tensor.grad.__get__ Tensor.grad.__set__ Tensor.grad_dtype.__get__
        Tensor.grad_fn.__get__ Tensor._grad.__get__ Tensor._grad_fn.__get__ Tensor.output_nr.__get__
        Tensor.requires_grad.__set__ Tensor.requires_grad_ Tensor.retain_grad
        Tensor.retains_grad.__get__
    """),
    ("a graph is data and carries no function to call", "Tensor.", """
        _backward_hooks.__get__ _post_accumulate_grad_hooks.__get__ apply_ map2_ map_ register_hook
        register_post_accumulate_grad_hook
    """),
    ("a graph is data and is never pickled", "Tensor.", "__reduce_ex__ __setstate__"),
    ("it is part of the Python object, not of the tensor", "Tensor.", """
        __array_wrap__ __deepcopy__ __delitem__ __dir__ __format__ __hash__ __repr__ __str__
        _clear_non_serializable_cached_data _is_view as_subclass name.__get__ volatile.__get__
    """),
    ("it draws numbers that no key reaches; use the dropouts of nn.functional", "", """
        alpha_dropout alpha_dropout_ dropout dropout_ feature_alpha_dropout feature_alpha_dropout_
        feature_dropout feature_dropout_ native_dropout nn.functional.feature_alpha_dropout
    """),
    ("it draws numbers that no key reaches", "", """
        lobpcg nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool2d_with_indices
        nn.functional.fractional_max_pool3d nn.functional.fractional_max_pool3d_with_indices
        pca_lowrank rrelu rrelu_ svd_lowrank
    """),
    ("it looks at numbers inside; write the formula out", "", "nn.functional.gaussian_nll_loss"),
    ("whole recurrent layers are not in the table; use the cells in a loop", "", """
        gru lstm rnn_relu rnn_tanh
    """),
    ("it is the inside of a public function; call that of nn.functional", "", """
        affine_grid_generator batch_norm batch_norm_backward_elemt batch_norm_backward_reduce
        batch_norm_elemt batch_norm_gather_stats batch_norm_gather_stats_with_counts
        batch_norm_stats batch_norm_update_stats binary_cross_entropy_with_logits
        cosine_embedding_loss embedding_renorm_ grid_sampler grid_sampler_2d grid_sampler_3d
        hinge_embedding_loss instance_norm kl_div margin_ranking_loss native_batch_norm
        native_channel_shuffle native_group_norm native_layer_norm native_norm
        nn.functional._sym_int poisson_nll_loss triplet_margin_loss
    """),
    ("it is an internal function of one backend", "", """
        cudnn_affine_grid_generator cudnn_batch_norm cudnn_convolution cudnn_convolution_add_relu
        cudnn_convolution_relu cudnn_convolution_transpose cudnn_grid_sampler
        fbgemm_linear_fp16_weight fbgemm_linear_fp16_weight_fp32_activation
        fbgemm_linear_int8_weight
        fbgemm_linear_int8_weight_fp32_activation fbgemm_linear_quantize_weight
        fbgemm_pack_gemm_matrix_fp16 fbgemm_pack_quantized_matrix miopen_batch_norm
        miopen_convolution miopen_convolution_add_relu miopen_convolution_relu
        miopen_convolution_transpose miopen_ctc_loss miopen_depthwise_convolution miopen_rnn
        mkldnn_adaptive_avg_pool2d mkldnn_convolution mkldnn_linear_backward_weights
        mkldnn_max_pool2d mkldnn_max_pool3d mkldnn_rnn_layer slice_inverse
        Tensor._autocast_to_full_precision Tensor._autocast_to_reduced_precision Tensor.to_mkldnn
    """),
    ("quantised tensors are not in the table", "", """
        choose_qparams_optimized dequantize fused_moving_avg_obs_fake_quant int_repr
        q_per_channel_axis q_per_channel_scales q_per_channel_zero_points q_scale q_zero_point
        quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic quantized_batch_norm
        quantized_gru quantized_gru_cell quantized_lstm quantized_lstm_cell quantized_max_pool1d
        quantized_max_pool2d quantized_max_pool3d quantized_rnn_relu_cell quantized_rnn_tanh_cell
        Tensor.qscheme
    """),
    ("only dense tensors are in the table", "", """
        ccol_indices_copy col_indices_copy crow_indices_copy hspmm indices_copy row_indices_copy smm
        sspaddmm values_copy sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor
        sparse_coo_tensor sparse_csc_tensor sparse_csr_tensor
    """),
    ("only dense tensors are in the table", "Tensor.", """
        _coalesced_ _dimI _dimV _indices _nnz _sparse_mask_projection _to_dense _values ccol_indices
        coalesce col_indices crow_indices dense_dim indices is_coalesced row_indices sparse_dim
        sparse_mask to_dense to_sparse to_sparse_bsc to_sparse_bsr to_sparse_coo to_sparse_csc
        to_sparse_csr values
    """),
    ("nested tensors are not in the table", "Tensor.", """
        _nested_tensor_size _nested_tensor_storage_offsets _nested_tensor_strides to_padded_tensor
    """),
    ("dimensions with names are not in the table", "Tensor.", """
        align_as align_to index names.__get__ names.__set__ refine_names rename rename_
    """),
    ("symbolic numbers never meet a recorded value", "", """
        sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum
    """),
    ("tensors lie on one device here", "", "is_distributed Tensor.is_distributed"),
    ("it is a state of the process; cast the tensor instead", "", "autocast"),
    ("it is old; use linalg.multi_dot", "", "chain_matmul"),
    ("it is old; use linalg.cholesky", "", "cholesky"),
    ("it is old; use linalg.qr", "", "qr"),
    ("it is old; use linalg.lu_factor", "", "lu Tensor.lu"),
    ("it is old and gone from torch; use the twin in linalg", "", """
        eig lstsq matrix_rank solve symeig Tensor.eig Tensor.lstsq Tensor.solve Tensor.symeig
    """),
    ("it is old; use torch.arange", "", "range"),
    ("it gives views that autograd does not follow; use the twin without unsafe", "", """
        unsafe_chunk unsafe_split unsafe_split_with_sizes
    """),
    ("it has no rule for the shape of its result", "", """
        geqrf hash_tensor histogram istft Tensor.hash_tensor Tensor.istft
    """),
)  # fmt: skip


def _ops() -> dict[str, Op]:
    """`_TABLE` as one dict; a name stands in it once."""
    names = [(prefix + name, kind) for kind, prefix, text in _TABLE for name in text.split()]
    ops = {name: Op(name, kind) for name, kind in names}
    assert len(ops) == len(names), "a name stands twice in the operation table"
    return ops


def _aliases() -> dict[str, str]:
    """Spelling to name of the table."""
    rows = [(prefix, prefix, text) for prefix, text in _ALIASES] + [("Tensor.", "", _METHODS)]
    found = {}
    for prefix, target, text in rows:
        for line in text.strip().splitlines():
            spellings, name = line.split("=")
            found.update({prefix + word: target + name.strip() for word in spellings.split()})
    return found


OPS: dict[str, Op] = _ops()
ALIASES: dict[str, str] = _aliases()
EXCLUDED: dict[str, str] = {
    prefix + name: reason for reason, prefix, text in _EXCLUDED for name in text.split()
}
