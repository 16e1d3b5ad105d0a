"""What solvers on gradients share: the Fisher matrix of a loss in place of the Gram of a layer's inputs."""

from typing import Protocol

import torch
from torch import Tensor

from pyprune.methods.scope import Scope
from pyprune.oneshot.choose import choose
from pyprune.oneshot.solution import Solution
from pyprune.oneshot.system import check_asked, check_mask, check_matrix, described, unrounded
from pyprune.ops._library import check_tensor

# Elements that are worked on at once.
AT_ONCE = 2**22
# The damping where all gradients are zero: the order of scores is then that of magnitudes.
_LEAST = 1e-20


class GradientSolver(Protocol):
    """A rule for the weights that are kept: those with which a loss stays closest to what it was.

    It sees the weight W and its gradients g of some samples, and takes the loss for one that grows by
    d F d / 2 when the weight changes by d, with the empirical Fisher matrix F = mean(g g^T) + lambda I.
    """

    @property
    def name(self) -> str:
        """Its name in messages."""

    def scores(self, weight: Tensor, gradients: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
        """Return what the loss grows by if a weight goes and the others are solved for, and the damping.

        Args:
            weight: of any shape and float dtype.
            gradients: (samples, elements), float32 or float64, elements in C order.
            mask: bool, of the shape of the weight: what is dropped already takes no part, and scores 0.
        """

    def update(self, weight: Tensor, gradients: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        """Return the weights solved for with all that a mask drops gone together, zero there; and the damping."""

    def solve(
        self, weight: Tensor, gradients: Tensor, *, scope: Scope | None, ratio: float | None, mask: Tensor | None
    ) -> Solution:
        """Choose a mask by the scores and solve for what it keeps, of one matrix.

        Args:
            weight: (rows, columns), of any float dtype; it is left as it is.
            gradients: (samples, rows * columns), float32 or float64: of each sample the gradient, flattened.
            scope: what competes; all elements if None.
            ratio: the fraction of the elements to remove, those that ``mask`` drops among them; None for all that
                N:M removes.
            mask: elements that are False stay zero.
        """


def solve_by_scores(
    solver: GradientSolver,
    weight: Tensor,
    gradients: Tensor,
    scope: Scope | None,
    ratio: float | None,
    mask: Tensor | None,
) -> Solution:
    """Do what `GradientSolver.solve` says."""
    check_matrix("weight", weight)
    scope, ratio = check_asked(Scope("tensor") if scope is None else scope, ratio)
    with unrounded(weight.device):
        scores, damping = solver.scores(weight, gradients, mask)
    kept = choose(scores, scope, ratio, mask)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if bool(kept.all()):
        return Solution(weight.detach().to(dtype, copy=True), kept, damping)
    with unrounded(weight.device):
        solved, other = solver.update(weight, gradients, kept)
    return Solution(solved.to(dtype), kept, max(damping, other))


def problem(weight: Tensor, gradients: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Return the weight and what takes part as rows of numbers, in the dtype to compute in, and the mean square.

    Raises:
        TypeError, ValueError: for other shapes, dtypes and devices, and for what is not finite.
    """
    check_tensor(gradients, "gradients", (torch.float32, torch.float64), values=True)
    check_mask(mask, weight)
    wanted = (gradients.shape[0] if gradients.dim() == 2 else 0, weight.numel())
    if not all(wanted) or gradients.shape != wanted or gradients.device != weight.device:
        raise ValueError(
            f"gradients is {described(gradients)}, and weight {described(weight)}; give one row of {weight.numel()} "
            "numbers for each sample, at least one, on the weight's device"
        )
    mean = float(gradients.norm(dtype=torch.float64)) ** 2 / gradients.numel()
    if not mean < torch.inf:
        raise ValueError("gradients has NaN or infinite elements; check the loss and the batches")
    dtype = torch.promote_types(torch.promote_types(weight.dtype, gradients.dtype), torch.float32)
    values = weight.detach().to(dtype).flatten()
    part = torch.ones_like(values) if mask is None else mask.flatten().to(dtype)
    return values, part, max(mean, _LEAST)
