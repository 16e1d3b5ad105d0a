"""Hold the zeros of a folded model while it is trained."""

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyprune import ops
from pyprune.modules.attachments import attach, check_module, detach
from pyprune.modules.averages import apply_masks
from pyprune.modules.coverage import warn_of_missed
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import FollowingMask, Mask
from pyprune.modules.optimizer import innermost_of
from pyprune.modules.sharding import local_part
from pyprune.modules.steps import mask_gradients, mask_state
from pyprune.modules.strip import let_go
from pyprune.modules.targets import Target, attachments_of, find_targets
from pyprune.modules.undo import Change
from pyprune.modules.watching import unwatch, watch
from pyprune.modules.zeros import hold_zeros


class KeepSparse:
    """What `keep_sparse` returns: the masks that it put on a model, by which zeros are held.

    It refers to the parameters of one model, so it can be neither copied nor pickled. A copy of the model holds its
    zeros by itself. In a ``with`` statement it lets go at the end.

    Example:
        >>> linear = nn.Linear(2, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        >>> keep_sparse(linear, None).masks["weight"].tolist()
        [[False, True], [True, False]]
    """

    def __init__(self, model: nn.Module, held: Mapping[Target, Mask]) -> None:
        self._model = model
        self._held = dict(held)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by the names of the parameters, True = kept; those of sharded weights are of this rank's part."""
        return {target.name: mask.mask for target, mask in self._held.items()}

    def apply(self) -> None:
        """Zero what is dropped in the weights, now: after a step in a compiled graph, or after writing to ``.data``.

        Example:
            >>> linear = nn.Linear(2, 1, bias=False)
            >>> _ = linear.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
            >>> keep = keep_sparse(linear, None)
            >>> _ = linear.weight.data.fill_(5.0)
            >>> keep.apply()
            >>> linear.weight.tolist()
            [[0.0, 5.0]]
        """
        with Change(holds=self._held.values()):
            hold_zeros(self._held.values())

    def mask_gradients(self) -> None:
        """Zero the gradients of what is dropped, now, where they did not come by a backward pass."""
        mask_gradients(self._held.values())

    def reapply(self, model: nn.Module) -> None:
        """Zero the same elements of another model, or of this one with other parameters, by name.

        For weights that changed as a whole: adapters that were merged into them (LoRA), averages, other checkpoints.

        Args:
            model: has parameters of these names and shapes, of any dtype and device.

        Raises:
            ValueError: if it lacks one, or has it in another shape. Names them; nothing is changed then.

        Example:
            >>> linear = nn.Linear(2, 1, bias=False)
            >>> _ = linear.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
            >>> merged = nn.Linear(2, 1, bias=False)
            >>> keep_sparse(linear, None).reapply(merged)
            >>> int((merged.weight == 0).sum())
            1
        """
        apply_masks(self.masks, model)

    def remove(self) -> None:
        """Hold the zeros no longer."""
        with Change(self._model):
            for target, mask in self._held.items():
                there = {owner: owner.attachment for owner in target.owners}
                held = [one for one, found in there.items() if mask in (found, getattr(found, "untied_from", None))]
                detach(held)
            unwatch(self._model)

    def __enter__(self) -> "KeepSparse":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        is_held = any(mask.parameter is not None for mask in self._held.values())
        return f"KeepSparse(parameters={len(self._held)}, held={is_held})"

    def __reduce__(self) -> str:
        raise TypeError(
            "KeepSparse refers to the parameters of one model and cannot be copied or pickled; a copy of the model "
            "holds its zeros by itself"
        )


@torch.inference_mode(False)  # masks made under inference_mode could not be used in training
def keep_sparse(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None,
    *,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
) -> KeepSparse:
    """Hold the zeros of a model while an optimizer trains it: the masks stay as they are.

    A model that carries masks is stripped first (`strip`), and exactly what they drop is held, in biases and
    BatchNorm too. In every other weight that `prune` would choose, what is zero now is held (not in one that is zero
    everywhere and so could never train: see `IgnoredScope`). The forward pass costs
    what it costs in the dense model, a checkpoint is a plain one, and a mask of one byte per element is all the
    memory it takes: nothing is parked, and what is dropped does not come back.

    Gradients of dropped weights are zeroed as they arrive, weights after each step, and the state of the optimizer
    when it is new or loaded. So the zeros stay, whatever the optimizer does with momentum, moments and weight decay.

    Args:
        model: a model with masks, or with zeros in its weights: stripped, or loaded from a checkpoint of a
            stripped one. FSDP2 may have sharded it (``fully_shard``), but then it cannot carry masks.
        optimizer: the one that trains the model, or several. Wrappers that have it as ``.optimizer`` (of Accelerate,
            Lightning) will do. It is only looked at: zeros are held in the steps of any. None leaves that out.
        ignored_scope: weights whose zeros are not held.
        examples_inputs: as in `prune`; finds weights that are bare parameters.

    Raises:
        TypeError, ValueError: for wrong arguments, a weight that cannot be pruned (see `prune`), learned gates, an
            optimizer that lacks such a weight that requires a gradient. The model is then as it was.

    Example:
        >>> from pyprune import prune
        >>> model = prune(nn.Linear(8, 8), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.75)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> keep_sparse(model, optimizer)
        KeepSparse(parameters=1, held=True)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 8)).sum().backward()
        ...     optimizer.step()
        >>> int(model.weight.count_nonzero()), sorted(model.state_dict())
        (16, ['bias', 'weight'])
    """
    check_module(model)
    optimizers = innermost_of(optimizer, "; several of them, or None")
    targets = find_targets(model, ignored_scope, examples_inputs, shards=True)
    warn_of_missed(model, ignored_scope, targets, has_inputs=examples_inputs is not None)
    held = _masks_to_hold(model, targets)
    if optimizer is not None:
        _check_all_grouped(held, optimizers)
    if not held:
        warnings.warn("the model has no zeros to hold; prune it, or load its sparse weights, before", stacklevel=3)
    masks = {target: Mask(mask) for target, mask in held.items()}
    for mask in masks.values():
        mask.parks = False
    with Change(model) as change:
        let_go(model)
        attach((target.owners, mask) for target, mask in masks.items())
        hold_zeros(masks.values())
        watch(model)
        change.finish(partial(_mask_states, optimizers, masks.values()))
    return KeepSparse(model, masks)


def _mask_states(optimizers: Iterable[Optimizer], masks: Iterable[Mask]) -> None:
    for optimizer in optimizers:
        mask_state(optimizer, list(masks))


def _masks_to_hold(model: nn.Module, targets: list[Target]) -> dict[Target, Tensor]:
    """Return the masks of what is dropped in the targets, and of what follows them; of nothing that is whole."""
    attached = attachments_of(model)
    gated = [target.name for target, found in attached.items() if not isinstance(found, Mask)]
    if gated:
        raise ValueError(f"learned gates are on {', '.join(gated)}; fold them in with pyprune.strip first")
    carried = {target: found.mask for target in targets if isinstance(found := target.attachment, Mask)}
    sources = {target.attachment for target in carried}
    followers = {
        target: found.mask
        for target, found in attached.items()
        if isinstance(found, FollowingMask) and found.source in sources
    }
    carried |= followers
    zeros = _count_zeros({target: carried.get(target, target.parameter) for target in [*targets, *followers]})
    return {
        target: carried[target] if target in carried else local_part(target.parameter) != 0
        for target, count in zeros.items()
        if count and not (target not in carried and _is_padding(target, count))
    }


def _is_padding(target: Target, zeros: int) -> bool:
    """Whether all zeros are the row of an embedding that gets no gradient anyway; to hold it costs as much as all."""
    weight = local_part(target.parameter)
    for owner in target.owners:
        row = owner.module.padding_idx if isinstance(owner.module, (nn.Embedding, nn.EmbeddingBag)) else None
        if row is None or weight is not target.parameter or zeros != weight.shape[1] or bool(weight[row].any()):
            return False
    return True


def _count_zeros(tensors: Mapping[Target, Tensor]) -> dict[Target, int]:
    """Count zeros; of a sharded tensor those of all ranks, so that all hold the same weights."""
    zeros = dict.fromkeys(tensors, 0)
    for device in {tensor.device for tensor in tensors.values()}:
        plain = {target: t for target, t in tensors.items() if t.device == device and local_part(t) is t}
        zeros |= zip(plain, ops.count_zeros(list(plain.values())).tolist(), strict=True)
    for target, tensor in tensors.items():
        if local_part(tensor) is not tensor:
            zeros[target] = int((tensor.detach() == 0).sum().full_tensor())  # type: ignore[attr-defined]
    return zeros


def _check_all_grouped(held: Iterable[Target], optimizers: Iterable[Optimizer]) -> None:
    grouped = {parameter for one in optimizers for group in one.param_groups for parameter in group["params"]}
    missing = [target.name for target in held if target.parameter.requires_grad and target.parameter not in grouped]
    if missing:
        raise ValueError(
            f"weights with zeros to hold are in no group of the optimizer: {', '.join(missing)}. Give all optimizers "
            "that train the model, or freeze with requires_grad_(False) what none of them trains"
        )
