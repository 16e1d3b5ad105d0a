"""Masks computed anew in training: a step of the pruner beside the kernels alone, on the same masks."""

from measure import Way, with_floor
from shapes import LISTS, Case, as_modules

from pyprune import Method, Pruner, importance, ops, schedules, scope
from pyprune.methods.allocation import removed_count

MODELS = tuple(LISTS)
UPDATE, LOCAL = "masks updated in training", "local masks updated in training"


def ways(case: Case) -> list[Way]:
    weights = case.draw()
    masks = [weight > 0 for weight in weights]
    everywhere = removed_count(case.count, case.ratio)
    each = [removed_count(size, case.ratio) for size in case.sizes]
    found: list[Way] = []
    for group, competing, removed in ((UPDATE, scope.model(), everywhere), (LOCAL, scope.tensor(), each)):
        method = Method(importance.magnitude(), scope=competing)
        pruner = Pruner(as_modules(weights), method, schedules.custom(lambda step: case.ratio))
        found += with_floor(
            Way(
                group,
                "floor: the kernels alone",
                lambda removed=removed: ops.threshold(weights, removed, masks=masks),
            ),
            [Way(group, "pyprune", pruner.step)],
        )
    return found
