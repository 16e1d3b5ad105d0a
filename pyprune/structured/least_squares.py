"""Least squares: the weights with which given inputs come closest to wanted outputs, in pure tensors.

Weights are matrices W of shape (groups, inputs of a group, outputs of a group), outputs are x W + b, and all is
float64. Solutions are written as a step from the present weights V, with the ridge pulling towards V::

    W = V + (A + lambda I)^-1 (B - A V),   A = X'X,  B = X'Y,  lambda = damping * mean of A's diagonal

with X and Y centred if there is a bias. Where the inputs say nothing (fewer samples than inputs, inputs that depend
on each other or are zero) the weights so stay what they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Floating-point operations that are well spent on solving outputs with masks of their own one by one.
_EXACT = 1e11


class Sums:
    """Sums over samples of inputs and wanted outputs: all that least squares needs of them.

    Args:
        groups, inputs, outputs: of the matrix; inputs and outputs are those of one group.
        device: where the sums are.

    Example:
        >>> sums = Sums(1, 2, 1)
        >>> sums.add(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[3.0], [8.0]]]))
        >>> sums.system(False).solve(torch.zeros(1, 2, 1), damping=0).flatten().tolist()
        [3.0, 4.0]
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.count = 0
        self.x, self.xx = zeros(inputs), zeros(inputs, inputs)
        self.y, self.xy, self.yy = zeros(outputs), zeros(inputs, outputs), zeros(outputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples: x is (groups, samples, inputs), y (groups, samples, outputs)."""
        x, y = x.double(), y.double()
        self.count += x.shape[1]
        self.x += x.sum(1)
        self.y += y.sum(1)
        self.xx.baddbmm_(x.mT, x)
        self.xy.baddbmm_(x.mT, y)
        self.yy += y.square().sum(1)

    def outputs(self, start: int, stop: int) -> "Sums":
        """Return the sums of some of the outputs; those of the inputs are the same tensors."""
        part = object.__new__(Sums)
        part.count, part.x, part.xx = self.count, self.x, self.xx
        part.y, part.xy, part.yy = self.y[:, start:stop], self.xy[..., start:stop], self.yy[:, start:stop]
        return part

    def without(self, other: "Sums") -> "Sums":
        """Return the sums of the samples that are not in others."""
        left = object.__new__(Sums)
        vars(left).update({name: value - getattr(other, name) for name, value in vars(self).items()})
        return left

    def system(self, centred: bool) -> "System":
        """Return the equations of the weights: with a bias, which takes the means away, or without one."""
        if not centred or not self.count:
            return System(self.xx, self.xy)
        means = (self.x / self.count)[:, :, None]
        return System(self.xx - means * self.x[:, None, :], self.xy - means * self.y[:, None, :])

    def bias(self, weight: Tensor) -> Tensor:
        """Return the bias that goes with weights: (groups, outputs)."""
        return (self.y - torch.einsum("gi,gio->go", self.x, weight)) / max(1, self.count)

    def squares(self, weight: Tensor, bias: Tensor | None = None) -> tuple[float, float]:
        """Return the sum of squares of what is missing to the wanted outputs, and that of the wanted outputs."""
        missing = self.yy.sum() + (weight * (self.xx @ weight - 2 * self.xy)).sum()
        if bias is not None:
            made = torch.einsum("gi,gio->go", self.x, weight)
            missing = missing + (bias * (2 * (made - self.y) + self.count * bias)).sum()
        return max(0.0, float(missing)), float(self.yy.sum())


@dataclass(frozen=True, eq=False)
class System:
    """The equations A W = B of one weight; those of several layers that share it are added."""

    gram: Tensor
    cross: Tensor

    def __add__(self, other: "System") -> "System":
        return System(self.gram + other.gram, self.cross + other.cross)

    def solve(self, present: Tensor, *, damping: float, mask: Tensor | None = None) -> Tensor:
        """Return the weights of least squares; those outside of a mask are zero and take no part.

        Args:
            present: the weights V that there are, (groups, inputs, outputs).
            damping: of the ridge, a share of the mean diagonal of the equations that take part.
            mask: like ``present``, True = kept. Outputs with the same mask are solved together. If that is too much
                work because nearly each has its own, all are solved at once by conjugate gradients.
        """
        weight = present.double() if mask is None else present.double() * mask
        right = self.cross - self.gram @ weight
        if mask is None:
            return weight + torch.stack([_step(*one, damping) for one in zip(self.gram, right, strict=True)])
        weight = weight.clone()
        for gram, vector, kept, solved in zip(self.gram, right, mask, weight, strict=True):
            patterns, which = kept.unique(dim=1, return_inverse=True)
            if float(patterns.sum(0).double().pow(3).sum()) / 3 > _EXACT and patterns.shape[1] > 1:
                solved += _masked_step(gram, vector, kept, damping)
                continue
            for i, pattern in enumerate(patterns.unbind(1)):
                inputs, outputs = pattern.nonzero()[:, 0], (which == i).nonzero()[:, 0]
                if len(inputs):
                    step = _step(gram[inputs][:, inputs], vector[inputs][:, outputs], damping)
                    solved[inputs[:, None], outputs] += step
        return weight


def _step(gram: Tensor, right: Tensor, damping: float) -> Tensor:
    """Solve (gram + lambda I) step = right; of many solutions it is the smallest."""
    ridged = gram.clone()
    ridged.diagonal().add_(damping * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(ridged)
    # A pivot of rounding errors would make a step of rounding errors.
    least = len(gram) * torch.finfo(gram.dtype).eps * ridged.diagonal().amax()
    if not failed and bool((factor.diagonal().square() > least).all()):
        return torch.cholesky_solve(right, factor)
    inverse: Tensor = torch.linalg.pinv(ridged, hermitian=True)
    return inverse @ right


def _masked_step(gram: Tensor, right: Tensor, mask: Tensor, damping: float) -> Tensor:
    kept = mask.to(gram.dtype)
    diagonal = gram.diagonal()[:, None]
    ridge = damping * (diagonal * kept).sum(0) / kept.sum(0).clamp(min=1)

    def product(step: Tensor) -> Tensor:
        return kept * (gram @ step + ridge * step)

    return conjugate_gradients(product, kept * right, diagonal + ridge, tolerance=1e-6, iterations=200)[0]


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    diagonal: Tensor,
    *,
    tolerance: float,
    iterations: int,
    watched: Callable[[Tensor], float] | None = None,
) -> tuple[Tensor, int]:
    """Solve A step = right for all outputs at once, where only products with A are known.

    Args:
        product: returns A step.
        right: (..., inputs, outputs); each output is a system of its own.
        diagonal: of A, broadcast to ``right``; scales the inputs.
        tolerance: how small what is left of the right side is to become, as a share of it.
        iterations: how many there are at most.
        watched: what is to become small; the end is where it has not for two iterations.

    Returns:
        The step, and how many iterations it took.

    Example:
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> right, diagonal = torch.tensor([[3.0], [4.0]]), gram.diagonal()[:, None]
        >>> step, _ = conjugate_gradients(gram.__matmul__, right, diagonal, tolerance=1e-6, iterations=9)
        >>> torch.allclose(step, torch.ones(2, 1))
        True
    """
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).reciprocal()
    step = torch.zeros_like(right)
    left = right.clone()
    direction = scale * left
    energy = (left * direction).sum(-2, keepdim=True)
    enough = tolerance**2 * energy
    best, count, least = step, 0, 0.0 if watched is None else watched(step)
    for iteration in range(1, iterations + 1):
        if bool((energy <= enough).all()):
            break
        image = product(direction)
        curvature = (direction * image).sum(-2, keepdim=True)
        # An output that is solved takes no further steps: its direction is made of rounding errors.
        length = torch.where((energy > enough) & (curvature > 0), energy / curvature, torch.zeros_like(energy))
        step = step + length * direction
        left -= length * image
        now = -1.0 if watched is None else watched(step)
        if now < least:
            best, count, least = step, iteration, 0.0 if watched is None else now
        elif iteration - count == 2:
            break
        scaled = scale * left
        before, energy = energy, (left * scaled).sum(-2, keepdim=True)
        direction = scaled + torch.where(before > 0, energy / before, torch.zeros_like(energy)) * direction
    return best, count
