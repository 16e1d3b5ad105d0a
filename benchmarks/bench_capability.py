"""Our kernels, each built for several instruction sets: what the portable build costs where nothing better runs."""

from collections.abc import Callable
from functools import partial

import torch
from bench_gates import Reused
from measure import Way
from shapes import LISTS, Case

from pyprune import _C, ops
from pyprune.methods import removed_count

MODELS = tuple(LISTS)
DTYPES = ("float32",)
CAPABILITY = "by instruction set: "


def built_for(capability: str, run: Callable[[], object]) -> None:
    _C.set_cpu_capability(capability)
    try:
        run()
    finally:
        _C.set_cpu_capability("auto")


def ways(case: Case) -> list[Way]:
    weights = case.draw()
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    logits, grads = ([torch.randn(weight.shape) for weight in weights] for _ in range(2))
    removed = removed_count(case.count, case.ratio)
    jobs: dict[str, Callable[[], object]] = {
        "global masks": lambda: ops.threshold(weights, removed, masks=masks),
        "global masks, L2": lambda: ops.threshold(weights, removed, normalize=True, masks=masks),
        "fold": lambda: ops.fold(weights, masks),
        "Bernoulli gates": Reused(weights, logits, grads, 0).both,
        "hard-concrete gates": Reused(weights, logits, grads, 1).both,
    }
    *others, best = _C.available_cpu_capabilities()
    return [
        Way(CAPABILITY + name, way, partial(built_for, capability, run))
        for name, run in jobs.items()
        for way, capability in [("pyprune", best), *((f"pyprune, {other}", other) for other in reversed(others))]
    ]
