"""What solvers of one-shot pruning take and return, in pure tensors."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyprune.methods.scope import Scope


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver made of a weight.

    Args:
        weight: (rows, columns), float32, or float64 if the weight was that; zero where the mask drops.
        mask: bool of the same shape, True = kept.
        damping: what was added to the Gram's diagonal, as a share of its mean; larger than asked for if it had to be.
    """

    weight: Tensor
    mask: Tensor
    damping: float


class Solver(Protocol):
    """A rule for the weights that are kept: those with which a layer's outputs stay closest to what they were.

    It sees one matrix, weight V, whose outputs are X V^T, and the Gram H = X^T X of its inputs.
    """

    @property
    def name(self) -> str:
        """Its name in tables."""

    @property
    def chooses(self) -> bool:
        """Whether it chooses the mask by itself; otherwise it takes that of a method.

        `swaps` takes one, too, and returns a better one, with as many kept of all that competes: the mask of a
        solution is what counts.
        """

    def solve(
        self, weight: Tensor, gram: Tensor, *, scope: Scope | None, ratio: float | None, mask: Tensor | None
    ) -> Solution:
        """Solve one matrix.

        Args:
            weight: (rows, columns), of any float dtype; it is left as it is.
            gram: (columns, columns), symmetric, float32 or float64, without damping; it is left as it is.
            scope: what competes; of a solver that takes a mask the one that this was made for (None will do for
                all but `swaps`).
            ratio: the fraction of the elements to remove, those that ``mask`` drops among them; None for all that
                N:M removes.
            mask: elements that are False stay zero.
        """


def relative_error(before: Tensor, after: Tensor, gram: Tensor) -> float:
    """Return the share of a layer's output that a change of its weight loses: tr((V-W) H (V-W)^T) / tr(W H W^T).

    0 where the inputs are all zero.

    Example:
        >>> relative_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]]), torch.eye(2))
        0.2
    """
    wide = gram.dtype if gram.dtype == torch.float64 else torch.promote_types(before.dtype, torch.float32)
    before, gram = before.to(wide), gram.to(wide)
    missing = after.to(wide) - before

    whole = output_size(before, gram)
    return max(0.0, output_size(missing, gram)) / whole if whole > 0 else 0.0


def output_size(weight: Tensor, gram: Tensor) -> float:
    """Return the sum of the squares of a layer's outputs, tr(W H W^T).

    Example:
        >>> output_size(torch.tensor([[1.0, 2.0]]), torch.eye(2))
        5.0
    """
    wide = weight.to(gram.dtype)
    with torch.autocast(gram.device.type, enabled=False):  # it would round the product to half types
        return float(((wide @ gram) * wide).sum(dtype=torch.float64))
