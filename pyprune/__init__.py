"""Prune PyTorch models with fused C++ and CUDA mask kernels, and end with a plain model."""

from pyprune._batch_norm import Dataset, batch_norm_adaptation
from pyprune._build_info import build_info
from pyprune._config import get_config, load_from_config
from pyprune._prune import prune
from pyprune._statistics import ModelPruningStatistic, TensorPruningStatistic, pruning_statistic
from pyprune._strip import StripFormat, strip
from pyprune.ignored_scope import IgnoredScope
from pyprune.methods import PruneMode

__version__ = build_info()["pyprune"]

__all__ = [
    "Dataset",
    "IgnoredScope",
    "ModelPruningStatistic",
    "PruneMode",
    "StripFormat",
    "TensorPruningStatistic",
    "__version__",
    "batch_norm_adaptation",
    "build_info",
    "get_config",
    "load_from_config",
    "prune",
    "pruning_statistic",
    "strip",
]
