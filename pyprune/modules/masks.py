"""Masks: what magnitude pruning puts on weights."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from pyprune.methods.layout import Layout, groups_first
from pyprune.modules import steps as _steps  # noqa: F401  (optimizers keep what masks hold)
from pyprune.modules.attachments import Owner, attach, shared_attachment
from pyprune.modules.holding import HELD, Hold
from pyprune.modules.targets import Target, attachments_of
from pyprune.modules.undo import Change
from pyprune.modules.watching import watch
from pyprune.modules.zeros import hold_zeros, holds_in, raw_values, release


class Mask(Hold):
    """What magnitude pruning puts on weights: a bool tensor whose zeros are held; owners of a tied weight share one.

    Args:
        mask: True = kept.
        unit: how large what goes as one is along each dimension of the weight; None for single elements, and for
            units that lie in several weights.
        on_target: False for a bias or norm parameter, which goes with the weights of its unit and not by itself.
    """

    def __init__(self, mask: Tensor, unit: tuple[int, ...] | None = None, *, on_target: bool = True) -> None:
        super().__init__(mask)
        self.unit = unit
        self.on_target = on_target
        # Copies of a model link to the copies.
        self.followers: list[FollowingMask] = []

    def _untied(self) -> "Mask":
        untied = cast(Mask, super()._untied())
        untied.followers = []
        return untied

    def update_followers(self) -> None:
        """Set the masks of biases and BatchNorm parameters that follow this one to what it has become."""
        for follower in self.followers:
            follower.update()


class FollowingMask(Mask):
    """The mask of a bias or a BatchNorm parameter: drops what belongs to dead output channels of a layer.

    Args:
        source: the mask of the layer's weight.
        layout: what the dimensions of that weight count.
        shape: that of the parameter.
    """

    on_target = False  # of pickles too, whose masks do not say so

    def __init__(self, source: Mask, layout: Layout, shape: Sequence[int]) -> None:
        super().__init__(channels_alive(source.mask, layout).reshape(tuple(shape)), on_target=False)
        # In a list: it is no submodule, and a copy of a model links to the copy.
        self._source = [source]
        self.layout = layout

    @property
    def source(self) -> Mask:
        """The mask that this one follows."""
        return self._source[0]

    def put_on(self, module: nn.Module, attribute: str) -> None:
        """Be the mask of a place, and let the source keep this one in step."""
        super().put_on(module, attribute)
        if self not in self.source.followers:
            self.source.followers.append(self)

    def take_off(self, module: nn.Module, attribute: str) -> None:
        """Hold nothing at a place any more."""
        super().take_off(module, attribute)
        if self.parameter is None and self in self.source.followers:
            self.source.followers.remove(self)

    def update(self) -> None:
        """Become what the source has become."""
        self.mask = channels_alive(self.source.mask, self.layout).view_as(self.mask)


def channels_alive(mask: Tensor, layout: Layout) -> Tensor:
    """Say of each output channel of a layer, those of one group after the other, whether it keeps a weight.

    Example:
        >>> import torch
        >>> channels_alive(torch.tensor([[True, False], [False, False]]), Layout(0, 1)).tolist()
        [True, False]
    """
    assert layout.outputs is not None
    outputs_first = groups_first(mask, layout).movedim(layout.outputs + 1, 1)
    return outputs_first.flatten(2).any(2).flatten()


def masks_in(model: nn.Module) -> list[Mask]:
    """List the masks of a model, also those that follow others, each once."""
    return [hold for hold in holds_in(model) if isinstance(hold, Mask)]


def masks_by_target(model: nn.Module) -> dict[Target, Mask]:
    """Return the weights of a model that carry masks, also those that follow others, with these."""
    return {target: found for target, found in attachments_of(model).items() if isinstance(found, Mask)}


def raw_weight(target: Target) -> Tensor:
    """Return the values of a weight without the zeros of its mask; not to be written to."""
    carried = target.attachment
    return raw_values(carried) if isinstance(carried, Mask) else target.parameter.detach()


@contextmanager
def changing_masks(masks: Iterable[Mask]) -> Iterator[None]:
    """Let weights have their raw values while their masks change; then followers follow, and zeros are held again.

    Masks become other tensors (``mask.mask = ...``), and are not written into: if the body fails, all is as it was.

    Example:
        >>> import torch
        >>> from pyprune import prune
        >>> linear = prune(nn.Linear(2, 2), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
        >>> (mask,) = masks_in(linear)
        >>> with changing_masks([mask]):
        ...     mask.mask = torch.ones_like(mask.mask)
        >>> int((linear.weight == 0).sum())
        0
    """
    masks = list(masks)
    holds = list(dict.fromkeys([*masks, *(follower for mask in masks for follower in mask.followers)]))
    with Change(holds=holds):
        release(holds)
        yield
        for mask in masks:
            mask.update_followers()
        hold_zeros(holds)


@dataclass(frozen=True, eq=False)
class NewMask:
    """A mask to be, for all owners of one parameter; ``unit`` and ``on_target`` as in `Mask`."""

    owners: Sequence[Owner]
    mask: Tensor
    unit: tuple[int, ...] | None = None
    on_target: bool = True


@dataclass(frozen=True, eq=False)
class NewFollower:
    """A `FollowingMask` to be, of a new mask; ``layout`` and ``shape`` as there."""

    owners: Sequence[Owner]
    of: NewMask
    layout: Layout
    shape: Sequence[int]


def _mask_elsewhere(owners: Sequence[Owner]) -> Mask | None:
    """Return the mask of a weight that is tied to a place outside of the model, and has it there."""
    held = HELD.get(id(owners[0].parameter))
    return held if isinstance(held, Mask) else None


def attach_masks(model: nn.Module, masks: Sequence[NewMask], followers: Iterable[NewFollower] = ()) -> None:
    """Put each mask on all its owners, and new followers on theirs; call it within a `Change` of the model.

    Where a `Mask` is there already it is kept, and has the new tensor. Weights have their zeros afterwards, and what
    was there is parked; but those of a mask that was there already must be raw (`changing_masks`), and stay so.

    Example:
        >>> import torch
        >>> linear = torch.nn.Linear(2, 2)
        >>> attach_masks(linear, [NewMask([Owner("weight", linear, "weight")], torch.eye(2, dtype=torch.bool))])
        >>> bool(linear.weight[0, 1] == 0)
        True
    """
    carried: dict[NewMask, Mask] = {}
    updates: list[NewMask] = []
    for new in masks:
        shared = cast(Mask | None, shared_attachment(new.owners)) or _mask_elsewhere(new.owners)
        if shared is not None:
            if new.mask.shape != shared.mask.shape:
                raise ValueError(
                    f"a mask of shape {tuple(shared.mask.shape)} cannot take one of {tuple(new.mask.shape)}; call "
                    "pyprune.strip before weights are resized"
                )
            updates.append(new)
        carried[new] = shared or Mask(new.mask, new.unit, on_target=new.on_target)
    following = [(new.owners, FollowingMask(carried[new.of], new.layout, new.shape)) for new in followers]
    attach([*((new.owners, mask) for new, mask in carried.items()), *following])
    for new in updates:
        carried[new].mask = new.mask
        carried[new].unit = new.unit
        carried[new].parks = True  # `keep_sparse` and RigL had no use for what is dropped
    for _, follower_mask in following:
        follower_mask.update()
    updated = {carried[new] for new in updates}
    hold_zeros([mask for mask in carried.values() if mask not in updated] + [mask for _, mask in following])
    if len(updated) < len(carried) or following:
        watch(model)
