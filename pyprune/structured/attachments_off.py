"""Take masks and gates off a model while it is made smaller, and put masks on what is left of their weights."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyprune.methods.layout import Layout
from pyprune.modules.attachments import Owner, detach
from pyprune.modules.forward_pass import unshare_samples
from pyprune.modules.gates import StochasticGate, check_gates
from pyprune.modules.masks import FollowingMask, Mask, NewFollower, NewMask, attach_masks, raw_weight
from pyprune.modules.strip import check_foldable
from pyprune.modules.targets import attachments_of
from pyprune.modules.unit_gates import UnitGates
from pyprune.modules.watching import unwatch
from pyprune.modules.zeros import check_places, holds_in, settle_written
from pyprune.structured.compact import Kept, cut

GATES = (StochasticGate, UnitGates)


@dataclass(frozen=True, eq=False)
class Carried:
    """A mask that a weight had: where, what it keeps, the raw values, and which other mask it follows."""

    owners: Sequence[Owner]
    parameter: nn.Parameter
    mask: Tensor
    raw: Tensor
    unit: tuple[int, ...] | None
    on_target: bool
    follows: nn.Parameter | None = None
    layout: Layout | None = None


def gated_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights under gates; raises for what cannot be folded.

    Raises:
        ValueError: as `strip` does.
    """
    check_gates(model)
    check_places(model)
    attachments = attachments_of(model)
    check_foldable(attachments)
    return [target.parameter for target, found in attachments.items() if isinstance(found, GATES)]


@torch.no_grad()
def take_off(model: nn.Module) -> list[Carried]:
    """Fold gates into weights, and take masks off, within a `Change` that knows the values of gated weights."""
    settle_written(holds_in(model))
    attachments = attachments_of(model)
    carried = [
        Carried(
            target.owners,
            target.parameter,
            found.mask,
            raw_weight(target),
            found.unit,
            found.on_target,
            found.source.parameter if isinstance(found, FollowingMask) else None,
            found.layout if isinstance(found, FollowingMask) else None,
        )
        for target, found in attachments.items()
        if isinstance(found, Mask)
    ]
    gated = {
        target.parameter: found.deterministic(target.parameter)
        for target, found in attachments.items()
        if isinstance(found, GATES)
    }
    for target in reversed(attachments):
        detach(target.owners[::-1])
    unshare_samples(model)
    unwatch(model)
    for weight, value in gated.items():
        weight.copy_(value)
    return carried


@torch.no_grad()
def put_back(model: nn.Module, carried: Sequence[Carried], kept: Kept, changed: Set[int]) -> None:
    """Put masks on what is left of weights, if they still drop something; within a `Change`.

    Weights with these ids have other values now, which are their raw ones.
    """
    new: dict[int, NewMask] = {}
    followers = []
    for one in carried:
        mask = cut(one.mask, kept.of(one.parameter))
        if one.follows is None and not bool(mask.all()):
            if id(one.parameter) not in changed:
                one.parameter.copy_(cut(one.raw, kept.of(one.parameter)))
            new[id(one.parameter)] = NewMask(one.owners, mask, one.unit, one.on_target)
    for one in carried:
        source = new.get(id(one.follows))
        if source is not None and one.layout is not None:
            one.parameter.copy_(cut(one.raw, kept.of(one.parameter)))
            groups = one.layout.groups
            if groups > 1:
                before = next(other.mask.shape[0] for other in carried if other.parameter is one.follows)
                groups = groups * source.mask.shape[0] // before
            followers.append(NewFollower(one.owners, source, replace(one.layout, groups=groups), one.parameter.shape))
    attach_masks(model, list(new.values()), followers)
