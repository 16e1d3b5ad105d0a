"""Which elements and channels go."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune import ops
from pyprune.checks import check_number, shown
from pyprune.modules.memory import prefer_huge_pages


def without_smallest(
    scores: Sequence[Tensor], removed: int, bases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """Return bool masks without the smallest magnitudes; where a base is False, nothing competes or is kept."""
    scores = [_real(score.detach()).to(scores[0].device) for score in scores]
    removed += sum(ops.count_zeros([base for base in bases or () if base is not None]).tolist())
    sizes = [score.numel() for score in scores]
    joined = prefer_huge_pages(torch.empty(sum(sizes), dtype=torch.bool, device=scores[0].device))
    masks = [mask.view(score.shape) for mask, score in zip(torch.split(joined, sizes), scores, strict=True)]
    _, nonfinite = ops.threshold(scores, removed, masks=masks, bases=bases)
    if nonfinite.any():
        ops.threshold([_finite(score) for score in scores], removed, masks=masks, bases=bases)
    return masks


def _real(scores: Tensor) -> Tensor:
    """Return the magnitudes of complex scores, and other dtypes that no kernel takes as float64."""
    if scores.is_complex():
        return scores.abs()
    return scores if scores.dtype in ops.WEIGHT_DTYPES else scores.double()


def _finite(scores: Tensor) -> Tensor:
    """Return magnitudes in the same order: infinity above all numbers, NaN above infinity."""
    largest = torch.finfo(torch.float64).max
    return scores.double().abs().nan_to_num(nan=largest, posinf=math.nextafter(largest, 0))


def channel_norms(t: Tensor, n: float | str, dim: int) -> Tensor:
    """Return the n-norm of each channel."""
    if not isinstance(n, str):
        finite = 0 if isinstance(n, float) and math.isinf(n) else n
        check_number("n", finite, what='the order of a norm: a number, inf, -inf, "fro" or "nuc"')
    elif n not in ("fro", "nuc"):
        raise ValueError(f'n is {shown(n)}; give the order of a norm: a number, inf, -inf, "fro" or "nuc"')
    others = [other for other in range(t.dim()) if other != dim % t.dim()]
    if n == "nuc":
        norms: Tensor = torch.linalg.matrix_norm(t, "nuc", dim=others)
    else:
        norms = torch.linalg.vector_norm(_real(t), 2 if n == "fro" else n, dim=others, dtype=torch.float64)
    return norms


def without_channels(default_mask: Tensor, dim: int, scores: Tensor, removed: int) -> Tensor:
    """Return the default mask with so many more channels of zeros, those of the lowest scores."""
    lowest = scores.argsort(stable=True)[:removed].to(default_mask.device)
    return default_mask.index_fill(dim, lowest, 0)
