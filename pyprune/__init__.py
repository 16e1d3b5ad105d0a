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
import sys
from importlib import import_module
from typing import Any

from pyprune import ops as ops  # registers the operators, which exported programs name
from pyprune.ops.build_info import build_info

__version__ = build_info()["pyprune"]

# Where the public names live. Each is imported when it is first asked for: all at once would take longer than many a
# script that needs one of them. Type checkers read __init__.pyi.
_MODULE_OF = {
    "AcDcPruner": "training.ac_dc",
    "Calibration": "calibration.calibrate",
    "Dataset": "calibration.batches",
    "Distillation": "training.teacher",
    "Dropped": "structured.dropped",
    "ExponentialMagnitudePruningScheduler": "training.schedulers",
    "ExponentialRBPruningScheduler": "training.schedulers",
    "HardConcreteGate": "modules.gates",
    "IgnoredScope": "modules.ignored_scope",
    "IterativeResult": "training.iterative",
    "KeepSparse": "training.keep_sparse",
    "L0Loss": "training.losses",
    "LagrangianLoss": "training.losses",
    "Method": "methods.method",
    "ModelPruningStatistic": "modules.statistics_result",
    "MovementPruner": "training.movement",
    "MultiStepMagnitudePruningScheduler": "training.schedulers",
    "MultiStepRBPruningScheduler": "training.schedulers",
    "OneShotResult": "oneshot.one_shot_result",
    "Plan": "structured.plan",
    "PruneMode": "methods.method",
    "PrunedWeight": "oneshot.one_shot_result",
    "Pruner": "training.pruner",
    "PruningRound": "training.iterative",
    "RBLoss": "training.losses",
    "Recipe": "recipes.recipe",
    "RecipePruner": "recipes.recipe_pruner",
    "Reconstructed": "structured.reconstructed",
    "RetrainFree": "oneshot.retrain_free_result",
    "RigLPruner": "training.rigl",
    "Schedule": "methods.schedules",
    "SensitivityResult": "analysis.sensitivity_result",
    "SensitivityTarget": "analysis.sensitivity_result",
    "Shrunk": "structured.shrunk",
    "SparseFile": "sparse.reading",
    "StochasticGate": "modules.gates",
    "StripFormat": "modules.strip",
    "TensorPruningStatistic": "modules.statistics_result",
    "Written": "sparse.writing",
    "ac_dc": "training.ac_dc",
    "allocation_from_sensitivity": "analysis.sensitivity_allocation",
    "attach_gate": "modules.forward_pass",
    "batch_norm_adaptation": "calibration.batch_norm",
    "block_scores": "structured.block_scores",
    "calibrate": "calibration.calibrate",
    "check_optimizer": "modules.optimizer",
    "coupled_groups": "structured.groups",
    "distillation_loss": "training.distillation",
    "drop_blocks": "structured.drop_blocks",
    "drop_experts": "structured.drop_experts",
    "expert_scores": "structured.expert_scores",
    "gate_parameters": "modules.optimizer",
    "get_config": "modules.config",
    "gmp": "training.gmp",
    "iterative_prune": "training.iterative",
    "keep_sparse": "training.keep_sparse",
    "load_from_config": "modules.config",
    "load_sparse": "sparse.load_sparse",
    "lottery_ticket": "training.iterative",
    "one_gate_sample": "modules.forward_pass",
    "plan_of": "structured.remembered",
    "prune": "selection.prune",
    "prune_checkpoint": "oneshot.prune_checkpoint",
    "prune_one_shot": "oneshot.prune_one_shot",
    "prune_retrain_free": "oneshot.retrain_free",
    "prune_with_gradients": "oneshot.prune_with_gradients",
    "pruning_statistic": "modules.statistics",
    "ratios_below": "selection.thresholds",
    "reapply": "modules.averages",
    "rebuild": "structured.rebuild",
    "reconstruct": "structured.reconstruct",
    "reconstruction_scores": "structured.reconstruction_scores",
    "save_sparse": "sparse.save_sparse",
    "sensitivity": "analysis.sensitivity",
    "shrink": "structured.shrink",
    "slimming_loss": "training.slimming",
    "snip": "training.snip",
    "squarehead_loss": "training.distillation",
    "strip": "modules.strip",
    "upgrade_checkpoint": "modules.config",
    "weight_parameters": "modules.optimizer",
}
_MODULES = {
    "allocations": "oneshot.allocations",
    "granularity": "methods.granularity",
    "importance": "methods.importance",
    "integrations": "integrations",
    "schedules": "methods.schedules",
    "scope": "methods.scope",
    "solvers": "oneshot.solvers",
    "torch_prune": "torch_prune",
}

__all__ = sorted(["__version__", "build_info", "ops", *_MODULE_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = import_module(f"pyprune.{_MODULES[name]}")
    elif name in _MODULE_OF:
        found = getattr(import_module(f"pyprune.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'pyprune' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    # The rooms in which these names live are no part of the public face.
    return sorted(__all__)
