"""Spectra of weights, which say how much training has shaped them."""

import math

import torch
from torch import Tensor


def tail_exponent(matrix: Tensor) -> float | None:
    """Return the exponent of the power law that the larger half of the eigenvalues of W^T W follows: Hill's estimate.

    alpha = 1 + k / sum(log(eigenvalue / the smallest of the k)). A small one means heavy tails, which training makes.
    Eigenvalues that are 0 (by the rank of the matrix) do not count; None if those of the larger half do not differ.

    Args:
        matrix: (rows, columns), of any float dtype.

    Paper: Martin et al. 2021, "Predicting trends in the quality of state-of-the-art neural networks without access to
    training or testing data".

    Example:
        >>> round(tail_exponent(torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0]))), 3)  # 1 + 2 / log(8^2 / 4^2)
        2.443
    """
    wide = matrix.double() if matrix.dtype == torch.float64 else matrix.float()
    if not wide.numel():
        return None
    values = torch.linalg.svdvals(wide).double().flip(0)
    tolerance = float(values[-1]) * max(wide.shape) * torch.finfo(wide.dtype).eps
    eigenvalues = values[values > tolerance].square().log()
    larger = eigenvalues[len(eigenvalues) // 2 :]
    spread = float((larger - larger[0]).sum()) if len(larger) else 0.0
    return 1 + len(larger) / spread if spread > 0 and math.isfinite(spread) else None
