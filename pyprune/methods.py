"""What a ratio means, and the magnitude methods: pure functions of tensors and numbers."""

import math
import numbers
from collections.abc import Sequence
from enum import Enum

from torch import Tensor

from pyprune import ops


class PruneMode(str, Enum):
    """The pruning methods, under the names NNCF gives them where it has them; `prune` takes a member or its string.

    * ``UNSTRUCTURED_MAGNITUDE_LOCAL``: the elements with the smallest |w| of each weight tensor go.
    * ``UNSTRUCTURED_MAGNITUDE_GLOBAL``: the elements with the smallest |w| / ||W||_2 of the whole model go,
      where ||W||_2 is the norm of the tensor that holds w.
    * ``UNSTRUCTURED_REGULARIZATION_BASED``: a learned Bernoulli gate on every element; a loss sets the ratio.
    * ``UNSTRUCTURED_HARD_CONCRETE``: a learned hard-concrete gate on every element (not in NNCF).

    Example:
        >>> PruneMode("UNSTRUCTURED_MAGNITUDE_LOCAL")
        <PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL: 'UNSTRUCTURED_MAGNITUDE_LOCAL'>
    """

    UNSTRUCTURED_MAGNITUDE_LOCAL = "UNSTRUCTURED_MAGNITUDE_LOCAL"
    UNSTRUCTURED_MAGNITUDE_GLOBAL = "UNSTRUCTURED_MAGNITUDE_GLOBAL"
    UNSTRUCTURED_REGULARIZATION_BASED = "UNSTRUCTURED_REGULARIZATION_BASED"
    UNSTRUCTURED_HARD_CONCRETE = "UNSTRUCTURED_HARD_CONCRETE"


def check_mode(mode: PruneMode | str) -> PruneMode:
    """Return the member that ``mode`` names, in upper or lower case.

    Raises:
        TypeError, ValueError: if it names none.

    Example:
        >>> check_mode("UNSTRUCTURED_MAGNITUDE_GLOBAL") is PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
        True
    """
    if not isinstance(mode, str):
        raise TypeError(f"mode is a {type(mode).__name__}; give a PruneMode or its name as a string")
    names = [member.value for member in PruneMode]
    if mode.upper() not in names:
        raise ValueError(f"mode is {mode!r}; allowed are {', '.join(names)}")
    return PruneMode(mode.upper())


def check_ratio(ratio: object) -> float:
    """Return ``ratio``, the fraction to remove, as a float in [0, 1).

    Raises:
        TypeError: if it is not a real number (a bool is not one).
        ValueError: if it is NaN, negative, or 1 and beyond.

    Example:
        >>> check_ratio(0)
        0.0
    """
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real):
        raise TypeError(f"ratio is {ratio!r}; give the fraction of the weights to remove, a number in [0, 1)")
    value = float(ratio)
    if not 0 <= value < 1:
        raise ValueError(f"ratio is {ratio}; it is the fraction of the weights to remove, and must be in [0, 1)")
    return value


def removed_count(n: int, ratio: float) -> int:
    """Return how many of n competing elements go: min(floor(ratio * n + 0.5), n - 1), and 0 of none.

    Example:
        >>> [removed_count(n, 0.5) for n in (0, 1, 2, 3, 10)]
        [0, 0, 1, 2, 5]
    """
    return max(0, min(math.floor(ratio * n + 0.5), n - 1))


def local_magnitude(weights: Sequence[Tensor], ratio: float) -> tuple[list[Tensor], Tensor]:
    """Mask out the smallest |w| of each tensor.

    Args:
        weights: tensors of one device.
        ratio: fraction of each tensor to remove, in [0, 1).

    Returns:
        New masks (True = kept) and the number of non-finite elements per tensor; where that is not zero, the
        masks mean nothing.

    Example:
        >>> import torch
        >>> masks, _ = local_magnitude([torch.tensor([3.0, -1.0]), torch.tensor([0.1, 0.2])], 0.5)
        >>> [mask.tolist() for mask in masks]
        [[True, False], [False, True]]
    """
    return ops.threshold(weights, [removed_count(weight.numel(), ratio) for weight in weights])


def global_magnitude(weights: Sequence[Tensor], ratio: float) -> tuple[list[Tensor], Tensor]:
    """Mask out the smallest |w| / ||W||_2 of all tensors together; otherwise as `local_magnitude`.

    An all-zero tensor has no norm to divide by; its scores are zeros, so it goes first.

    Example:
        >>> import torch
        >>> masks, _ = global_magnitude([torch.tensor([30.0, -40.0]), torch.tensor([0.0, 0.2])], 0.5)
        >>> [mask.tolist() for mask in masks]
        [[False, True], [False, True]]
    """
    removed = removed_count(sum(weight.numel() for weight in weights), ratio)
    return ops.threshold(weights, removed, normalize=True)
