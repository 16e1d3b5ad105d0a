"""Masks and the checkpoints of trainers, which save and load the model by themselves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pyprune.checks import shown
from pyprune.modules.attachments import MASKS, dense_parameters
from pyprune.modules.mask_states import check_state, load_states, state_of
from pyprune.modules.masks import FollowingMask, Mask, changing_masks, masks_by_target
from pyprune.modules.zeros import holds_in, settle_written


def masks_follow_loading(model: nn.Module) -> list[RemovableHandle]:
    """Let the masks of a model become the zeros of what is loaded into it.

    Trainers load the best checkpoint into the model at the end of a training (``load_best_model_at_end``), whose
    weights are to stay as they were, though masks drop others by now.

    Example:
        >>> from pyprune import prune
        >>> linear = prune(nn.Linear(4, 2), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
        >>> hooks = masks_follow_loading(linear)
        >>> _ = linear.load_state_dict({"weight": torch.ones(2, 4), "bias": torch.ones(2)})
        >>> int((linear.weight == 0).sum())
        0
    """
    # Wherever masks are, because a part of the model may be what is loaded.
    masked = [module for module in model.modules() if MASKS in module.__dict__]
    return [module.register_load_state_dict_post_hook(_take_zeros) for module in masked]


@torch.no_grad()
def _take_zeros(module: nn.Module, incompatible: object) -> None:
    masks = [
        mask
        for mask in module.__dict__.get(MASKS, {}).values()
        # A bias that is zero by chance is not dropped; those masks follow the weights'.
        if isinstance(mask, Mask) and not isinstance(mask, FollowingMask) and mask.is_written()
    ]
    for mask in masks:
        mask.parked = None
        mask.saw()
    with changing_masks(masks):
        for mask in masks:
            if mask.parameter is not None:
                mask.mask = mask.parameter.detach() != 0


def state_of_masks(model: nn.Module) -> dict[str, Any]:
    """Return the masks of a model by name, as `state_of` does.

    Example:
        >>> from pyprune import prune
        >>> list(state_of_masks(prune(nn.Linear(4, 2), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)))
        ['weight']
    """
    settle_written(holds_in(model))
    return {target.name: state_of(mask) for target, mask in masks_by_target(model).items()}


def load_masks(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Bring the masks of a model to what `state_of_masks` returned.

    Raises:
        ValueError: if other weights carry masks.
    """
    masks = {target.name: mask for target, mask in masks_by_target(model).items()}
    if not isinstance(state, Mapping):
        raise ValueError(f"the masks of the checkpoint are {shown(state)}; they are to be a dict")
    different = sorted(map(str, set(masks) ^ set(state)))
    if different:
        raise ValueError(
            f"the masks of the checkpoint and of the model differ in {', '.join(different[:8])}; resume with the "
            "model and the pruning that were saved"
        )
    for name, mask in masks.items():
        check_state(name, state[name], mask.mask.shape, mask.followers)
    load_states([(mask, state[name]) for name, mask in masks.items()])


@contextmanager
def filled_where_all_is_dropped(model: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Within it, weights of which the masks of a state leave nothing have a value.

    A `Pruner` leaves out what is zero everywhere, and so would not have the masks that its state has. When it has
    loaded them, the weights are zero again.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> with filled_where_all_is_dropped(layer, {"masks": {"weight": {"bits": torch.tensor([0])}}}):
        ...     layer.weight.tolist()
        [[1.0, 1.0]]
    """
    names = set(_all_dropped(state))
    empty = [one for owner, one in dense_parameters(model) if owner.name in names and not one.detach().any()]

    def empty_again() -> None:
        for parameter in empty:
            parameter.data.zero_()

    # By `.data`, so that gradients need not be switched off, and on again whatever happens.
    try:
        for parameter in empty:
            parameter.data.fill_(1)
        yield
    except BaseException:
        try:
            empty_again()
        finally:
            empty_again()
        raise


def _all_dropped(state: object) -> Iterator[str]:
    """Yield the weights that masks leave nothing of, in the state of a pruner, of several, or of masks alone."""
    if not isinstance(state, Mapping):
        return
    masks, pruners = state.get("masks"), state.get("pruners")
    for name, mask in masks.items() if isinstance(masks, Mapping) else ():
        bits = mask.get("bits") if isinstance(mask, Mapping) else None
        if isinstance(bits, torch.Tensor) and not bits.any():
            yield name
    for one in [state.get("pruning"), *(pruners if isinstance(pruners, (list, tuple)) else ())]:
        yield from _all_dropped(one)
