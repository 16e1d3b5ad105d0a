"""Report how much of a model is pruned."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from pyprune import ops
from pyprune.modules.attachments import check_module
from pyprune.modules.evaluation import check_inputs
from pyprune.modules.flops import macs_of
from pyprune.modules.gates import StochasticGate
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import Mask
from pyprune.modules.statistics_result import ModelPruningStatistic, TensorPruningStatistic
from pyprune.modules.targets import (
    Target,
    all_parameters,
    attachments_of,
    check_readable,
    choose_targets,
    is_readable,
)
from pyprune.modules.unit_gates import UnitGates


def pruning_statistic(
    model: nn.Module, *, ignored_scope: IgnoredScope | None = None, examples_inputs: Any = None
) -> ModelPruningStatistic:
    """Count what is pruned, exactly; a tied weight counts once.

    With masks or gates on, the weights that carry them are listed, and the zeros of the masks, and of the gates as
    they are in evaluation, count. Without (a dense or a stripped model), it is the weights that `prune` would
    choose, and the zeros in them: give the ``ignored_scope`` and ``examples_inputs`` that `prune` got to see the
    same weights as before `strip`.

    Args:
        model: the model, pruned or not.
        ignored_scope: weights not to list.
        examples_inputs: as in `prune`. One forward pass counts multiply-accumulates (MACs); it also finds bare
            parameters in a model without masks and gates.

    Returns:
        ``pruning_ratio``: zeros / elements of the listed weights; ``global_pruning_ratio``: these zeros,
        and those of weights that `prune` would choose and that carry nothing (a layer that was stripped by itself),
        / elements of all parameters of the model; ``pruned_tensors``: name, shape and ratio of each, how many units
        it has (blocks, channels or heads, as `prune` cut it; else elements; heads count once for each projection
        that is stacked in a weight), and how many of these have no weight left. 0.0 of nothing. With
        ``examples_inputs`` also ``macs``: the multiply-accumulates of matrix products and convolutions in a pass, of
        the model and in those that take each weight, and ``macs_without_zeros``: those that the zeros above are not
        in. A dense kernel does all of them.

    Raises:
        TypeError, ValueError: for wrong arguments, or, without masks and gates, if the zeros of a weight cannot be
            counted (lazy, meta, sharded, quantised).

    Example:
        >>> import torch
        >>> linear = nn.Linear(4, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.eye(2, 4))
        >>> pruning_statistic(linear).pruning_ratio
        0.75
    """
    check_inputs(examples_inputs)
    check_module(model)
    # What carries something is known without a trace.
    is_pruned = bool(attachments_of(model))
    chosen = choose_targets(model, ignored_scope, None if is_pruned else examples_inputs)
    counted: dict[Target, Tensor] = {}
    for target in chosen:
        if not is_pruned:
            check_readable(target)
            counted[target] = target.parameter
        elif isinstance(target.attachment, Mask):
            counted[target] = target.attachment.mask
        elif isinstance(target.attachment, (StochasticGate, UnitGates)):
            counted[target] = target.attachment.values()
    zeros = _count(counted)
    macs, macs_of_each = (None, {}) if examples_inputs is None else macs_of(model, list(counted), examples_inputs)
    left = {t: macs_of_each[t] - _share(macs_of_each[t], zeros[t], t.parameter.numel()) for t in macs_of_each}
    units = {target: (target.parameter.numel(), zeros[target]) for target in counted} | _count_units(counted)
    tensors = tuple(
        TensorPruningStatistic(
            target.name,
            tuple(target.parameter.shape),
            _ratio(zeros[target], target.parameter.numel()),
            *units[target],
            macs_of_each.get(target),
            left.get(target),
        )
        for target in counted
    )
    total = sum(zeros.values())
    # What was stripped by itself carries nothing any more.
    others: dict[Target, Tensor] = {
        target: target.parameter for target in chosen if target not in counted and is_readable(target)
    }
    return ModelPruningStatistic(
        _ratio(total, sum(target.parameter.numel() for target in counted)),
        _ratio(
            total + sum(_count(others).values()), sum(target.parameter.numel() for target in all_parameters(model))
        ),
        tensors,
        macs,
        None if macs is None else macs - sum(macs_of_each.values()) + sum(left.values()),
    )


def _share(macs: int, zeros: int, weights: int) -> int:
    """Return how many of the multiply-accumulates with a weight are with a zero in it; each element has as many."""
    return macs * zeros // weights if weights else 0


def _count(tensors: dict[Target, Tensor]) -> dict[Target, int]:
    """Count the elements of each target whose entry in a tensor is zero; one synchronisation per device."""
    zeros = dict.fromkeys(tensors, 0)
    for device in {tensor.device for tensor in tensors.values()}:
        group = {target: tensor for target, tensor in tensors.items() if tensor.device == device}
        for target, count in zip(group, ops.count_zeros(list(group.values())).tolist(), strict=True):
            # A gate may stand for several elements.
            zeros[target] = count * (target.parameter.numel() // max(1, tensors[target].numel()))
    return zeros


def _count_units(targets: Iterable[Target]) -> dict[Target, tuple[int, int]]:
    """Count the units of weights that were not cut into elements, and those of them that are gone."""
    cut: dict[Target, tuple[Tensor, tuple[int, ...]]] = {}
    for target in targets:
        if isinstance(target.attachment, Mask) and target.attachment.unit is not None:
            cut[target] = (target.attachment.mask, target.attachment.unit)
    counts: dict[Target, tuple[int, int]] = {}
    for device in {mask.device for mask, _ in cut.values()}:
        group = {target: pair for target, pair in cut.items() if pair[0].device == device}
        masks, blocks = zip(*group.values(), strict=True)
        kept = ops.unit_scores(masks, blocks, p=None, reduction="max")
        for target, units, gone in zip(group, kept, ops.count_zeros(kept).tolist(), strict=True):
            counts[target] = (units.numel(), gone)
    return counts


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
