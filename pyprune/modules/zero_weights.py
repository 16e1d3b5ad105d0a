"""Weights that are zero everywhere: fresh LoRA factors, zero-initialised heads.

By magnitude nothing goes before them, and what is masked as a whole never trains. So they do not compete, unless
`IgnoredScope(all_zero=False)` says so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune import ops
from pyprune.modules.sharding import local_part

_START = 4096


@torch.no_grad()
def are_zero(tensors: Sequence[Tensor]) -> list[bool]:
    """Say of each tensor whether it has elements, and all of them are zero; of a sharded one, on all ranks.

    Example:
        >>> are_zero([torch.zeros(2, 2), torch.tensor([0.0, 1.0]), torch.zeros(0)])
        [True, False, False]
    """
    zero = [False] * len(tensors)
    plain: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.is_meta or not tensor.numel():
            continue
        if local_part(tensor) is not tensor:
            zero[i] = not int((tensor != 0).sum().full_tensor())  # type: ignore[attr-defined]
        elif not _starts_nonzero(tensor):
            plain.setdefault(tensor.device, []).append(i)
    for group in plain.values():
        for i, count in zip(group, ops.count_zeros([tensors[i] for i in group]).tolist(), strict=True):
            zero[i] = count == tensors[i].numel()
    return zero


def _starts_nonzero(tensor: Tensor) -> bool:
    """Look at the start of a tensor, which nearly always is enough; on a GPU looking would be waiting."""
    if not tensor.is_cpu:
        return False
    if tensor.is_contiguous():
        return bool(tensor.view(-1)[:_START].any())
    while tensor.dim() > 1:
        tensor = tensor[0]
    return bool(tensor.any())
