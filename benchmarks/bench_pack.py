"""Weights as bits and kept values, as they are stored, and back."""

import torch
from measure import Way, with_floor
from shapes import LISTS, Case
from torch import Tensor

from pyprune import ops

MODELS = tuple(LISTS)
PACK, UNPACK = "pack bits and values", "unpack bits and values"


def ways(case: Case) -> list[Way]:
    weights = case.draw()
    masks = [torch.rand_like(weight, dtype=torch.float32) >= case.ratio for weight in weights]
    ops.fold(weights, masks)
    bits, values = ops.pack(weights)
    shapes = [weight.shape for weight in weights]
    masks = [weight != 0 for weight in weights]
    out = [torch.empty_like(weight) for weight in weights]
    dense, packed = sum(one.nbytes for one in weights), sum(one.nbytes for one in [*bits, *values])

    def copy() -> list[Tensor]:
        """Read and write as many bytes as the job, in memory that is as new as that of its results."""
        return [source.clone() for source in halves]

    # Half of the bytes that are moved, read once and written once, in as many pieces.
    halves = [torch.ones((weight.nbytes + row.nbytes + some.nbytes) // 2, dtype=torch.uint8)
              for weight, row, some in zip(weights, bits, values, strict=True)]  # fmt: skip

    def by_masks() -> list[Tensor]:
        found = [torch.zeros(shape, dtype=weights[0].dtype) for shape in shapes]
        for one, mask, some in zip(found, masks, values, strict=True):
            one[mask] = some
        return found

    return [
        *with_floor(
            Way(PACK, "floor: copy as many bytes", copy, moved=dense + packed),
            [
                Way(PACK, "pyprune", lambda: ops.pack(weights), returned=packed),
                Way(PACK, "torch, x where x != 0", lambda: [weight[weight != 0] for weight in weights]),
            ],
        ),
        *with_floor(
            Way(UNPACK, "floor: copy as many bytes", copy, moved=dense + packed),
            [
                Way(UNPACK, "pyprune", lambda: ops.unpack(bits, values, shapes), returned=dense),
                Way(UNPACK, "pyprune, into what is there", lambda: ops.unpack(bits, values, shapes, out=out)),
                Way(UNPACK, "torch, values into a mask", by_masks),
            ],
        ),
    ]
