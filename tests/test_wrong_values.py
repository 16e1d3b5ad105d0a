"""Every argument of every public function against every value that it does not take.

A row of the table says how a function is called well, and which other values each argument takes (or are not ours to
judge: inputs of a model fail in the model). All the rest must be a TypeError or ValueError with the argument's name,
and leave the models that were given as they were.
"""

import inspect
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyprune
from pyprune import (
    BenchmarkResult,
    Calibration,
    Dataset,
    HardConcreteGate,
    IgnoredScope,
    Method,
    ModelBenchmark,
    RBLoss,
    Recipe,
    SensitivityResult,
    SensitivityTarget,
    StochasticGate,
    allocations,
    granularity,
    importance,
    schedules,
    scope,
    solvers,
    torch_prune,
)
from tests.conftest import Unchanged
from tests.structured.small_blocks import Experts, Residual
from tests.wrong_values import (
    COUNT,
    DICTS,
    FLAG,
    FROM_0,
    FUNCTIONS,
    NOT_NEGATIVE,
    OPTIONAL,
    POSITIVE,
    RATIOS,
    SEQUENCES,
    SHARE,
    TENSORS,
    TEXT,
    VALUES,
    Hostile,
)

LOCAL, RB, HARD = "UNSTRUCTURED_MAGNITUDE_LOCAL", "UNSTRUCTURED_REGULARIZATION_BASED", "UNSTRUCTURED_HARD_CONCRETE"
COUPLED = Method(importance.magnitude(), granularity.coupled())
FOLDER = tempfile.TemporaryDirectory()
MODULES = {"nn.Linear"}
INPUTS = OPTIONAL | TENSORS | SEQUENCES | DICTS
RATIO_DICTS = {"{'0': 0.25}", "{'nowhere': 0.25}"}
DATA = {"range", "generator", "set", "[1]", "[0.25]", "[None]", "['0']", "(1, 2)", "(4, 4)", "endless", "np.zeros"}
DATA |= {"[]", "()"} | TENSORS - {"tensor(0.25)"}  # batches that are no good are the model's to refuse
# What each argument takes, wherever it occurs; a row may say otherwise.
TAKES: dict[str, set[str]] = {
    "model": MODULES,
    "other": MODULES,
    "module": MODULES,
    "ratio": SHARE,
    "min_ratio": {*SHARE, "1", "1.0", "np.int64(1)", "{'0': 0.25}", "{}"},
    "max_ratio": {*SHARE, "1", "1.0", "np.int64(1)", "{'0': 0.25}", "{}"},
    "final": RATIOS | {"{'nowhere': 0.25}"},
    "initial": RATIOS | {"{'nowhere': 0.25}"},
    "ignored_scope": OPTIONAL | {"an IgnoredScope"},
    "examples_inputs": INPUTS,
    "examples": INPUTS,
    "fresh_model": MODULES,
    "plan": set(),
    "constants": set(),
    "calibration": OPTIONAL,
    "allocation": set(),
    "mode": {"a Method"},
    "method": {"a Method"},
    "schedule": FUNCTIONS,
    "start": FROM_0,
    "end": {"1", "2", "5", "np.int64(1)", "2**70", "2**63"} - {"2**70", "2**63"},
    "frequency": COUNT,
    "num_batches": COUNT | OPTIONAL,
    "num_iterations": COUNT | OPTIONAL,
    "dataset": DATA,
    "calibration_dataset": DATA,
    "data_source": DATA | {"a Method"} - {"a Method"},
    "max_drop": NOT_NEGATIVE | OPTIONAL,
    "early_stop": NOT_NEGATIVE | OPTIONAL,
    "seed": FROM_0,
    "side": set(),
    "reduction": set(),
    "normalize": set(),
    "activation": FUNCTIONS,
    "dtype": OPTIONAL | {"torch.float32"},
    "device": OPTIONAL | {"a device", "meta"},
    "keep_probability": SHARE - {"0", "0.0"},
    "progress": FLAG,
    "monotonic_fit": FLAG,
    "name": set(),
}
FLAGS = [
    "from_remaining",
    "zero_dead_channels",
    "same_on_all_ranks",
    "do_copy",
    "expected_count",
    "higher_is_better",
    "reintroduce",
    "reset",
    "validate",
    "straight_through",
    "update_stale",
    "heads",
    "joint",
    "width",
    "progress",
    "strip",
]
TAKES |= dict.fromkeys(FLAGS, FLAG)
CALLABLE = (
    "eval_fn",
    "finetune_fn",
    "train_fn",
    "loss_fn",
    "calibrate_fn",
    "transform_func",
    "score_optimizer",
    "function",
)
TAKES |= {
    name: FUNCTIONS | (OPTIONAL if name in ("calibrate_fn", "transform_func", "score_optimizer") else set())
    for name in CALLABLE
}


@dataclass
class Row:
    """A function, arguments that it takes, and what else its arguments take."""

    function: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    takes: dict[str, set[str]] = field(default_factory=dict)


DAMPING = SHARE | {"1", "1.0", "np.int64(1)"}
LARGE, TINY = {"1e308", "2**63", "2**70"}, {"5e-324"}
OF_SOLVERS = {"damping": DAMPING, "iterations": COUNT}


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def checkpoint():
    """Return a folder with the weights of such blocks, one for others, and the blocks without values."""
    source, destination = Path(tempfile.mkdtemp(dir=FOLDER.name)), tempfile.mkdtemp(dir=FOLDER.name)
    header, data = {}, b""
    for name, value in blocks().state_dict().items():
        content = value.numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return {"source_folder": source, "destination_folder": destination, "model": blocks().to("meta")}


def blocks():
    return nn.Sequential(*(Residual() for _ in range(3)))


def experts():
    return Experts(4)


def masked():
    return pyprune.prune(net(), LOCAL, ratio=0.5)


def gated(mode=RB):
    return pyprune.prune(net(), mode)


def loss_of(model, batch=None):
    return model(torch.ones(2, 4) if batch is None else batch).sum()


def with_optimizer(**arguments):
    model = net()
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **arguments}


def analysis():
    return SensitivityResult(0.9, {"a": SensitivityTarget(10, 10, {0.5: 0.9, 0.9: 0.8})})


def data():
    return [torch.ones(2, 4)]


def written(write, suffix):
    """Return the path of a file that was written; the folder goes with the process."""
    path = Path(FOLDER.name) / f"x.{suffix}"
    write(path)
    return path


def same(**arguments):
    return lambda: arguments


def of_curve(**more):
    return lambda: {"final": 0.5, "end": 4, "start": 0, "initial": 0.0, "frequency": 1, **more}


def recipe_apply(model, optimizer, steps_per_epoch, examples_inputs=None):
    recipe = Recipe.from_string("stages: [prune: {final: 0.5, end: 2}]")
    return recipe.apply(model, optimizer, steps_per_epoch, examples_inputs=examples_inputs)


def recipe_apply_with_teacher(model, teacher):
    recipe = Recipe.from_string("{stages: [prune: {final: 0.5, end: 2}], teacher: {}}")
    return recipe.apply(model, None, 2, teacher=teacher)


def pruner_of(importance_=None, **options):
    arguments = with_optimizer()
    method = Method(importance_ or importance.magnitude())
    return pyprune.Pruner(
        arguments["model"], method, schedules.cubic(0.5, start=1, end=3), arguments["optimizer"], **options
    )


def placed(function, **arguments):
    takes = {
        "name": {"weight"},
        "importance_scores": OPTIONAL | TENSORS - {"tensor(0.25)", "meta", "fake", "sparse", "quantised"},
    }
    takes["amount"] = SHARE | {"True", "False", "np.True_", "1", "2", "5", "1.0", "np.int64(1)"}
    takes["mask"] = TENSORS - {"tensor(0.25)", "meta", "fake", "sparse", "quantised"}
    takes["dim"] = {"0", "1", "-1", "np.int64(1)", "True", "False"}
    takes["n"] = NOT_NEGATIVE | {"inf", "-inf", "-1", "-0.25", "True", "False", "np.True_"} | {"2**63", "2**70"}
    return Row(function, lambda: {"module": nn.Linear(4, 4), "name": "weight", **arguments}, takes)


MADE = (importance.Importance, granularity.Granularity, scope.Scope, schedules.Schedule)
PRUNER = {"schedule": FUNCTIONS, "optimizer": OPTIONAL}
PATHS = TEXT - {"NUL", "''"} | {"a path"}
SEVERAL = OPTIONAL | {"[]", "()", "{}", "set", "generator"}
GATE = {"shape": SEQUENCES, "gate_shape": OPTIONAL | {"(4, 4)"}}
GATE["shape"] = {"(4, 4)", "()", "(1, 2)", "[]", "[1]", "range"}
GATE["gate_shape"] = OPTIONAL | {"(4, 4)", "(1, 2)"}
ROWS: dict[str, Row] = {
    "prune": Row(
        pyprune.prune,
        lambda: (
            {"model": net(), "mode": Method(importance.magnitude()), "ratio": 0.5, "min_ratio": 0.0, "max_ratio": 1.0}
            | dict.fromkeys(("ignored_scope", "examples_inputs", "calibration"))
            | {"allocation": "uniform"}
            | dict.fromkeys(("from_remaining", "zero_dead_channels", "same_on_all_ranks"), False)
        ),
        {"mode": {"a Method"}},
    ),
    "prune, tensor": Row(
        pyprune.prune,
        lambda: {"model": net(), "mode": LOCAL, "ratio": 0.5},
        {"ratio": RATIOS, "mode": {"a Method"}},
    ),
    "prune, gates": Row(
        pyprune.prune, lambda: {"model": net(), "mode": RB, "same_on_all_ranks": False, "ignored_scope": None}
    ),
    "prune, coupled": Row(
        pyprune.prune,
        lambda: {
            "model": net(),
            "mode": COUPLED,
            "target_params": None,
            "target_macs": 0.75,
            "examples_inputs": torch.ones(2, 4),
        },
        {
            "mode": {"a Method"},
            "target_params": OPTIONAL,
            "target_macs": OPTIONAL | {"1", "1.0", "np.int64(1)", "0.25", "np.float32(0.25)", "1/4"},
        },
    ),
    "prune, gates of units": Row(
        pyprune.prune,
        lambda: {
            "model": net(),
            "mode": RB,
            "granularity": granularity.coupled(),
            "examples_inputs": torch.ones(2, 4),
        },
        {"mode": set(), "granularity": OPTIONAL},
    ),
    "prune, wanda": Row(
        pyprune.prune,
        lambda: {
            "model": net(),
            "mode": Method(importance.wanda()),
            "ratio": 0.5,
            "calibration": Calibration(
                "input norm", (), {"0.weight": torch.ones(1, 4), "2.weight": torch.ones(1, 4)}, 1
            ),
        },
        {"calibration": set()},
    ),
    "ratios_below": Row(
        pyprune.ratios_below,
        lambda: {
            "model": net(),
            "method": Method(importance.magnitude()),
            "threshold": 0.5,
            **dict.fromkeys(("ignored_scope", "examples_inputs", "calibration")),
        },
        {"threshold": NOT_NEGATIVE | {"-1", "-0.25"}},
    ),
    "coupled_groups": Row(pyprune.coupled_groups, lambda: {"model": net(), "examples": torch.ones(2, 4)}),
    "shrink": Row(
        pyprune.shrink,
        lambda: {
            "model": net(),
            "examples": torch.ones(2, 4),
            "optimizer": None,
            "round_to": 1,
            "constants": "exact",
            "verify": 1e-4,
            "width": False,
            "update_stale": False,
        },
        {"optimizer": OPTIONAL | {"[]", "()", "{}"}, "round_to": COUNT, "verify": NOT_NEGATIVE | {"inf"}},
    ),
    "save_sparse": Row(
        pyprune.save_sparse,
        lambda: {
            "model": net(),
            "path": Path(FOLDER.name) / "model.safetensors",
            "codec": None,
            "layout": "pyprune",
            "keep_negative_zero": False,
            "min_zeros": 0.1,
            "metadata": None,
        },
        {
            "model": MODULES | {"{}"},
            "path": PATHS,
            "codec": OPTIONAL,
            "layout": set(),
            "keep_negative_zero": FLAG,
            "min_zeros": SHARE | {"1", "1.0", "np.int64(1)"},
            "metadata": OPTIONAL | {"{}"},
        },
    ),
    "load_sparse": Row(
        pyprune.load_sparse,
        lambda: {
            "path": written(lambda path: pyprune.save_sparse(nn.Linear(4, 4), path), "safetensors"),
            "model": nn.Linear(4, 4),
        },
        {"path": PATHS, "model": MODULES | OPTIONAL},
    ),
    "SparseFile": Row(
        pyprune.SparseFile,
        lambda: {"path": written(lambda path: pyprune.save_sparse(nn.Linear(4, 4), path), "safetensors")},
        {"path": PATHS},
    ),
    "plan_of": Row(pyprune.plan_of, lambda: {"model": net()}),
    "reconstruct": Row(
        pyprune.reconstruct,
        lambda: {
            "dense": net(),
            "model": pyprune.prune(net(), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5),
            "batches": [torch.ones(2, 4)],
            "plan": None,
            "layers": "cut",
            "damping": None,
            "num_batches": None,
            "ignored_scope": None,
            "memory": 2**20,
        },
        {
            "dense": MODULES,
            "batches": DATA,
            "plan": OPTIONAL,
            "layers": set(),
            "damping": NOT_NEGATIVE | OPTIONAL,
            "memory": FROM_0,
        },
    ),
    "reconstruction_scores": Row(
        pyprune.reconstruction_scores,
        lambda: {
            "model": net(),
            "groups": [],
            "batches": [torch.ones(2, 4)],
            "damping": 1e-4,
            "num_batches": None,
            "memory": 2**20,
        },
        {"groups": {"[]", "()"}, "batches": DATA, "damping": NOT_NEGATIVE, "memory": FROM_0},
    ),
    "prune_retrain_free": Row(
        pyprune.prune_retrain_free,
        lambda: {
            "model": net(),
            "data": [torch.randn(2, 4)],
            "target_macs": 0.8,
            "loss_fn": None,
            "likelihood": None,
            "draws": 2,
            "rearrange": True,
            "tune": True,
            "num_batches": None,
            "ignored_scope": None,
            "examples_inputs": torch.ones(2, 4),
            "memory": 2**20,
        },
        {
            "data": DATA,
            "target_macs": SHARE - {"0", "0.0"} | {"1", "1.0", "np.int64(1)", "5e-324"},
            "loss_fn": FUNCTIONS | OPTIONAL,
            "likelihood": OPTIONAL,
            "draws": COUNT,
            "rearrange": FLAG,
            "tune": FLAG,
            "memory": FROM_0,
        },
    ),
    "drop_blocks": Row(
        pyprune.drop_blocks,
        lambda: (
            {"model": blocks(), "examples": torch.ones(2, 4), "names": None, "count": 1, "importance": "influence"}
            | {"optimizer": None}
        ),
        {"names": OPTIONAL, "count": COUNT - {"5"}, "importance": FUNCTIONS, "optimizer": SEVERAL},
    ),
    "drop_blocks, names": Row(
        pyprune.drop_blocks,
        lambda: {"model": blocks(), "examples": torch.ones(2, 4), "names": ["1"], "count": None},
        {"names": {"['0']"}, "count": OPTIONAL},
    ),
    "drop_experts": Row(
        pyprune.drop_experts,
        lambda: (
            {"model": experts(), "examples": torch.ones(2, 4), "names": None, "count": None, "ratio": 0.25}
            | {"importance": "use", "optimizer": None}
        ),
        {"names": OPTIONAL, "count": OPTIONAL, "ratio": SHARE, "importance": FUNCTIONS, "optimizer": SEVERAL},
    ),
    "drop_experts, count": Row(
        pyprune.drop_experts,
        lambda: {"model": experts(), "examples": torch.ones(2, 4), "count": 1},
        {"count": {"1", "2", "np.int64(1)"}},
    ),
    "block_scores": Row(
        pyprune.block_scores,
        lambda: {"model": blocks(), "examples": torch.ones(2, 4), "importance": "influence"},
        {"importance": set()},
    ),
    "expert_scores": Row(
        pyprune.expert_scores,
        lambda: {"model": experts(), "examples": torch.ones(2, 4), "importance": "use"},
        {"importance": set()},
    ),
    "prune_checkpoint": Row(
        pyprune.prune_checkpoint,
        lambda: {
            **checkpoint(),
            "data": [torch.ones(2, 4)],
            "method": Method(importance.wanda(), scope=scope.row()),
            "ratio": 0.5,
            "solver": solvers.least_squares(),
            "blocks": ["0", "1"],
            "allocation": "uniform",
            "propagate": True,
            "reconstruct": None,
            "resume": False,
            "ignored_scope": None,
            "memory": 2**20,
            "dtype": None,
        },
        {
            "source_folder": set(),
            "destination_folder": {"a path", *TEXT} - {"''", "NUL"},
            "data": DATA,
            "method": set(),
            "ratio": SHARE | {"{'0': 0.25}", "{}"},
            "solver": OPTIONAL,
            "blocks": OPTIONAL | {"'1'", "['0']"},
            "propagate": FLAG,
            "reconstruct": OPTIONAL,
            "memory": FROM_0,
            "resume": FLAG,
            "dtype": OPTIONAL,
        },
    ),
    "prune_one_shot": Row(
        pyprune.prune_one_shot,
        lambda: {
            "model": blocks(),
            "data": [torch.ones(2, 4)],
            "method": Method(importance.wanda(), scope=scope.row()),
            "ratio": 0.5,
            "solver": solvers.least_squares(),
            "blocks": ["0", "1"],
            "allocation": "uniform",
            "propagate": True,
            "reconstruct": None,
            "store": "memory",
            "resume": False,
            "ignored_scope": None,
            "memory": 2**20,
        },
        {
            "data": DATA,
            "method": set(),
            "ratio": SHARE | {"{'0': 0.25}", "{}"},
            "solver": OPTIONAL,
            "blocks": OPTIONAL | {"'1'", "['0']"},
            "propagate": FLAG,
            "reconstruct": OPTIONAL,
            "store": {"a path", *TEXT} - {"''", "NUL"},
            "memory": FROM_0,
            "resume": {"False"},
        },
    ),
    "allocations.ratios": Row(
        allocations.ratios,
        lambda: {
            "model": net(),
            "allocation": allocations.progression(),
            "ratio": 0.25,
            "blocks": ["0", "2"],
            "calibration": None,
            "max_ratio": 0.5,
            "ignored_scope": None,
        },
        {"ratio": SHARE, "max_ratio": SHARE | {"1", "1.0", "np.int64(1)"}, "blocks": OPTIONAL | {"['0']"}},
    ),
    "progression": Row(
        allocations.progression, same(beta=0.1), {"beta": SHARE | {"1", "1.0", "np.int64(1)", "-1", "-0.25"}}
    ),
    "owl": Row(allocations.owl, same(m=3.0, spread=0.08), {"m": POSITIVE, "spread": SHARE - {"0", "0.0"}}),
    "alpha_pruning": Row(allocations.alpha_pruning, same(epsilon=0.2), {"epsilon": SHARE - {"0", "0.0"}}),
    "solvers.sparsegpt": Row(
        solvers.sparsegpt,
        same(block=128, polish=False, damping=0.01, quantize=None),
        {"block": COUNT, "polish": FLAG, "damping": SHARE | {"1", "1.0", "np.int64(1)"}, "quantize": OPTIONAL},
    ),
    "solvers.grid": Row(
        solvers.grid,
        same(bits=4, symmetric=True, group=None),
        {"bits": {"2", "5"}, "symmetric": FLAG, "group": COUNT | OPTIONAL},
    ),
    "distillation_loss": Row(
        pyprune.distillation_loss,
        lambda: {
            "student": torch.ones(2, 3),
            "teacher": torch.ones(2, 3),
            "temperature": 2.0,
            "mask": torch.ones(2),
            "labels": torch.ones(2),
        },
        {"student": set(), "teacher": set(), "temperature": POSITIVE, "mask": OPTIONAL, "labels": OPTIONAL},
    ),
    "squarehead_loss": Row(
        pyprune.squarehead_loss,
        lambda: {"student": [torch.ones(2, 3)], "teacher": [torch.ones(2, 3)], "mask": torch.ones(2)},
        {"student": set(), "teacher": set(), "mask": OPTIONAL | {"tensor(0.25)"}},
    ),
    "Distillation": Row(
        pyprune.Distillation,
        lambda: {
            "model": net(),
            "teacher": net(),
            "pairs": ["0"],
            "temperature": 2.0,
            "task_weight": 0.5,
            "logits_weight": 0.5,
            "hidden_weight": 1.0,
        },
        {"teacher": MODULES, "pairs": {"['0']", "[]", "()", "{}"}, "temperature": POSITIVE}
        | dict.fromkeys(("task_weight", "logits_weight", "hidden_weight"), NOT_NEGATIVE),
    ),
    "solvers.reconstruct": Row(
        solvers.reconstruct,
        same(steps=60, lr=3e-4, batch=8, seed=0),
        {"steps": COUNT, "lr": POSITIVE, "batch": COUNT},
    ),
    "rebuild": Row(pyprune.rebuild, lambda: {"fresh_model": net(), "plan": pyprune.Plan()}),
    "strip": Row(
        pyprune.strip,
        lambda: {"model": gated(HARD), "do_copy": False, "strip_format": "in_place", "expected_count": False},
    ),
    "accelerate": Row(
        pyprune.accelerate,
        lambda: {
            "model": net().eval(),
            "examples": torch.ones(2, 4),
            "dtype": None,
            "min_gain": 1.1,
            "seconds": 0,
            "verify": None,
        },
        {
            "dtype": OPTIONAL | {"torch.float32", "torch.int8"},
            "min_gain": POSITIVE - SHARE,
            "seconds": NOT_NEGATIVE - {"1e308", "2**63", "2**70"},
            "verify": OPTIONAL | NOT_NEGATIVE | {"inf"},
        },
    ),
    "densify": Row(pyprune.densify, lambda: {"model": net()}),
    "load_accelerated": Row(
        pyprune.load_accelerated, lambda: {"model": net(), "state_dict": net().state_dict()}, {"state_dict": set()}
    ),
    "benchmark": Row(
        pyprune.benchmark,
        lambda: {
            "model": net(),
            "examples": torch.ones(2, 4),
            "dense": None,
            "seconds": 0,
            "memory": False,
            "files": False,
        },
        {
            "dense": OPTIONAL | MODULES,
            "seconds": NOT_NEGATIVE - {"1e308", "2**63", "2**70"},
            "memory": FLAG,
            "files": FLAG,
        },
    ),
    "sensitivity": Row(
        pyprune.sensitivity,
        lambda: {
            "model": net(),
            "eval_fn": lambda model: 1.0,
            "ratios": (0.5,),
            "method": LOCAL,
            "higher_is_better": True,
            "save_to": None,
            "progress": False,
            **dict.fromkeys(("ignored_scope", "examples_inputs", "calibration", "early_stop")),
        },
        {"ratios": {"[0.25]", "np.zeros"}, "save_to": OPTIONAL | TEXT - {"NUL", "''"}},
    ),
    "iterative_prune": Row(
        pyprune.iterative_prune,
        lambda: {
            "model": net(),
            "schedule": (0.5,),
            "method": LOCAL,
            "finetune_fn": lambda model: None,
            "eval_fn": lambda model: 1.0,
            "higher_is_better": True,
            "reintroduce": False,
            "zero_dead_channels": False,
            "progress": False,
            **dict.fromkeys(("num_iterations", "max_drop", "ignored_scope", "examples_inputs", "calibrate_fn")),
        },
        {
            "schedule": FUNCTIONS | {"[0.25]"},
            "num_iterations": {"1", "np.int64(1)", "None"},
            "calibrate_fn": OPTIONAL,
        },
    ),
    "lottery_ticket": Row(
        pyprune.lottery_ticket,
        lambda: {
            "model": net(),
            "train_fn": lambda model: None,
            "ratio": 0.5,
            "iterations": 1,
            "method": LOCAL,
            "progress": False,
            **dict.fromkeys(("rewind_to", "eval_fn", "ignored_scope", "examples_inputs", "calibrate_fn")),
        },
        {"iterations": COUNT, "rewind_to": OPTIONAL, "eval_fn": FUNCTIONS | OPTIONAL, "calibrate_fn": OPTIONAL},
    ),
    "batch_norm_adaptation": Row(
        pyprune.batch_norm_adaptation,
        lambda: {
            "model": nn.Sequential(nn.BatchNorm1d(4)),
            "calibration_dataset": data(),
            "num_iterations": None,
            "reset": False,
        },
    ),
    "calibrate": Row(
        pyprune.calibrate,
        lambda: {
            "model": net(),
            "dataset": data(),
            "importance": importance.taylor(),
            "loss_fn": loss_of,
            "num_batches": None,
            "ignored_scope": None,
            "examples_inputs": None,
        },
    ),
    "Dataset": Row(
        Dataset, lambda: {"data_source": data(), "transform_func": None}, {"transform_func": FUNCTIONS | OPTIONAL}
    ),
    "IgnoredScope": Row(
        IgnoredScope,
        same(names=(), patterns=(), types=(), validate=True),
        {rules: {"[]", "()", "['0']"} for rules in ("names", "patterns", "types")},
    ),
    "StochasticGate": Row(
        StochasticGate,
        same(shape=(4, 4), gate_shape=None, keep_probability=0.9, same_on_all_ranks=False, dtype=None, device=None),
        GATE,
    ),
    "HardConcreteGate": Row(
        HardConcreteGate,
        same(shape=(4, 4), beta=0.5, gamma=-0.1, zeta=1.1, straight_through=False, keep_probability=0.9),
        GATE | {"beta": POSITIVE, "gamma": {"-1", "-0.25"}, "zeta": {"2", "5", "3.5"}},
    ),
    "attach_gate": Row(
        pyprune.attach_gate,
        lambda: {"module": nn.Linear(4, 4), "attribute": "weight", "gate": StochasticGate((4, 4))},
        {"attribute": {"weight"}},
    ),
    "one_gate_sample": Row(lambda model: pyprune.one_gate_sample(model).__enter__(), lambda: {"model": gated()}),
    "RBLoss": Row(
        RBLoss, lambda: {"model": gated(), "target_ratio": 0.5, "p": 0.1}, {"target_ratio": SHARE, "p": POSITIVE}
    ),
    "L0Loss": Row(
        pyprune.L0Loss, lambda: {"model": gated(), "weight": 1.0, "examples_inputs": None}, {"weight": POSITIVE}
    ),
    "LagrangianLoss": Row(
        pyprune.LagrangianLoss,
        lambda: {"model": gated(), "target_ratio": 0.5, "warmup_steps": 0, "start_ratio": 0.0, "learning_rate": 0.1},
        {"target_ratio": SHARE, "start_ratio": SHARE, "warmup_steps": FROM_0, "learning_rate": POSITIVE},
    ),
    "Method": Row(
        Method,
        lambda: {"importance": importance.magnitude(), "granularity": granularity.element(), "scope": scope.tensor()},
        {
            "importance": FUNCTIONS | {"an importance"},
            "granularity": {"a granularity"},
            "scope": {"a scope"},
        },
    ),
    "Pruner": Row(
        pyprune.Pruner,
        lambda: with_optimizer(
            method=Method(importance.magnitude()),
            schedule=schedules.cubic(0.5, end=4),
            ignored_scope=None,
            examples_inputs=None,
            allocation="uniform",
            min_ratio=0.0,
            max_ratio=1.0,
            reintroduce=True,
            zero_dead_channels=False,
        ),
        PRUNER,
    ),
    "gmp": Row(
        pyprune.gmp,
        lambda: with_optimizer(
            ratio=0.5, end=4, start=0, initial=0.0, frequency=1, method=None, reintroduce=True, ignored_scope=None
        ),
        {"ratio": RATIOS, "method": {"a Method", "None"}, "optimizer": OPTIONAL},
    ),
    "ac_dc": Row(
        pyprune.ac_dc,
        lambda: with_optimizer(ratio=0.5, end=4, frequency=1, start=0, method=None, ignored_scope=None),
        {"method": {"a Method", "None"}, "optimizer": set()},
    ),
    "RigLPruner": Row(
        pyprune.RigLPruner,
        lambda: with_optimizer(
            ratio=0.5, end=9, frequency=2, fraction=0.3, allocation="erk", seed=0, ignored_scope=None
        ),
        {"fraction": SHARE, "end": {"5"}, "optimizer": set()},
    ),
    "MovementPruner": Row(
        pyprune.MovementPruner,
        lambda: with_optimizer(
            schedule=schedules.cubic(0.5, start=1, end=4),
            lr=0.1,
            score_optimizer=None,
            granularity=None,
            scope=None,
            threshold=0.5,
            regularization=0.0,
            ignored_scope=None,
        ),
        {
            "lr": NOT_NEGATIVE,
            "granularity": {"None", "a granularity"},
            "scope": {"None", "a scope"},
            "threshold": (SHARE - {"0", "0.0"}) | OPTIONAL,
            "regularization": NOT_NEGATIVE,
            "optimizer": set(),
        },
    ),
    "snip": Row(
        pyprune.snip,
        lambda: {
            "model": net(),
            "dataset": data(),
            "loss_fn": loss_of,
            "ratio": 0.5,
            "num_batches": 1,
            "ignored_scope": None,
        },
    ),
    "prune_with_gradients": Row(
        pyprune.prune_with_gradients,
        lambda: {
            "model": net(),
            "dataset": data(),
            "loss_fn": loss_of,
            "solver": solvers.m_fac(),
            "ratio": 0.5,
            "scope": None,
            "num_batches": 1,
            "ignored_scope": None,
            "memory": 10**6,
        },
        {
            "ratio": SHARE,
            "solver": set(),
            "scope": OPTIONAL | {"a scope"},
            "memory": set(),
        },
    ),
    "solvers.admm": Row(
        solvers.admm, same(rho=0.1, iterations=300, damping=0.01), {"rho": POSITIVE - LARGE - TINY, **OF_SOLVERS}
    ),
    "solvers.least_squares": Row(
        solvers.least_squares, same(damping=0.01, exact=None), {"exact": FLAG | OPTIONAL, **OF_SOLVERS}
    ),
    "solvers.swaps": Row(
        solvers.swaps, same(rounds=100, polish=True, damping=0.01), {"rounds": FROM_0, "polish": FLAG, **OF_SOLVERS}
    ),
    "solvers.block_fisher": Row(solvers.block_fisher, same(block=50, damping=0.01), {"block": COUNT, **OF_SOLVERS}),
    "solvers.m_fac": Row(solvers.m_fac, same(damping=0.01), {"damping": DAMPING - {"0", "0.0"}}),
    "slimming_loss": Row(
        pyprune.slimming_loss,
        lambda: {"model": nn.Sequential(nn.BatchNorm1d(4)), "weight": 0.1},
        {"weight": NOT_NEGATIVE},
    ),
    "keep_sparse": Row(
        pyprune.keep_sparse,
        lambda: with_optimizer(model=masked(), ignored_scope=None, examples_inputs=None) | {"optimizer": None},
        {"optimizer": OPTIONAL | {"[]", "()", "{}", "set", "generator"}},
    ),
    "KeepSparse.reapply": Row(
        lambda model: pyprune.keep_sparse(masked(), None).reapply(model), lambda: {"model": net()}
    ),
    "reapply": Row(pyprune.reapply, lambda: {"model": masked(), "other": net()}),
    "get_config": Row(pyprune.get_config, lambda: {"model": masked()}),
    "load_from_config": Row(
        pyprune.load_from_config, lambda: {"model": net(), "config": pyprune.get_config(masked())}, {}
    ),
    "upgrade_checkpoint": Row(
        pyprune.upgrade_checkpoint,
        lambda: {"state_dict": {}, "config": {"version": 1, "masks": [], "gates": []}},
        {"state_dict": DICTS},
    ),
    "check_optimizer": Row(
        pyprune.check_optimizer,
        lambda: {"model": (model := gated()), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)},
    ),
    "gate_parameters": Row(pyprune.gate_parameters, lambda: {"model": gated()}),
    "weight_parameters": Row(pyprune.weight_parameters, lambda: {"model": gated()}),
    "pruning_statistic": Row(
        pyprune.pruning_statistic, lambda: {"model": masked(), "ignored_scope": None, "examples_inputs": None}
    ),
    "MultiStepMagnitudePruningScheduler": Row(
        pyprune.MultiStepMagnitudePruningScheduler,
        lambda: {"model": masked(), "mode": LOCAL, "steps": {0: 0.5}},
        {"mode": set(), "steps": {"{0: 0.25}"}},
    ),
    "ExponentialMagnitudePruningScheduler": Row(
        pyprune.ExponentialMagnitudePruningScheduler,
        lambda: {"model": masked(), "mode": LOCAL, "initial_ratio": 0.0, "target_ratio": 0.5, "target_epoch": 3},
        {"mode": set(), "initial_ratio": SHARE, "target_ratio": SHARE, "target_epoch": COUNT},
    ),
    "MultiStepRBPruningScheduler": Row(
        pyprune.MultiStepRBPruningScheduler,
        lambda: {"rb_loss": RBLoss(gated(), 0.5), "steps": {0: 0.5}},
        {"steps": {"{0: 0.25}"}},
    ),
    "ExponentialRBPruningScheduler": Row(
        pyprune.ExponentialRBPruningScheduler,
        lambda: {"rb_loss": RBLoss(gated(), 0.5), "initial_ratio": 0.0, "target_ratio": 0.5, "target_epoch": 3},
        {"initial_ratio": SHARE, "target_ratio": SHARE, "target_epoch": COUNT},
    ),
    "Recipe.apply": Row(
        recipe_apply,
        lambda: with_optimizer(steps_per_epoch=2, examples_inputs=None),
        {"optimizer": OPTIONAL | {"[]", "()", "{}", "set", "generator"}, "steps_per_epoch": COUNT},
    ),
    "Recipe.apply, teacher": Row(
        recipe_apply_with_teacher, lambda: {"model": nn.Linear(4, 4), "teacher": nn.Linear(4, 4)}, {"teacher": set()}
    ),
    "Recipe.from_string": Row(
        Recipe.from_string,
        same(text="stages: [constant]", name="recipe.yaml"),
        {"name": TEXT, "text": TEXT},  # what is no recipe names the line, not the argument
    ),
    "Recipe.from_file": Row(
        Recipe.from_file,
        lambda: {"path": written(lambda path: Path(path).write_text("stages: [constant]"), "yaml")},
        {"path": TEXT | {"a path"}},
    ),
    "SensitivityResult.from_json": Row(
        SensitivityResult.from_json,
        lambda: {"path": written(analysis().to_json, "json")},
        {"path": TEXT | {"a path"}},
    ),
    "SensitivityResult.from_csv": Row(
        SensitivityResult.from_csv, lambda: {"path": written(analysis().to_csv, "csv")}, {"path": TEXT | {"a path"}}
    ),
    "BenchmarkResult.from_json": Row(
        BenchmarkResult.from_json,
        lambda: {"path": written(BenchmarkResult(ModelBenchmark((1.0,))).to_json, "json")},
        {"path": TEXT | {"a path"}},
    ),
    "BenchmarkResult.from_dict": Row(
        BenchmarkResult.from_dict, lambda: {"content": BenchmarkResult(ModelBenchmark((1.0,))).to_dict()}
    ),
    "allocation_from_sensitivity": Row(
        pyprune.allocation_from_sensitivity,
        lambda: {
            "result": analysis(),
            "target_ratio": 0.5,
            "groups": None,
            "round_to": 1,
            "rule": "least",
            "max_drop": None,
            "max_ratio": 0.95,
            "monotonic_fit": False,
        },
        {
            "target_ratio": SHARE,
            "max_ratio": SHARE,
            "rule": set(),
            "groups": OPTIONAL,
            "round_to": {"1", "np.int64(1)"},
        },
    ),
    "allocation_from_sensitivity of costs": Row(
        pyprune.allocation_from_sensitivity,
        lambda: {
            "result": SensitivityResult(0.9, {"0.weight": SensitivityTarget(40, 4, {0.5: 0.8})}),
            "target_macs": 0.9,
            "target_params": None,
            "groups": pyprune.coupled_groups(
                nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.ones(1, 4)
            ),
            "round_to": 1,
        },
        {"target_macs": {"1", "1.0", "np.int64(1)"}, "target_params": OPTIONAL},
    ),
    "magnitude": Row(importance.magnitude, same(p=1.0, normalize="l2"), {"p": POSITIVE}),
    "random": Row(importance.random, same(seed=0)),
    "gradient": Row(importance.gradient, same(normalize="l2")),
    "importance.snip": Row(importance.snip, same(normalize="l2")),
    "snip_momentum": Row(
        importance.snip_momentum, same(decay=0.9, scale=1.0, normalize="l2"), {"decay": POSITIVE, "scale": POSITIVE}
    ),
    "taylor": Row(importance.taylor, same(normalize="l2", joint=True)),
    "fisher": Row(importance.fisher, same(damp=0.0, normalize="l2"), {"damp": NOT_NEGATIVE}),
    "wanda": Row(importance.wanda, same(normalize="l2")),
    "ria": Row(importance.ria, same(power=0.5, normalize="l2"), {"power": NOT_NEGATIVE}),
    "apoz": Row(importance.apoz, same(activation=torch.relu)),
    "mean_activation": Row(importance.mean_activation, same(activation=torch.relu)),
    "custom": Row(importance.custom, same(function=torch.abs, name="x"), {"name": TEXT}),
    "given": Row(importance.given, lambda: {"scores": {"0.weight": torch.ones(4, 4)}}, {"scores": {"{}"}}),
    "block": Row(granularity.block, same(n=1, m=1, reduction="sum"), {"n": COUNT, "m": COUNT}),
    "channel": Row(granularity.channel, same(side="out", reduction="sum")),
    "kernel": Row(granularity.kernel, same(reduction="sum")),
    "head": Row(
        granularity.head,
        same(num_heads=10, num_kv_heads=None, names=None, reduction="sum"),
        {"num_heads": COUNT, "num_kv_heads": COUNT | OPTIONAL, "names": OPTIONAL},
    ),
    "coupled": Row(
        granularity.coupled,
        same(heads=True, width=False, reduce="mean", normalize="mean", round_to=1, min_units=1, ratio_of="units"),
        {"reduce": set(), "normalize": OPTIONAL, "round_to": COUNT, "min_units": COUNT, "ratio_of": set()},
    ),
    "n_of_m": Row(
        scope.n_of_m,
        same(keep=2, of=6, dim="in", among="tensor"),
        {"keep": COUNT, "of": {"5"}, "dim": set(), "among": set()},
    ),
    "columns": Row(scope.columns, same(width=128), {"width": COUNT}),
    "group": Row(scope.group, same(groups={"a": ["0"]}), {"groups": {"{'a': ['0']}"}}),
    "one_shot": Row(schedules.one_shot, same(final=0.5, start=0)),
    "constant": Row(schedules.constant, same(final=0.5, end=9, start=0, frequency=1)),
    "polynomial": Row(schedules.polynomial, of_curve(power=2.0), {"power": POSITIVE}),
    "multi_step": Row(schedules.multi_step, same(steps={0: 0.5}), {"steps": {"{0: 0.25}"}}),
    "in_turn": Row(schedules.in_turn, same(ratios={"0": 0.5}, start=0, frequency=1), {"ratios": RATIO_DICTS}),
    "alternating": Row(schedules.alternating, same(final=0.5, end=4, frequency=1, start=0)),
    "schedules.custom": Row(
        schedules.custom, same(function=lambda step: 0.5, start=0, end=4, frequency=1), {"end": FROM_0 | OPTIONAL}
    ),
    **{
        f"schedules.{one.__name__}": Row(one, of_curve())
        for one in (
            schedules.linear,
            schedules.cubic,
            schedules.inverse_cubic,
            schedules.exponential,
            schedules.cosine,
            schedules.cube,
        )
    },
    "torch_prune.identity": placed(torch_prune.identity),
    "torch_prune.random_unstructured": placed(torch_prune.random_unstructured, amount=0.5),
    "torch_prune.l1_unstructured": placed(torch_prune.l1_unstructured, amount=0.5, importance_scores=None),
    "torch_prune.random_structured": placed(torch_prune.random_structured, amount=0.5, dim=0),
    "torch_prune.ln_structured": placed(torch_prune.ln_structured, amount=0.5, n=2, dim=0, importance_scores=None),
    "torch_prune.custom_from_mask": placed(torch_prune.custom_from_mask, mask=torch.ones(4, 4)),
    "torch_prune.remove": Row(
        torch_prune.remove,
        lambda: {"module": torch_prune.identity(nn.Linear(4, 4), "weight"), "name": "weight"},
        {"name": {"weight"}, "module": MODULES},
    ),
    "torch_prune.is_pruned": Row(torch_prune.is_pruned, lambda: {"module": nn.Linear(4, 4)}),
    "torch_prune.global_unstructured": Row(
        torch_prune.global_unstructured,
        lambda: {
            "parameters": [(nn.Linear(4, 4), "weight")],
            "pruning_method": torch_prune.L1Unstructured,
            "importance_scores": None,
            "amount": 0.5,
        },
        {
            "importance_scores": OPTIONAL | DICTS,
            "amount": SHARE | {"True", "False", "np.True_", "1", "2", "5", "1.0", "np.int64(1)"},
        },
    ),
    "Pruner.load_state_dict": Row(
        pyprune.Pruner.load_state_dict, lambda: {"self": pruner_of(), "state_dict": pruner_of().state_dict()}
    ),
    "MultiStepRBPruningScheduler.load_state_dict": Row(
        pyprune.MultiStepRBPruningScheduler.load_state_dict,
        lambda: {
            "self": pyprune.MultiStepRBPruningScheduler(RBLoss(gated(), 0.5), {0: 0.5}),
            "state_dict": {"epoch": 0, "ratio": 0.5},
        },
    ),
    "RecipePruner.load_state_dict": Row(
        pyprune.RecipePruner.load_state_dict,
        lambda: {
            "self": recipe_apply(**with_optimizer(steps_per_epoch=2)),
            "state_dict": recipe_apply(**with_optimizer(steps_per_epoch=2)).state_dict(),
        },
    ),
    "SensitivityResult.from_dict": Row(
        lambda content: SensitivityResult.from_dict(content), lambda: {"content": analysis().to_dict()}
    ),
}


# What calls return, and tables: their fields are not checked. AcDcPruner takes what `ac_dc` takes; one_gate_sample is
# called in its row, by another name.
NOT_CALLED = """
    __version__ build_info one_gate_sample Accelerated AcceleratedLayer AcDcPruner Calibration Dropped
    IterativeResult KeepSparse
    BenchmarkResult ModelBenchmark ModelPruningStatistic
    OneShotResult Plan PruneMode PrunedWeight PruningRound Reconstructed RetrainFree Shrunk Recipe RecipePruner
    Schedule SensitivityResult SensitivityTarget
    StripFormat TensorPruningStatistic Written as_schedule
""".split()  # noqa: SIM905


def test_every_public_function_has_a_row():
    called = {row.function for row in ROWS.values()}
    public = {name: getattr(pyprune, name) for name in pyprune.__all__}
    public |= {name: getattr(torch_prune, name) for name in torch_prune.__all__ if name[0].islower()}
    for room in (importance, granularity, scope, schedules):
        for name, function in inspect.getmembers(room, inspect.isfunction):
            if function.__annotations__.get("return") in MADE and inspect.signature(function).parameters:
                public[name] = function
    public = {
        name: one
        for name, one in public.items()
        if not (inspect.ismodule(one) or name[0] == "_" or name in NOT_CALLED)
    }
    assert not [name for name, one in public.items() if one not in called]


def wrong_values(row, argument):
    """Return the labels of the values that an argument does not take."""
    takes = row.takes.get(argument, TAKES.get(argument))
    assert takes is not None, f"say what {argument} takes"
    assert takes <= set(VALUES), takes - set(VALUES)
    return [label for label in VALUES if label not in takes]


TAKES |= {
    "importance": {"an importance", "a Method"},
    "optimizer": set(),
    "rb_loss": set(),
    "gate": set(),
    "result": set(),
    "config": set(),
    "parameters": set(),
    "pruning_method": set(),
    "strip_format": set(),
    "state_dict": set(),
    "content": set(),
    "groups": set(),
    "round_to": COUNT,
}


def faults(name, part, of):
    """Call a function with every so-manieth wrong value of each argument; return what is wrong with the answers."""
    row = ROWS[name]
    row.function(**row.good())
    found = []
    for number, argument in enumerate(name for name in row.good() if name != "self"):
        for label in wrong_values(row, argument)[(part + number) % of :: of]:
            arguments = row.good() | {argument: VALUES[label]()}
            given = [getattr(one, "model", one) for one in arguments.values() if not isinstance(one, Hostile)]
            before = [Unchanged(one) for one in given if isinstance(one, nn.Module)]
            try:
                row.function(**arguments)
            except (TypeError, ValueError) as error:
                said = str(error)
                if argument not in said and not (argument == "content" and "result" in said):
                    found.append(f"{argument}={label}: no name in {said!r:.150}")
                elif len(said) > 1000:
                    found.append(f"{argument}={label}: {len(said)} characters")
            except Exception as error:
                found.append(f"{argument}={label}: {type(error).__name__}: {error!s:.150}")
            else:
                found.append(f"{argument}={label}: accepted")
                continue
            for one in before:
                one.check()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_wrong_values_are_refused_by_name(name):
    found = faults(name, part=len(name), of=8)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_all_wrong_values_are_refused_by_name(name):
    found = faults(name, part=0, of=1)
    assert not found, "\n".join(found)
