"""ADMM: weights and mask searched together, with a penalty that grows until the mask is settled.

The published algorithm (ALPS) decomposes H into eigenvectors, so that each new penalty rho costs a product of two
matrices. Here (H + rho I) is inverted from its Cholesky factor instead: there are about ten penalties, and all of
them together take less than the decomposition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune.checks import check_count, check_number
from pyprune.methods.scope import Scope
from pyprune.oneshot.choose import choose
from pyprune.oneshot.least_squares import solve_kept
from pyprune.oneshot.solution import Solution
from pyprune.oneshot.system import check_asked, check_damping, cholesky, damped, system_of

# The schedule of the paper's code: each third iteration the penalty grows by how much of the mask has changed.
_EACH = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_SMALLER = 5.0
_LEAST_RHO = 1e-6
_SETTLED_AFTER, _SETTLED = 30, 3e-4
# Steps of conjugate gradients at the end; they begin close to where they go.
_STEPS = 10


@dataclass(frozen=True)
class Admm:
    """What `admm` returns."""

    rho: float
    iterations: int
    damping: float
    name: str = "ADMM"
    chooses: bool = True

    def solve(
        self, weight: Tensor, gram: Tensor, *, scope: Scope | None, ratio: float | None, mask: Tensor | None
    ) -> Solution:
        """Choose the mask and solve, as `Solver` says; without a scope all elements of the weight compete."""
        scope, ratio = check_asked(Scope("tensor") if scope is None else scope, ratio)
        system = system_of(weight, gram, mask)

        def attempt(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
            # Inputs of one size: the penalty means the same for all.
            size = matrix.diagonal().sqrt()
            matrix.div_(size).div_(size[:, None])
            wanted = system.weight * size
            found = search(wanted, matrix, scope, ratio, mask, rho=self.rho, iterations=self.iterations)
            if found is None:
                return None
            solved = solve_kept(wanted, matrix, found.mask, start=found.weight, iterations=_STEPS)
            return None if solved is None else (solved.div_(size), found.mask)

        (solved, kept), damping = damped(system.gram, self.damping, attempt)
        return system.solution(solved, kept, damping)


def admm(*, rho: float = 0.1, iterations: int = 300, damping: float = 0.01) -> Admm:
    """Choose mask and weights together by ADMM, as ALPS does; the best of these solvers, and the slowest.

    Weights B are pulled by a penalty rho towards D, their own projection to what scope and ratio allow:
    ``B = (W H + rho (D - U)) (H + rho I)^-1``, ``D = projection(B + U)``, ``U += B - D``. Each third iteration rho
    grows by 1.3, 1.2 or 1.1, as more than a tenth, 1/200 or anything of the mask has changed, and the search ends
    when nothing has (rho that begins too large is divided by 5). Then least squares on that mask. H is the Gram,
    damped, with inputs scaled to a diagonal of 1.

    Scopes are tensor(), which is best and the default, columns(), row(), and n_of_m().

    Args:
        rho: the penalty to begin with.
        iterations: how many there are at most; about 30 do.
        damping: as for `least_squares`.

    Raises:
        TypeError, ValueError: for other values, and when it solves for scopes in which weights compete.

    Paper: Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
    Models".

    Example:
        >>> from pyprune import scope, solvers
        >>> _ = torch.manual_seed(0)
        >>> weight, inputs = torch.randn(8, 16), torch.randn(64, 16)
        >>> gram = inputs.T @ inputs
        >>> solution = solvers.admm().solve(weight, gram, scope=scope.n_of_m(keep=2, of=4), ratio=None, mask=None)
        >>> int(solution.mask.sum())
        64
    """
    what = "a penalty, a number above 0 and up to 1e6"
    return Admm(
        check_number("rho", rho, what=what, least=_LEAST_RHO, most=1e6),
        check_count("iterations", iterations, least=1),
        check_damping(damping),
    )


@dataclass(frozen=True, eq=False)
class Found:
    """What a search ends with: weights that are zero outside of the mask, and the penalties that it went through."""

    weight: Tensor
    mask: Tensor
    rhos: list[float]
    iterations: int


def search(
    wanted: Tensor,
    gram: Tensor,
    scope: Scope,
    ratio: float | None,
    base: Tensor | None,
    *,
    rho: float,
    iterations: int,
) -> Found | None:
    """Search weights and mask for a Gram with a diagonal of 1; None if it is not positive definite."""
    mask = choose(wanted, scope, ratio, base)
    first, before = mask, mask.clone()
    kept = int(mask.sum())
    if kept in (0, mask.numel()):
        return Found(wanted * mask, mask, [], 0)
    inverse = _inverse(gram, rho)
    if inverse is None:
        return None
    outputs = wanted @ gram
    split = wanted * mask  # D
    dual = torch.zeros_like(wanted)  # U
    total, right = torch.empty_like(wanted), torch.empty_like(wanted)
    rhos: list[float] = []
    has_grown = False
    count = 0
    mask = mask.clone()
    while count < iterations:
        count += 1
        torch.sub(split, dual, out=right)
        torch.add(outputs, right, alpha=rho, out=right)
        torch.addmm(dual, right, inverse, out=total)  # B + U
        choose(total, scope, ratio, base, out=mask)
        torch.mul(total, mask, out=split)
        torch.sub(total, split, out=dual)
        if count % _EACH:
            continue
        changed = int((mask != before).sum()) / kept
        before.copy_(mask)
        if changed == 0 and (has_grown or rho / _SMALLER < _LEAST_RHO):
            break
        if count == iterations or (count > _SETTLED_AFTER and changed < _SETTLED):
            break
        old = rho
        if changed == 0:
            rho /= _SMALLER
            torch.mul(wanted, first, out=split)
            dual.zero_()
            before.copy_(first)
        else:
            has_grown = True
            rho = min(1e6, rho * next(growth for least, growth in _GROWTH if changed > least))
            dual.mul_(old / rho)
        rhos.append(rho)
        inverse = _inverse(gram, rho)
        if inverse is None:
            return None
    # As published, what stays in the end is by the weights that are pulled, not by what they are pulled to.
    torch.mm(right, inverse, out=total)
    choose(total, scope, ratio, base, out=mask)
    return Found(total.mul_(mask), mask, rhos, count)


def _inverse(gram: Tensor, rho: float) -> Tensor | None:
    matrix = gram.clone()
    matrix.diagonal().add_(rho)
    factor = cholesky(matrix)
    return None if factor is None else torch.cholesky_inverse(factor)
