"""A threshold in place of a ratio."""

from typing import Any

import torch
from torch import nn

from pyprune.calibration.calibrate import Calibration
from pyprune.checks import check_number
from pyprune.methods.allocation import Amount
from pyprune.methods.method import Method, PruneMode
from pyprune.modules.attachments import check_module
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import changing_masks, masks_in
from pyprune.selection.choose_coupled import coupled_scores
from pyprune.selection.choose_masks import unit_groups_of
from pyprune.selection.prune import method_with_ratios, targets_with_statistics
from pyprune.selection.scores import unit_scores


@torch.no_grad()
def ratios_below(
    model: nn.Module,
    method: Method | PruneMode | str,
    threshold: float,
    *,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
    calibration: Calibration | None = None,
) -> dict[str, float]:
    """Return for each weight the share of its units whose score is below a threshold, as `prune` takes ratios.

    ``prune(model, method, ratio=ratios_below(model, method, threshold))`` drops exactly these, in a scope in which
    weights have ratios of their own (``scope.tensor()``); but of each weight one unit stays. Scores are those of the
    method before they are made comparable (``normalize``): |w| of elements of magnitude, the sum of it of channels.

    Args:
        model, ignored_scope, examples_inputs, calibration: as for `prune`.
        method: how units are scored; the smallest go first.
        threshold: what scores are compared with.

    Returns:
        Ratios in [0, 1) by the names of the weights, of attention layers for heads, of groups of coupled units.

    Raises:
        TypeError, ValueError: as `prune` does, for scores that are not finite, and for another threshold.

    Example:
        >>> from pyprune import Method, importance, prune, scope
        >>> linear = nn.Linear(4, 1, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[0.25, -2.0, 0.5, 4.0]]))
        >>> method = Method(importance.magnitude(), scope=scope.tensor())
        >>> ratios = ratios_below(linear, method, 0.5)
        >>> ratios, prune(linear, method, ratio=ratios).weight.tolist()
        ({'weight': 0.25}, [[0.0, -2.0, 0.5, 4.0]])
    """
    check_module(model)
    chosen = method_with_ratios(method)
    threshold = check_number("threshold", threshold, what="a number")
    with changing_masks(masks_in(model)):
        statistics, found = targets_with_statistics(model, chosen, ignored_scope, examples_inputs, calibration)
        if found.coupled is not None:
            names = [units.name for units in found.coupled.chosen]
            scores = coupled_scores(chosen, Amount(), found.coupled.chosen, statistics)
        else:
            groups = unit_groups_of(chosen, Amount(), list(statistics), statistics)
            names, scores = [group.name for group in groups], unit_scores(chosen, groups)
        bad = [name for name, score in zip(names, scores, strict=True) if not score.isfinite().all()]
        if bad:
            raise ValueError(
                f"NaN or infinite scores in {', '.join(bad)}. Repair them, or name them in ignored_scope"
            )
        return {
            name: min(int((score < threshold).sum()), score.numel() - 1) / score.numel()
            for name, score in zip(names, scores, strict=True)
            if score.numel()
        }
