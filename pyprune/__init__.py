"""Prune PyTorch models with fused C++ and CUDA mask kernels, and end with a plain model."""

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
    "Accelerated": "runtime.accelerated",
    "AcceleratedLayer": "runtime.accelerated",
    "BenchmarkResult": "analysis.benchmark_result",
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
    "ModelBenchmark": "analysis.benchmark_result",
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
    "accelerate": "runtime.accelerate",
    "allocation_from_sensitivity": "analysis.sensitivity_allocation",
    "attach_gate": "modules.forward_pass",
    "batch_norm_adaptation": "calibration.batch_norm",
    "benchmark": "analysis.benchmark",
    "block_scores": "structured.block_scores",
    "calibrate": "calibration.calibrate",
    "check_optimizer": "modules.optimizer",
    "coupled_groups": "structured.groups",
    "densify": "runtime.densify",
    "distillation_loss": "training.distillation",
    "drop_blocks": "structured.drop_blocks",
    "drop_experts": "structured.drop_experts",
    "expert_scores": "structured.expert_scores",
    "gate_parameters": "modules.optimizer",
    "get_config": "modules.config",
    "gmp": "training.gmp",
    "iterative_prune": "training.iterative",
    "keep_sparse": "training.keep_sparse",
    "load_accelerated": "runtime.load_accelerated",
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
