"""How the cost of global masks grows with the number of weights: it should be a straight line."""

import torch
from measure import Way, with_floor
from peers import cat_kthvalue
from shapes import SIZES, Case

from pyprune import ops
from pyprune.methods.allocation import removed_count

MODELS = ("tiny", *SIZES)
GROWTH = "growth of global masks"
LARGEST_PEER = 100_000_000  # weights; more would take minutes


def ways(case: Case) -> list[Way]:
    weights = case.draw()
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    removed = removed_count(case.count, case.ratio)
    moved = sum(weight.nbytes for weight in weights) + case.count
    peer = Way(GROWTH, "torch.cat + kthvalue", lambda: cat_kthvalue(weights, removed), returned=case.count)
    peer.left_out = "takes too long" if case.count > LARGEST_PEER else ""
    return with_floor(
        Way(GROWTH, "floor: read weights, write masks", lambda: ops.threshold(weights, 0, masks=masks), moved=moved),
        [Way(GROWTH, "pyprune", lambda: ops.threshold(weights, removed, masks=masks)), peer],
    )
