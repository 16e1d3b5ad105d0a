"""Masks and what is parked under them as plain tensors, to save and to load: a state_dict of the model lacks them."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyprune import ops
from pyprune.checks import LARGEST_INT, shown
from pyprune.modules.holding import Hold
from pyprune.modules.masks import FollowingMask, Mask, changing_masks, channels_alive
from pyprune.modules.undo import Change


def pack_bits(mask: Tensor) -> Tensor:
    """Return a bool tensor as bits, eight in a byte.

    Example:
        >>> pack_bits(torch.tensor([True, False, True])).tolist()
        [160]
    """
    return torch.from_numpy(np.packbits(mask.detach().cpu().reshape(-1).numpy()))


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bool tensor of a shape that `pack_bits` was given.

    Example:
        >>> unpack_bits(torch.tensor([160], dtype=torch.uint8), (3,)).tolist()
        [True, False, True]
    """
    flat = np.unpackbits(bits.cpu().numpy(), count=math.prod(shape))
    return torch.from_numpy(flat.astype(bool)).reshape(tuple(shape))


def state_of(mask: Mask) -> dict[str, Any]:
    """Return what `check_state` and `load_states` take: bits, shape, units, and what is parked, all on the CPU."""
    return {
        "shape": list(mask.mask.shape),
        "bits": pack_bits(mask.mask),
        "parked": None if mask.parked is None else mask.parked.detach().to("cpu", copy=True),
        "unit": None if mask.unit is None else list(mask.unit),
        "followers": [None if one.parked is None else one.parked.detach().cpu() for one in mask.followers],
    }


def is_size(value: object) -> bool:
    """Whether a value of a file is an integer that counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_INT


def check_state(
    name: str, state: object, shape: Sequence[int], followers: Sequence[FollowingMask] | None = None
) -> None:
    """Raise ValueError unless a state is that of a mask of a shape, with these followers if they are given.

    Raises:
        ValueError: with the name of the weight and what is wrong.
    """
    problem = _problem(state, tuple(shape)) or _problem_of_followers(state, shape, followers)
    if problem:
        raise ValueError(f"the state of {name} {problem}; load it into the model and the pruning that were saved")


def _problem(state: object, shape: tuple[int, ...]) -> str:
    if not isinstance(state, Mapping) or not {"shape", "bits", "parked"} <= set(state):
        return "is no state of a mask"
    saved, bits, unit = state["shape"], state["bits"], state.get("unit")
    if not isinstance(saved, (list, tuple)) or not all(map(is_size, saved)) or tuple(saved) != shape:
        return f"has a mask of shape {shown(saved)}, and the model one of {list(shape)}"
    if not isinstance(bits, Tensor) or not is_plain(bits) or bits.dtype is not torch.uint8 or bits.dim() != 1:
        return "has bits that are no tensor of bytes"
    if bits.numel() != -(-math.prod(shape) // 8):
        return f"has {bits.numel()} bytes of bits for a mask of shape {list(shape)}"
    if unit is not None and not (
        isinstance(unit, (list, tuple)) and len(unit) == len(shape) and all(is_size(size) and size for size in unit)
    ):
        return f"has units of {shown(unit)} for a mask of shape {list(shape)}"
    return _problem_of_parked(state["parked"], int((~unpack_bits(bits, shape)).sum()))


def _problem_of_followers(state: Any, shape: Sequence[int], followers: Sequence[FollowingMask] | None) -> str:
    saved = state.get("followers", [])
    if not isinstance(saved, (list, tuple)):
        return "has followers that are no list"
    if followers is None:
        return ""
    if len(saved) != len(followers):
        return f"has {len(saved)} followers, the biases and norms of its dead channels, and the mask {len(followers)}"
    mask = unpack_bits(state["bits"], shape)
    dropped = [int((~channels_alive(mask, one.layout)).sum()) for one in followers]
    found = (_problem_of_parked(parked, number) for parked, number in zip(saved, dropped, strict=True))
    return next((f"has a follower that {problem}" for problem in found if problem), "")


def _problem_of_parked(parked: object, dropped: int) -> str:
    if parked is None:
        return ""
    if not isinstance(parked, Tensor) or not is_plain(parked) or parked.dtype not in ops.WEIGHT_DTYPES:
        return "has parked values that are no tensor of weights"
    if parked.dim() != 1 or parked.numel() != dropped:
        return f"has not as many parked values as the {dropped} that its mask drops"
    if not bool(parked.isfinite().all()):
        return "has parked values that are NaN or infinite: the file is damaged, or the training had diverged"
    return ""


def check_tensors(what: str, tensors: object, *, integers: bool = False) -> None:
    """Raise ValueError unless a part of a state is a dict from names to finite tensors.

    Raises:
        ValueError: with what it is called.
    """
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"the state has the {what} {shown(tensors)}; load one that state_dict() returned")
    wrong = [
        name
        for name, tensor in tensors.items()
        if not (isinstance(tensor, Tensor) and is_plain(tensor) and bool(tensor.isfinite().all()))
        or not (tensor.is_floating_point() or integers)
    ]
    if wrong:
        raise ValueError(
            f"the state has {what} of {', '.join(wrong[:5])} that are no tensors of finite numbers: it is damaged, "
            "or the training had diverged"
        )


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is an ordinary one, whose values can be read."""
    return (
        not is_traceable_wrapper_subclass(value)
        and value.layout is torch.strided
        and not value.is_meta
        and not value.is_quantized
    )


@torch.no_grad()
def load_states(pairs: Sequence[tuple[Mask, Mapping[str, Any]]]) -> None:
    """Bring masks, and what is parked under them, to states that `check_state` has seen."""
    with Change() as change:
        change.finish(loading(pairs))


@torch.inference_mode(False)
@torch.no_grad()
def loading(pairs: Sequence[tuple[Mask, Mapping[str, Any]]]) -> Callable[[], None]:
    """Return what does the work of `load_states`; it may be done twice."""
    holds = list(dict.fromkeys(one for mask, _ in pairs for one in (mask, *mask.followers)))
    # Weights were loaded before: they are right where the new mask keeps them.
    loaded = [
        (one, one.parameter.detach().clone()) for one in holds if one.parameter is not None and one.is_written()
    ]
    parked: dict[Hold, Tensor | None] = {}
    for mask, state in pairs:
        followers = zip(mask.followers, state.get("followers", []), strict=False)
        for one, values in [(mask, state["parked"]), *followers]:
            parked[one] = None if values is None else values.clone()
    return partial(_load, pairs, loaded, parked)


@torch.inference_mode(False)
@torch.no_grad()
def _load(
    pairs: Sequence[tuple[Mask, Mapping[str, Any]]],
    loaded: Sequence[tuple[Hold, Tensor]],
    parked: Mapping[Hold, Tensor | None],
) -> None:
    with changing_masks([mask for mask, _ in pairs]):
        for mask, state in pairs:
            mask.mask = unpack_bits(state["bits"], state["shape"]).to(mask.mask.device)
            unit = state.get("unit")
            mask.unit = None if unit is None else tuple(unit)
    for hold, values in loaded:
        assert hold.parameter is not None
        hold.parameter.copy_(values)
        ops.fold([hold.parameter], [hold.mask])
        hold.saw()
    for hold, there in parked.items():
        hold.parked = there
