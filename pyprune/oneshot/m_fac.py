"""The Fisher matrix of a whole weight, which is never made: products with its inverse, from the gradients (M-FAC).

With the gradients of m samples as the rows of G, F = lambda I + G^T G / m, and by the identity of Woodbury
F^-1 = (I - G^T M^-1 G) / lambda with M = lambda m I + G G^T, a matrix of m by m.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.methods.scope import Scope
from pyprune.oneshot.gradient_solver import AT_ONCE, problem, solve_by_scores
from pyprune.oneshot.solution import Solution
from pyprune.oneshot.system import check_damping, cholesky, with_damping


@dataclass(frozen=True)
class MFac:
    """What `m_fac` returns."""

    damping: float
    name: str = "M-FAC"

    def scores(self, weight: Tensor, gradients: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
        """Return w^2 / (2 [F^-1]_ii), and the damping, as `GradientSolver` says."""
        values, part, mean = problem(weight, gradients, mask)
        products = _products(gradients, part)

        def attempt(damping: float) -> Tensor | None:
            factor = _factor(products, damping * mean)
            if factor is None:
                return None
            found = []
            for w, there, g in _pieces(gradients, values, part):
                taken = torch.linalg.solve_triangular(factor, g * there, upper=False).square().sum(0)
                found.append((w * there).square() * (0.5 * damping * mean) / (1 - taken).clamp(min=1e-12))
            return torch.cat(found)

        scores, damping = with_damping(self.damping, products.dtype, attempt)
        return scores.to(values.dtype).view(weight.shape), damping

    def update(self, weight: Tensor, gradients: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        """Return W_K + F_KK^-1 F_KQ W_Q = W_K + G_K^T M_K^-1 G_Q W_Q, and the damping, as `GradientSolver` says."""
        values, part, mean = problem(weight, gradients, mask)
        products = _products(gradients, part)
        lost = sum(g @ (w * (1 - kept)) for w, kept, g in _pieces(gradients, values, part))
        assert isinstance(lost, Tensor)

        def attempt(damping: float) -> Tensor | None:
            factor = _factor(products, damping * mean)
            return None if factor is None else torch.cholesky_solve(lost[:, None], factor)[:, 0]

        along, damping = with_damping(self.damping, products.dtype, attempt)
        solved = torch.cat([(w + along @ g) * kept for w, kept, g in _pieces(gradients, values, part)])
        return solved.to(values.dtype).view(weight.shape), damping

    def solve(
        self, weight: Tensor, gradients: Tensor, *, scope: Scope | None, ratio: float | None, mask: Tensor | None
    ) -> Solution:
        """Choose a mask and solve for what it keeps, as `GradientSolver` says."""
        return solve_by_scores(self, weight, gradients, scope, ratio, mask)


def m_fac(*, damping: float = 0.01) -> MFac:
    """Prune by the second order of a loss, with the Fisher matrix of the whole weight, as M-FAC does.

    The matrix is never made: of m samples a weight with n elements needs their gradients, and m^2 n operations.
    Scores and the joint solution are those of `block_fisher` with all of the weight in one block; they can tell apart
    only as many directions as there are samples. Sums are in float64.

    It solves from gradients, not from a Gram: see `prune_with_gradients`, and `GradientSolver` for tensors.

    Args:
        damping: as for `block_fisher`; more than 0.

    Raises:
        TypeError, ValueError: for other values.

    Paper: Frantar et al. 2021, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information".

    Example:
        >>> from pyprune import solvers
        >>> weight, gradients = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [3.0, 1.0]])
        >>> solution = solvers.m_fac().solve(weight, gradients, scope=None, ratio=0.5, mask=None)
        >>> solution.mask.tolist()
        [[True, False]]
    """
    damping = check_damping(damping)
    if damping == 0:
        raise ValueError("damping is 0; fewer samples than weights leave F without an inverse, so give more than 0")
    return MFac(damping)


def _pieces(gradients: Tensor, *rows: Tensor) -> Iterator[list[Tensor]]:
    """Yield some elements of rows, and of the gradients, in float64."""
    size = max(1, AT_ONCE // len(gradients))
    for start in range(0, gradients.shape[1], size):
        yield [one[..., start : start + size].double() for one in (*rows, gradients)]


def _products(gradients: Tensor, part: Tensor) -> Tensor:
    """Return G G^T of the elements that take part."""
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=gradients.device)
    for there, g in _pieces(gradients, part):
        g = g * there
        total.addmm_(g, g.T)
    return total


def _factor(products: Tensor, damping: float) -> Tensor | None:
    matrix = products.clone()
    matrix.diagonal().add_(len(products) * damping)
    return cholesky(matrix)
