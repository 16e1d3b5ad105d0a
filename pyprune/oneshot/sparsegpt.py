"""SparseGPT: columns from left to right, each makes up for what those before it lost."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyprune import ops
from pyprune.checks import check_bool, check_count, shown
from pyprune.methods.allocation import removed_count
from pyprune.methods.scope import Scope, columns
from pyprune.oneshot.choose import choose
from pyprune.oneshot.grids import Grid
from pyprune.oneshot.least_squares import solve_kept
from pyprune.oneshot.solution import Solution
from pyprune.oneshot.system import check_asked, check_damping, cholesky, damped, system_of, unrounded

_PANEL = 128  # columns that are factorised at a time


@dataclass(frozen=True)
class SparseGPT:
    """What `sparsegpt` returns."""

    block: int
    polish: bool
    damping: float
    quantize: Grid | None = None
    name: str = "SparseGPT"
    chooses: bool = True

    @torch.no_grad()
    def solve(
        self, weight: Tensor, gram: Tensor, *, scope: Scope | None, ratio: float | None, mask: Tensor | None
    ) -> Solution:
        """Choose a mask and solve for what it keeps, as `Solver` says; scope None is ``columns(block)``."""
        scope, ratio = check_asked(columns(self.block) if scope is None else scope, ratio)
        system = system_of(weight, gram, mask)
        factor, damping = damped(system.gram, self.damping, _factor)
        on_grid = None if self.quantize is None else _OnGrid(self.quantize, *self.quantize.steps(weight))
        with unrounded(weight.device):
            values = system.weight.clone() if self.polish else system.weight
            walk = _Walk(values, factor, mask, scope, ratio, on_grid)
            for start, end in _spans(0, weight.shape[1], scope.width or self._width(scope)):
                walk.choose(start, end)
                for part in _spans(start, end, self._width(scope)):
                    walk.solve(*part)
        if self.quantize is None and bool(walk.mask.all()):
            return system.solution(walk.weight, walk.mask, damping)
        if self.polish:
            solved, damping = damped(
                system.gram, damping, lambda matrix: solve_kept(system.weight, matrix, walk.mask)
            )
            return system.solution(solved, walk.mask, damping)
        return Solution(walk.weight.to(torch.promote_types(weight.dtype, torch.float32)), walk.mask, damping)

    def _width(self, scope: Scope) -> int:
        """Return how many columns are solved at a time: whole groups of N:M, which the kernel chooses by itself."""
        if scope.of and self.quantize is not None:
            return scope.of
        return max(1, self.block // scope.of) * scope.of if scope.of else self.block


def sparsegpt(
    *, block: int = 128, polish: bool = False, damping: float = 0.01, quantize: Grid | None = None
) -> SparseGPT:
    """Prune column by column, and let the columns that follow make up for what each loses (Optimal Brain Surgeon).

    An element (row, j) costs c^2 / (2 U_jj^2), with c its value when column j is reached and U the Cholesky factor of
    the inverse of H + lambda I, of which the columns from j on are left. What goes is chosen by that cost:

    - ``columns(width)``, the rule of the paper with 128: of all rows of so many columns, when they are reached.
      Without a scope it is ``columns(block)``.
    - `n_of_m` along inputs: of each group, when it is reached.
    - `tensor` and `row`: how many go of each block is what the costs before the first column say, which of these the
      costs when the block is reached. The error is smaller than with blocks that all lose the same share: on
      correlated inputs up to half.
    - other N:M by the costs before the first column.

    Instead of the inverse and its factor (4/3 n^3 operations) it takes one Cholesky R R^T = H + lambda I with R upper
    triangular (n^3 / 3), because U_jj = 1 / R_jj, and the rows U_j / U_jj follow from sums of R.

    Args:
        block: how many columns are solved before those that follow are told.
        polish: whether the weights that are kept are solved by least squares in the end: half of the way to ADMM, and
            several times the work.
        damping: lambda as a share of the mean of H's diagonal. If H cannot be factorised with it, it is taken ten
            times as large, until it can; the solution says what was used.
        quantize: what `grid` returns: each kept weight is rounded to it when its column is reached, and the columns
            that follow make up for that, too. Column by column in torch, so slowly. Not with ``polish``.

    Raises:
        TypeError, ValueError: for other values; when it solves, for a scope in which weights compete, or matrices
            that do not fit or are not finite.

    Paper: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".

    Example:
        >>> from pyprune import scope, solvers
        >>> inputs = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
        >>> solver = solvers.sparsegpt(damping=0)
        >>> found = solver.solve(
        ...     torch.tensor([[1.0, 3.0]]), inputs.T @ inputs, scope=scope.tensor(), ratio=0.5, mask=None
        ... )
        >>> found.mask.tolist(), [[round(value, 3) for value in row] for row in found.weight.tolist()]
        ([[False, True]], [[0.0, 3.6]])
    """
    block = check_count("block", block, least=1, what="a number of columns, at least 1")
    polish = check_bool("polish", polish)
    damping = check_damping(damping)
    if quantize is not None and not isinstance(quantize, Grid):
        raise TypeError(f"quantize is {shown(quantize)}; give pyprune.solvers.grid(bits=...), or None")
    if quantize is not None and polish:
        raise ValueError("polish is True, which solves again without a grid, and quantize is given; give one of them")
    return SparseGPT(block, polish, damping, quantize)


@dataclass(frozen=True, eq=False)
class _OnGrid:
    """A grid for one weight."""

    grid: Grid
    scale: Tensor
    zero_point: Tensor

    def solve(self, weight: Tensor, sums: Tensor, factor: Tensor, mask: Tensor, start: int) -> None:
        """Do what `ops.sparsegpt_block` does, with rounded values: d_j = w_j - q_j where the mask keeps, too."""
        for j in range(weight.shape[1]):
            column = slice(j, j + 1)
            before = sums[:, column] + sums[:, :j] @ factor[:j, column]
            values = weight[:, column] + before / factor[j, j]
            values = self.grid.round(values, self.scale, self.zero_point, start=start + j)
            values = torch.where(mask[:, column], values, torch.zeros_like(values))
            sums[:, column] = weight[:, column] - values
            weight[:, column] = values


class _Walk:
    """From left to right through the columns of a weight.

    ``sums`` holds what the columns before say to those that follow, sum of d_i R_ij, with d what column i lost;
    behind the walk it holds d.
    """

    def __init__(
        self,
        weight: Tensor,
        factor: Tensor,
        base: Tensor | None,
        scope: Scope,
        ratio: float | None,
        on_grid: _OnGrid | None,
    ) -> None:
        self.weight, self.factor, self.base, self.scope, self.ratio = weight, factor, base, scope, ratio
        self.on_grid = on_grid
        self.sums = torch.zeros_like(weight)
        self.mask = torch.ones_like(weight, dtype=torch.bool)
        if base is not None:
            self.mask.copy_(base)
        self.by_group = scope.name == "n_of_m" and scope.dim == "in" and ratio in (None, scope.ratio)
        if not self.by_group and scope.name != "columns":
            self.mask = choose(weight * factor.diagonal(), scope, ratio, base)

    def choose(self, start: int, end: int) -> None:
        """Choose the mask of some columns that are next, where it is chosen now."""
        in_kernel = self.by_group and self.on_grid is None
        if in_kernel or not (self.by_group or self.scope.name in ("columns", "tensor", "row")):
            return
        part = slice(start, end)
        scores, mask = self._scores(start, end), self.mask[:, part]
        base = None if self.base is None else self.base[:, part]
        if self.by_group:
            mask.copy_(choose(scores, self.scope, self.ratio, base))
            return
        if self.scope.name == "row":
            mask.copy_(_drop_in_rows(scores, (~mask).sum(1), base))
            return
        if self.scope.name == "tensor":
            removed = int(ops.count_zeros([mask]))
        else:
            assert self.ratio is not None
            removed = removed_count(mask.numel(), self.ratio)
        ops.threshold([scores], removed, bases=None if base is None else [base], masks=[mask])

    def _scores(self, start: int, end: int) -> Tensor:
        """Return the values that these columns have now, times R_jj: roots of twice what they cost."""
        square = self.factor[start:end, start:end]
        scores = torch.addmm(self.weight[:, start:end], self.sums[:, start:end], _inverse(square))
        return scores.mul_(square.diagonal())

    def solve(self, start: int, end: int) -> None:
        """Solve some columns, whose mask is chosen, and tell those that follow."""
        weight, sums, mask = (one[:, start:end] for one in (self.weight, self.sums, self.mask))
        factor = self.factor[start:end, start:end].contiguous()
        if self.on_grid is not None:
            self.on_grid.solve(weight, sums, factor, mask, start)
        else:
            keep, of = (self.scope.keep, self.scope.of) if self.by_group else (0, 0)
            ops.sparsegpt_block(weight, sums, factor, mask, keep=keep, of=of)
        if end < self.weight.shape[1]:
            self.sums[:, end:].addmm_(sums, self.factor[start:end, end:])


def _factor(gram: Tensor) -> Tensor | None:
    """Return R with H = R R^T, upper triangular, in the place of H; None if H is not positive definite.

    What lies below the diagonal means nothing. From the last columns to the first: nearly all is products of
    matrices, twice as fast as LAPACK's factorisation of the flipped matrix at 2048.
    """
    for start in reversed(range(0, len(gram), _PANEL)):
        end = min(start + _PANEL, len(gram))
        panel = gram[:end, start:end]
        panel.addmm_(gram[:end, end:], gram[start:end, end:].T, alpha=-1)
        lower = cholesky(panel[start:].flip(0, 1))
        if lower is None:
            return None
        panel[start:] = square = lower.flip(0, 1)
        if start:
            panel[:start] = panel[:start] @ _inverse(square).T
    return gram


def _inverse(factor: Tensor) -> Tensor:
    one = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, one, upper=True)
    return inverse


def _spans(start: int, end: int, width: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + width, end)) for first in range(start, end, width))


def _drop_in_rows(scores: Tensor, removed: Tensor, base: Tensor | None) -> Tensor:
    """Return a mask that drops the smallest |scores| of each row, as many as is said for it, of equals the first."""
    sizes = scores.abs()
    order = (sizes if base is None else torch.where(base, sizes, -1)).sort(dim=1, stable=True).indices
    kept = torch.arange(scores.shape[1], device=scores.device) >= removed[:, None]
    mask = torch.empty_like(kept).scatter_(1, order, kept)
    return mask if base is None else mask & base
