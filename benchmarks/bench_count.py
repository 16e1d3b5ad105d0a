"""Counting the zeros of masks, as statistics do."""

import torch
from measure import Way, with_floor
from shapes import LISTS, Case
from torch import Tensor

from pyprune import ops

MODELS = tuple(LISTS)
COUNT = "count zeros of masks"


def ways(case: Case) -> list[Way]:
    flat = torch.rand(case.count) >= case.ratio
    masks = [part.view(shape) for part, shape in zip(flat.split(case.sizes), case.shapes, strict=True)]

    def read() -> Tensor:
        return flat.view(torch.uint8).amax()

    def warm() -> tuple[()]:
        """Read the masks before every way: those of a small model stay in the cache, and must do so for all."""
        read()
        return ()

    return with_floor(
        Way(COUNT, "floor: read the masks", read, warm, moved=flat.nbytes),
        [
            Way(COUNT, "pyprune", lambda: ops.count_zeros(masks), warm),
            Way(COUNT, "torch.count_nonzero", lambda: [torch.count_nonzero(mask) for mask in masks], warm),
            Way(COUNT, "(mask == 0).sum()", lambda: [(mask == 0).sum() for mask in masks], warm),
        ],
    )
