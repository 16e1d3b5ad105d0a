"""Units of weights, channels and blocks: their scores, masks of elements from masks of units, and folding."""

import torch
from measure import Way, with_floor
from peers import scores_of_blocks, scores_of_channels, spread_units
from shapes import LISTS, Case, Shapes
from torch import Tensor

from pyprune import ops

MODELS = tuple(LISTS)
SCORES, EXPAND, FOLD_UNITS = "scores of", "expand masks of", "fold masks of"
CHANNELS = ("output channels", "input channels")
BLOCKS = {"4x1 blocks": (4, 1), "1x4 blocks": (1, 4), "16x16 blocks": (16, 16)}
UNITS = (*CHANNELS, *BLOCKS)


def blocks_of(unit: str, shapes: Shapes) -> Shapes:
    """List the units' sizes: blocks lie in outputs and inputs, for each place of a kernel."""
    if unit in BLOCKS:
        return [(*BLOCKS[unit], *[1] * (len(shape) - 2)) for shape in shapes]
    return [(1, *shape[1:]) if unit == "output channels" else (shape[0], 1, *shape[2:]) for shape in shapes]


def ways(case: Case) -> list[Way]:
    weights = case.draw()
    masks = [torch.empty(shape, dtype=torch.bool) for shape in case.shapes]
    return [way for unit in UNITS for way in ways_of(case, unit, weights, masks)]


def ways_of(case: Case, unit: str, weights: list[Tensor], masks: list[Tensor]) -> list[Way]:
    weight_bytes = sum(weight.nbytes for weight in weights)
    blocks = blocks_of(unit, case.shapes)
    shapes = [ops.unit_shape(shape, block) for shape, block in zip(case.shapes, blocks, strict=True)]
    units = [torch.rand(shape) >= case.ratio for shape in shapes]
    returned = sum(4 * mask.numel() for mask in units)
    scores, expand, fold = (f"{job} {unit}" for job in (SCORES, EXPAND, FOLD_UNITS))
    peer = scores_of_channels if unit in CHANNELS else scores_of_blocks
    return [
        *with_floor(
            Way(
                scores,
                "floor: read weights, write scores",
                lambda: (ops.count_zeros(weights), [torch.zeros(shape) for shape in shapes]),
                moved=weight_bytes + returned,
                returned=returned,
            ),
            [
                Way(scores, "pyprune", lambda: ops.unit_scores(weights, blocks), returned=returned),
                Way(scores, "pyprune, squares", lambda: ops.unit_scores(weights, blocks, p=2), returned=returned),
                Way(scores, "torch, per tensor", lambda: list(map(peer, weights, blocks)), returned=returned),
            ],
        ),
        *with_floor(
            Way(expand, "floor: write masks", lambda: [mask.zero_() for mask in masks], moved=case.count),
            [
                Way(expand, "pyprune", lambda: ops.expand(units, blocks, masks)),
                Way(
                    expand,
                    "torch, repeat_interleave",
                    lambda: list(map(spread_units, units, blocks, case.shapes)),
                    returned=case.count,
                ),
            ],
        ),
        *with_floor(
            Way(
                fold,
                "floor: weights * 1.0 in place",
                lambda: torch._foreach_mul_(weights, 1.0),
                moved=2 * weight_bytes,
            ),
            [
                Way(fold, "pyprune", lambda: ops.fold(weights, units, blocks)),
                Way(
                    fold,
                    "torch, repeat_interleave and mul_",
                    lambda: torch._foreach_mul_(weights, list(map(spread_units, units, blocks, case.shapes))),
                ),
            ],
        ),
    ]
