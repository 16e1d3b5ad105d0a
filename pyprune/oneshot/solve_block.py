"""The weights of a block chosen and solved, and written into it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.console import listed
from pyprune.methods.allocation import Amount
from pyprune.methods.method import Method
from pyprune.modules.masks import Mask, NewMask, attach_masks, changing_masks, raw_weight
from pyprune.modules.targets import Target
from pyprune.oneshot.linear_grams import WeightInput, as_matrices, as_weight
from pyprune.oneshot.one_shot_result import PrunedWeight
from pyprune.oneshot.rule import Rule
from pyprune.oneshot.solution import output_size, relative_error
from pyprune.selection.choose_masks import choose_masks


@dataclass(frozen=True, eq=False)
class Solved:
    """What a weight is to become: its new values (None if they stay) and its mask, and what is said of it."""

    weight: Tensor | None
    mask: Tensor
    said: PrunedWeight


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
        inputs: what went into each weight.
        ratios: how much goes of each.
        given: scores, of an importance that has them.

    Raises:
        ValueError: for inputs or scores that are NaN or infinite.
    """
    masks: dict[Target, Tensor] = {}
    spent = dict.fromkeys(inputs, 0.0)
    if rule.method is not None:
        began = time.perf_counter()
        masks = _chosen(rule.method, rule.amount, inputs, ratios, given)
        spent = dict.fromkeys(inputs, (time.perf_counter() - began) / len(inputs))
    solved = {}
    for target, into in inputs.items():
        began = time.perf_counter()
        carried = target.attachment
        mask = masks.get(target, carried.mask if isinstance(carried, Mask) else None)
        values, mask, damping = _solved(rule, target, into, ratios[target], mask)
        seconds = spent[target] + time.perf_counter() - began
        errors = _errors(target, into, values, mask)
        removed = int(ops.count_zeros([mask]))
        tokens = tuple(into.tokens.tolist())
        said = PrunedWeight(block, target.name, removed, mask.numel(), *errors, damping, tokens, seconds)
        solved[target] = Solved(values, mask, said)
    return solved


def _chosen(
    method: Method,
    amount: Amount,
    inputs: Mapping[Target, WeightInput],
    ratios: Mapping[Target, float | None],
    given: Mapping[Target, Tensor | None],
) -> dict[Target, Tensor]:
    """Return the masks by a method, within those that are there."""
    statistics = {target: given.get(target) for target in inputs}
    if method.importance.needs == "input norm":
        statistics = {target: _norms(target, into) for target, into in inputs.items()}
    if amount.ratio is not None:
        numbers = {target.name: ratio for target in inputs if (ratio := ratios[target]) is not None}
        amount = replace(amount, ratio=numbers)
    choice = choose_masks(method, amount, list(inputs), statistics)
    choice.check()
    return {target: new.mask for target, new in choice.masks.items()}


def _norms(target: Target, into: WeightInput) -> Tensor:
    """Return the norm of the input that each element multiplies; where there were no inputs all are the same."""
    squares = into.gram.diagonal(dim1=-2, dim2=-1)
    squares = torch.where((into.tokens == 0)[:, None], 1.0, squares)
    outputs = as_matrices(target, target.parameter).shape[1]
    return as_weight(target, squares.sqrt()[:, None].expand(-1, outputs, -1))


def _solved(
    rule: Rule, target: Target, into: WeightInput, ratio: float | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor, float | None]:
    """Return the new values of a weight, None if they stay; its mask; and the damping."""
    all_kept = torch.ones_like(target.parameter, dtype=torch.bool)
    if rule.solver is None or (ratio == 0 and (mask is None or bool(mask.all()))):
        return None, all_kept if mask is None else mask, None
    weights = as_matrices(target, raw_weight(target))
    bases = None if mask is None else as_matrices(target, mask)
    solutions = [
        rule.solver.solve(
            weight,
            gram,
            scope=rule.scope,
            ratio=ratio if rule.solver.chooses else None,  # otherwise the mask says it
            mask=None if bases is None else bases[group],
        )
        for group, (weight, gram) in enumerate(zip(weights, _grams(into), strict=True))
    ]
    values = as_weight(target, torch.stack([one.weight for one in solutions])).to(target.parameter.dtype)
    if not bool(values.isfinite().all()):
        raise ValueError(f"solver {rule.solver.name} gives NaN or infinity for {target.name}; give it more damping")
    kept = as_weight(target, torch.stack([one.mask for one in solutions]))
    return values, kept, max(one.damping for one in solutions)


def _grams(into: WeightInput) -> list[Tensor]:
    """Return the Gram of each group; of one without inputs the identity, by which all weights count by magnitude."""
    columns = into.gram.shape[-1]
    counted = zip(into.gram, into.tokens.tolist(), strict=True)
    return [gram if tokens else torch.eye(columns, dtype=gram.dtype, device=gram.device) for gram, tokens in counted]


def _errors(target: Target, into: WeightInput, values: Tensor | None, mask: Tensor) -> tuple[float, float]:
    """Return what is lost of the outputs by the mask alone, and by what becomes of the weight."""
    dense = raw_weight(target)
    masked = torch.where(mask, dense, 0)
    after = masked if values is None else values
    before = as_matrices(target, dense)
    found = []
    for tensor in (masked,) if after is masked else (masked, after):
        lost = whole = 0.0
        for one, other, gram in zip(before, as_matrices(target, tensor), _grams(into), strict=True):
            size = output_size(one, gram)
            whole += size
            lost += size * relative_error(one, other, gram)
        found.append(lost / whole if whole else 0.0)
    return found[0], found[-1]


def check_inputs(inputs: Mapping[Target, WeightInput]) -> None:
    """Raise ValueError if inputs were NaN or infinite.

    Raises:
        ValueError: with the names of the weights.
    """
    bad = [target.name for target, into in inputs.items() if not bool(into.gram.isfinite().all())]
    if bad:
        raise ValueError(
            f"what goes into {listed(bad)} is NaN or infinite, or its squares are; check the batches of data, and "
            "the model's dtype"
        )


def write_block(model: nn.Module, solved: Mapping[Target, Solved]) -> None:
    """Write what a block is to become into it; call it within a `Change` of the model and these weights."""
    masks = [target.attachment for target in solved]
    with changing_masks([mask for mask in masks if isinstance(mask, Mask)]), torch.no_grad():
        for target, one in solved.items():
            if one.weight is not None:
                # What is dropped keeps its value, which is parked beside the mask.
                target.parameter.copy_(torch.where(one.mask, one.weight, target.parameter))
        attach_masks(model, [NewMask(target.owners, one.mask) for target, one in solved.items()])
