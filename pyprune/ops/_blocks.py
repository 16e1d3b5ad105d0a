"""Units of a tensor: the blocks that tile it."""

import operator
from collections.abc import Sequence

from torch import Tensor


def unit_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Return how many units lie along each dimension: ``ceil(size / block)``. The last one may be smaller.

    Example:
        >>> unit_shape((64, 30, 3, 3), (1, 16, 3, 3))
        (64, 2, 1, 1)
    """
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=True))


def check_blocks(blocks: Sequence[Sequence[int]], tensors: Sequence[Tensor], name: str) -> list[tuple[int, ...]]:
    """Return the blocks as tuples; raise unless there is one per tensor, with a positive size for each dimension."""
    if len(blocks) != len(tensors):
        raise ValueError(f"got {len(blocks)} blocks for {len(tensors)} {name}; give one block per tensor")
    checked = []
    for index, (block, tensor) in enumerate(zip(blocks, tensors, strict=True)):
        try:
            sizes = tuple(operator.index(size) for size in block)
        except TypeError as error:
            raise TypeError(f"blocks[{index}] is {block!r}; a block is a tuple of integers") from error
        if len(sizes) != tensor.dim() or any(size < 1 for size in sizes):
            raise ValueError(
                f"blocks[{index}] is {sizes} for {name}[{index}] of shape {tuple(tensor.shape)}; "
                f"give {tensor.dim()} sizes of at least 1, one per dimension"
            )
        # What reaches beyond the tensor covers the dimension, and no size overflows in a kernel.
        checked.append(tuple(min(size, max(1, whole)) for size, whole in zip(sizes, tensor.shape, strict=True)))
    return checked
