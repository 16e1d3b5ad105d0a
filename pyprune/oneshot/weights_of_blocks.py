"""Which weights of blocks are pruned, and how much goes of each."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from pyprune.calibration.calibrate import calibrate
from pyprune.console import listed
from pyprune.methods.importance import wanda
from pyprune.methods.name_rules import by_name
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import Mask, raw_weight
from pyprune.modules.norms import NORMS
from pyprune.modules.targets import (
    Target,
    all_parameters,
    find_targets_and_zeros,
    ignored_in,
    layer_weights,
)
from pyprune.oneshot.allocations import BlockAllocation
from pyprune.oneshot.allocations import ratios as ratios_by
from pyprune.oneshot.find_blocks import Block
from pyprune.oneshot.rule import Rule
from pyprune.oneshot.system import is_finite
from pyprune.selection.find_prunable import Prunable, check_kind
from pyprune.selection.prune import statistics_of

# Parameters of blocks that are no weights of layers are told from this share on, as by `prune`: routers are fewer.
_MISSED = 0.1


def targets_of(
    model: nn.Module, blocks: Sequence[Block], ignored_scope: IgnoredScope | None
) -> tuple[dict[str, list[Target]], tuple[str, ...]]:
    """Return the weights of each block, and names of those that are zero.

    Raises:
        TypeError, ValueError: as `find_targets` does, and for weights that are tied to others elsewhere.
    """
    block_of = {module: block.name for block in blocks for module in block.module.modules()}
    targets, left_out = find_targets_and_zeros(model, ignored_scope, within=block_of)
    check_kind(targets, Mask)
    found: dict[str, list[Target]] = {block.name: [] for block in blocks}
    tied = []
    for target in targets:
        places = {block_of.get(owner.module, "") for owner in target.owners}
        if len(places) > 1:
            tied.append(target.name)
        else:
            found[places.pop()].append(target)
    if tied:
        raise ValueError(
            f"{listed(tied)} is tied to a weight of another block, or outside of all, which would change with it; "
            "name it in ignored_scope"
        )
    return found, left_out


def check_finite(targets: Sequence[Target]) -> None:
    """Raise if weights have elements that a solver would spread, and no score can order."""
    bad = [target.name for target in targets if not is_finite(raw_weight(target))]
    if bad:
        raise ValueError(f"{listed(bad)} has NaN or infinite elements; mend the model, or name it in ignored_scope")


def check_masks(rule: Rule, targets: Mapping[str, Sequence[Target]]) -> None:
    """Raise if a solver is to solve for masks, and there are none."""
    if rule.takes_masks and not any(target.attachment for some in targets.values() for target in some):
        assert rule.solver is not None
        raise ValueError(
            f"method is no Method, so solver {rule.solver.name} solves for the masks of the model, and its blocks "
            "have none; give a Method, or call pyprune.prune first"
        )


def given(
    model: nn.Module, rule: Rule, targets: Sequence[Target], left_out: tuple[str, ...]
) -> Mapping[Target, Tensor | None]:
    """Return the scores that an importance was given."""
    if rule.method is None or rule.method.importance.needs != "given":
        return {}
    return statistics_of(model, rule.method.importance, Prunable(list(targets), list(targets), left_out), None, None)


def ratios_of(
    model: nn.Module,
    rule: Rule,
    targets: Sequence[Target],
    left_out: Sequence[str],
    allocation: str | BlockAllocation,
    blocks: str | Sequence[str] | None,
    batches: Sequence[Any],
    ignored_scope: IgnoredScope | None,
) -> dict[Target, float | None]:
    """Return how much goes of each weight; None for all that N:M removes, and where masks say it.

    Raises:
        TypeError, ValueError: for names that mean no weight, and as `pyprune.allocations.ratios` does.
    """
    ratio = rule.amount.ratio
    if isinstance(allocation, BlockAllocation):
        needs = allocation.needs != "none"
        calibration = calibrate(model, batches, wanda(), ignored_scope=_only(model, targets)) if needs else None
        most = rule.scope.ratio if rule.scope is not None and rule.scope.ratio is not None else 1.0
        ratio = ratios_by(
            model,
            allocation,
            cast(float, ratio),  # None is refused by name
            blocks=blocks,
            calibration=calibration,
            max_ratio=most,
            ignored_scope=ignored_scope,
        )
    if ratio is None:
        return dict.fromkeys(targets)
    names = [tuple(owner.name for owner in target.owners) for target in targets]
    return dict(zip(targets, by_name(ratio, names, 0.0, left_out=left_out), strict=True))


def _only(model: nn.Module, targets: Sequence[Target]) -> IgnoredScope:
    """Return what leaves out all weights but these."""
    known = {owner.name for target in targets for owner in target.owners}
    # Of what is outside of blocks, also weights that are no parameters, because something computes them.
    owners = [*layer_weights(model), *(owner for one in all_parameters(model) for owner in one.owners)]
    return IgnoredScope(names=sorted({owner.name for owner in owners} - known), all_zero=False)


def missed_in(
    model: nn.Module, blocks: Sequence[Block], targets: Sequence[Target], ignored_scope: IgnoredScope | None
) -> list[tuple[str, str]]:
    """Return the parameters of blocks that could be weights, and are no targets, if they are a tenth of them."""
    ignored = ignored_in(model, ignored_scope)
    inside = {module for block in blocks for module in block.module.modules() if not isinstance(module, NORMS)}
    known = {target.parameter for target in targets}
    missed = [
        one
        for one in all_parameters(model)
        if one.parameter.dim() > 1
        and one.parameter not in known
        and any(owner.module in inside for owner in one.owners)
        and not any(ignored(owner.name) for owner in one.owners)
        and bool(one.parameter.any())
    ]
    size = sum(one.parameter.numel() for one in missed)
    if size <= _MISSED * (size + sum(one.parameter.numel() for one in targets)):
        return []
    return [("in no layer that is known, and left as it is", one.name) for one in missed]
