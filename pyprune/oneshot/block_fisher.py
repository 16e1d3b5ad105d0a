"""The Fisher matrix of a weight, in blocks of neighbours along its diagonal (oBERT)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyprune.checks import check_count
from pyprune.methods.scope import Scope
from pyprune.oneshot.gradient_solver import AT_ONCE, problem, solve_by_scores
from pyprune.oneshot.solution import Solution
from pyprune.oneshot.system import check_damping, cholesky, with_damping


@dataclass(frozen=True)
class BlockFisher:
    """What `block_fisher` returns."""

    block: int
    damping: float
    name: str = "block Fisher"

    def scores(self, weight: Tensor, gradients: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
        """Return w^2 / (2 [F^-1]_ii), and the damping, as `GradientSolver` says."""
        values, part, mean = problem(weight, gradients, mask)

        def attempt(damping: float) -> Tensor | None:
            found = []
            for fisher, (w, there) in self._blocks(gradients, values, part):
                fisher.mul_(there[:, :, None]).mul_(there[:, None, :])
                fisher.diagonal(dim1=1, dim2=2).add_(damping * mean)
                factors = cholesky(fisher)
                if factors is None:
                    return None
                inverse = torch.cholesky_inverse(factors).diagonal(dim1=1, dim2=2)
                found.append((w * there).square().div_(2 * inverse).flatten())
            return torch.cat(found)

        scores, damping = with_damping(self.damping, values.dtype, attempt)
        return scores[: len(values)].view(weight.shape), damping

    def update(self, weight: Tensor, gradients: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        """Return W_K + F_KK^-1 F_KQ W_Q of the kept K when Q goes, and the damping, as `GradientSolver` says."""
        values, part, mean = problem(weight, gradients, mask)

        def attempt(damping: float) -> Tensor | None:
            found = []
            for fisher, (w, kept) in self._blocks(gradients, values, part):
                right = torch.bmm(fisher, (w * (1 - kept))[:, :, None])[:, :, 0].mul_(kept)
                fisher.mul_(kept[:, :, None]).mul_(kept[:, None, :])
                fisher.diagonal(dim1=1, dim2=2).add_(damping * mean)
                factors = cholesky(fisher)
                if factors is None:
                    return None
                step = torch.cholesky_solve(right[:, :, None], factors)[:, :, 0]
                found.append(torch.where(kept > 0, w + step, torch.zeros_like(w)).flatten())
            return torch.cat(found)

        solved, damping = with_damping(self.damping, values.dtype, attempt)
        return solved[: len(values)].view(weight.shape), damping

    def solve(
        self, weight: Tensor, gradients: Tensor, *, scope: Scope | None, ratio: float | None, mask: Tensor | None
    ) -> Solution:
        """Choose a mask and solve for what it keeps, as `GradientSolver` says."""
        return solve_by_scores(self, weight, gradients, scope, ratio, mask)

    def _blocks(self, gradients: Tensor, *rows: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield mean(g g^T) of many blocks, (blocks, block, block), with their part of rows; zeros fill the last."""
        elements, block = gradients.shape[1], min(self.block, gradients.shape[1])
        step = max(1, AT_ONCE // (block * max(block, len(gradients)))) * block
        for start in range(0, elements, step):
            stop = min(elements, start + step)
            filled = (0, -(stop - start) % block)
            g = pad(gradients[:, start:stop].to(rows[0].dtype), filled)
            g = g.view(len(gradients), -1, block).transpose(0, 1)
            parts = [pad(row[start:stop], filled).view(-1, block) for row in rows]
            yield torch.bmm(g.mT, g).div_(len(gradients)), parts


def block_fisher(*, block: int = 50, damping: float = 0.01) -> BlockFisher:
    """Prune by the second order of a loss, with the Fisher matrix in blocks along its diagonal, as oBERT does.

    F = mean(g g^T) + lambda I of ``block`` neighbours in C order, from the gradients g of samples. A weight's score
    is ``w^2 / (2 [F^-1]_ii)``: what the loss grows by if it goes and its block is solved for. All that goes from a
    block goes together: what is kept becomes ``W_K + F_KK^-1 F_KQ W_Q``, the joint solution, in which nothing is
    counted twice. Matrices are made for some blocks at a time.

    It solves from gradients, not from a Gram: see `prune_with_gradients`, and `GradientSolver` for tensors.

    Args:
        block: neighbours in a block.
        damping: lambda as a share of the mean of g^2; ten times as large where that cannot be factorised. Weights
            without any gradient are compared by magnitude.

    Raises:
        TypeError, ValueError: for other values.

    Paper: Kurtic et al. 2022, "The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large
    Language Models".

    Example:
        >>> from pyprune import solvers
        >>> weight, gradients = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [3.0, 1.0]])
        >>> solution = solvers.block_fisher().solve(weight, gradients, scope=None, ratio=0.5, mask=None)
        >>> solution.mask.tolist()
        [[True, False]]
    """
    return BlockFisher(check_count("block", block, least=1), check_damping(damping))
