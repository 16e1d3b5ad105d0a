"""Prune PyTorch models with fused C++ and CUDA mask kernels, and end with a plain model."""

from pyprune._ac_dc import AcDcPruner, ac_dc
from pyprune._batch_norm import batch_norm_adaptation
from pyprune._build_info import build_info
from pyprune._calibrate import calibrate
from pyprune._config import get_config, load_from_config
from pyprune._gmp import gmp
from pyprune._iterative import IterativeResult, PruningRound, iterative_prune, lottery_ticket
from pyprune._keep_sparse import KeepSparse, keep_sparse
from pyprune._losses import L0Loss, LagrangianLoss, RBLoss
from pyprune._movement import MovementPruner
from pyprune._optimizer import check_optimizer, gate_parameters, weight_parameters
from pyprune._prune import prune
from pyprune._pruner import Pruner
from pyprune._recipe_pruner import RecipePruner
from pyprune._rigl import RigLPruner
from pyprune._schedulers import (
    ExponentialMagnitudePruningScheduler,
    ExponentialRBPruningScheduler,
    MultiStepMagnitudePruningScheduler,
    MultiStepRBPruningScheduler,
)
from pyprune._sensitivity import sensitivity
from pyprune._slimming import slimming_loss
from pyprune._snip import snip
from pyprune._statistics import ModelPruningStatistic, TensorPruningStatistic, pruning_statistic
from pyprune._strip import StripFormat, strip
from pyprune.batches import Dataset
from pyprune.calibration import Calibration
from pyprune.gates import HardConcreteGate, StochasticGate
from pyprune.ignored_scope import IgnoredScope
from pyprune.methods import Method, PruneMode
from pyprune.passes import one_gate_sample
from pyprune.recipes import Recipe
from pyprune.schedules import Schedule
from pyprune.sensitivity_allocation import allocation_from_sensitivity
from pyprune.sensitivity_result import SensitivityResult, SensitivityTarget

__version__ = build_info()["pyprune"]

__all__ = [
    "AcDcPruner",
    "Calibration",
    "Dataset",
    "ExponentialMagnitudePruningScheduler",
    "ExponentialRBPruningScheduler",
    "HardConcreteGate",
    "IgnoredScope",
    "IterativeResult",
    "KeepSparse",
    "L0Loss",
    "LagrangianLoss",
    "Method",
    "ModelPruningStatistic",
    "MovementPruner",
    "MultiStepMagnitudePruningScheduler",
    "MultiStepRBPruningScheduler",
    "PruneMode",
    "Pruner",
    "PruningRound",
    "RBLoss",
    "Recipe",
    "RecipePruner",
    "RigLPruner",
    "Schedule",
    "SensitivityResult",
    "SensitivityTarget",
    "StochasticGate",
    "StripFormat",
    "TensorPruningStatistic",
    "__version__",
    "ac_dc",
    "allocation_from_sensitivity",
    "batch_norm_adaptation",
    "build_info",
    "calibrate",
    "check_optimizer",
    "gate_parameters",
    "get_config",
    "gmp",
    "iterative_prune",
    "keep_sparse",
    "load_from_config",
    "lottery_ticket",
    "one_gate_sample",
    "prune",
    "pruning_statistic",
    "sensitivity",
    "slimming_loss",
    "snip",
    "strip",
    "weight_parameters",
]
