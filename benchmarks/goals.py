"""What the kernels are to reach on a CPU, as data, and by how much a run reached or missed it.

Goals are judged on the lists of real models, at ratio 0.7, on normal weights, with the most threads measured.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench_admm import ADMM, ADMM_2_OF_4
from bench_capability import CAPABILITY
from bench_count import COUNT
from bench_cut import CUT, DROP
from bench_fold import FOLD
from bench_geometric_median import GEOMETRIC_MEDIAN
from bench_groups import PATTERNS, ROWS, group_of
from bench_mask_update import LOCAL as LOCAL_UPDATE
from bench_mask_update import UPDATE
from bench_masks import LOCAL, NORMALISED, RAW
from bench_pack import PACK, UNPACK
from bench_rb_loss import LOSS
from bench_remaining import CAPPED, LAMP, REMAINING
from bench_shrink import LATENCY, SHRINK, TRACE
from bench_sparse_linear import BLOCKS, DENSE
from bench_sparse_linear import group_of as linear_of
from bench_sparsegpt import GRAM, TWO_OF_FOUR, UNSTRUCTURED
from bench_torch_prune import ONCE
from bench_training import COMPILED, KEPT
from bench_training import MASKED as MASKED_STEP
from bench_units import EXPAND, FOLD_UNITS, MASKED, SCORES, UNITS

Row = dict[str, Any]  # one way in one case, as run.py writes it
FP32, BF16 = ("float32",), ("bfloat16",)
BOTH = FP32 + BF16


@dataclass(frozen=True)
class Goal:
    """How many times faster than peers our first way is to be at least, and how many times its floor at most.

    And what fraction of a peer's memory it may take.
    """

    group: str
    dtypes: tuple[str, ...] = FP32
    peers: dict[str, float] = field(default_factory=dict)
    floor: tuple[float, float] | None = None  # on ResNet-50, and on all others
    memory: dict[str, float] = field(default_factory=dict)
    models: tuple[str, ...] = ()  # all, if there are none


GOALS = [
    Goal(RAW, FP32, {"torch.nn.utils.prune": 500, "torch.cat + kthvalue": 70}, (1.5, 1.2)),
    Goal(RAW, BF16, {"torch.nn.utils.prune": 500, "torch.cat + kthvalue": 70}, (2.5, 1.5)),
    Goal(NORMALISED, FP32, {"NNCF": 50}, (2.2, 1.7)),
    Goal(LOCAL, BOTH, {"kthvalue per tensor": 40}, (2.6, 1.9)),
    *(
        Goal(group_of(*pattern), BOTH, {"topk per group": 20, "argsort per group": 20}, (1.4, 1.4))
        for pattern in PATTERNS
    ),
    Goal(ROWS, BOTH, {"sort per row": 20}),
    Goal(REMAINING, FP32, {"torch.cat + kthvalue": 70}, (1.5, 1.2)),
    Goal(REMAINING, BF16, {"torch.cat + kthvalue": 70}, (2.5, 1.5)),
    Goal(CAPPED, BOTH, {"NNI's formula": 50}),
    Goal(LAMP, BOTH, {"sort per tensor + kthvalue": 10}),
    Goal(FOLD, BOTH, {"torch._foreach_mul_, bool masks": 2}, (1.2, 1.2)),
    Goal(ONCE, FP32, {"torch.nn.utils.prune": 100}, memory={"torch.nn.utils.prune": 0.25}),
    Goal(COUNT, BOTH, {"torch.count_nonzero": 5, "(mask == 0).sum()": 100}, (1.1, 1.1)),
    Goal(CUT, BOTH, {"torch.cat + kthvalue": 5}),
    Goal(DROP, BOTH, {"torch, masked_fill_ of |w| <= score": 1}),
    Goal(PACK, BOTH, {"torch, x where x != 0": 20}, (1 / 0.7, 1 / 0.7)),
    Goal(UNPACK, BOTH, {"torch, values into a mask": 20}, (1 / 0.7, 1 / 0.7)),
    *(Goal(f"{SCORES} {unit}", BOTH, {"torch, per tensor": 3}, (1.4, 1.4)) for unit in UNITS),
    *(Goal(f"{EXPAND} {unit}", FP32, {"torch, repeat_interleave": 3}, (1.4, 1.4)) for unit in MASKED),
    *(Goal(f"{FOLD_UNITS} {unit}", BOTH, {"torch, repeat_interleave and mul_": 2}, (1.2, 1.2)) for unit in MASKED),
    Goal("Bernoulli gates, one tensor", FP32, {"NNCF, eager": 15, "NNCF, compiled": 10}, (1.3, 1.3)),
    Goal("hard-concrete gates, one tensor", FP32, {"torch, eager": 15, "torch, compiled": 6}, (1.6, 1.6)),
    Goal("Bernoulli gates, tensor by tensor", FP32, {"NNCF, eager": 8, "NNCF, compiled": 5}),
    Goal("hard-concrete gates, tensor by tensor", FP32, {"torch, eager": 8, "torch, compiled": 5}),
    Goal(GEOMETRIC_MEDIAN, FP32, {"NNI, filter by filter": 20}),
    *(Goal(group, FP32, floor=(1.1, 1.1)) for group in (UPDATE, LOCAL_UPDATE)),
    *(
        goal
        for suffix in ("", COMPILED)
        for goal in (
            Goal(MASKED_STEP + suffix, FP32, {"torch.nn.utils.prune": 1, "NNCF": 1}, (1.1, 1.1)),
            Goal(KEPT + suffix, FP32, floor=(1.03, 1.03)),
        )
    ),
    Goal(LOSS, FP32, {"NNCF, eager": 6, "NNCF, compiled": 2.5}, (1.5, 1.5)),
    Goal(TRACE, FP32, floor=(5.0, 8.0)),  # 4 forward passes and 1 ms per operation come to about as much
    Goal(LATENCY, FP32, floor=(1 / 2.5, 1 / 1.5)),
    *(
        Goal(group, FP32, {"the authors' algorithm": factor}, floor, models=(model,))
        for model, unstructured, of_four, floor in (
            ("768x768", 5, 6, None),
            ("768x3072", 2.5, 2.3, None),
            ("2048x2048", 3.7, 3.3, (2.0, 2.0)),
            ("4096x4096", 3.3, 2.7, (2.0, 2.0)),
        )
        for group, factor in ((UNSTRUCTURED, unstructured), (TWO_OF_FOUR, of_four))
    ),
    Goal(GRAM, FP32, {"torch, all of X^T X": 1.5}, models=("2048x2048",)),
    *(Goal(group, FP32, {"ALPS by eigenvectors": 2}, models=("576x576",)) for group in (ADMM, ADMM_2_OF_4)),
    *(Goal(linear_of(rows), FP32, {DENSE: factor}) for rows, factor in ((16, 2.1), (64, 2.2), (256, 2.2))),
    *(Goal(linear_of(rows), FP32, {DENSE: factor}, models=("4096x4096",)) for rows, factor in ((1, 3.4), (4, 5.4))),
    *(Goal(f"{BLOCKS}, {rows}", FP32, {DENSE: 2.8}) for rows in (64, 256)),
]  # fmt: skip
JUDGED = ("resnet50", "bert", "llama", "resnet18", "encoder", "mobilenet_v2", "minilm",
          "576x576", "768x768", "768x3072", "3072x768", "2048x2048", "4096x4096")  # fmt: skip
SECONDS = 5.0  # to remove what is dead, and to verify it
MASKS = (RAW, NORMALISED, LOCAL)
PORTABLE = 2.5  # times what the best build takes, at most
LARGEST_CLIFF = 3.0  # times what normal weights take, on any others
MEMORY_FRACTION, MEMORY_MIB = 0.02, 16.0  # of the weights, or so much, to choose masks


@dataclass(frozen=True)
class Verdict:
    """What was wanted in one case, and what was measured."""

    group: str
    against: str
    wanted: str
    model: str
    dtype: str
    measured: float
    limit: float
    unit: str = "x"
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether it was."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def missed_by(self) -> float:
        """What is missing, as a fraction of the goal."""
        return abs(self.measured / self.limit - 1)

    @property
    def text(self) -> str:
        """The measurement; beside it, by how much the goal was missed."""
        measured = f"{self.measured:,.0f}" if self.measured >= 99.5 else f"{self.measured:#.3g}".rstrip(".")
        return f"{measured} {self.unit}" + ("" if self.reached else f", missed by {max(self.missed_by, 0.01):.0%}")


def median(row: Row) -> float:
    return statistics.median(row["samples_ms"])


def beside_floor(row: Row) -> float:
    return median(row) / float(row["floor_ms"])


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Judge every goal whose job was measured."""
    rows = [row for row in usual(rows, any_weights=True) if row["model"] in JUDGED]
    normal = [row for row in rows if row["weights"] == "normal"]
    found = [verdict for goal in GOALS for verdict in judge(goal, normal)]
    return [*found, *portable(normal), *cliffs(rows), *memory(normal), *in_seconds(normal)]


def usual(rows: list[Row], any_weights: bool = False) -> list[Row]:
    """Return what goals are judged by."""
    threads: dict[str, int] = {}  # the most that a job was measured with
    for row in rows:
        threads[row["job"]] = max(row["threads"], threads.get(row["job"], 0))
    return [
        row
        for row in rows
        if row["threads"] == threads[row["job"]]
        and row["ratio"] == 0.7
        and (any_weights or row["weights"] == "normal")
        and row["samples_ms"]
    ]


def judge(goal: Goal, rows: list[Row]) -> Iterator[Verdict]:
    ours = [row for row in rows if row["group"] == goal.group and row["way"] == "pyprune"]
    ours = [row for row in ours if row["dtype"] in goal.dtypes and (not goal.models or row["model"] in goal.models)]
    for peer, factor in goal.peers.items():
        wanted = f"at least {factor:g} x"
        for row in ours:
            theirs = way_beside(row, peer, rows)
            if theirs is not None:
                times = median(theirs) / median(row)
                yield Verdict(goal.group, peer, wanted, row["model"], row["dtype"], times, factor, at_least=True)
    for peer, fraction in goal.memory.items():
        wanted = f"at most {fraction:g} x"
        for row in ours:
            theirs = way_beside(row, peer, rows)
            if theirs is not None and theirs["memory_mib"]:
                part = row["memory_mib"] / theirs["memory_mib"]
                yield Verdict(goal.group, f"memory of {peer}", wanted, row["model"], row["dtype"], part, fraction)
    if goal.floor is not None:
        small, large = goal.floor
        wanted = f"at most {small:.3g} x" + (f", beyond ResNet-50 {large:.3g} x" if large != small else "")
        for row in ours:
            limit = small if row["model"] == "resnet50" else large
            times = beside_floor(row)
            yield Verdict(goal.group, "floor", wanted, row["model"], row["dtype"], times, limit)


def way_beside(row: Row, name: str, rows: list[Row]) -> Row | None:
    return next((other for other in rows if same(other, row, ("group",)) and other["way"] == name), None)


def same(one: Row, other: Row, also: tuple[str, ...]) -> bool:
    return all(one[key] == other[key] for key in ("model", "dtype", *also))


def portable(rows: list[Row]) -> Iterator[Verdict]:
    """Compare the build that runs everywhere with the best."""
    for row in rows:
        if row["group"].startswith(CAPABILITY) and row["way"] == "pyprune, default":
            best = next(other for other in rows if same(other, row, ("group",)) and other["way"] == "pyprune")
            times, wanted = median(row) / median(best), f"at most {PORTABLE:g} x the best build"
            yield Verdict(row["group"], "portable build", wanted, row["model"], row["dtype"], times, PORTABLE)


def cliffs(rows: list[Row]) -> Iterator[Verdict]:
    """Compare the worst of the adversarial distributions with normal weights: beside the floors, which drift too."""
    for group in MASKS:
        ours = [row for row in rows if row["group"] == group and row["way"] == "pyprune"]
        for row in ours:
            others = [beside_floor(other) for other in ours if same(other, row, ()) and other["weights"] != "normal"]
            if row["weights"] == "normal" and others:
                wanted = f"at most {LARGEST_CLIFF:g} x normal weights"
                times = max(others) / beside_floor(row)
                yield Verdict(group, "worst weights", wanted, row["model"], row["dtype"], times, LARGEST_CLIFF)


def memory(rows: list[Row]) -> Iterator[Verdict]:
    """Look at the extra memory of choosing masks."""
    for group in MASKS:
        for row in rows:
            if row["group"] == group and row["way"] == "pyprune" and row["memory_mib"] is not None:
                limit = max(MEMORY_MIB, MEMORY_FRACTION * row["weight_bytes"] / 2**20)
                wanted = f"at most {MEMORY_FRACTION:.0%} of the weights or {MEMORY_MIB:g} MiB"
                measured, model = row["memory_mib"], row["model"]
                yield Verdict(group, "extra memory", wanted, model, row["dtype"], measured, limit, "MiB")


def in_seconds(rows: list[Row]) -> Iterator[Verdict]:
    """Look at the time to remove what is dead."""
    for row in rows:
        if row["group"] == SHRINK and row["way"] == "pyprune":
            wanted, seconds = f"at most {SECONDS:g} s", median(row) / 1e3
            yield Verdict(row["group"], "time", wanted, row["model"], row["dtype"], seconds, SECONDS, "s")
