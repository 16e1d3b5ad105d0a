"""Move what masks drop out of weights, packed, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.ops._library import WEIGHT_DTYPES, check_masks, check_tensors, register_fake
from pyprune.ops._memory import check_memory
from pyprune.ops.count_zeros import count_zeros


@torch.no_grad()
def park(weights: Sequence[Tensor], masks: Sequence[Tensor], *, into: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return ``weights[i][~masks[i]]`` and set it to zero in place; kept elements are not touched.

    What is returned does not depend on the layout: it is in the order of the flat index. On a GPU this waits for the
    device, because the sizes of the results depend on the masks.

    Args:
        weights: float32, float64, float16 or bfloat16 tensors on one device, any strides without overlap.
        masks: one bool tensor per weight, of its shape, True = kept.
        into: empty tensors of the weights' dtypes on their device, which become the results together with the zeros:
            whoever keeps them loses nothing if the call is interrupted. New ones if None.

    Returns:
        For each weight a tensor of one dimension, of its dtype.

    Raises:
        TypeError, ValueError: for other dtypes, mixed devices, shapes that disagree, or weights that share memory.

    Example:
        >>> weight = torch.tensor([1.0, 2.0, 3.0])
        >>> [values.tolist() for values in park([weight], [torch.tensor([False, True, False])])], weight.tolist()
        ([[1.0, 3.0]], [0.0, 2.0, 0.0])
    """
    _check(weights, masks)
    if into is None:
        into = [weight.detach().new_empty(0) for weight in weights]
    if len(into) != len(weights):
        raise ValueError(f"got {len(into)} tensors in into for {len(weights)} weights; give one per weight")
    for index, (values, weight) in enumerate(zip(into, weights, strict=True)):
        if values.numel() or values.dtype != weight.dtype or values.device != weight.device:
            raise ValueError(
                f"into[{index}] has {values.numel()} elements of {values.dtype} on {values.device}; give an empty "
                f"tensor of {weight.dtype} on {weight.device}"
            )
    if not weights:
        return []
    if weights[0].is_cpu:
        torch.ops.pyprune.park(list(weights), list(masks), list(into))
    else:
        parked = [weight[~mask] for weight, mask in zip(weights, masks, strict=True)]
        for values, dropped in zip(into, parked, strict=True):
            values.set_(dropped)  # type: ignore[call-overload]
        torch.ops.pyprune.fold(list(weights), list(masks))
    torch.autograd.graph.increment_version(list(weights))
    return list(into)


@torch.no_grad()
def unpark(weights: Sequence[Tensor], masks: Sequence[Tensor], parked: Sequence[Tensor]) -> None:
    """Set ``weights[i][~masks[i]] = parked[i]`` in place: the reverse of `park`, also for another layout.

    Args:
        weights, masks: as for `park`.
        parked: what `park` returned; contiguous, of the weight's dtype.

    Raises:
        TypeError, ValueError: as `park`, and if what is parked is not as much as the mask drops.

    Example:
        >>> weight = torch.tensor([0.0, 2.0, 0.0])
        >>> unpark([weight], [torch.tensor([False, True, False])], [torch.tensor([1.0, 3.0])])
        >>> weight.tolist()
        [1.0, 2.0, 3.0]
    """
    check_tensors(parked, "parked", WEIGHT_DTYPES)
    _check(weights, masks, parked)
    if len(parked) != len(weights):
        raise ValueError(f"parked has {len(parked)} tensors for {len(weights)} weights; give what park returned")
    for index, (values, weight) in enumerate(zip(parked, weights, strict=True)):
        if values.dtype != weight.dtype or values.device != weight.device or not values.is_contiguous():
            raise ValueError(
                f"parked[{index}] is {values.dtype} on {values.device} with strides {values.stride()}, its weight "
                f"{weight.dtype} on {weight.device}; give contiguous tensors of the weight's dtype there"
            )
    if not weights:
        return
    if weights[0].is_cpu:
        try:
            torch.ops.pyprune.unpark(list(weights), list(masks), list(parked))
        except RuntimeError:  # it counts anyway, and writes nothing if something does not fit
            _check_sizes(masks, parked)
            raise
    else:
        _check_sizes(masks, parked)
        for weight, mask, values in zip(weights, masks, parked, strict=True):
            weight[~mask] = values
    torch.autograd.graph.increment_version(list(weights))


def _check_sizes(masks: Sequence[Tensor], parked: Sequence[Tensor]) -> None:
    for index, (values, dropped) in enumerate(zip(parked, count_zeros(masks).tolist(), strict=True)):
        if values.shape != (dropped,):
            raise ValueError(
                f"parked[{index}] has shape {tuple(values.shape)}, and must be as much as its mask drops, {dropped} "
                "values; give what park returned for these masks"
            )


def _check(weights: Sequence[Tensor], masks: Sequence[Tensor], parked: Sequence[Tensor] = ()) -> None:
    check_tensors(weights, "weights", WEIGHT_DTYPES)
    check_masks(masks, weights)
    check_memory({"weights": weights}, {"masks": masks, "parked": parked})


def _fake_park(weights: list[Tensor], masks: list[Tensor], parked: list[Tensor]) -> None:
    return None


def _fake_unpark(weights: list[Tensor], masks: list[Tensor], parked: list[Tensor]) -> None:
    return None


register_fake("pyprune::park", _fake_park)
register_fake("pyprune::unpark", _fake_unpark)
