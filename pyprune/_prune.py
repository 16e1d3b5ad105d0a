"""Put masks or gates on a model, and compute masks anew."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.attachments import Attachment
from pyprune.gates import HardConcreteGate, StochasticGate
from pyprune.ignored_scope import IgnoredScope
from pyprune.masks import Mask, attach_masks
from pyprune.methods import PruneMode, check_mode, check_ratio, global_magnitude, local_magnitude
from pyprune.passes import attach_and_share
from pyprune.targets import Target, attachments_of, check_prunable, find_targets

_MAGNITUDE = {
    PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL: local_magnitude,
    PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL: global_magnitude,
}
_GATES = {
    PruneMode.UNSTRUCTURED_REGULARIZATION_BASED: StochasticGate,
    PruneMode.UNSTRUCTURED_HARD_CONCRETE: HardConcreteGate,
}


@torch.inference_mode(False)  # masks made under inference_mode could not be trained with
def prune(
    model: nn.Module,
    mode: PruneMode | str,
    *,
    ratio: float | None = None,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
    same_on_all_ranks: bool = False,
) -> nn.Module:
    """Mask the weights of least magnitude, or put learned gates on all weights, in place; return the model.

    In the magnitude modes exactly ``min(floor(ratio * n + 0.5), n - 1)`` elements go: of every tensor of n elements
    in local mode, of the n elements of all tensors together in global mode. Of equals, the one in the first tensor,
    and there the one with the lowest index, goes first. The masks are computed from the raw weights at every call,
    and a weight under a mask keeps its value (momentum and weight decay still move it): what was dropped can come
    back. A tensor that a later call ignores keeps the mask it has.

    In the modes UNSTRUCTURED_REGULARIZATION_BASED and UNSTRUCTURED_HARD_CONCRETE every element gets a gate
    (`StochasticGate`, `HardConcreteGate`). Its float32 logit is a parameter of the model (`gate_parameters`) and
    starts at a keep probability of 0.99. In training each call of the model samples the gates once. Nothing is
    pruned until the logits are trained with a loss that knows the target: `RBLoss`, `L0Loss` or `LagrangianLoss`.
    What carries such gates already keeps them, with all they learned.

    While a mask or gate is on, assigning to the attribute (``layer.weight = ...``, as code that ties weights does)
    raises; write to ``layer.parametrizations.weight.original``. Prune before the forward pass or after the
    backward pass: between them, backward fails, because autograd sees that masks were updated in place.
    `torch.compile` may come before or after. Gates must be on before the model is wrapped in
    DistributedDataParallel; it need not know of masks.

    Args:
        model: the model. Its weights stay the same `Parameter` objects, now under ``parametrizations``.
        mode: a `PruneMode` or its name.
        ratio: fraction of the elements to remove, in [0, 1). Not for gates: a loss has it, and here it only warns.
        ignored_scope: weights to leave out.
        examples_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model. If given,
            one forward pass also finds weights that are bare parameters.
        same_on_all_ranks: as in `StochasticGate`; for new gates. Masks have no noise, and it only warns.

    Raises:
        TypeError, ValueError: for arguments out of range, weights that cannot be pruned, NaN or infinity in a
            weight, weights that carry a mask or gate of another kind, new gates in DistributedDataParallel, and, in
            global mode, weights on several devices. The model is then as it was.

    Papers: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks"; Kozlov et
    al. 2020, "Neural Network Compression Framework for fast model inference".

    Example:
        >>> import torch
        >>> linear = nn.Linear(2, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        >>> prune(linear, PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5).weight.tolist()
        [[0.0, 0.0], [3.0, 4.0]]
    """
    mode = check_mode(mode)
    if mode in _MAGNITUDE:
        fraction = check_ratio(ratio)
        targets = find_targets(model, ignored_scope, examples_inputs)
        _check_kind(targets, Mask)
        if same_on_all_ranks:
            warnings.warn(f"same_on_all_ranks does nothing in mode {mode.value}: masks have no noise", stacklevel=3)
        _mask(targets, mode, fraction)
        return model
    if ratio is not None:
        check_ratio(ratio)
    targets = find_targets(model, ignored_scope, examples_inputs)
    _check_kind(targets, _GATES[mode])
    _check_finite(targets)
    if ratio is not None:
        warnings.warn(
            f"ratio does nothing in mode {mode.value}: the target belongs to RBLoss or LagrangianLoss",
            stacklevel=3,  # past the decorator
        )
    gates = [(target.owners, target.attachment or _new_gate(target, mode, same_on_all_ranks)) for target in targets]
    attach_and_share(model, gates)
    return model


@torch.inference_mode(False)
def update_masks(model: nn.Module, mode: PruneMode | str, ratio: float) -> None:
    """Compute the masks that a model carries anew, from the raw weights, in place.

    Args:
        model: a model that `prune` put masks on.
        mode: one of the magnitude modes, or its name.
        ratio: fraction of the elements to remove, in [0, 1).

    Raises:
        TypeError, ValueError: as `prune` does, and if there are no masks. The model is then as it was.

    Example:
        >>> linear = prune(nn.Linear(4, 4), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.75)
        >>> update_masks(linear, "UNSTRUCTURED_MAGNITUDE_LOCAL", 0.25)
        >>> int(linear.weight.count_nonzero())
        12
    """
    mode = check_mode(mode)
    if mode not in _MAGNITUDE:
        raise ValueError(
            f"mode is {mode.value}; masks are computed by {', '.join(known.value for known in _MAGNITUDE)}"
        )
    fraction = check_ratio(ratio)
    targets = masked_targets(model)
    for target in targets:
        check_prunable(target)
    _mask(targets, mode, fraction)


def masked_targets(model: nn.Module) -> list[Target]:
    """Return the weights that carry masks; raise ValueError if there are none."""
    targets = [target for target, found in attachments_of(model).items() if isinstance(found, Mask)]
    if not targets:
        raise ValueError(f"{type(model).__name__} carries no masks; call pyprune.prune in a magnitude mode first")
    return targets


def _mask(targets: Sequence[Target], mode: PruneMode, fraction: float) -> None:
    devices = dict.fromkeys(target.parameter.device for target in targets)
    if mode is PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL and len(devices) > 1:
        raise ValueError(
            f"the weights are on {', '.join(map(str, devices))}; in global mode they compete with each other "
            "and must be on one device. Move the model, or use UNSTRUCTURED_MAGNITUDE_LOCAL"
        )
    masks = _finite_masks(targets, _MAGNITUDE[mode], fraction)
    attach_masks((target.owners, mask) for target, mask in masks.items())


def _finite_masks(
    targets: Sequence[Target],
    method: Callable[[Sequence[Tensor], float], tuple[list[Tensor], Tensor]],
    fraction: float,
) -> dict[Target, Tensor]:
    """Return new masks; raise if a weight is not finite."""
    masks: dict[Target, Tensor] = {}
    nonfinite: dict[str, int] = {}
    for device in dict.fromkeys(target.parameter.device for target in targets):
        group = [target for target in targets if target.parameter.device == device]
        new_masks, counts = method([target.parameter for target in group], fraction)
        masks.update(zip(group, new_masks, strict=True))
        nonfinite.update(zip([target.name for target in group], counts.tolist(), strict=True))
    bad = [f"{count} in {name}" for name, count in nonfinite.items() if count]
    if bad:
        raise ValueError(f"NaN or infinite weights: {', '.join(bad)}. Repair them, or name them in ignored_scope")
    return masks


def _check_finite(targets: Sequence[Target]) -> None:
    """Raise if a weight is not finite, which is found while masks that drop nothing are made."""
    _finite_masks(targets, local_magnitude, 0.0)


def _check_kind(targets: Sequence[Target], kind: type[Attachment]) -> None:
    for target in targets:
        if target.attachment is not None and type(target.attachment) is not kind:
            raise ValueError(
                f"{target.name} carries a {type(target.attachment).__name__}, this mode would put a {kind.__name__} "
                "there; strip the model first, or name the weight in ignored_scope"
            )


def _new_gate(target: Target, mode: PruneMode, same_on_all_ranks: bool) -> StochasticGate:
    weight = target.parameter
    return _GATES[mode](weight.shape, same_on_all_ranks=same_on_all_ranks, device=weight.device)
