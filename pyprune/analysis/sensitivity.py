"""Measure what pruning each weight by itself does to a model."""

import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.analysis.sensitivity_result import SensitivityResult, SensitivityTarget, with_score
from pyprune.calibration.calibrate import Calibration
from pyprune.checks import check_bool, check_items, check_path
from pyprune.console import tracked
from pyprune.methods.allocation import Amount, check_ratio
from pyprune.methods.coupled import counting
from pyprune.methods.importance import magnitude
from pyprune.methods.method import Method, PruneMode, check_amount
from pyprune.methods.scope import tensor
from pyprune.methods.tolerance import check_drop, worsening
from pyprune.modules.attachments import check_module
from pyprune.modules.evaluation import check_callable, score_of
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.masks import Mask, NewMask, changing_masks, masks_in
from pyprune.modules.targets import Target
from pyprune.modules.undo import Before, Change, undoing
from pyprune.selection.attention import find_attention
from pyprune.selection.choose_masks import choose_masks
from pyprune.selection.coupled import CoupledUnits, check_no_coupled
from pyprune.selection.prune import method_with_ratios, targets_with_statistics

_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_MAGNITUDE = Method(magnitude(), scope=tensor())


@torch.inference_mode(False)
def sensitivity(
    model: nn.Module,
    eval_fn: Callable[[nn.Module], float],
    *,
    ratios: Iterable[float] = _RATIOS,
    method: Method | PruneMode | str = _MAGNITUDE,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
    calibration: Calibration | None = None,
    higher_is_better: bool = True,
    early_stop: float | None = None,
    save_to: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SensitivityResult:
    """Prune one weight at a time to each of several ratios, and measure what is left of the model.

    The model is the same in the end, bit for bit, also if it fails or is interrupted. Meanwhile zeros are written
    into the weight itself (into its mask, if it carries one; the others keep theirs), so nothing is copied but that
    weight, and a compiled model is not compiled again. It takes targets x ratios + 1 evaluations: give a small but
    honest set of data. A ratio that drops the same units as the one before is not evaluated again.

    Args:
        model: the model.
        eval_fn: takes the model and returns its score. It is called in evaluation mode, without gradients, with the
            same random numbers each time; buffers that it changes (as `batch_norm_adaptation` does) are given back,
            and so are modules, hooks and flags. It must not train the model.
        ratios: fractions of the units to remove, in [0, 1).
        method: how units are chosen. All that compete are those of one target: a weight, with heads the four
            weights of an attention layer, with coupled units a group. Its scope matters only if it is ``row``, or
            N:M, whose ratios end at 1 - keep / of; not for gates.
        ignored_scope, examples_inputs, calibration: as in `prune`.
        higher_is_better: False if the score is a loss or an error.
        early_stop: leave out the larger ratios of a target once its score has lost more than this.
        save_to: a JSON file to save the result to after each evaluation. If there is one of the same model and
            method, only what it lacks is evaluated.
        progress: whether to show a bar, on a terminal.

    Returns:
        The scores, for a table, a plot, files and `allocation_from_sensitivity`.

    Raises:
        TypeError, ValueError: for arguments that `prune` would refuse too, ratios out of range, a score that is no
            number, and a file of another analysis.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> inputs = torch.randn(64, 8)
        >>> outputs = model(inputs).detach()
        >>> result = sensitivity(
        ...     model,
        ...     lambda pruned: nn.functional.mse_loss(pruned(inputs), outputs),
        ...     ratios=(0.25, 0.5),
        ...     higher_is_better=False,
        ... )
        >>> result.baseline, list(result.targets), result.ratios
        (0.0, ['0.weight', '2.weight'], [0.25, 0.5])
    """
    chosen = method_with_ratios(method)
    check_callable("eval_fn", eval_fn)
    check_drop("early_stop", early_stop)
    check_bool("higher_is_better", higher_is_better)
    check_bool("progress", progress)
    wanted = _check_ratios(ratios)
    check_path("save_to", save_to, optional=True)
    check_amount(chosen, Amount(wanted[-1]))
    if save_to is not None and not Path(save_to).absolute().parent.is_dir():
        raise ValueError(f"save_to is {save_to}, whose folder does not exist; create it first")
    check_module(model)
    with Change(model), changing_masks(masks_in(model)):
        check_no_coupled(model, chosen, stay=False)
        statistics, found = targets_with_statistics(model, chosen, ignored_scope, examples_inputs, calibration)
    # One target competes with itself alone, so all scopes but rows and N:M are the same.
    method = chosen if chosen.scope.name in ("row", "n_of_m") else replace(chosen, scope=tensor())
    coupled = found.coupled
    if coupled is not None:
        method = replace(method, granularity=counting(method.granularity, "units"))
    targets = _targets(method, list(statistics), coupled)

    def masks_of(name: str, ratio: float) -> dict[Target, NewMask]:
        with changing_masks(mask for target in targets[name] if isinstance(mask := target.attachment, Mask)):
            amount, units = check_amount(method, Amount(ratio)), None if coupled is None else coupled.only(name)
            choice = choose_masks(method, amount, targets[name], statistics, coupled=units)
            choice.check()
        return choice.masks

    # What cannot be pruned is found now, not after hours.
    sizes = {name: _unmeasured(method, masks_of(name, wanted[-1]), name, coupled) for name in targets}
    setting = {
        "method": _description(method),
        "targets": list(targets),
        "weights": _checksum(chain(model.state_dict().values(), statistics.values())),
    }
    result = _saved(save_to, setting, higher_is_better)
    if result is None:
        baseline = score_of(model, eval_fn)
        if not math.isfinite(baseline):
            raise ValueError(f"the score of the model as it is is {baseline}; nothing can be compared with that")
        result = SensitivityResult(baseline, {}, higher_is_better, setting)
    last: tuple[str, dict[Target, NewMask], float] | None = None
    pairs = [(name, ratio) for name in targets for ratio in wanted]
    for name, ratio in tracked(pairs, len(pairs), "Sensitivity", shown=progress):
        target = result.targets.get(name, sizes[name])
        if ratio in target.scores or _is_stopped(result, target, ratio, early_stop):
            continue
        masks = masks_of(name, ratio)
        if last is not None and last[0] == name and _equal(masks, last[1]):
            score = last[2]
        else:
            with _pruned(masks):
                score = score_of(model, eval_fn)
        last = name, masks, score
        result = replace(result, targets={**result.targets, name: with_score(target, ratio, score)})
        if save_to is not None:
            result.to_json(save_to)
    return result


def _check_ratios(ratios: Iterable[float]) -> list[float]:
    items = check_items("ratios", ratios, "several fractions of the weights, as (0.3, 0.6, 0.9)")
    wanted = sorted({check_ratio(ratio, "one of ratios") for ratio in items})
    if not wanted:
        raise ValueError("ratios is empty; give at least one")
    return wanted


def _targets(method: Method, targets: Sequence[Target], coupled: CoupledUnits | None) -> dict[str, list[Target]]:
    """Return what is pruned together: one weight, or those that a layer's heads, or a group's units, lie in."""
    if coupled is not None:
        return {units.name: coupled.only(units.name).targets for units in coupled.chosen}
    heads = method.granularity.heads
    if heads is None:
        return {target.name: [target] for target in targets}
    layers = find_attention(targets, heads)
    return {name: list(dict.fromkeys(target for target, _, _ in parts)) for name, parts in layers.items()}


def _unmeasured(
    method: Method, masks: Mapping[Target, NewMask], name: str, coupled: CoupledUnits | None
) -> SensitivityTarget:
    if coupled is not None:
        (one,) = coupled.only(name).chosen
        return SensitivityTarget(round(one.group.parameters * len(one)), len(one), {})
    weights = sum(target.parameter.numel() for target in masks)
    heads, (first, *_) = method.granularity.heads, masks.values()
    if heads is not None:
        units = heads.num_kv_heads
    else:
        units = weights if first.unit is None else math.prod(ops.unit_shape(first.mask.shape, first.unit))
    return SensitivityTarget(weights, units, {})


def _is_stopped(result: SensitivityResult, target: SensitivityTarget, ratio: float, most: float | None) -> bool:
    smaller = (score for measured, score in target.scores.items() if measured < ratio)
    return most is not None and any(
        worsening(result.baseline, score, result.higher_is_better) > most for score in smaller
    )


def _equal(masks: Mapping[Target, NewMask], others: Mapping[Target, NewMask]) -> bool:
    return all(torch.equal(new.mask, others[target].mask) for target, new in masks.items())


@contextmanager
def _pruned(masks: Mapping[Target, NewMask]) -> Iterator[None]:
    """Write masks into weights, or into the masks that are there, and give all back, whatever happens."""
    carried = {target: mask for target in masks if isinstance(mask := target.attachment, Mask)}
    plain = [target for target in masks if target not in carried]
    before = Before(holds=carried.values(), values=[target.parameter for target in plain])
    with undoing(before.restore):
        with changing_masks(carried.values()):
            for target, mask in carried.items():
                mask.mask = masks[target].mask
        ops.fold([target.parameter for target in plain], [masks[target].mask for target in plain])
        yield


# ---- resuming ----


def _saved(
    path: str | os.PathLike[str] | None, setting: Mapping[str, Any], higher_is_better: bool
) -> SensitivityResult | None:
    if path is None or not Path(path).exists():
        return None
    found = SensitivityResult.from_json(path)
    asked = {**setting, "higher_is_better": higher_is_better}
    there = {**found.setting, "higher_is_better": found.higher_is_better}
    other = [key for key in asked if there.get(key) != asked[key]]
    if other:
        raise ValueError(
            f"{path} holds an analysis with another {' and another '.join(other)}; give another save_to, or remove "
            "the file"
        )
    return found


def _description(method: Method) -> str:
    cut, among = method.granularity, method.scope
    competing = f"{among.keep} of {among.of} along {among.dim}" if among.name == "n_of_m" else among.name
    how = f"{cut.reduction}, {cut.heads}" if cut.coupled is None else str(cut.coupled)
    return f"{method.importance.name}, {cut.name} ({how}), {competing}"


def _checksum(values: Iterable[object]) -> int:
    """Return a number that almost surely differs if a plain tensor differs in one bit."""
    total = 0
    for value in values:
        # Others (sharded, quantised) are no targets, and have no bytes to look at.
        if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_quantized:  # type: ignore[attr-defined]
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # type: ignore[attr-defined]
            total = zlib.crc32(data.numpy(), total)
    return total
