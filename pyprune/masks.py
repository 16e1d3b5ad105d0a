"""Masks: what magnitude pruning puts on weights."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pyprune.attachments import Attachment, Owner, attach, shared_attachment


class Mask(Attachment):
    """A bool tensor that zeroes part of a weight and of its gradient; all owners of a tied weight share one.

    ``where``, not a product: a dropped infinity must give 0, not NaN.

    Args:
        mask: True = kept.
        unit: how large what goes as one is along each dimension of the weight; None for single elements.

    Example:
        >>> Mask(torch.tensor([True, False]))(torch.tensor([1.0, torch.inf])).tolist()
        [1.0, 0.0]
    """

    mask: Tensor

    def __init__(self, mask: Tensor, unit: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.unit = unit

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros where the mask is False."""
        return torch.where(self.mask, weight, 0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Mask":
        # model.type(dtype), unlike model.to(dtype), converts bool buffers too.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mask = self.mask.bool()
        return self


class FollowingMask(Mask):
    """The mask of a bias or a BatchNorm parameter: drops what belongs to dead output channels of a weight.

    Args:
        mask: True = kept.
        follows: the name of that weight in the dense model.
    """

    on_target = False

    def __init__(self, mask: Tensor, follows: str) -> None:
        super().__init__(mask)
        self.follows = follows


@dataclass(frozen=True, eq=False)
class NewMask:
    """A mask to be, for all owners of one parameter; ``unit`` as in `Mask`."""

    owners: Sequence[Owner]
    mask: Tensor
    unit: tuple[int, ...] | None = None


def attach_masks(masks: Iterable[NewMask], followers: Iterable[tuple[Sequence[Owner], FollowingMask]] = ()) -> None:
    """Put each mask on all its owners, and new followers on theirs; change nothing if one of them refuses.

    Where a `Mask` is there already it is kept, and updated in place, so that nothing is recompiled.

    Example:
        >>> linear = torch.nn.Linear(2, 2)
        >>> attach_masks([NewMask([Owner("weight", linear, "weight")], torch.eye(2, dtype=torch.bool))])
        >>> bool(linear.weight[0, 1] == 0)
        True
    """
    updates: list[tuple[Mask, NewMask]] = []
    attachments: list[tuple[Sequence[Owner], Mask]] = []
    for new in masks:
        shared = cast(Mask | None, shared_attachment(new.owners))
        if shared is not None:
            # Checked before the first is written, so that no copy of the old masks is needed.
            if new.mask.shape != shared.mask.shape or shared.mask.is_inference():
                raise ValueError(
                    f"a mask of shape {tuple(shared.mask.shape)} cannot take one of {tuple(new.mask.shape)}, or it "
                    "was loaded under torch.inference_mode; load the state_dict outside it"
                )
            updates.append((shared, new))
        attachments.append((new.owners, shared or Mask(new.mask, new.unit)))
    attach([*attachments, *followers])
    with torch.no_grad():
        for shared, new in updates:
            shared.mask.copy_(new.mask)
            shared.unit = new.unit
