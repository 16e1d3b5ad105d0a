"""The operators: the only users of ``torch.ops.pyprune``."""

from pyprune.ops._library import CUDA_KERNELS_LOADED, CUDA_PROBLEM, WEIGHT_DTYPES
from pyprune.ops.count_zeros import count_zeros
from pyprune.ops.fold import fold
from pyprune.ops.norms import norms
from pyprune.ops.threshold import threshold

__all__ = ["CUDA_KERNELS_LOADED", "CUDA_PROBLEM", "WEIGHT_DTYPES", "count_zeros", "fold", "norms", "threshold"]
