"""Parameters that become smaller: slices are kept of them, their masks and the states of optimizers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyprune.modules.holding import HELD, Hold
from pyprune.modules.masks import FollowingMask
from pyprune.modules.zeros import hold_zeros, raw_values
from pyprune.structured.compact import Kept, cut, cut_state, give_data


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
    shape: torch.Size
    dim: int
    kept: Tensor
    small: Tensor
    hold: tuple[Hold, Tensor, Tensor] | None


@torch.no_grad()
def cut_of(parameter: nn.Parameter, dim: int, kept: Sequence[int]) -> Cut:
    """Return what stays of a parameter; it is not changed.

    Example:
        >>> cut_of(nn.Parameter(torch.ones(3, 2)), 0, [0, 2]).small.shape
        torch.Size([2, 2])
    """
    places = torch.tensor(kept, dtype=torch.int64, device=parameter.device)
    held = HELD.get(id(parameter))
    hold = None
    if held is not None:
        masks = held.mask.index_select(dim, places.to(held.mask.device))
        hold = held, masks, raw_values(held).index_select(dim, places)
    return Cut(parameter, parameter.shape, dim, places, cut(parameter.detach(), {dim: places}), hold)


@torch.no_grad()
def apply_cuts(cuts: Sequence[Cut], optimizers: Iterable[Optimizer]) -> list[str]:
    """Make parameters smaller, and cut the states of optimizers alike; may be done twice.

    Returns:
        Of optimizers' states what did not fit, and is begun anew.
    """
    for one in cuts:
        one.parameter.grad = None  # torch refuses other shapes
        if one.hold is None:
            give_data(one.parameter, one.small)
            continue
        hold, mask, raw = one.hold
        give_data(one.parameter, raw.clone())
        vars(hold).update(_mask=mask, parked=None, is_raw=True)
        if isinstance(hold, FollowingMask) and hold.layout.groups == one.shape[one.dim]:
            hold.layout = replace(hold.layout, groups=len(one.kept))
        hold_zeros([hold])
    kept = Kept({id(one.parameter): {one.dim: one.kept} for one in cuts})
    shapes = {id(one.parameter): one.shape for one in cuts}
    return [key for optimizer in optimizers for key in cut_state(optimizer, kept, shapes)]
