"""Our kernels, each built for several instruction sets: what the portable build costs where nothing better runs."""

from collections.abc import Callable
from functools import partial

import torch
from bench_gates import Reused
from measure import Way, with_floor
from shapes import LISTS, Case

from pyprune import _C, ops
from pyprune.methods.allocation import removed_count

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
    masks, kept = ([torch.ones_like(weight, dtype=torch.bool) for weight in weights] for _ in range(2))
    logits, grads = ([torch.randn(weight.shape) for weight in weights] for _ in range(2))
    removed = removed_count(case.count, case.ratio)
    bernoulli, hard_concrete = (Reused(weights, logits, grads, rule) for rule in (0, 1))
    # What only moves the bytes, and the job.
    jobs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "global masks": (
            lambda: ops.threshold(weights, 0, masks=masks),
            lambda: ops.threshold(weights, removed, masks=masks),
        ),
        "global masks, L2": (
            lambda: ops.threshold(weights, 0, masks=masks),
            lambda: ops.threshold(weights, removed, normalize=True, masks=masks),
        ),
        "fold": (lambda: torch._foreach_mul_(weights, 1.0), lambda: ops.fold(weights, kept)),
        "Bernoulli gates": (bernoulli.floor, bernoulli.both),
        "hard-concrete gates": (hard_concrete.floor, hard_concrete.both),
    }
    *others, best = _C.available_cpu_capabilities()
    builds = [("pyprune", best), *((f"pyprune, {other}", other) for other in reversed(others))]
    return [
        way
        for name, (floor, run) in jobs.items()
        for way in with_floor(
            Way(CAPABILITY + name, "floor", floor),
            [Way(CAPABILITY + name, build, partial(built_for, capability, run)) for build, capability in builds],
        )
    ]
