"""The table of rules, by the names of ATen's operators, without a trailing underscore.

Whatever is tagged as pointwise by torch has the rule for that. What has none keeps the sizes of all that it touches,
and is named.
"""

from collections.abc import Callable

from pyprune.structured.rules import (
    attention,
    convolutions,
    elementwise,
    images,
    indexing,
    moves,
    norms,
    pieces,
    products,
    views,
)
from pyprune.structured.rules.call import Call, Result

Rule = Callable[[Call], Result]


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_rules(
        elementwise.pointwise,
        "copy gelu silu hardswish hardsigmoid hardtanh leaky_relu elu celu selu mish softplus threshold "
        "masked_fill where lerp addcmul addcdiv native_dropout dropout prelu _prelu_kernel rrelu "
        "rrelu_with_noise clamp floor_divide remainder masked_scatter isnan isinf isfinite nan_to_num "
        "log_sigmoid_forward fake_quantize_per_tensor_affine_cachemask",
    ),
    **_rules(
        elementwise.numbers,
        "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full "
        "new_empty empty_strided new_empty_strided zero fill scalar_tensor empty_permuted",
    ),
    **_rules(elementwise.ranges, "arange linspace logspace eye tril_indices triu_indices lift_fresh lift_fresh_copy"),
    **_rules(
        elementwise.none_of_them,
        "is_nonzero equal _local_scalar_dense bernoulli rand randn randint rand_like "
        "randn_like uniform normal bucketize searchsorted unique_consecutive _unique2 unique_dim bincount "
        "histc random exponential randperm _assert_async _assert_scalar sym_size allclose isclose",
    ),
    **_rules(products.mm, "mm"),
    **_rules(products.addmm, "addmm _addmm_activation"),
    **_rules(products.mv, "mv"),
    **_rules(products.addmv, "addmv"),
    **_rules(products.dot, "dot vdot"),
    **_rules(products.bmm, "bmm"),
    **_rules(products.baddbmm, "baddbmm"),
    **_rules(products.grouped_mm, "_grouped_mm"),
    **_rules(convolutions.convolution, "convolution _convolution convolution_overrideable"),
    **_rules(
        attention.attention,
        "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention",
    ),
    **_rules(
        norms.batch_norm,
        "native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
        "_batch_norm_with_update _batch_norm_no_update miopen_batch_norm",
    ),
    **_rules(norms.layer_norm, "native_layer_norm _fused_rms_norm rms_norm"),
    **_rules(norms.weight_norm, "_weight_norm_interface _weight_norm"),
    **_rules(norms.group_norm, "native_group_norm"),
    **_rules(
        norms.reduction,
        "mean var std var_mean std_mean amax amin aminmax max min logsumexp prod all median nanmedian mode",
    ),
    **_rules(norms.summation, "sum any linalg_vector_norm norm nansum count_nonzero"),
    **_rules(
        norms.along_axis,
        "softmax _softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin _fft_r2c "
        "_fft_c2c _fft_c2r",
    ),
    **_rules(norms.held_axis, "sort topk argsort kthvalue"),
    **_rules(norms.positions, "argmax argmin nonzero multinomial"),
    **_rules(views.view, "view _unsafe_view reshape _reshape_alias _reshape_copy view_copy"),
    **_rules(
        views.same,
        "clone detach alias _to_copy contiguous to _conj resolve_conj resolve_neg conj_physical _fw_primal "
        "positive copy_to lift _neg_view alias_copy detach_copy _nested_tensor_from_mask pin_memory",
    ),
    **_rules(moves.transpose, "t transpose swapaxes t_copy transpose_copy adjoint"),
    **_rules(moves.permute, "permute permute_copy"),
    **_rules(moves.unsqueeze, "unsqueeze unsqueeze_copy"),
    **_rules(moves.squeeze, "squeeze squeeze_copy"),
    **_rules(moves.expand, "expand expand_copy"),
    **_rules(moves.repeat, "repeat"),
    **_rules(moves.repeat_interleave, "repeat_interleave"),
    **_rules(moves.flip, "flip"),
    **_rules(moves.roll, "roll"),
    **_rules(moves.same_memory, "as_strided as_strided_copy"),
    **_rules(
        pieces.split,
        "split split_with_sizes unsafe_split unsafe_split_with_sizes split_copy tensor_split chunk",
    ),
    **_rules(pieces.take_slice, "slice slice_copy narrow"),
    **_rules(pieces.select, "select select_copy"),
    **_rules(pieces.unbind, "unbind unbind_copy"),
    **_rules(pieces.halves, "glu"),
    **_rules(pieces.concatenate, "cat concat"),
    **_rules(pieces.stack, "stack"),
    **_rules(
        pieces.pad,
        "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
        "replication_pad2d replication_pad3d",
    ),
    **_rules(images.pixel_shuffle, "pixel_shuffle"),
    **_rules(images.pixel_unshuffle, "pixel_unshuffle"),
    **_rules(images.im2col, "im2col"),
    **_rules(images.col2im, "col2im"),
    **_rules(images.channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **_rules(views.unfold_axis, "unfold unfold_copy"),
    **_rules(images.to_real, "view_as_real"),
    **_rules(images.to_complex, "view_as_complex"),
    **_rules(
        images.image,
        "max_pool2d_with_indices max_pool3d_with_indices max_pool1d avg_pool1d avg_pool2d avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d "
        "adaptive_avg_pool1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
        "upsample_bicubic2d upsample_trilinear3d upsample_linear1d _upsample_nearest_exact1d "
        "_upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
        "grid_sampler_2d grid_sampler_3d fractional_max_pool2d max_pool2d mkldnn_max_pool2d "
        "_adaptive_avg_pool2d_backward cudnn_grid_sampler max_unpool2d",
    ),
    **_rules(indexing.embedding, "embedding"),
    **_rules(indexing.embedding_bag, "_embedding_bag _embedding_bag_forward_only"),
    **_rules(indexing.index, "index _unsafe_index"),
    **_rules(indexing.index_select, "index_select"),
    **_rules(indexing.gather, "gather"),
    **_rules(indexing.scatter, "scatter scatter_add scatter_reduce index_add index_copy index_reduce index_fill"),
    **_rules(indexing.index_put, "index_put _index_put_impl _unsafe_index_put"),
}
