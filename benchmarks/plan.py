"""Which jobs are measured on what. A new job joins with its file, a line in JOBS and a place in BENCH."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import bench_admm
import bench_capability
import bench_count
import bench_cut
import bench_fold
import bench_gates
import bench_geometric_median
import bench_groups
import bench_growth
import bench_mask_update
import bench_masks
import bench_pack
import bench_rb_loss
import bench_remaining
import bench_shrink
import bench_sparse_linear
import bench_sparsegpt
import bench_torch_prune
import bench_training
import bench_units
from shapes import DTYPES, SIZES, Case

JOBS: dict[str, ModuleType] = {
    "masks": bench_masks,
    "groups": bench_groups,
    "remaining": bench_remaining,
    "fold": bench_fold,
    "count": bench_count,
    "pack": bench_pack,
    "cut": bench_cut,
    "torch_prune": bench_torch_prune,
    "geometric_median": bench_geometric_median,
    "units": bench_units,
    "gates": bench_gates,
    "rb_loss": bench_rb_loss,
    "mask_update": bench_mask_update,
    "training": bench_training,
    "capability": bench_capability,
    "growth": bench_growth,
    "shrink": bench_shrink,
    "sparsegpt": bench_sparsegpt,
    "admm": bench_admm,
    "sparse_linear": bench_sparse_linear,
}
PEERS = ("none", "quick", "all")
LISTS_JOBS = ("masks", "remaining", "fold", "count", "pack", "cut", "units")
BOTH = tuple(DTYPES)
SMALLER = ("resnet50", "mobilenet_v2", "minilm")
LAYERS = ("768x768", "768x3072", "2048x2048", "4096x4096")
ADVERSARIAL = ("equal", "two-values", "sorted", "heavy-tailed", "one-binade")


@dataclass(frozen=True)
class Slice:
    """Jobs, and the values along each axis that they are measured on, in all combinations."""

    jobs: tuple[str, ...]
    models: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)
    ratios: tuple[float, ...] = (0.7,)
    weights: tuple[str, ...] = ("normal",)
    threads: tuple[int, ...] = ()  # torch's own number
    peers: str = "quick"  # of PEERS

    def cases(self, own_threads: int) -> Iterator[tuple[str, Case]]:
        """Yield the jobs with their cases, leaving out what a job cannot do."""
        for threads in self.threads or (own_threads,):
            for model in self.models:
                for dtype in self.dtypes:
                    for ratio in self.ratios:
                        for weights in self.weights:
                            for job in self.jobs:
                                if accepts(job, model, dtype):
                                    yield job, Case(model, dtype, ratio, weights, threads)


def accepts(job: str, model: str, dtype: str) -> bool:
    module = JOBS[job]
    return model in module.MODELS and dtype in getattr(module, "DTYPES", DTYPES)


BENCH = [
    Slice(("geometric_median",), ("resnet50",)),
    Slice(LISTS_JOBS, ("resnet50", "bert"), BOTH),
    Slice(("torch_prune",), ("resnet50", "bert")),
    Slice(("groups",), ("resnet50", "bert"), BOTH),
    Slice(("gates",), ("resnet50",)),
    Slice(("rb_loss",), ("resnet50", "bert")),
    Slice(("mask_update",), ("resnet50", "bert")),
    Slice(("training",), ("resnet18", "encoder")),
    Slice(("capability",), ("resnet50",)),
    Slice(("growth",), ("1M", "4M", "16M", "64M")),
    Slice(("shrink",), SMALLER),
    Slice(("sparsegpt",), ("768x768", "2048x2048"), threads=(1,)),
    Slice(("admm",), ("576x576",), threads=(1,)),
    Slice(("sparse_linear",), ("3072x768", "4096x4096")),
]
QUICK = [
    Slice(("geometric_median",), ("tiny",)),
    Slice((*LISTS_JOBS, "torch_prune", "groups", "gates", "rb_loss", "mask_update", "capability"), ("resnet50",)),
    Slice(("training",), ("convnet",)),
    Slice(("growth",), ("1M", "4M", "16M")),
    Slice(("shrink",), ("mobilenet_v2",)),
    Slice(("sparsegpt",), ("768x768",), threads=(1,)),
    Slice(("admm",), ("576x576",), threads=(1,)),
    Slice(("sparse_linear",), ("3072x768",)),
]
# Not all combinations, which would take days: one axis is varied at a time, and peers run where they say something
# new. What needs over 20 GB or many minutes is left out, and says so in its place.
FULL = [
    Slice(("geometric_median",), ("resnet50",)),
    Slice(LISTS_JOBS, ("resnet50", "bert"), BOTH, peers="all"),
    Slice(LISTS_JOBS, ("llama",), BOTH, peers="all"),
    Slice(("torch_prune",), ("resnet50", "bert"), BOTH, peers="all"),
    Slice(("groups",), ("resnet50", "bert"), BOTH, peers="all"),
    Slice(("groups",), ("resnet50", "bert"), BOTH, threads=(1,), peers="none"),
    Slice(("masks",), ("resnet50", "bert"), ratios=(0.5, 0.9, 0.99)),
    Slice(("masks",), ("llama",), ratios=(0.5, 0.9, 0.99), peers="none"),
    Slice(("masks",), ("resnet50", "bert"), BOTH, weights=ADVERSARIAL, peers="none"),
    Slice((*LISTS_JOBS, "gates", "rb_loss"), ("resnet50",), BOTH, threads=(1,)),
    Slice(LISTS_JOBS, ("bert",), BOTH, threads=(1,), peers="none"),
    Slice(("gates",), ("resnet50", "bert"), peers="all"),
    Slice(("rb_loss",), ("resnet50", "bert", "llama"), peers="all"),
    Slice(("mask_update",), ("resnet50", "bert", "llama")),
    Slice(("training",), ("convnet", "transformer", "resnet18", "encoder"), peers="all"),
    Slice(("capability",), ("resnet50", "bert")),
    Slice(("growth",), tuple(SIZES), BOTH),
    Slice(("shrink",), SMALLER, peers="all"),
    Slice(("sparsegpt",), LAYERS, threads=(1,), peers="all"),
    Slice(("admm",), ("576x576", "768x3072"), threads=(1,), peers="all"),
    Slice(("sparse_linear",), ("3072x768", "4096x4096"), ratios=(0.5, 0.7, 0.8, 0.9)),
    Slice(("sparse_linear",), ("3072x768", "4096x4096"), ratios=(0.5, 0.7, 0.8, 0.9), threads=(1,)),
]
