"""Which elements of one matrix stay, by scores: what solvers that choose share."""

import torch
from torch import Tensor

from pyprune import ops
from pyprune.methods import importance
from pyprune.methods.allocation import Amount, removed_count
from pyprune.methods.method import Method
from pyprune.methods.scope import Scope
from pyprune.methods.unit_groups import Member, UnitGroup, Weight
from pyprune.selection.choose_units import choose_units


def choose(
    scores: Tensor, scope: Scope, ratio: float | None, base: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Return the mask that drops what has the smallest |score|, ties at the lowest index first.

    Args:
        scores: (rows, columns), finite.
        scope, ratio: as `pyprune.oneshot.system.check_asked` gives them.
        base: elements that are False go first, count, and never stay.
        out: a bool tensor to write; a new one if None.

    Example:
        >>> from pyprune.methods.scope import tensor
        >>> choose(torch.tensor([[3.0, -1.0], [0.5, -2.0]]), tensor(), 0.5).tolist()
        [[True, False], [False, True]]
    """
    masks = None if out is None else [out]
    bases = None if base is None else [base]
    columns = scores.shape[1]
    if scope.name == "tensor":
        return ops.threshold([scores], [removed_count(scores.numel(), _some(ratio))], bases=bases, masks=masks)[0][0]
    if scope.name == "row":
        kept = columns - removed_count(columns, _some(ratio))
        return ops.group_masks([scores], columns, kept, bases=bases, masks=masks)[0][0]
    if scope.name == "columns":
        mask = torch.empty_like(scores, dtype=torch.bool) if out is None else out
        places = [slice(start, start + scope.width) for start in range(0, columns, scope.width)]
        parts = [scores[:, place] for place in places]
        removed = [removed_count(part.numel(), _some(ratio)) for part in parts]
        bases = None if base is None else [base[:, place] for place in places]
        ops.threshold(parts, removed, bases=bases, masks=[mask[:, place] for place in places])
        return mask
    if scope.dim == "in" and ratio in (None, scope.ratio):
        return ops.group_masks([scores], scope.of, scope.keep, bases=bases, masks=masks)[0][0]
    unit_group = UnitGroup("weight", (Member(Weight("weight", scores, base=base), (1, 1)),))
    amount = Amount(ratio, dropped_stay=base is not None)
    return choose_units(Method(importance.magnitude(), scope=scope), [unit_group], amount, masks).masks[0]


def _some(ratio: float | None) -> float:
    assert ratio is not None
    return ratio
