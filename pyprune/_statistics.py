"""Report how much of a model is pruned."""

import io
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from pyprune import ops
from pyprune.gates import StochasticGate
from pyprune.ignored_scope import IgnoredScope
from pyprune.masks import Mask
from pyprune.targets import Target, all_parameters, attachments_of, check_readable, choose_targets


@dataclass(frozen=True)
class TensorPruningStatistic:
    """How much of one weight is pruned."""

    tensor_name: str
    shape: tuple[int, ...]
    pruned_ratio: float


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
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Pruning statistics", title_justify="left", box=box.SIMPLE, show_footer=True)
        table.add_column("weight", "all of these\nall parameters of the model", overflow="fold")
        table.add_column("shape", justify="right")
        table.add_column("pruned", f"{self.pruning_ratio:.2%}\n{self.global_pruning_ratio:.2%}", justify="right")
        for tensor in self.pruned_tensors:
            # Text, because a name with brackets in it is no markup.
            table.add_row(Text(tensor.tensor_name), " x ".join(map(str, tensor.shape)), f"{tensor.pruned_ratio:.2%}")
        # As wide as the table needs, and never coloured: the text may go anywhere.
        console = Console(file=io.StringIO(), width=1000, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


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
        ``pruning_ratio``: zeros / elements of the listed weights; ``global_pruning_ratio``: the same zeros /
        elements of all parameters of the model; ``pruned_tensors``: name, shape and ratio of each. 0.0 of nothing.

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
    tensors = tuple(
        TensorPruningStatistic(
            target.name, tuple(target.parameter.shape), _ratio(zeros[target], target.parameter.numel())
        )
        for target in counted
    )
    total = sum(zeros.values())
    return ModelPruningStatistic(
        _ratio(total, sum(target.parameter.numel() for target in counted)),
        _ratio(total, sum(target.parameter.numel() for target in all_parameters(model))),
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


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
