"""The columns of a block of SparseGPT: each makes up for what those before it lost."""

import torch
from torch import Tensor

from pyprune.checks import check_count
from pyprune.ops._library import check_tensor, register_fake
from pyprune.ops._memory import check_memory, has_no_addresses

_REALS = (torch.float32, torch.float64)


@torch.no_grad()
def sparsegpt_block(
    weight: Tensor, sums: Tensor, factor: Tensor, mask: Tensor, *, keep: int = 0, of: int = 0
) -> None:
    """Go through the columns of a block, drop what the mask drops, and let what is kept make up for it, in place.

    With the factor R, upper triangular, of the Gram H = R R^T, a column j has the sum s_j = sums_j + sum of d_i R_ij
    over the columns i < j of the block. Where the mask keeps, the difference is d_j = -s_j / R_jj; where it drops,
    d_j = w_j. The weight becomes w - d, and +0 where it is dropped; sums become d. What it costs to drop an element
    is (w_j R_jj + s_j)^2 / 2.

    With ``of``, each ``of`` columns choose their mask when they are reached: of each row those ``keep`` stay whose
    dropping would cost the most if the others stayed, of equal ones the last. What the mask drops before never stays.
    If the columns are not a multiple of ``of``, the last group has fewer, and keeps ``keep`` at most.

    Args:
        weight: (rows, columns), float32 or float64. Its columns lie one after the other in memory, as those of a
            slice of columns do; so with the others.
        sums: as weight; what the columns before the block say: their differences times their rows of R.
        factor: (columns, columns), of the weight's dtype; the block's own part of R. Only its upper triangle is read.
        mask: bool, as weight; read, and with ``of`` written.
        keep, of: N:M, 1 <= keep < of <= 64; neither to take the mask as it is.

    Raises:
        TypeError, ValueError: for other dtypes, devices, layouts or shapes, tensors that share memory, or impossible
            numbers.

    Example:
        >>> weight, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[False, True]])
        >>> sparsegpt_block(weight, torch.zeros(1, 2), torch.tensor([[1.0, 1.0], [0.0, 2.0]]), mask)
        >>> weight.tolist()
        [[0.0, 2.5]]
    """
    check_tensor(weight, "weight", _REALS, values=True)
    _check_matrix(weight, "weight", None)
    for name, tensor in (("sums", sums), ("factor", factor)):
        check_tensor(tensor, name, (weight.dtype,), values=True)
        _check_matrix(tensor, name, weight)
    check_tensor(mask, "mask", (torch.bool,), values=True)
    _check_matrix(mask, "mask", weight)
    keep, of = check_count("keep", keep), check_count("of", of, most=64)
    if (keep, of) != (0, 0) and not 1 <= keep < of:
        raise ValueError(f"keep is {keep}, of is {of}; give 1 <= keep < of, or neither")
    check_memory({"weight": [weight], "sums": [sums], "mask": [mask]}, {"factor": [factor]})
    torch.ops.pyprune.sparsegpt_block(weight, sums, factor, mask, keep, of)
    # Let autograd notice what a graph still needs.
    torch.autograd.graph.increment_version([weight, sums, *([mask] if of else [])])


def _check_matrix(tensor: Tensor, name: str, weight: Tensor | None) -> None:
    if weight is None:
        shape = tuple(tensor.shape)
        if tensor.dim() != 2:
            raise ValueError(f"{name} is of shape {shape}; give a matrix")
        weight = tensor
    expected = (weight.shape[1], weight.shape[1]) if name == "factor" else tuple(weight.shape)
    if tuple(tensor.shape) != expected or tensor.device != weight.device:
        raise ValueError(
            f"{name} is of shape {tuple(tensor.shape)} on {tensor.device}; a weight of shape {tuple(weight.shape)} "
            f"on {weight.device} needs {expected} there"
        )
    if tensor.shape[1] > 1 and tensor.stride(1) != 1 and not has_no_addresses():
        raise ValueError(
            f"{name} has strides {tensor.stride()}; its columns must lie one after the other, as in .contiguous()"
        )


def _fake(weight: Tensor, sums: Tensor, factor: Tensor, mask: Tensor, keep: int, of: int) -> None:
    return None


register_fake("pyprune::sparsegpt_block", _fake)
