"""The operators: the only users of ``torch.ops.pyprune``."""

from pyprune.ops._blocks import unit_shape
from pyprune.ops._library import CUDA_KERNELS_LOADED, CUDA_PROBLEM, WEIGHT_DTYPES, check_bases
from pyprune.ops.count_zeros import count_zeros
from pyprune.ops.cut import Cut, cut
from pyprune.ops.drop import drop
from pyprune.ops.expand import expand
from pyprune.ops.fold import fold
from pyprune.ops.gate import bernoulli_gate, check_gate_shape, check_hard_concrete, hard_concrete_gate
from pyprune.ops.gate_noise import gate_noise
from pyprune.ops.gate_penalty import gate_penalty
from pyprune.ops.group_masks import group_masks
from pyprune.ops.mask_weight import mask_weight
from pyprune.ops.norms import inverse_norms, norms
from pyprune.ops.pack import PACK_DTYPES, pack, unpack
from pyprune.ops.pack_sparse import (
    SPARSE_DTYPES,
    SPARSE_LAYOUTS,
    SparseWeight,
    check_sparse,
    pack_sparse,
    pack_sparse_bits,
    unpack_sparse,
)
from pyprune.ops.park import park, unpark
from pyprune.ops.probe import probe
from pyprune.ops.sparse_linear import ACTIVATIONS, sparse_linear
from pyprune.ops.sparsegpt_block import sparsegpt_block
from pyprune.ops.threshold import threshold
from pyprune.ops.unit_scores import unit_scores

__all__ = [
    "ACTIVATIONS",
    "CUDA_KERNELS_LOADED",
    "CUDA_PROBLEM",
    "PACK_DTYPES",
    "SPARSE_DTYPES",
    "SPARSE_LAYOUTS",
    "WEIGHT_DTYPES",
    "Cut",
    "SparseWeight",
    "bernoulli_gate",
    "check_bases",
    "check_gate_shape",
    "check_hard_concrete",
    "check_sparse",
    "count_zeros",
    "cut",
    "drop",
    "expand",
    "fold",
    "gate_noise",
    "gate_penalty",
    "group_masks",
    "hard_concrete_gate",
    "inverse_norms",
    "mask_weight",
    "norms",
    "pack",
    "pack_sparse",
    "pack_sparse_bits",
    "park",
    "probe",
    "sparse_linear",
    "sparsegpt_block",
    "threshold",
    "unit_scores",
    "unit_shape",
    "unpack",
    "unpack_sparse",
    "unpark",
]
