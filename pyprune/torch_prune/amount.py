"""How many go: an int is a number, a float a fraction. Three functions have the names that the original has."""

import numbers
from typing import TypeAlias

from torch import Tensor

from pyprune.checks import shown

Amount: TypeAlias = int | float


class NoSuchDimension(IndexError, ValueError):
    """A dimension that is none: an IndexError as in torch, and a ValueError as everywhere here."""


def _validate_pruning_amount_init(amount: Amount) -> None:
    if not isinstance(amount, numbers.Real):
        raise TypeError(f"amount is {shown(amount)}; give an int, or a float in [0, 1]")
    whole = isinstance(amount, numbers.Integral)
    if amount < 0 or not (whole or amount <= 1):
        raise ValueError(f"amount is {shown(amount)}; give an int that is not negative, or a float in [0, 1]")


def _validate_pruning_amount(amount: Amount, tensor_size: int) -> None:
    if isinstance(amount, numbers.Integral) and amount > tensor_size:
        raise ValueError(
            f"amount is {shown(amount)}, but only {tensor_size} can still be pruned; give at most so many"
        )


def _compute_nparams_toprune(amount: Amount, tensor_size: int) -> int:
    return int(amount) if isinstance(amount, numbers.Integral) else round(amount * tensor_size)


def count(amount: Amount, size: int) -> int:
    """Return how many of so many go."""
    _validate_pruning_amount(amount, size)
    return _compute_nparams_toprune(amount, size)


def channel_count(amount: Amount, t: Tensor, dim: int) -> int:
    """Return how many channels of a tensor go."""
    if t.dim() < 2:
        raise ValueError(
            f"a tensor of shape {tuple(t.shape)} has no channels to prune; it needs two dimensions or more"
        )
    if not isinstance(dim, numbers.Integral):
        raise TypeError(f"dim is {shown(dim)}; give an int")
    if not -t.dim() <= dim < t.dim():
        raise NoSuchDimension(
            f"dim is {shown(dim)}; a tensor of shape {tuple(t.shape)} has {-t.dim()} to {t.dim() - 1}"
        )
    return count(amount, t.shape[dim])
