"""Hold the zeros of a folded model while it is trained."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyprune import ops
from pyprune.modules.attachments import check_module
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import FollowingMask, Mask
from pyprune.modules.optimizer import innermost_of
from pyprune.modules.strip import strip
from pyprune.modules.targets import Target, all_parameters, attachments_of, find_targets, local_part

# torch.compile puts this into names; a checkpoint of the plain model does not have it.
_WRAPPED = "_orig_mod."


class KeepSparse:
    """What `keep_sparse` returns: the masks that it holds, and the hooks in the optimizers.

    It refers to the parameters of one model, so it can be neither copied nor pickled: call `keep_sparse` on the copy.
    A copy of an optimizer has no hooks either. In a ``with`` statement it lets go at the end.

    Example:
        >>> linear = nn.Linear(2, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        >>> keep_sparse(linear, None).masks["weight"].tolist()
        [[False, True], [True, False]]
    """

    def __init__(self, held: Mapping[Target, Tensor]) -> None:
        self._names = {target.name.replace(_WRAPPED, ""): target.parameter for target in held}
        self._masks = {target.parameter: mask for target, mask in held.items()}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by the names of the parameters, True = kept; those of sharded weights are of this rank's part."""
        return {name: self._masks[parameter] for name, parameter in self._names.items()}

    def apply(self) -> None:
        """Zero what is dropped in the weights, now: after a step without hooks, or after loading dense weights.

        Example:
            >>> linear = nn.Linear(2, 1, bias=False)
            >>> _ = linear.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
            >>> keep = keep_sparse(linear, None)
            >>> _ = linear.weight.data.fill_(5.0)
            >>> keep.apply()
            >>> linear.weight.tolist()
            [[0.0, 5.0]]
        """
        _fold((parameter, self._mask_of(parameter)) for parameter in self._masks)

    def mask_gradients(self) -> None:
        """Zero the gradients of what is dropped, now, as the optimizer's step would.

        Call it before gradients are clipped, so that the norm counts only what is kept, and before a
        ``GradScaler`` unscales, so that an overflow in what is dropped skips no step.
        """
        self._mask_gradients(self._masks)

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
        check_module(model)
        there = {
            owner.name.replace(_WRAPPED, ""): local_part(target.parameter)
            for target in all_parameters(model)
            for owner in target.owners
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in there.items()}
        wrong = [
            f"{name} {tuple(mask.shape)} (there: {shapes.get(name, 'none')})"
            for name, mask in self.masks.items()
            if shapes.get(name) != mask.shape
        ]
        if wrong:
            raise ValueError(
                f"{type(model).__name__} does not have the parameters that are held: {', '.join(wrong)}. Give a "
                "model of the same architecture, without wrappers around it, its adapters merged and removed"
            )
        _fold((there[name], mask) for name, mask in self.masks.items())

    def remove(self) -> None:
        """Take the hooks out of the optimizers: zeros are no longer held."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> "KeepSparse":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"KeepSparse(parameters={len(self._masks)}, hooked={bool(self._hooks)})"

    def __reduce__(self) -> str:
        raise TypeError(
            "KeepSparse refers to the parameters of one model and cannot be copied or pickled; call keep_sparse on "
            "the copied or loaded model and its optimizer"
        )

    def _hook_into(self, optimizer: Optimizer) -> None:
        self._mask_state(optimizer)
        self._hooks += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._mask_state),
        ]

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._mask_gradients(self._of(optimizer))
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._masking(optimizer, args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, kwargs | {"closure": self._masking(optimizer, kwargs["closure"])}
        return None

    def _masking(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that masks the gradients which it computes, as often as the optimizer calls it."""

        def masking() -> Any:
            loss = closure()
            self._mask_gradients(self._of(optimizer))
            return loss

        return masking

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        # With zeros in weight, gradient and state most optimizers leave a weight at zero. Those that look at more
        # than one element (Muon), add noise or divide zero by zero (eps=0) do not.
        _fold(
            (parameter, self._mask_of(parameter))
            for parameter in self._of(optimizer)
            if parameter.requires_grad or parameter.grad is not None
        )

    def _mask_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pairs: list[tuple[Tensor, Tensor]] = []
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is not None:
                if gradient.layout is not torch.strided:
                    name = next(name for name, known in self._names.items() if known is parameter)
                    raise TypeError(f"the gradient of {name} is sparse, which cannot be masked; set sparse=False")
                pairs.append((gradient, self._mask_of(parameter)))
        _fold(pairs)

    def _mask_state(self, optimizer: Optimizer) -> None:
        """Zero momentum, moments and the like, which would move what is dropped without a gradient."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for parameter in self._of(optimizer):
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype in ops.WEIGHT_DTYPES:
                    # A copy: what was loaded may still be the tensors of a checkpoint that someone else uses.
                    state[key] = value.clone()
                    pairs.append((state[key], self._mask_of(parameter)))
        _fold(pairs)

    def _of(self, optimizer: Optimizer) -> Iterator[nn.Parameter]:
        """Yield the held parameters of an optimizer; groups may have been added to it."""
        return (
            parameter for group in optimizer.param_groups for parameter in group["params"] if parameter in self._masks
        )

    def _mask_of(self, parameter: nn.Parameter) -> Tensor:
        mask = self._masks[parameter]
        if mask.device != parameter.device:  # the model was moved
            mask = self._masks[parameter] = mask.to(parameter.device)
        return mask


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
    BatchNorm too. In every other weight that `prune` would choose, what is zero now is held. Nothing is attached
    to the model: the forward pass costs what it costs in the dense model, a checkpoint is a plain one, and a mask of
    one byte per element is all the memory it takes.

    Gradients of dropped weights are zeroed before each step, the weights after it, and the state of the optimizer
    now and when it loads one. So the zeros stay, whatever the optimizer does with momentum, moments and weight
    decay. All of a model is zeroed in one call.

    Args:
        model: a model with masks, or with zeros in its weights: stripped, or loaded from a checkpoint of a
            stripped one. FSDP2 may have sharded it (``fully_shard``), but then it cannot carry masks.
        optimizer: the one that trains the model, or several. Wrappers that have it as ``.optimizer`` (of Accelerate,
            Lightning) will do. None if `KeepSparse.apply` is to be called by hand after each step.
        ignored_scope: weights whose zeros are not held.
        examples_inputs: as in `prune`; finds weights that are bare parameters.

    Raises:
        TypeError, ValueError: for wrong arguments, a weight that cannot be pruned (see `prune`), learned gates, an
            optimizer that lacks such a weight, and a weight that is zero everywhere; the last two only if the weight
            requires a gradient. The model is then as it was.

    Example:
        >>> from pyprune import prune
        >>> model = prune(nn.Linear(8, 8), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.75)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> keep_sparse(model, optimizer)
        KeepSparse(parameters=1, hooked=True)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 8)).sum().backward()
        ...     optimizer.step()
        >>> int(model.weight.count_nonzero()), sorted(model.state_dict())
        (16, ['bias', 'weight'])
    """
    check_module(model)
    optimizers = innermost_of(optimizer, "; several of them, or None, and call apply() after each step yourself")
    held = _masks_to_hold(model, find_targets(model, ignored_scope, examples_inputs, shards=True))
    if optimizer is not None:
        _check_all_grouped(held, optimizers)
    if not held:
        warnings.warn("the model has no zeros to hold; prune it, or load its sparse weights, before", stacklevel=3)
    strip(model)
    keep = KeepSparse(held)
    for one in optimizers:
        keep._hook_into(one)
    return keep


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
    empty = [
        target.name
        for target, count in zeros.items()
        if 0 < count == target.parameter.numel() and target not in carried and target.parameter.requires_grad
    ]
    if empty:
        raise ValueError(
            f"zero everywhere, and held so these would never train: {', '.join(empty)}. Name what is to train in "
            "ignored_scope, and freeze with requires_grad_(False) what is to stay zero"
        )
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


@torch.no_grad()
def _fold(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Zero in each tensor what its mask drops: one call per device."""
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, mask in pairs:
        tensors, masks = by_device.setdefault(tensor.device, ([], []))
        tensors.append(local_part(tensor))
        masks.append(mask.to(tensor.device))
    for tensors, masks in by_device.values():
        ops.fold(tensors, masks)
