"""Masks of blocks: one bit for rows x columns of a weight, whose rows are its first dimension."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from pyprune import ops

# What is tried, rows x columns, besides units of whole kernels, rows and columns.
_TRIED = ((4, 1), (1, 4), (8, 1), (1, 8), (4, 4), (8, 8), (16, 16), (32, 32))
SAMPLE = 64  # rows, a multiple of all that are tried


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of a weight.

    Example:
        >>> as_matrix((8, 4, 3, 3))
        (8, 36)
    """
    return shape[0], prod(shape[1:])


def find_block(tensor: Tensor, packed: int) -> tuple[tuple[int, int], Tensor] | None:
    """Return the block of which a weight takes the fewest bytes, and the mask of its blocks, if these are fewer.

    Args:
        tensor: contiguous.
        packed: bytes that it takes with a bit per element.

    Example:
        >>> weight = torch.zeros(64, 8)
        >>> weight[:4] = 1
        >>> find_block(weight, 64 * 8 // 8 + 4 * 8 * 4)[0]
        (4, 8)
    """
    if tensor.dim() < 2 or not tensor.numel():
        return None
    rows, columns = as_matrix(tuple(tensor.shape))
    kept = (tensor if tensor.dtype is torch.bool else _nonzero(tensor)).view(rows, columns)
    best: tuple[tuple[int, int], Tensor] | None = None
    for block in _promising(kept[:SAMPLE], tensor.dtype.itemsize, tuple(tensor.shape)):
        size, mask = _bytes(kept, block, tensor.dtype.itemsize)
        if size < packed:
            packed, best = size, (block, mask)
    return best


def may_have_blocks(sample: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether `find_block` may find one in a weight of two or more dimensions.

    Args:
        sample: the elements of its first rows, `SAMPLE` or all.
        shape: of the weight.

    Example:
        >>> may_have_blocks(torch.eye(64).view(-1), (1000, 64)), may_have_blocks(torch.ones(64 * 64), (1000, 64))
        (False, True)
    """
    kept = (sample if sample.dtype is torch.bool else _nonzero(sample)).view(-1, prod(shape[1:]))
    return next(_promising(kept, sample.dtype.itemsize, shape), None) is not None


def expand_blocks(mask: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Return the mask of the elements of a weight.

    Example:
        >>> expand_blocks(torch.tensor([[True], [False]]), (1, 2), (2, 2)).tolist()
        [[True, True], [False, False]]
    """
    whole = torch.empty(as_matrix(shape), dtype=torch.bool)
    ops.expand([mask], [block], masks=[whole])
    return whole.view(shape)


def blocks_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks a weight has, in rows and columns; those at the ends may be smaller.

    Example:
        >>> blocks_of((9, 4), (4, 2))
        (3, 2)
    """
    rows, columns = as_matrix(shape)
    return -(-rows // block[0]), -(-columns // block[1])


def elements_in(mask: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> int:
    """Return how many elements of a weight a mask of blocks keeps.

    Example:
        >>> elements_in(torch.tensor([[True], [True]]), (4, 2), (5, 2))
        10
    """
    sides = []
    for size, step in zip(as_matrix(shape), block, strict=True):
        side = torch.full((-(-size // step),), step)
        if size % step:
            side[-1] = size % step
        sides.append(side)
    return int((mask.long() @ sides[1]) @ sides[0])


def _nonzero(tensor: Tensor) -> Tensor:
    # float8 has no comparison.
    return (tensor.float() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor) != 0


def _promising(sample: Tensor, itemsize: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the blocks to try: of weights with many rows, those that the first ones have."""
    rows, columns = as_matrix(shape)
    plain = sample.numel() // 8 + int(sample.sum()) * itemsize
    for block in _candidates(shape, rows, columns):
        if rows <= 2 * SAMPLE or _bytes(sample, block, itemsize)[0] <= plain:
            yield block


def _candidates(shape: tuple[int, ...], rows: int, columns: int) -> Iterator[tuple[int, int]]:
    kernel = prod(shape[2:])
    several = {(1, kernel), (1, columns), (4, columns), (rows, 1), (rows, kernel)} if len(shape) > 2 else set()
    for block in dict.fromkeys([*_TRIED, *sorted(several | {(1, columns), (4, columns), (rows, 1)})]):
        if block[0] <= rows and block[1] <= columns and prod(block) > 1:
            yield block


def _bytes(kept: Tensor, block: tuple[int, int], itemsize: int) -> tuple[int, Tensor]:
    rows, columns = kept.shape
    block = min(block[0], rows), block[1]  # or a few rows of a column would be filled up to all
    padded = torch.nn.functional.pad(kept, (0, -columns % block[1], 0, -rows % block[0]))
    mask = padded.view(len(padded) // block[0], block[0], -1, block[1]).any(3).any(1)
    return -(-mask.numel() // 8) + elements_in(mask, block, (rows, columns)) * itemsize, mask
