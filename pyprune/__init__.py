"""Prune PyTorch models with fused C++ and CUDA mask kernels, and end with a plain model."""

from pyprune import integrations, ops, torch_prune
from pyprune.analysis.benchmark import benchmark
from pyprune.analysis.benchmark_result import BenchmarkResult, ModelBenchmark
from pyprune.analysis.sensitivity import sensitivity
from pyprune.analysis.sensitivity_allocation import allocation_from_sensitivity
from pyprune.analysis.sensitivity_result import SensitivityResult, SensitivityTarget
from pyprune.calibration.batch_norm import batch_norm_adaptation
from pyprune.calibration.batches import Dataset
from pyprune.calibration.calibrate import Calibration, calibrate
from pyprune.methods import granularity, importance, schedules, scope
from pyprune.methods.method import Method, PruneMode
from pyprune.methods.schedules import Schedule
from pyprune.modules.averages import reapply
from pyprune.modules.config import get_config, load_from_config, upgrade_checkpoint
from pyprune.modules.forward_pass import attach_gate, one_gate_sample
from pyprune.modules.gates import HardConcreteGate, StochasticGate
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.optimizer import check_optimizer, gate_parameters, weight_parameters
from pyprune.modules.statistics import pruning_statistic
from pyprune.modules.statistics_result import ModelPruningStatistic, TensorPruningStatistic
from pyprune.modules.strip import StripFormat, strip
from pyprune.oneshot import allocations, solvers
from pyprune.oneshot.one_shot_result import OneShotResult, PrunedWeight
from pyprune.oneshot.prune_checkpoint import prune_checkpoint
from pyprune.oneshot.prune_one_shot import prune_one_shot
from pyprune.oneshot.prune_with_gradients import prune_with_gradients
from pyprune.oneshot.retrain_free import prune_retrain_free
from pyprune.oneshot.retrain_free_result import RetrainFree
from pyprune.ops.build_info import build_info
from pyprune.recipes.recipe import Recipe
from pyprune.recipes.recipe_pruner import RecipePruner
from pyprune.runtime.accelerate import accelerate
from pyprune.runtime.accelerated import Accelerated, AcceleratedLayer
from pyprune.runtime.densify import densify
from pyprune.runtime.load_accelerated import load_accelerated
from pyprune.selection.prune import prune
from pyprune.selection.thresholds import ratios_below
from pyprune.sparse.load_sparse import load_sparse
from pyprune.sparse.reading import SparseFile
from pyprune.sparse.save_sparse import save_sparse
from pyprune.sparse.writing import Written
from pyprune.structured.block_scores import block_scores
from pyprune.structured.drop_blocks import drop_blocks
from pyprune.structured.drop_experts import drop_experts
from pyprune.structured.dropped import Dropped
from pyprune.structured.expert_scores import expert_scores
from pyprune.structured.groups import coupled_groups
from pyprune.structured.plan import Plan
from pyprune.structured.rebuild import rebuild
from pyprune.structured.reconstruct import reconstruct
from pyprune.structured.reconstructed import Reconstructed
from pyprune.structured.reconstruction_scores import reconstruction_scores
from pyprune.structured.remembered import plan_of
from pyprune.structured.shrink import shrink
from pyprune.structured.shrunk import Shrunk
from pyprune.training.ac_dc import AcDcPruner, ac_dc
from pyprune.training.distillation import distillation_loss, squarehead_loss
from pyprune.training.gmp import gmp
from pyprune.training.iterative import IterativeResult, PruningRound, iterative_prune, lottery_ticket
from pyprune.training.keep_sparse import KeepSparse, keep_sparse
from pyprune.training.losses import L0Loss, LagrangianLoss, RBLoss
from pyprune.training.movement import MovementPruner
from pyprune.training.pruner import Pruner
from pyprune.training.rigl import RigLPruner
from pyprune.training.schedulers import (
    ExponentialMagnitudePruningScheduler,
    ExponentialRBPruningScheduler,
    MultiStepMagnitudePruningScheduler,
    MultiStepRBPruningScheduler,
)
from pyprune.training.slimming import slimming_loss
from pyprune.training.snip import snip
from pyprune.training.teacher import Distillation

__version__ = build_info()["pyprune"]

__all__ = [
    "AcDcPruner",
    "Accelerated",
    "AcceleratedLayer",
    "BenchmarkResult",
    "Calibration",
    "Dataset",
    "Distillation",
    "Dropped",
    "ExponentialMagnitudePruningScheduler",
    "ExponentialRBPruningScheduler",
    "HardConcreteGate",
    "IgnoredScope",
    "IterativeResult",
    "KeepSparse",
    "L0Loss",
    "LagrangianLoss",
    "Method",
    "ModelBenchmark",
    "ModelPruningStatistic",
    "MovementPruner",
    "MultiStepMagnitudePruningScheduler",
    "MultiStepRBPruningScheduler",
    "OneShotResult",
    "Plan",
    "PruneMode",
    "PrunedWeight",
    "Pruner",
    "PruningRound",
    "RBLoss",
    "Recipe",
    "RecipePruner",
    "Reconstructed",
    "RetrainFree",
    "RigLPruner",
    "Schedule",
    "SensitivityResult",
    "SensitivityTarget",
    "Shrunk",
    "SparseFile",
    "StochasticGate",
    "StripFormat",
    "TensorPruningStatistic",
    "Written",
    "__version__",
    "ac_dc",
    "accelerate",
    "allocation_from_sensitivity",
    "allocations",
    "attach_gate",
    "batch_norm_adaptation",
    "benchmark",
    "block_scores",
    "build_info",
    "calibrate",
    "check_optimizer",
    "coupled_groups",
    "densify",
    "distillation_loss",
    "drop_blocks",
    "drop_experts",
    "expert_scores",
    "gate_parameters",
    "get_config",
    "gmp",
    "granularity",
    "importance",
    "integrations",
    "iterative_prune",
    "keep_sparse",
    "load_accelerated",
    "load_from_config",
    "load_sparse",
    "lottery_ticket",
    "one_gate_sample",
    "ops",
    "plan_of",
    "prune",
    "prune_checkpoint",
    "prune_one_shot",
    "prune_retrain_free",
    "prune_with_gradients",
    "pruning_statistic",
    "ratios_below",
    "reapply",
    "rebuild",
    "reconstruct",
    "reconstruction_scores",
    "save_sparse",
    "schedules",
    "scope",
    "sensitivity",
    "shrink",
    "slimming_loss",
    "snip",
    "solvers",
    "squarehead_loss",
    "strip",
    "torch_prune",
    "upgrade_checkpoint",
    "weight_parameters",
]


def __dir__() -> list[str]:
    # The rooms in which these names live are no part of the public face.
    return sorted(__all__)
