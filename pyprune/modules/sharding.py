"""What a rank has of a parameter that is sharded (a DTensor, as under FSDP2)."""

from collections.abc import Callable, Sequence
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


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered from all ranks if it is sharded; then all of them must call this.

    Example:
        >>> whole(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def sum_of_parts(tensors: Sequence[Tensor], rule: Callable[[list[Tensor]], Tensor], factors: Tensor) -> list[Tensor]:
    """Return numbers whose sum is that of ``factors * rule(tensors)``, also of sharded ones; gradients flow.

    Args:
        tensors: plain or sharded, on one device; of sharded ones all ranks must call this, and their gradients are
            those of one rank's sum, as FSDP2 averages them.
        rule: returns a number for each tensor, which is that of its parts added up.
        factors: of the numbers.

    Example:
        >>> sum_of_parts([torch.ones(2)], lambda parts: torch.stack([x.sum() for x in parts]), torch.ones(1))
        [tensor(2.)]
    """
    sets: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        there = cast(Any, tensor)
        sets.setdefault((there.device_mesh, there.placements) if is_sharded(tensor) else None, []).append(place)
    sums = []
    for sharding, places in sets.items():
        parts = [cast(Any, tensors[place]).to_local() if sharding else tensors[place] for place in places]
        of_these = factors if len(places) == len(tensors) else factors[places]
        part = (rule(parts) * of_these).sum()
        sums.append(part if sharding is None else _added_up(part, *sharding))
    return sums


def _added_up(part: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    added = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return cast(Tensor, cast(Any, DTensor.from_local(part, mesh, added)).full_tensor())
