"""Masks that are N:M along rows and columns at once, so that the transpose of a weight is N:M too."""

import itertools
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

_AT_ONCE = 2**16  # squares whose patterns are compared at once: 90 sums of each are 47 MB


@torch.no_grad()
def transposable_mask(scores: Tensor, keep: int, of: int) -> Tensor:
    """Keep ``keep`` in each row and column of each square of ``of`` by ``of``, with the largest sum of scores.

    All patterns of a square are tried (90 for 2 of 4), their sums in float64. Of patterns that tie, the one goes
    first whose first lost element has the lowest index. Where ``of`` does not divide a size, the squares at the edge
    are as if zeros, or less if scores are negative, lay beyond it.

    Args:
        scores: [..., rows, columns].
        keep, of: as in `pyprune.scope.n_of_m`; ``of`` up to 4.

    Returns:
        The mask (True = kept), of the shape of the scores.

    Example:
        >>> transposable_mask(torch.tensor([[1.0, 5.0], [2.0, 3.0]]), keep=1, of=2).int().tolist()
        [[0, 1], [1, 0]]
    """
    rows, columns = scores.shape[-2:]
    if scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    patterns = _patterns(keep, of).to(scores.device)
    padded = functional.pad(scores, (0, -columns % of, 0, -rows % of), value=torch.nan)
    *others, down, across = padded.shape
    squares = padded.reshape(*others, down // of, of, across // of, of).transpose(-3, -2)
    masks = torch.cat([_best(part, patterns) for part in torch.split(squares.reshape(-1, of * of), _AT_ONCE)])
    whole = masks.reshape(squares.shape).transpose(-3, -2).reshape(padded.shape)
    return whole[..., :rows, :columns]


def _best(squares: Tensor, patterns: Tensor) -> Tensor:
    # What is added to all of a square changes no choice, and zeros beyond the edge are the lowest then.
    wide = squares.double()
    wide = (wide - wide.nan_to_num(nan=0.0).amin(1, keepdim=True).clamp(max=0)).nan_to_num(nan=0.0)
    return patterns[(wide @ patterns.T.double()).argmax(1)]


@cache
def _patterns(keep: int, of: int) -> Tensor:
    """Return all 0-1 squares with ``keep`` in each row and column, those that lose the lowest indices first."""
    rows = [row for row in itertools.product((False, True), repeat=of) if sum(row) == keep]
    squares = itertools.product(rows, repeat=of)
    fitting = [square for square in squares if all(sum(column) == keep for column in zip(*square, strict=True))]
    return torch.tensor(sorted(fitting)).flatten(1)
