"""Masks computed anew in training: a step of the pruner beside the kernels alone, on weights with parked values.

The kernels bring back what is parked, find the masks, and park what they drop.
"""

from collections.abc import Callable

from measure import Way, with_floor
from shapes import LISTS, Case, as_modules
from torch import Tensor

from pyprune import Method, Pruner, importance, ops, schedules, scope
from pyprune.methods.allocation import removed_count

MODELS = tuple(LISTS)
UPDATE, LOCAL = "masks updated in training", "local masks updated in training"


def kernels(weights: list[Tensor], removed: int | list[int]) -> Callable[[], None]:
    masks, _ = ops.threshold(weights, removed)
    parked = [ops.park(weights, masks)]

    def update() -> None:
        ops.unpark(weights, masks, parked.pop())
        ops.threshold(weights, removed, masks=masks)
        parked.append(ops.park(weights, masks))

    return update


def ways(case: Case) -> list[Way]:
    everywhere = removed_count(case.count, case.ratio)
    each = [removed_count(size, case.ratio) for size in case.sizes]
    found: list[Way] = []
    for group, competing, removed in ((UPDATE, scope.model(), everywhere), (LOCAL, scope.tensor(), each)):
        method = Method(importance.magnitude(), scope=competing)
        pruner = Pruner(as_modules(case.draw()), method, schedules.custom(lambda step: case.ratio))
        pruner.step()
        found += with_floor(
            Way(
                group,
                "floor: the kernels alone",
                kernels(case.draw(), removed),
            ),
            [Way(group, "pyprune", pruner.step)],
        )
    return found
