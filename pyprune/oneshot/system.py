"""What solvers of one-shot pruning share: the problem of one matrix, with checks, dead inputs mended, and damping."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pyprune.checks import check_number, shown
from pyprune.methods import importance
from pyprune.methods.allocation import Amount
from pyprune.methods.method import Method, check_amount
from pyprune.methods.scope import Scope
from pyprune.oneshot.solution import Solution
from pyprune.ops._library import WEIGHT_DTYPES, check_tensor

_T = TypeVar("_T")

# Beyond this the diagonal is all there is to the sum, and a failure is no matter of rounding.
_MOST_DAMPING = 1e4


@dataclass(frozen=True, eq=False)
class System:
    """The problem of one matrix: which V is closest to the weight, in tr((V-W) H (V-W)^T).

    Args:
        weight: a copy to compute with, float32, or float64 if one of the weight and the Gram is; 0 for dead inputs.
        gram: of the same dtype, 1 on the diagonal of dead inputs, without damping; the caller's own where nothing had
            to be changed.
        dead: bool, of the inputs that are always zero; None if there are none.
        given: the weight that was given.
    """

    weight: Tensor
    gram: Tensor
    dead: Tensor | None
    given: Tensor

    def solution(self, weight: Tensor, mask: Tensor, damping: float) -> Solution:
        """Return what a solver found, with zeros where the mask drops; all of the weight, bit for bit, if none is."""
        dtype = torch.promote_types(self.given.dtype, torch.float32)
        if bool(mask.all()):
            return Solution(self.given.detach().to(dtype, copy=True), mask, damping)
        weight = weight.to(dtype)
        return Solution(torch.where(mask, weight, torch.zeros_like(weight)), mask, damping)


def system_of(weight: Tensor, gram: Tensor, mask: Tensor | None) -> System:
    """Return the problem of a weight (rows, columns) and the Gram of its inputs; neither is written to.

    Raises:
        TypeError, ValueError: for other shapes, dtypes and devices, and for what is not finite.

    Example:
        >>> system = system_of(torch.ones(1, 2), torch.diag(torch.tensor([4.0, 0.0])), None)
        >>> system.weight.tolist(), system.gram.tolist()
        ([[1.0, 0.0]], [[4.0, 0.0], [0.0, 1.0]])
    """
    check_matrix("weight", weight)
    check_mask(mask, weight)
    check_tensor(gram, "gram", (torch.float32, torch.float64), values=True)
    columns = weight.shape[1]
    if gram.shape != (columns, columns) or gram.device != weight.device:
        raise ValueError(
            f"gram is {described(gram)}, and weight {described(weight)}; give one of shape ({columns}, {columns}) on "
            "the weight's device"
        )
    diagonal = gram.diagonal()
    if not is_finite(gram):
        raise ValueError("gram has NaN or infinite elements; check the inputs that it was summed over")
    if bool((diagonal < 0).any()):
        raise ValueError("gram has negative elements on its diagonal, so it is no X^T X")
    dtype = torch.promote_types(torch.promote_types(weight.dtype, gram.dtype), torch.float32)
    # Weights with inputs first come transposed.
    wide = weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    square, dead = gram.detach().to(dtype), diagonal == 0
    if not bool(dead.any()):
        return System(wide, square, None, weight)
    square = square.clone() if square.data_ptr() == gram.data_ptr() else square
    square.diagonal()[dead] = 1
    wide[:, dead] = 0
    return System(wide, square, dead, weight)


def check_matrix(name: str, weight: Tensor) -> None:
    """Raise unless this is a finite matrix of numbers with at least one element."""
    check_tensor(weight, name, WEIGHT_DTYPES, values=True)
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"{name} is {described(weight)}; give a matrix of shape (rows, columns), none of them 0")
    if not is_finite(weight):
        raise ValueError(f"{name} has NaN or infinite elements; a solver would spread them")


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity; in one read where, as nearly always, a sum of all says so."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_mask(mask: Tensor | None, weight: Tensor) -> None:
    """Raise unless this is None, or a mask of the weight."""
    if mask is None:
        return
    check_tensor(mask, "mask", (torch.bool,), values=True)
    if mask.shape != weight.shape or mask.device != weight.device:
        raise ValueError(f"mask is {described(mask)}, and weight {described(weight)}; give one like the weight")


def check_asked(scope: Scope | None, ratio: float | None) -> tuple[Scope, float | None]:
    """Return what competes, and how much of it goes, if a solver can choose so within one matrix."""
    if not isinstance(scope, Scope):
        raise TypeError(f"scope is {shown(scope)}; give one of pyprune.scope, such as tensor()")
    if scope.weights_compete:
        raise ValueError(
            f"in scope {scope.name} weights compete with each other, and a solver sees one; give scope.tensor(), "
            'row(), or n_of_m() with among="tensor"'
        )
    amount = check_amount(Method(importance.magnitude(), scope=scope), Amount(ratio))
    assert amount.ratio is None or isinstance(amount.ratio, float)
    return scope, amount.ratio


def check_damping(damping: object) -> float:
    """Return a damping, as a share of the mean of the Gram's diagonal."""
    what = "a share of the mean of the Gram's diagonal, a number from 0 to 1"
    return check_number("damping", damping, what=what, least=0, most=1)


def damped(gram: Tensor, damping: float, attempt: Callable[[Tensor], _T | None]) -> tuple[_T, float]:
    """Return what an attempt makes of a Gram with ``damping * mean(diag)`` added to its diagonal, and the damping.

    While it makes None, because a factorisation fails, it gets ten times as much. It may write into its argument.

    Raises:
        ValueError: if no damping helps.

    Example:
        >>> factor, used = damped(torch.tensor([[1.0, 1.05], [1.05, 1.0]]), 0.01, cholesky)
        >>> used
        0.1
    """
    mean = float(gram.diagonal().mean(dtype=torch.float64))

    def add(share: float) -> _T | None:
        matrix = gram.clone()
        matrix.diagonal().add_(share * mean)
        with unrounded(gram.device):
            return attempt(matrix)

    return with_damping(damping, gram.dtype, add)


def with_damping(damping: float, dtype: torch.dtype, attempt: Callable[[float], _T | None]) -> tuple[_T, float]:
    """Return what an attempt makes with a damping, or with ten times as much while it makes None; and the damping.

    Raises:
        ValueError: if no damping helps.
    """
    while damping <= _MOST_DAMPING:
        made = attempt(damping)
        if made is not None:
            return made, damping
        # Of 0, ten times is no more.
        damping = max(float(f"{10 * damping:.12g}"), torch.finfo(dtype).eps)
    raise ValueError("gram cannot be factorised with any damping; is it symmetric, and a sum X^T X?")


def cholesky(matrix: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor, or None if there is none."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if bool(failed.any()) or not is_finite(factor) else factor


def unrounded(device: torch.device) -> torch.autocast:
    """Return a context in which autocast does not round products to half types, whatever is around it."""
    return torch.autocast(device.type, enabled=False)


def described(tensor: Tensor) -> str:
    """Say of a tensor what it is."""
    return f"a {str(tensor.dtype).removeprefix('torch.')} tensor of shape {tuple(tensor.shape)} on {tensor.device}"
