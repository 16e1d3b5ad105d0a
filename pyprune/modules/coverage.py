"""Say which weights a call does not reach."""

from collections.abc import Mapping, Sequence

from torch import nn

from pyprune.console import listed, warn
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.targets import Target, all_parameters, ignored_in
from pyprune.modules.zero_weights import are_zero

# Below this share a model is visibly less sparse than asked.
_ENOUGH = 0.9
_UNKNOWN = "in no layer that is known; examples_inputs finds what a forward pass uses as a weight"


def warn_of_missed(
    model: nn.Module,
    ignored_scope: IgnoredScope | None,
    found: Sequence[Target],
    because: Mapping[str, Sequence[Target]] | None = None,
) -> None:
    """Warn if a call reaches less than 90 % of the elements of a model's parameters of two or more dimensions.

    What the user ignores does not count, and neither does what is zero everywhere, which has a warning of its own.
    Where all that was found carries something already, it was said before.

    Args:
        model: the model.
        ignored_scope: weights that are to be left out.
        found: what `find_targets` found.
        because: why the call does not reach some of them.
    """
    if all(target.attachment is not None for target in found):
        return
    ignored = ignored_in(model, ignored_scope)
    why = {target.parameter: reason for reason, targets in (because or {}).items() for target in targets}
    reached = {target.parameter for target in found if target.parameter not in why}
    missed = [
        target
        for target in all_parameters(model)
        if target.parameter.dim() > 1
        and target.parameter not in reached
        and not any(ignored(owner.name) for owner in target.owners)
    ]
    missed = [t for t, is_zero in zip(missed, are_zero([t.parameter for t in missed]), strict=True) if not is_zero]
    size = sum(target.parameter.numel() for target in missed)
    total = size + sum(parameter.numel() for parameter in reached)
    if size <= (1 - _ENOUGH) * total:
        return
    names: dict[str, list[str]] = {}
    for target in sorted(missed, key=lambda target: -target.parameter.numel()):
        names.setdefault(why.get(target.parameter, _UNKNOWN), []).append(target.name)
    parts = "; ".join(f"{listed(some)} ({reason})" for reason, some in names.items())
    warn(
        f"this reaches {1 - size / total:.0%} of the weights of {type(model).__name__}, and leaves out {parts}. Name "
        "in ignored_scope what is to stay dense"
    )
