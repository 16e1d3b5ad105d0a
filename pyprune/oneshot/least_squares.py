"""The weights that a mask keeps, solved anew: those with which a layer's outputs stay closest to what they were."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.checks import check_bool
from pyprune.methods.scope import Scope
from pyprune.oneshot.solution import Solution
from pyprune.oneshot.system import check_damping, cholesky, damped, system_of
from pyprune.structured.least_squares import conjugate_gradients

# How small the gradient on what is kept becomes, as a share of what it is if nothing is solved.
_TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-9}
_ITERATIONS = 200
# Inputs that a row keeps, up to which a factorisation of its own is less work than conjugate gradients for all rows.
_EXACT = 64
# Elements of the matrices that are factorised at once.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class LeastSquares:
    """What `least_squares` returns."""

    damping: float
    exact: bool | None
    name: str = "least squares"
    chooses: bool = False

    def solve(
        self, weight: Tensor, gram: Tensor, *, scope: Scope | None, ratio: float | None, mask: Tensor | None
    ) -> Solution:
        """Solve for what the mask keeps, as `Solver` says; scope and ratio are not looked at."""
        if mask is None:
            raise ValueError("mask is None; least_squares solves for what a mask keeps, so give one")
        system = system_of(weight, gram, mask)

        def attempt(matrix: Tensor) -> Tensor | None:
            return solve_kept(system.weight, matrix, mask, exact=self.exact)

        solved, damping = damped(system.gram, self.damping, attempt)
        return system.solution(solved, mask, damping)


def least_squares(*, damping: float = 0.01, exact: bool | None = None) -> LeastSquares:
    """Solve for the weights that any mask keeps: V = argmin tr((V-W) (H + lambda I) (V-W)^T), zero where it drops.

    It takes the mask that a method made, or one of your own, and changes no zero. On the mask of Wanda it is about as
    good as SparseGPT, and on SparseGPT's better.

    Args:
        damping: lambda as a share of the mean of H's diagonal. If H cannot be factorised with it, it is taken ten
            times as large, until it can; the solution says what was used.
        exact: whether each row is solved by a factorisation of its own (kept^3 / 3 operations a row), or all at once
            by conjugate gradients, until what is left of the gradient is rounding. None takes what is less work.

    Raises:
        TypeError, ValueError: for other values, and when it solves without a mask.

    Example:
        >>> from pyprune import solvers
        >>> inputs = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
        >>> mask = torch.tensor([[True, False]])
        >>> solver = solvers.least_squares(damping=0)
        >>> solver.solve(torch.tensor([[1.0, 1.0]]), inputs.T @ inputs, scope=None, ratio=None, mask=mask).weight
        tensor([[2.5000, 0.0000]])
    """
    return LeastSquares(check_damping(damping), exact if exact is None else check_bool("exact", exact))


def solve_kept(
    wanted: Tensor,
    gram: Tensor,
    mask: Tensor,
    *,
    exact: bool | None = None,
    start: Tensor | None = None,
    iterations: int = _ITERATIONS,
) -> Tensor | None:
    """Return V with the least tr((V-W) H (V-W)^T) among those that are zero outside of a mask; None if H is not
    positive definite.

    Args:
        wanted: W, (rows, columns).
        gram: H, with damping.
        mask: bool, True = kept.
        exact: as for `least_squares`.
        start: where conjugate gradients begin, zero outside of the mask; W under the mask if None.
        iterations: how many of them there are at most.
    """
    most = int(mask.sum(1).max())
    if exact or (exact is None and most <= _EXACT):
        return _by_rows(wanted, gram, mask, most)
    begin = torch.where(mask, wanted, torch.zeros_like(wanted)) if start is None else start
    kept = mask.T.to(gram.dtype)
    right = (gram @ (wanted - begin).T).mul_(kept)

    def product(step: Tensor) -> Tensor:
        return (gram @ step).mul_(kept)

    step, _ = conjugate_gradients(
        product, right, gram.diagonal()[:, None], tolerance=_TOLERANCE[gram.dtype], iterations=iterations
    )
    return begin + step.T


def _by_rows(wanted: Tensor, gram: Tensor, mask: Tensor, most: int) -> Tensor | None:
    """Solve H_KK V_K = (W H)_K of each row by a factorisation; rows that keep less have ones on the diagonal."""
    solved = torch.zeros_like(wanted)
    right = wanted @ gram
    order = (~mask).sort(dim=1, stable=True).indices[:, :most]
    step = max(1, _AT_ONCE // max(1, most * most))
    for start in range(0, len(wanted), step):
        rows = slice(start, start + step)
        kept, there = order[rows], mask[rows].gather(1, order[rows])
        matrices = gram[kept[:, :, None], kept[:, None, :]]
        matrices.mul_((there[:, :, None] & there[:, None, :]).to(gram.dtype))
        matrices.diagonal(dim1=1, dim2=2).add_((~there).to(gram.dtype))
        factors = cholesky(matrices)
        if factors is None:
            return None
        parts = right[rows].gather(1, kept).mul_(there)
        found = torch.cholesky_solve(parts[:, :, None], factors)[:, :, 0]
        solved[rows].scatter_(1, kept, found)
    return solved
