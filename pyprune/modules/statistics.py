"""Report how much of a model is pruned."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from pyprune import ops
from pyprune.console import as_text
from pyprune.modules.evaluation import check_inputs
from pyprune.modules.gates import StochasticGate
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import Mask
from pyprune.modules.targets import (
    Target,
    all_parameters,
    attachments_of,
    check_readable,
    choose_targets,
    is_readable,
)


@dataclass(frozen=True)
class TensorPruningStatistic:
    """How much of one weight is pruned; units are what was removed as one, down to single elements."""

    tensor_name: str
    shape: tuple[int, ...]
    pruned_ratio: float
    units: int
    pruned_units: int


@dataclass(frozen=True)
class ModelPruningStatistic:
    """How much of a model is pruned: of the weights that are listed, and of all parameters."""

    pruning_ratio: float
    global_pruning_ratio: float
    pruned_tensors: tuple[TensorPruningStatistic, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return dicts, lists and numbers, ready for JSON."""
        tensors = [asdict(tensor) | {"shape": list(tensor.shape)} for tensor in self.pruned_tensors]
        return asdict(self) | {"pruned_tensors": tensors}

    def __str__(self) -> str:
        # Imported here: `import pyprune` must cost little.
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Pruning statistics", title_justify="left", box=box.SIMPLE, show_footer=True)
        table.add_column("weight", "all of these\nall parameters of the model", overflow="fold")
        table.add_column("shape", justify="right")
        table.add_column("pruned", f"{self.pruning_ratio:.2%}\n{self.global_pruning_ratio:.2%}", justify="right")
        units, pruned_units = (
            sum(getattr(one, name) for one in self.pruned_tensors) for name in ("units", "pruned_units")
        )
        table.add_column("units pruned", f"{pruned_units:,} of {units:,}", justify="right")
        for tensor in self.pruned_tensors:
            # Text, because a name with brackets in it is no markup.
            name, shape = Text(tensor.tensor_name), " x ".join(map(str, tensor.shape))
            table.add_row(name, shape, f"{tensor.pruned_ratio:.2%}", f"{tensor.pruned_units:,} of {tensor.units:,}")
        return as_text(table)


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
        examples_inputs: as in `prune`; finds bare parameters in a model without masks and gates.

    Returns:
        ``pruning_ratio``: zeros / elements of the listed weights; ``global_pruning_ratio``: these zeros,
        and those of weights that `prune` would choose and that carry nothing (a layer that was stripped by itself),
        / elements of all parameters of the model; ``pruned_tensors``: name, shape and ratio of each, how many units
        it has (blocks, channels or heads, as `prune` cut it; else elements; heads count once for each projection
        that is stacked in a weight), and how many of these have no weight left. 0.0 of nothing.

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
    # What carries something is known without a trace.
    is_pruned = isinstance(model, nn.Module) and bool(attachments_of(model))
    chosen = choose_targets(model, ignored_scope, None if is_pruned else examples_inputs)
    counted: dict[Target, Tensor] = {}
    for target in chosen:
        if not is_pruned:
            check_readable(target)
            counted[target] = target.parameter
        elif isinstance(target.attachment, Mask):
            counted[target] = target.attachment.mask
        elif isinstance(target.attachment, StochasticGate):
            counted[target] = target.attachment.values()
    zeros = _count(counted)
    units = {target: (target.parameter.numel(), zeros[target]) for target in counted} | _count_units(counted)
    tensors = tuple(
        TensorPruningStatistic(
            target.name,
            tuple(target.parameter.shape),
            _ratio(zeros[target], target.parameter.numel()),
            *units[target],
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
    )


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
