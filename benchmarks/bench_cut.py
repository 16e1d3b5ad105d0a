"""Global magnitude pruning without masks, as of files that are larger than memory: find the cut, then write zeros."""

import peers
import torch
from measure import Way, with_floor
from shapes import LISTS, Case
from torch import Tensor

from pyprune import ops

MODELS = tuple(LISTS)
CUT, DROP = "cut, no masks", "drop what is below a cut"


def ways(case: Case) -> list[Way]:
    weights = case.draw()
    removed = int(case.ratio * case.count)
    found = ops.cut(weights, removed)
    weight_bytes = sum(weight.nbytes for weight in weights)

    def read() -> list[Tensor]:
        return [weight.view(torch.int16).amax() for weight in weights]

    def copies() -> tuple[list[Tensor]]:
        return ([weight.clone() for weight in weights],)

    def by_comparison(some: list[Tensor]) -> None:
        for weight in some:
            weight.masked_fill_(weight.abs() <= found.score, 0)

    return [
        *with_floor(
            # Half types are read once, float32 at least twice.
            Way(CUT, "floor: read the weights", read, moved=weight_bytes),
            [
                Way(CUT, "pyprune", lambda: ops.cut(weights, removed)),
                Way(CUT, "pyprune, threshold with masks", lambda: ops.threshold(weights, removed)),
                Way(CUT, "torch.cat + kthvalue", lambda: peers.cat_kthvalue(weights, removed), slow=True),
            ],
        ),
        *with_floor(
            Way(DROP, "floor: weights * 1.0 in place", lambda some: torch._foreach_mul_(some, 1.0), copies,
                moved=2 * weight_bytes),
            [
                Way(DROP, "pyprune", lambda some: ops.drop(some, found), copies),
                Way(DROP, "torch, masked_fill_ of |w| <= score", by_comparison, copies),
            ],
        ),
    ]  # fmt: skip
