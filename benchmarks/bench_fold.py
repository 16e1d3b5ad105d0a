"""Folding masks into weights: what they mask becomes zero, in place."""

import torch
from measure import Way, with_floor
from shapes import LISTS, Case

from pyprune import ops

MODELS = tuple(LISTS)
FOLD = "fold"


def ways(case: Case) -> list[Way]:
    weights = case.draw()
    masks = [torch.rand_like(weight, dtype=torch.float32) >= case.ratio for weight in weights]
    weight_bytes = sum(weight.nbytes for weight in weights)
    return with_floor(
        # Less than the job must move: it does not read the masks.
        Way(FOLD, "floor: weights * 1.0 in place", lambda: torch._foreach_mul_(weights, 1.0), moved=2 * weight_bytes),
        [
            Way(FOLD, "pyprune", lambda: ops.fold(weights, masks)),
            Way(FOLD, "torch._foreach_mul_, bool masks", lambda: torch._foreach_mul_(weights, masks)),
        ],
    )
