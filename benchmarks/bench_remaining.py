"""Masks under conditions: of what an earlier mask left, with caps on each weight, and with LAMP scores."""

from collections.abc import Callable

import torch
from measure import Way, with_floor
from peers import cat_kthvalue_of_remaining, lamp_kthvalue, nni_capped
from shapes import LISTS, Case
from torch import Tensor

from pyprune import ops
from pyprune.methods.allocation import removed_count
from pyprune.methods.lamp import lamp_removed
from pyprune.selection.limits import capped_threshold

MODELS = tuple(LISTS)
REMAINING, CAPPED, LAMP = "global masks of what is left", "global masks with caps", "global masks, LAMP"
LARGER, MOST = 3.0, 0.75  # every other weight is so much larger; no weight may lose more than this part of it


def ways(case: Case) -> list[Way]:
    weights = [weight * LARGER if i % 2 else weight for i, weight in enumerate(case.draw())]
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    removed = removed_count(case.count, case.ratio)
    bases, _ = ops.threshold(weights, removed // 2)
    most = [int(MOST * size) for size in case.sizes]
    weight_bytes = sum(weight.nbytes for weight in weights)

    def capped() -> list[Tensor]:
        return capped_threshold(weights, removed, least=[0] * len(most), most=most, masks=masks)[0]

    def lamp() -> list[Tensor]:
        return ops.threshold(weights, lamp_removed(weights, removed), masks=masks)[0]

    def peer(group: str, name: str, run: Callable[..., object]) -> Way:
        return Way(group, name, run, returned=case.count)

    remaining = with_floor(
        Way(
            REMAINING,
            "floor: read weights and bases, write masks",
            lambda: ops.threshold(weights, 0, masks=masks, bases=bases),
            moved=weight_bytes + 2 * case.count,
        ),
        [
            Way(REMAINING, "pyprune", lambda: ops.threshold(weights, removed, masks=masks, bases=bases)),
            Way(REMAINING, "pyprune, without bases", lambda: ops.threshold(weights, removed, masks=masks)),
            peer(REMAINING, "torch.cat + kthvalue", lambda: cat_kthvalue_of_remaining(weights, bases, removed)),
        ],
    )
    others = with_floor(
        Way(
            CAPPED,
            "floor: read weights, write masks",
            lambda: ops.threshold(weights, 0, masks=masks),
            moved=weight_bytes + case.count,
        ),
        [
            Way(CAPPED, "pyprune", capped),
            Way(CAPPED, "pyprune, without caps", lambda: ops.threshold(weights, removed, masks=masks)),
            peer(CAPPED, "NNI's formula", lambda: nni_capped(weights, removed, most)),
            Way(LAMP, "pyprune", lamp),
            peer(LAMP, "sort per tensor + kthvalue", lambda: lamp_kthvalue(weights, removed)),
        ],
    )
    return remaining + others
