"""Parameters that become smaller: slices are kept of them, their masks and the states of optimizers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyprune.modules.holding import HELD, Hold
from pyprune.modules.masks import FollowingMask
from pyprune.modules.zeros import hold_zeros, raw_values


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays of a parameter.

    Args:
        parameter: the parameter, with its shape.
        dim: along which it is cut.
        kept: the positions there that stay.
        small: its values without the others, as they are in use.
        hold: its mask, if it has one, with that mask and the raw values without the others.
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]
    dim: int
    kept: Tensor
    small: Tensor
    hold: tuple[Hold, Tensor, Tensor] | None


@torch.no_grad()
def cut_of(parameter: nn.Parameter, dim: int, kept: Sequence[int]) -> Cut:
    """Return what stays of a parameter; it is not changed.

    Example:
        >>> cut = cut_of(nn.Parameter(torch.ones(3, 2)), 0, [0, 2])
        >>> cut.small.shape
        torch.Size([2, 2])
    """
    places = torch.tensor(kept, dtype=torch.int64, device=parameter.device)
    held = HELD.get(id(parameter))
    hold = None
    if held is not None:
        masks = held.mask.index_select(dim, places.to(held.mask.device))
        hold = held, masks, raw_values(held).index_select(dim, places)
    small = parameter.detach().index_select(dim, places)
    return Cut(parameter, tuple(parameter.shape), dim, places, small, hold)


@torch.no_grad()
def apply_cuts(cuts: Iterable[Cut], optimizers: Iterable[Optimizer]) -> None:
    """Make parameters smaller, clear their gradients, and cut the states of optimizers alike; may be done twice."""
    optimizers = list(optimizers)
    for cut in cuts:
        parameter = cut.parameter
        parameter.grad = None
        for optimizer in optimizers:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and tuple(value.shape) == cut.shape:
                    state[key] = value.index_select(cut.dim, cut.kept)
        if cut.hold is None:
            parameter.data = cut.small
            continue
        hold, mask, raw = cut.hold
        parameter.data = raw.clone()
        vars(hold).update(_mask=mask, parked=None, is_raw=True)
        if isinstance(hold, FollowingMask) and hold.layout.groups == cut.shape[cut.dim]:
            hold.layout = replace(hold.layout, groups=len(cut.kept))
        hold_zeros([hold])
