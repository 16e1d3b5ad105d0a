"""Prune PyTorch models with fused C++ and CUDA mask kernels, and end with a plain model."""

from pyprune import integrations as integrations, ops as ops, torch_prune as torch_prune
from pyprune.analysis.benchmark import benchmark as benchmark
from pyprune.analysis.benchmark_result import BenchmarkResult as BenchmarkResult, ModelBenchmark as ModelBenchmark
from pyprune.analysis.sensitivity import sensitivity as sensitivity
from pyprune.analysis.sensitivity_allocation import allocation_from_sensitivity as allocation_from_sensitivity
from pyprune.analysis.sensitivity_result import (
    SensitivityResult as SensitivityResult,
    SensitivityTarget as SensitivityTarget,
)
from pyprune.calibration.batch_norm import batch_norm_adaptation as batch_norm_adaptation
from pyprune.calibration.batches import Dataset as Dataset
from pyprune.calibration.calibrate import Calibration as Calibration, calibrate as calibrate
from pyprune.methods import (
    granularity as granularity,
    importance as importance,
    schedules as schedules,
    scope as scope,
)
from pyprune.methods.method import Method as Method, PruneMode as PruneMode
from pyprune.methods.schedules import Schedule as Schedule
from pyprune.modules.averages import reapply as reapply
from pyprune.modules.config import (
    get_config as get_config,
    load_from_config as load_from_config,
    upgrade_checkpoint as upgrade_checkpoint,
)
from pyprune.modules.forward_pass import attach_gate as attach_gate, one_gate_sample as one_gate_sample
from pyprune.modules.gates import HardConcreteGate as HardConcreteGate, StochasticGate as StochasticGate
from pyprune.modules.ignored_scope import IgnoredScope as IgnoredScope
from pyprune.modules.optimizer import (
    check_optimizer as check_optimizer,
    gate_parameters as gate_parameters,
    weight_parameters as weight_parameters,
)
from pyprune.modules.statistics import pruning_statistic as pruning_statistic
from pyprune.modules.statistics_result import (
    ModelPruningStatistic as ModelPruningStatistic,
    TensorPruningStatistic as TensorPruningStatistic,
)
from pyprune.modules.strip import StripFormat as StripFormat, strip as strip
from pyprune.oneshot import allocations as allocations, solvers as solvers
from pyprune.oneshot.one_shot_result import OneShotResult as OneShotResult, PrunedWeight as PrunedWeight
from pyprune.oneshot.prune_checkpoint import prune_checkpoint as prune_checkpoint
from pyprune.oneshot.prune_one_shot import prune_one_shot as prune_one_shot
from pyprune.oneshot.prune_with_gradients import prune_with_gradients as prune_with_gradients
from pyprune.oneshot.retrain_free import prune_retrain_free as prune_retrain_free
from pyprune.oneshot.retrain_free_result import RetrainFree as RetrainFree
from pyprune.ops.build_info import build_info as build_info
from pyprune.recipes.recipe import Recipe as Recipe
from pyprune.recipes.recipe_pruner import RecipePruner as RecipePruner
from pyprune.runtime.accelerate import accelerate as accelerate
from pyprune.runtime.accelerated import Accelerated as Accelerated, AcceleratedLayer as AcceleratedLayer
from pyprune.runtime.densify import densify as densify
from pyprune.runtime.load_accelerated import load_accelerated as load_accelerated
from pyprune.selection.prune import prune as prune
from pyprune.selection.thresholds import ratios_below as ratios_below
from pyprune.sparse.load_sparse import load_sparse as load_sparse
from pyprune.sparse.reading import SparseFile as SparseFile
from pyprune.sparse.save_sparse import save_sparse as save_sparse
from pyprune.sparse.writing import Written as Written
from pyprune.structured.block_scores import block_scores as block_scores
from pyprune.structured.drop_blocks import drop_blocks as drop_blocks
from pyprune.structured.drop_experts import drop_experts as drop_experts
from pyprune.structured.dropped import Dropped as Dropped
from pyprune.structured.expert_scores import expert_scores as expert_scores
from pyprune.structured.groups import coupled_groups as coupled_groups
from pyprune.structured.plan import Plan as Plan
from pyprune.structured.rebuild import rebuild as rebuild
from pyprune.structured.reconstruct import reconstruct as reconstruct
from pyprune.structured.reconstructed import Reconstructed as Reconstructed
from pyprune.structured.reconstruction_scores import reconstruction_scores as reconstruction_scores
from pyprune.structured.remembered import plan_of as plan_of
from pyprune.structured.shrink import shrink as shrink
from pyprune.structured.shrunk import Shrunk as Shrunk
from pyprune.training.ac_dc import AcDcPruner as AcDcPruner, ac_dc as ac_dc
from pyprune.training.distillation import distillation_loss as distillation_loss, squarehead_loss as squarehead_loss
from pyprune.training.gmp import gmp as gmp
from pyprune.training.iterative import (
    IterativeResult as IterativeResult,
    PruningRound as PruningRound,
    iterative_prune as iterative_prune,
    lottery_ticket as lottery_ticket,
)
from pyprune.training.keep_sparse import KeepSparse as KeepSparse, keep_sparse as keep_sparse
from pyprune.training.losses import L0Loss as L0Loss, LagrangianLoss as LagrangianLoss, RBLoss as RBLoss
from pyprune.training.movement import MovementPruner as MovementPruner
from pyprune.training.pruner import Pruner as Pruner
from pyprune.training.rigl import RigLPruner as RigLPruner
from pyprune.training.schedulers import (
    ExponentialMagnitudePruningScheduler as ExponentialMagnitudePruningScheduler,
    ExponentialRBPruningScheduler as ExponentialRBPruningScheduler,
    MultiStepMagnitudePruningScheduler as MultiStepMagnitudePruningScheduler,
    MultiStepRBPruningScheduler as MultiStepRBPruningScheduler,
)
from pyprune.training.slimming import slimming_loss as slimming_loss
from pyprune.training.snip import snip as snip
from pyprune.training.teacher import Distillation as Distillation

__version__: str
