"""The weights of a block chosen and solved, and written into it."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.console import listed
from pyprune.methods.allocation import Amount
from pyprune.methods.method import Method
from pyprune.modules.masks import Mask, NewMask, attach_masks, changing_masks, raw_weight
from pyprune.modules.targets import Target
from pyprune.oneshot.matrices import as_matrices, as_weight, from_matrices, matrices
from pyprune.oneshot.one_shot_result import PrunedWeight
from pyprune.oneshot.rule import Rule
from pyprune.oneshot.solution import output_size
from pyprune.oneshot.sparsegpt import SparseGPT
from pyprune.oneshot.weight_input import InputPart, WeightInput
from pyprune.selection.choose_masks import choose_masks

# From this share of what a mask keeps on it is told that a solver made it zero with its inputs: a few units that are
# never active are nothing special.
_MANY = 0.1

_Place = tuple[Tensor | slice, Tensor | slice]


@dataclass(frozen=True, eq=False)
class Solved:
    """What a weight is to become: its new values (None if they stay) and its mask, and what is said of it.

    It ``lost_kept`` ones if a solver made many weights zero that the mask keeps, since their inputs are always zero.
    """

    values: Tensor | None
    mask: Tensor
    said: PrunedWeight
    lost_kept: bool = False


@torch.no_grad()
def solve_block(
    block: str,
    rule: Rule,
    inputs: Mapping[Target, WeightInput],
    ratios: Mapping[Target, float | None],
    given: Mapping[Target, Tensor | None],
) -> dict[Target, Solved]:
    """Choose and solve the weights of a block; nothing is changed.

    Args:
        block: its name.
        rule: how.
        inputs: what each weight multiplied.
        ratios: how much goes of each.
        given: scores, of an importance that has them.

    Raises:
        ValueError: for inputs, scores or solutions that are NaN or infinite.
    """
    _check(inputs)
    masks: dict[Target, Tensor] = {}
    spent = 0.0
    if rule.method is not None:
        began = time.perf_counter()
        masks = _chosen(rule.method, rule.amount, inputs, ratios, given)
        spent = (time.perf_counter() - began) / len(inputs)
    solved = {}
    for target, into in inputs.items():
        began = time.perf_counter()
        carried = target.attachment
        mask = masks.get(target, carried.mask if isinstance(carried, Mask) else None)
        values, mask, damping = _solved(rule, target, into, ratios[target], mask)
        seconds = spent + time.perf_counter() - began
        errors = _errors(target, into, values, mask)
        removed = int(ops.count_zeros([mask]))
        tokens = tuple(into.tokens.tolist())
        said = PrunedWeight(block, target.name, removed, mask.numel(), *errors, damping, tokens, seconds)
        solved[target] = Solved(values, mask, said, values is not None and _loses_kept(target, into, values, mask))
    return solved


def write_block(model: nn.Module, solved: Mapping[Target, Solved]) -> None:
    """Write what a block is to become into it; call it within a `Change` of the model and these weights."""
    carried = [target.attachment for target in solved]
    with changing_masks([mask for mask in carried if isinstance(mask, Mask)]), torch.no_grad():
        for target, one in solved.items():
            if one.values is not None:
                # What is dropped keeps its value, which is parked beside the mask.
                target.parameter.copy_(torch.where(one.mask, one.values, target.parameter))
        attach_masks(model, [NewMask(target.owners, one.mask) for target, one in solved.items()])


def _check(inputs: Mapping[Target, WeightInput]) -> None:
    bad = [t.name for t, into in inputs.items() if not all(bool(part.gram.isfinite().all()) for part in into.parts)]
    if bad:
        raise ValueError(
            f"what goes into {listed(bad)} is NaN or infinite, or its squares are; check the batches of data, and "
            "the dtype of the model"
        )


# ---- masks by a method ----


def _chosen(
    method: Method,
    amount: Amount,
    inputs: Mapping[Target, WeightInput],
    ratios: Mapping[Target, float | None],
    given: Mapping[Target, Tensor | None],
) -> dict[Target, Tensor]:
    """Return the masks by a method, within those that are there; one after the other, because scores take memory."""
    masks: dict[Target, Tensor] = {}
    for target, into in inputs.items():
        statistic = _norms(target, into) if method.importance.needs == "input norm" else given.get(target)
        if amount.ratio is not None:
            ratio = ratios[target]
            amount = replace(amount, ratio={} if ratio is None else {target.name: ratio})
        choice = choose_masks(method, amount, [target], {target: statistic})
        choice.check()
        masks |= {one: new.mask for one, new in choice.masks.items()}
    return masks


def _norms(target: Target, into: WeightInput) -> Tensor:
    """Return the norm of the input that each element multiplies; of experts without tokens all are the same."""
    norms = torch.zeros_like(matrices(target), dtype=into.parts[0].gram.dtype)
    for group, one in enumerate(norms):
        for part in into.parts:
            place = _place(part)
            one[place] = _gram(part, group).diagonal().sqrt().expand_as(one[place])
    return from_matrices(norms, target.layout, target.parameter.shape)


# ---- new values ----


def _solved(
    rule: Rule, target: Target, into: WeightInput, ratio: float | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor, float | None]:
    """Return the new values of a weight, None if they stay; its mask; and the damping."""
    there = torch.ones_like(target.parameter, dtype=torch.bool) if mask is None else mask
    quantises = isinstance(rule.solver, SparseGPT) and rule.solver.quantize is not None
    if rule.solver is None or (ratio == 0 and bool(there.all()) and not quantises):
        return None, there, None
    values = matrices(target)
    kept = as_matrices(there, target.layout).clone()
    damping = 0.0
    for part, group, place in _pieces(into, len(values)):
        solution = rule.solver.solve(
            values[group][place],
            _gram(part, group),
            scope=rule.scope if rule.method is None else rule.method.scope,
            ratio=ratio if rule.solver.chooses else None,  # otherwise the mask says it
            mask=None if mask is None else kept[group][place],
        )
        values[group][place] = solution.weight.to(values.dtype)
        kept[group][place] = solution.mask
        damping = max(damping, solution.damping)
    weight = as_weight(target, values)
    if not bool(weight.isfinite().all()):
        raise ValueError(f"solver {rule.solver.name} gives NaN or infinity for {target.name}; give it more damping")
    return weight, as_weight(target, kept), damping


def _errors(target: Target, into: WeightInput, values: Tensor | None, mask: Tensor) -> tuple[float, float]:
    """Return what is lost of the outputs by the mask alone, and by what becomes of the weight."""
    dense = raw_weight(target)
    versions = [torch.where(mask, dense, 0)]
    if values is not None:
        versions.append(torch.where(mask, values, 0))
    before, *after = (as_matrices(one, target.layout) for one in (dense, *versions))
    whole, lost = 0.0, [0.0] * len(after)
    for part, group, place in _pieces(into, len(before)):
        gram = _gram(part, group)
        there = before[group][place].to(gram.dtype)
        whole += output_size(there, gram)
        for i, one in enumerate(after):
            lost[i] += max(0.0, output_size(one[group][place].to(gram.dtype) - there, gram))
    errors = [one / whole if whole else 0.0 for one in lost]
    return errors[0], errors[-1]


def _loses_kept(target: Target, into: WeightInput, values: Tensor, mask: Tensor) -> bool:
    """Whether many weights that the mask keeps are zero now because no input of theirs was ever anything else."""
    lost = as_matrices(mask & (values == 0) & (raw_weight(target) != 0), target.layout)
    count = sum(
        int(lost[group][place][:, _gram(part, group).diagonal() == 0].sum())
        for part, group, place in _pieces(into, len(lost))
    )
    return count > _MANY * int(mask.sum())


# ---- parts of weights ----


def _pieces(into: WeightInput, groups: int) -> Iterator[tuple[InputPart, int, _Place]]:
    """Yield the parts of each group of a weight that are solved by themselves."""
    for part in into.parts:
        for group in range(groups):
            yield part, group, _place(part)


def _place(part: InputPart) -> _Place:
    everything = slice(None)
    if part.rows is None:
        return everything, everything if part.columns is None else part.columns
    return (part.rows, everything) if part.columns is None else (part.rows[:, None], part.columns)


def _gram(part: InputPart, group: int) -> Tensor:
    """Return a Gram; where there were no tokens the identity, by which all weights count by magnitude."""
    gram = part.gram[group]
    return gram if int(part.tokens[group]) else torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
