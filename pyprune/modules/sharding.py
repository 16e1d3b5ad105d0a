"""What a rank has of a parameter that is sharded (a DTensor, as under FSDP2)."""

from typing import Any, cast

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    # By name: importing the class would load all of torch.distributed.
    return type(tensor).__name__ == "DTensor"


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: its shard if it is a DTensor (as under FSDP2), else all of it.

    Example:
        >>> local_part(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # with gradients it would be another tensor, in the same memory
        return cast(Tensor, cast(Any, tensor).to_local())


def local_part_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a plain tensor that belongs to this rank's shard of a parameter of the same shape.

    Example:
        >>> local_part_like(torch.ones(2), torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    if not is_sharded(parameter) or whole.shape == local_part(parameter).shape != parameter.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    there = cast(Any, parameter)
    sharded = distribute_tensor(whole, there.device_mesh, there.placements, src_data_rank=None)
    return local_part(sharded)
