"""What a method prunes of a model: weights one by one, or coupled units of several."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pyprune.methods.importance import Importance
from pyprune.methods.method import Method
from pyprune.modules.attachments import Attachment
from pyprune.modules.coverage import warn_of_missed
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.targets import Target, all_parameters, find_targets_and_zeros
from pyprune.selection.choose_masks import left_out_by, prunable_targets
from pyprune.selection.coupled import CoupledUnits, find_coupled


@dataclass(frozen=True, eq=False)
class Prunable:
    """What a method prunes.

    Args:
        targets: the parameters that get masks.
        found: what there is to prune.
        left_out: the names of weights that are zero everywhere, which rules may mean.
        coupled: the units, if they are coupled.
    """

    targets: list[Target]
    found: list[Target]
    left_out: tuple[str, ...] = ()
    coupled: CoupledUnits | None = None

    def measured(self, rule: Importance) -> list[Target]:
        """Return the weights that an importance scores."""
        return self.targets if self.coupled is None else self.coupled.measured(rule)


def find_prunable(
    model: nn.Module, method: Method, ignored_scope: IgnoredScope | None, examples_inputs: Any
) -> Prunable:
    """Find what a method prunes of a model.

    Raises:
        TypeError, ValueError: as `find_targets` and `find_coupled` do, for groups of a scope that match nothing, and
            for an importance that is for solvers.
    """
    if method.importance.needs == "gram":
        raise ValueError(
            f"method has importance {method.importance.name}, by which solvers choose; give it to "
            "pyprune.prune_one_shot, with a solver"
        )
    if method.granularity.coupled is not None:
        coupled = find_coupled(model, method, ignored_scope, examples_inputs)
        return Prunable(coupled.targets, coupled.targets, (), coupled)
    found, left_out = find_targets_and_zeros(model, ignored_scope, examples_inputs)
    return Prunable(prunable_targets(method, found, left_out), found, left_out)


def tell_missed(
    model: nn.Module,
    method: Method,
    ignored_scope: IgnoredScope | None,
    prunable: Prunable,
    statistics: Mapping[Target, Tensor | None] | None,
    *,
    has_inputs: bool,
) -> None:
    """Warn of what a method does not reach: outside of its groups or heads, or without a score (if known)."""
    if prunable.coupled is not None:
        staying = _staying(model, prunable.coupled)
        there = [target for targets in staying.values() for target in targets]
        # What is in groups that are left alone was told when they were.
        known = [part.target for units in prunable.coupled.others for part in units.parts]
        warn_of_missed(model, ignored_scope, [*prunable.targets, *known, *there], staying, has_inputs=has_inputs)
        return
    # Tables have a warning of their own.
    targets = prunable.targets
    unscored = [t for t in targets if statistics is not None and t not in statistics and not t.layout.is_table]
    because = {
        f"without a score by {method.importance.name}": unscored,
        **left_out_by(method, prunable.found, targets),
    }
    warn_of_missed(model, ignored_scope, prunable.found, because, has_inputs=has_inputs)


def _staying(model: nn.Module, units: CoupledUnits) -> dict[str, Sequence[Target]]:
    """Return the weights that are in no group, by the reason."""
    grouped = {part.target.parameter for one in (*units.chosen, *units.others) for part in one.parts}
    reasons = {stay.name: stay.why for stay in reversed(units.found.stays)}
    staying: dict[str, list[Target]] = {}
    for target in all_parameters(model):
        if target.parameter not in grouped and target.parameter.dim() > 1:
            why = next((reasons[owner.name] for owner in target.owners if owner.name in reasons), "in no group")
            staying.setdefault(f"it stays: {why}", []).append(target)
    return dict(staying)


def check_kind(targets: Iterable[Target], kind: type[Attachment]) -> None:
    """Raise ValueError if a target carries an attachment of another kind."""
    for target in targets:
        if target.attachment is not None and type(target.attachment) is not kind:
            raise ValueError(
                f"{target.name} carries a {type(target.attachment).__name__}, this mode would put a {kind.__name__} "
                "there; strip the model first, or name the weight in ignored_scope"
            )
