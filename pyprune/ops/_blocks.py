"""Units of a tensor: the blocks that tile it."""

from collections.abc import Sequence

from torch import Tensor

from pyprune.checks import LARGEST_INT, check_count, shown


def unit_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Return how many units lie along each dimension: ``ceil(size / block)``. The last one may be smaller.

    Raises:
        TypeError, ValueError: for what is no sequence of integers, for a block without a size of at least 1 for each
            dimension, or negative sizes.

    Example:
        >>> unit_shape((64, 30, 3, 3), (1, 16, 3, 3))
        (64, 2, 1, 1)
    """
    sizes, steps = _sizes("shape", shape, least=0), _sizes("block", block, least=1)
    if len(sizes) != len(steps):
        raise ValueError(f"block is {shown(steps)} for a shape of {shown(sizes)}; give one size per dimension")
    return units_along(sizes, steps)


def units_along(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Return the same of what is known to fit, and maybe symbolic."""
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=True))


def check_blocks(blocks: Sequence[Sequence[int]], tensors: Sequence[Tensor], name: str) -> list[tuple[int, ...]]:
    """Return the blocks as tuples; raise unless there is one per tensor, with a positive size for each dimension."""
    if isinstance(blocks, (str, bytes)) or not isinstance(blocks, Sequence):
        raise TypeError(f"blocks is {shown(blocks)}; give a list of tuples of integers")
    if len(blocks) != len(tensors):
        raise ValueError(f"got {len(blocks)} blocks for {len(tensors)} {name}; give one block per tensor")
    checked = []
    for index, (block, tensor) in enumerate(zip(blocks, tensors, strict=True)):
        sizes = _sizes(f"blocks[{index}]", block, least=1)
        if len(sizes) != tensor.dim():
            raise ValueError(
                f"blocks[{index}] is {shown(sizes)} for {name}[{index}] of shape {tuple(tensor.shape)}; "
                f"give {tensor.dim()} sizes of at least 1, one per dimension"
            )
        # What reaches beyond the tensor covers the dimension, and no size overflows in a kernel.
        checked.append(tuple(min(size, max(1, whole)) for size, whole in zip(sizes, tensor.shape, strict=True)))
    return checked


def _sizes(name: str, sizes: Sequence[int], *, least: int) -> tuple[int, ...]:
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence):
        raise TypeError(f"{name} is {shown(sizes)}; give a tuple of integers")
    if all(type(size) is int and least <= size <= LARGEST_INT for size in sizes):
        return tuple(sizes)
    return tuple(check_count(name, size, least=least, what=f"integers of at least {least}") for size in sizes)
