"""Units of weights, channels and blocks: their scores, masks of elements from masks of units, and folding."""

import math

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
MASKED = ("output channels", "1x4 blocks")  # whose masks are expanded and folded: the longest runs and the shortest


def blocks_of(unit: str, shapes: Shapes) -> Shapes:
    """List the units' sizes: blocks lie in outputs and inputs, for each place of a kernel."""
    if unit in BLOCKS:
        return [(*BLOCKS[unit], *[1] * (len(shape) - 2)) for shape in shapes]
    return [(1, *shape[1:]) if unit == "output channels" else (shape[0], 1, *shape[2:]) for shape in shapes]


def ways(case: Case) -> list[Way]:
    weights = case.draw()
    scored = [way for unit in UNITS for way in ways_to_score(case, unit, weights)]
    return scored + [way for unit in MASKED for way in ways_to_mask(case, unit, weights)]


def ways_to_score(case: Case, unit: str, weights: list[Tensor]) -> list[Way]:
    blocks = blocks_of(unit, case.shapes)
    shapes = [ops.unit_shape(shape, block) for shape, block in zip(case.shapes, blocks, strict=True)]
    score_bytes = 4 * sum(math.prod(shape) for shape in shapes)
    group, peer = f"{SCORES} {unit}", scores_of_channels if unit in CHANNELS else scores_of_blocks

    def read_and_write() -> list[Tensor]:
        ops.count_zeros(weights)
        return [torch.zeros(shape) for shape in shapes]

    moved = sum(weight.nbytes for weight in weights) + score_bytes
    return with_floor(
        Way(group, "floor: read weights, write scores", read_and_write, moved=moved, returned=score_bytes),
        [
            Way(group, "pyprune", lambda: ops.unit_scores(weights, blocks), returned=score_bytes),
            Way(group, "pyprune, squares", lambda: ops.unit_scores(weights, blocks, p=2), returned=score_bytes),
            Way(group, "torch, per tensor", lambda: list(map(peer, weights, blocks)), returned=score_bytes),
        ],
    )


def ways_to_mask(case: Case, unit: str, weights: list[Tensor]) -> list[Way]:
    blocks = blocks_of(unit, case.shapes)
    units = [
        torch.rand(ops.unit_shape(shape, block)) >= case.ratio
        for shape, block in zip(case.shapes, blocks, strict=True)
    ]
    masks = [torch.empty(shape, dtype=torch.bool) for shape in case.shapes]
    expand, fold = f"{EXPAND} {unit}", f"{FOLD_UNITS} {unit}"

    def repeated() -> list[Tensor]:
        return list(map(spread_units, units, blocks, case.shapes))

    moved = 2 * sum(weight.nbytes for weight in weights)
    return [
        *with_floor(
            Way(expand, "floor: write masks", lambda: [mask.zero_() for mask in masks], moved=case.count),
            [
                Way(expand, "pyprune", lambda: ops.expand(units, blocks, masks)),
                Way(expand, "torch, repeat_interleave", repeated, returned=case.count),
            ],
        ),
        *with_floor(
            Way(fold, "floor: weights * 1.0 in place", lambda: torch._foreach_mul_(weights, 1.0), moved=moved),
            [
                Way(fold, "pyprune", lambda: ops.fold(weights, units, blocks)),
                Way(fold, "torch, repeat_interleave and mul_", lambda: torch._foreach_mul_(weights, repeated())),
            ],
        ),
    ]
