"""Masks: what magnitude pruning puts on weights."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pyprune import ops
from pyprune.modules.attachments import Attachment, Owner, attach, shared_attachment


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
    # Whether the gradient of the weight in use reaches the dropped weights too.
    dense_gradient = False

    def __init__(self, mask: Tensor, unit: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.unit = unit
        # Other modules, but not its submodules; copies of a model link to the copies.
        self.followers: list[FollowingMask] = []
        self._seen_by: list[Callable[[Tensor], None]] = []

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros where the mask is False."""
        return ops.mask_weight(weight, self.mask, dense_gradient=self.dense_gradient)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks of parameters are not copied or saved either.
        state = {name: value for name, value in vars(self).items() if name not in ("dense_gradient", "_hook")}
        return {**state, "_seen_by": []}

    def update_followers(self) -> None:
        """Set the masks of biases and BatchNorm parameters that follow this one to what it has become."""
        for follower in self.followers:
            follower.update()

    def show_gradient(self, parameter: Tensor, see: Callable[[Tensor], None]) -> Callable[[], None]:
        """Let ``see`` look at the gradient of the weight in use, in which dropped weights have theirs.

        What goes on into ``grad`` is masked all the same, so clipping and optimizers see nothing of it.

        Args:
            parameter: what the mask sits on.
            see: is called in each backward pass.

        Returns:
            A function that ends it.
        """
        if not self._seen_by:
            self.dense_gradient = True
            self._hook = parameter.register_hook(self._show)  # type: ignore[no-untyped-call]
        self._seen_by.append(see)

        def stop() -> None:
            self._seen_by.remove(see)
            if not self._seen_by:
                self.dense_gradient = False
                self._hook.remove()

        return stop

    def _show(self, gradient: Tensor) -> Tensor | None:
        if not self.dense_gradient:  # it was folded into the weight
            return None
        for see in self._seen_by:
            see(gradient.detach())
        return ops.mask_weight(gradient, self.mask)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Mask":
        # model.type(dtype), unlike model.to(dtype), converts bool buffers too.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mask = self.mask.bool()
        return self


class FollowingMask(Mask):
    """The mask of a bias or a BatchNorm parameter: drops what belongs to dead output channels of a layer.

    Args:
        source: the mask of the layer's weight.
        groups: 0 if the first dimension of the weight counts output channels; of a transposed convolution, whose
            second one does, the number of groups.
    """

    on_target = False

    def __init__(self, source: Mask, groups: int = 0) -> None:
        super().__init__(channels_alive(source.mask, groups))
        # In a list: it is no submodule, and a copy of a model links to the copy.
        self._source = [source]
        self.groups = groups

    @property
    def source(self) -> Mask:
        """The mask that this one follows."""
        return self._source[0]

    def link(self) -> None:
        """Let the source keep this one in step, once it is attached."""
        self.source.followers.append(self)

    def update(self) -> None:
        """Become what the source has become."""
        with torch.no_grad():
            self.mask.copy_(channels_alive(self.source.mask, self.groups))


def channels_alive(mask: Tensor, groups: int = 0) -> Tensor:
    """Say of each output channel of a layer whether it keeps a weight; ``groups`` as in `FollowingMask`.

    Example:
        >>> channels_alive(torch.tensor([[True, False], [False, False]])).tolist()
        [True, False]
    """
    if groups == 0:
        return mask.flatten(1).any(1)
    # (inputs, outputs of a group, ...), with the inputs of one group after the other.
    return mask.reshape(groups, mask.shape[0] // groups, mask.shape[1], -1).any(3).any(1).flatten()


@dataclass(frozen=True, eq=False)
class NewMask:
    """A mask to be, for all owners of one parameter; ``unit`` as in `Mask`."""

    owners: Sequence[Owner]
    mask: Tensor
    unit: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class NewFollower:
    """A `FollowingMask` to be, of a new mask."""

    owners: Sequence[Owner]
    of: NewMask
    groups: int


def attach_masks(masks: Sequence[NewMask], followers: Iterable[NewFollower] = ()) -> None:
    """Put each mask on all its owners, and new followers on theirs; change nothing if one of them refuses.

    Where a `Mask` is there already it is kept, and updated in place, so that nothing is recompiled.

    Example:
        >>> linear = torch.nn.Linear(2, 2)
        >>> attach_masks([NewMask([Owner("weight", linear, "weight")], torch.eye(2, dtype=torch.bool))])
        >>> bool(linear.weight[0, 1] == 0)
        True
    """
    carried: dict[NewMask, Mask] = {}
    updates: list[NewMask] = []
    for new in masks:
        shared = cast(Mask | None, shared_attachment(new.owners))
        if shared is not None:
            # Checked before the first is written, so that no copy of the old masks is needed.
            if new.mask.shape != shared.mask.shape or shared.mask.is_inference():
                raise ValueError(
                    f"a mask of shape {tuple(shared.mask.shape)} cannot take one of {tuple(new.mask.shape)}, or it "
                    "was loaded under torch.inference_mode; load the state_dict outside it"
                )
            updates.append(new)
        carried[new] = shared or Mask(new.mask, new.unit)
    following = [(follower.owners, FollowingMask(carried[follower.of], follower.groups)) for follower in followers]
    attach([*((new.owners, mask) for new, mask in carried.items()), *following])
    for _, follower_mask in following:
        follower_mask.link()
    with torch.no_grad():
        for new in updates:
            carried[new].mask.copy_(new.mask)
            carried[new].unit = new.unit
