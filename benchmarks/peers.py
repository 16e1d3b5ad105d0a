"""What pyprune's kernels are measured beside: torch's own ways, and the formulas of NNCF in plain torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-6
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
TARGET, P = 0.7, 0.05


def cat_scores(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.abs().flatten() for weight in weights])


def masks_above(weights: list[Tensor], bound: Tensor) -> list[Tensor]:
    return [weight.abs() > bound for weight in weights]


def cat_kthvalue(weights: list[Tensor], removed: int) -> list[Tensor]:
    return masks_above(weights, cat_scores(weights).kthvalue(removed).values)


def cat_topk(weights: list[Tensor], removed: int) -> list[Tensor]:
    """Take the fewer: those that go, or those that stay. They come unsorted, which is faster."""
    scores = cat_scores(weights)
    kept = scores.numel() - removed
    if removed <= kept:
        return masks_above(weights, scores.topk(removed, largest=False, sorted=False).values.max())
    bound = scores.topk(kept, sorted=False).values.min()
    return [weight.abs() >= bound for weight in weights]


def cat_sort(weights: list[Tensor], removed: int) -> list[Tensor]:
    return masks_above(weights, cat_scores(weights).sort().values[removed - 1])


def numpy_partition(weights: list[Tensor], removed: int) -> list[Tensor]:
    scores = cat_scores(weights).float().numpy()  # NumPy has no bfloat16
    scores.partition(removed - 1)  # in place
    return masks_above(weights, torch.tensor(scores[removed - 1]))


def nncf_formula(weights: list[Tensor], ratio: float) -> list[Tensor]:
    """Compute what NNCF 3's update_pruning_ratio computes for its global mode, without its hooks."""
    scores = torch.cat([(weight.abs() / weight.norm(2)).flatten() for weight in weights])
    bound = scores.kthvalue(int((scores.numel() - 1) * ratio) + 1).values
    return [weight.abs() / weight.norm(2) > bound for weight in weights]


def kthvalue_per_tensor(weights: list[Tensor], removed: list[int]) -> list[Tensor]:
    scores = [weight.abs() for weight in weights]
    bounds = [score.flatten().kthvalue(max(count, 1)).values for score, count in zip(scores, removed, strict=True)]
    return [score > bound for score, bound in zip(scores, bounds, strict=True)]


class Threshold(torch.autograd.Function):
    """Compare with 1/2; the gradient goes straight through."""

    @staticmethod
    def forward(p: Tensor) -> Tensor:
        return (p > 0.5).to(p.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def nncf_gate(weight: Tensor, logits: Tensor) -> Tensor:
    noise = torch.rand_like(logits).clamp(EPSILON, 1 - EPSILON)
    return weight * Threshold.apply(torch.sigmoid(logits + torch.logit(noise)))


def eager_hard_concrete(weight: Tensor, logits: Tensor) -> Tensor:
    noise = torch.rand_like(logits).clamp(EPSILON, 1 - EPSILON)
    s = torch.sigmoid((torch.log(noise) - torch.log(1 - noise) + logits) / BETA)
    return weight * (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def nncf_rb_loss(logits: list[Tensor]) -> Tensor:
    kept = sum(Threshold.apply(torch.sigmoid(one)).sum() for one in logits)
    count = sum(one.numel() for one in logits)
    return ((kept / count - (1 - TARGET)) / P) ** 2


def scores_of_channels(weight: Tensor, block: Sequence[int]) -> Tensor:
    """Sum magnitudes over all dimensions that the block covers, by torch's norm."""
    summed = [dim for dim, size in enumerate(block) if size > 1]
    return torch.linalg.vector_norm(weight, 1, summed, keepdim=True) if summed else weight.abs()


def scores_of_blocks(weight: Tensor, block: Sequence[int]) -> Tensor:
    """Sum magnitudes over a view of whole blocks; zeros fill up the last ones."""
    missing = [(0, -size % step) for size, step in zip(weight.shape, block, strict=True)]
    if any(after for _, after in missing):
        weight = torch.nn.functional.pad(weight, [size for pair in reversed(missing) for size in pair])
    view = weight
    for dim in reversed(range(weight.dim())):
        view = view.unflatten(dim, (-1, block[dim]))
    return view.abs().sum([2 * dim + 1 for dim in range(weight.dim())])


def spread_units(units: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    for dim, (step, size) in enumerate(zip(block, shape, strict=True)):
        if step > 1:
            units = units.repeat_interleave(step, dim).narrow(dim, 0, size)
    return units
