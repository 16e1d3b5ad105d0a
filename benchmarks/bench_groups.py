"""Masks by group: N:M along the inputs, and half of each row by |w| * norm of the input (Wanda)."""

from collections.abc import Callable
from typing import Any

import torch
from measure import Way, with_floor
from peers import argsort_groups, sort_rows, topk_groups
from shapes import LISTS, Case
from torch import Tensor

from pyprune import ops

MODELS = tuple(LISTS)
PATTERNS = ((2, 4), (4, 8), (1, 4))  # kept, of
ROWS = "half of each row, |w| * norm"
TOO_LARGE = 300_000_000  # weights; more than this, and the peers take minutes


def group_of(kept: int, size: int) -> str:
    return f"{kept}:{size} masks"


def inputs_last(weight: Tensor) -> Tensor:
    """View a weight with the dimension last that N:M goes along."""
    return weight.movedim(1, -1)


def ways(case: Case) -> list[Way]:
    as_drawn = case.draw()
    convolutions = any(weight.dim() == 4 for weight in as_drawn)
    # N:M wants input channels next to each other, as channels_last has them.
    weights = [
        weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight for weight in as_drawn
    ]
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    far_masks = [torch.ones_like(weight, dtype=torch.bool) for weight in as_drawn]
    left_out = "takes minutes" if case.count > TOO_LARGE else ""

    def along_inputs(weights: list[Tensor], masks: list[Tensor] | None, kept: int, size: int) -> object:
        return ops.group_masks(
            [inputs_last(weight) for weight in weights],
            size,
            kept,
            row_dims=[weight.dim() - 1 for weight in weights],
            masks=None if masks is None else [inputs_last(mask) for mask in masks],
        )

    def peer(group: str, name: str, run: Callable[[], object], **more: Any) -> Way:
        return Way(group, name, run, returned=case.count, left_out=left_out, **more)

    def of_pattern(kept: int, size: int) -> list[Way]:
        group = group_of(kept, size)
        views = [inputs_last(weight) for weight in weights]
        found = [
            Way(group, "pyprune", lambda: along_inputs(weights, masks, kept, size)),
            Way(group, "pyprune, new masks", lambda: along_inputs(weights, None, kept, size), returned=case.count),
        ]
        if convolutions:
            found.append(
                Way(group, "pyprune, torch's default layout", lambda: along_inputs(as_drawn, far_masks, kept, size))
            )
        return [
            *found,
            peer(group, "topk per group", lambda: topk_groups(views, kept, size)),
            peer(group, "argsort per group", lambda: argsort_groups(views, kept, size), slow=True),
        ]

    columns = [weight[0].numel() for weight in as_drawn]
    halves = [count // 2 for count in columns]
    norms = [torch.rand(count) + 0.5 for count in columns]
    rows = [
        Way(
            ROWS,
            "pyprune",
            lambda: ops.group_masks(
                as_drawn, columns, [n - half for n, half in zip(columns, halves, strict=True)],
                factors=norms, masks=far_masks,
            ),
        ),
        peer(ROWS, "sort per row", lambda: sort_rows(as_drawn, norms, halves)),
    ]  # fmt: skip
    floor = Way(
        "masks by group",
        "floor: read weights, write masks",
        lambda: ops.threshold(as_drawn, 0, masks=far_masks),
        moved=sum(weight.nbytes for weight in as_drawn) + case.count,
    )
    return with_floor(floor, [way for pattern in PATTERNS for way in of_pattern(*pattern)] + rows)
