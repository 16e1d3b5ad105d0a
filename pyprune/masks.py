"""Masks: what magnitude pruning puts on weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pyprune.attachments import Attachment, Owner, attach, shared_attachment


class Mask(Attachment):
    """A bool tensor that zeroes part of a weight and of its gradient; all owners of a tied weight share one.

    ``where``, not a product: a dropped infinity must give 0, not NaN.

    Example:
        >>> Mask(torch.tensor([True, False]))(torch.tensor([1.0, torch.inf])).tolist()
        [1.0, 0.0]
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros where the mask is False."""
        return torch.where(self.mask, weight, 0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Mask":
        # model.type(dtype), unlike model.to(dtype), converts bool buffers too.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mask = self.mask.bool()
        return self


def attach_masks(masks: Iterable[tuple[Sequence[Owner], Tensor]]) -> None:
    """Put each mask on all owners of one parameter; change nothing if one of them refuses.

    Where a `Mask` is there already it is kept, and updated in place, so that nothing is recompiled.

    Example:
        >>> linear = torch.nn.Linear(2, 2)
        >>> attach_masks([([Owner("weight", linear, "weight")], torch.eye(2, dtype=torch.bool))])
        >>> bool(linear.weight[0, 1] == 0)
        True
    """
    updates: list[tuple[Mask, Tensor]] = []
    attachments: list[tuple[Sequence[Owner], Mask]] = []
    for owners, mask in masks:
        shared = cast(Mask | None, shared_attachment(owners))
        if shared is not None:
            # Checked before the first is written, so that no copy of the old masks is needed.
            if mask.shape != shared.mask.shape or shared.mask.is_inference():
                raise ValueError(
                    f"a mask of shape {tuple(shared.mask.shape)} cannot take one of {tuple(mask.shape)}, or it was "
                    "loaded under torch.inference_mode; load the state_dict outside it"
                )
            updates.append((shared, mask))
        attachments.append((owners, shared or Mask(mask)))
    attach(attachments)
    with torch.no_grad():
        for shared, mask in updates:
            shared.mask.copy_(mask)
