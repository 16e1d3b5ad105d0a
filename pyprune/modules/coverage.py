"""Say which weights a call does not reach."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from pyprune.console import listed, warn
from pyprune.modules.attachments import Owner
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.layers import bias_of, weight_layouts
from pyprune.modules.norms import NORMS
from pyprune.modules.targets import Target, all_parameters, ignored_in, is_readable
from pyprune.modules.zero_weights import are_zero

# Below this share a model is visibly less sparse than asked.
_ENOUGH = 0.9
_UNKNOWN = "in no layer that is known; examples_inputs finds what a forward pass uses as a weight"
_UNUSED = "in no layer that is known, and no weight of a product in the forward pass of examples_inputs"


def warn_of_missed(
    model: nn.Module,
    ignored_scope: IgnoredScope | None,
    found: Sequence[Target],
    because: Mapping[str, Sequence[Target]] | None = None,
    *,
    has_inputs: bool,
) -> None:
    """Warn if a call reaches less than 90 % of the elements of a model's parameters of two or more dimensions.

    What the user ignores does not count, and neither does what is zero everywhere, which has a warning of its own.
    Neither does what carries a mask or gate already; where all that is reached does, it was said before.

    Args:
        model: the model.
        ignored_scope: weights that are to be left out.
        found: what `find_targets` found.
        because: why the call does not reach some of them.
        has_inputs: whether a forward pass was looked at.
    """
    why = {
        target.parameter: reason
        for reason, targets in (because or {}).items()
        for target in targets
        if target.attachment is None
    }
    if all(target.attachment is not None for target in found if target.parameter not in why):
        return
    ignored = ignored_in(model, ignored_scope)
    reached = {target.parameter for target in found if target.parameter not in why}
    missed = [
        target
        for target in all_parameters(model)
        if not is_lazy(target.parameter)
        and target.parameter.dim() > 1
        and target.parameter not in reached
        and not any(ignored(owner.name) or _is_no_weight(owner) for owner in target.owners)
    ]
    readable = [target for target in missed if is_readable(target)]
    zero = dict(zip(readable, are_zero([target.parameter for target in readable]), strict=True))
    missed = [target for target in missed if not zero.get(target, False)]
    size = sum(target.parameter.numel() for target in missed)
    total = size + sum(parameter.numel() for parameter in reached)
    if size <= (1 - _ENOUGH) * total:
        return
    unknown = _UNUSED if has_inputs else _UNKNOWN
    names: dict[str, list[str]] = {}
    for target in sorted(missed, key=lambda target: -target.parameter.numel()):
        names.setdefault(why.get(target.parameter, unknown), []).append(target.name)
    parts = "; ".join(f"{listed(some)} ({reason})" for reason, some in names.items())
    warn(
        f"this reaches {1 - size / total:.0%} of the weights of {type(model).__name__}, and leaves out {parts}. Name "
        "in ignored_scope what is to stay dense"
    )


def _is_no_weight(owner: Owner) -> bool:
    """Whether a parameter has the biases of experts, a row for each of them, or the scales of a norm."""
    is_bias = any(bias_of(weight) == owner.attribute for weight in weight_layouts(owner.module))
    return is_bias or isinstance(owner.module, NORMS)
