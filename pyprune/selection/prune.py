"""Put masks or gates on a model, and compute masks anew."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyprune.calibration.calibrate import Calibration
from pyprune.checks import check_bool, check_number, shown
from pyprune.methods.allocation import Allocation, Amount
from pyprune.methods.coupled import counting
from pyprune.methods.granularity import Granularity, RatioOf
from pyprune.methods.importance import Importance
from pyprune.methods.method import METHODS, Method, PruneMode, check_amount, check_mode
from pyprune.modules.attachments import check_module
from pyprune.modules.dead_channels import new_followers
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.last_layers import last_layers
from pyprune.modules.masks import Mask, attach_masks, changing_masks, masks_by_target, masks_in
from pyprune.modules.norms import norms_after
from pyprune.modules.targets import (
    Target,
    by_place,
    check_prunable,
    output_layers,
)
from pyprune.modules.undo import Change
from pyprune.selection.choose_masks import choose_masks
from pyprune.selection.coupled import check_follows, check_no_coupled, check_scored
from pyprune.selection.find_prunable import Prunable, check_kind, find_prunable, tell_missed
from pyprune.selection.put_gates import put_gates, units_of_gates

_M = TypeVar("_M", bound=nn.Module)


@torch.inference_mode(False)  # masks made under inference_mode could not be trained with
def prune(
    model: _M,
    mode: PruneMode | str | Method,
    *,
    ratio: float | Mapping[str, float] | None = None,
    target_params: float | None = None,
    target_macs: float | None = None,
    granularity: Granularity | None = None,
    ignored_scope: IgnoredScope | None = None,
    examples_inputs: Any = None,
    calibration: Calibration | None = None,
    allocation: Allocation = "uniform",
    min_ratio: float | Mapping[str, float] = 0.0,
    max_ratio: float | Mapping[str, float] = 1.0,
    from_remaining: bool = False,
    zero_dead_channels: bool = False,
    same_on_all_ranks: bool = False,
) -> _M:
    """Mask the weights that matter least, or put learned gates on all weights, in place; return the model.

    A `Method` says how weights are chosen, and the magnitude modes are the names of two. Of n units that compete
    (elements, blocks, channels, heads) exactly ``min(floor(ratio * n + 0.5), n - 1)`` go. Of equals, the one in the
    first tensor, and there the one with the lowest index, goes first. The masks are computed from the raw weights at
    every call, and what is dropped is parked beside the mask with its value: it can come back. A tensor that a later
    call ignores keeps the mask it has.

    In the modes UNSTRUCTURED_REGULARIZATION_BASED and UNSTRUCTURED_HARD_CONCRETE every element gets a gate
    (`StochasticGate`, `HardConcreteGate`). Its float32 logit is a parameter of the model (`gate_parameters`) and
    starts at a keep probability of 0.99. In training each call of the model samples the gates once. Nothing is
    pruned until the logits are trained with a loss that knows the target: `RBLoss`, `L0Loss` or `LagrangianLoss`.
    What carries such gates already keeps them, with all they learned.

    A weight with a mask is an ordinary parameter with zeros, which are held: by the steps of any optimizer of torch,
    and before the next forward pass against whatever else writes. Names, order, classes and state_dict of the model
    are those of the dense one. Assigning a `Parameter` (``layer.weight = ...``, as code that ties weights does) sets
    the raw weight. Prune before the forward pass or after the backward pass: between them, backward fails, because
    autograd sees that weights were changed. `torch.compile` may come before or after. Gates must be on before the
    model is wrapped in DistributedDataParallel; it need not know of masks.

    Args:
        model: the model. Its weights stay the same `Parameter` objects, in their places.
        mode: a `Method`, a `PruneMode` or its name.
        ratio: fraction of the units to remove, in [0, 1). Where weights do not compete with each other, also a dict
            of such fractions by name or regular expression of weights or of modules above them, or by groups; what
            it does not name loses nothing. For N:M it is at most 1 - keep / of, which None stands for, and less
            leaves some groups whole. For gates a loss has it, and here it only warns.
        granularity: for learned gates: `pyprune.granularity.coupled` puts one gate on each coupled unit, which all
            its weights, biases and norms share, in place of one on each element; a `Method` has its own.
        ignored_scope: weights to leave out.
        examples_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model. If given,
            one forward pass also finds weights that are bare parameters, which dimensions of weights are inputs by
            their use, and the BatchNorm after each layer.
        calibration: what `calibrate` gathered, for an importance that needs it.
        allocation: how one ratio becomes one for each tensor, within scope tensor or row: "uniform", or "erk", by
            which thin layers keep more (Evci et al. 2020), and all together lose that share of their weights.
        min_ratio, max_ratio: fraction of its units that each tensor loses at least, and at most, while it competes
            with others; or a dict, as for ``ratio``. What a limit changes is made up for by the other tensors.
        from_remaining: choose only among what is still kept, and take ``ratio`` as one of that. In a weight
            without a mask, what is zero counts as gone, as after `strip`.
        zero_dead_channels: mask the bias of an output channel without weights too, and its scale and shift in the
            norms that follow (which takes ``examples_inputs``), so that it is really zero. What is ignored stays, and
            warnings name that, and norms behind which channels are not zero (those of several layers). Later calls,
            with or without this, keep those masks in step.
        same_on_all_ranks: as in `StochasticGate`; for new gates. Masks have no noise, and it only warns.

    Raises:
        TypeError, ValueError: for arguments that are out of range or do not fit the model or each other, weights that
            cannot be pruned, NaN or infinity in a weight or score, weights that carry a mask or gate of another
            kind, new gates in DistributedDataParallel, and weights on several devices that compete with each other.
            The model is then as it was.

    Papers: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks"; Kozlov et
    al. 2020, "Neural Network Compression Framework for fast model inference".

    Example:
        >>> import torch
        >>> linear = nn.Linear(2, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        >>> prune(linear, PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5).weight.tolist()
        [[0.0, 0.0], [3.0, 4.0]]

        Half of the filters of each convolution, those with the smallest L2 norm:

        >>> from pyprune import Method
        >>> from pyprune.methods import granularity, importance, scope
        >>> method = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())
        >>> conv = prune(nn.Conv2d(3, 8, 3), method, ratio=0.5)
        >>> int((conv.weight == 0).all(dim=(1, 2, 3)).sum())
        4
    """
    for flag, value in (
        ("from_remaining", from_remaining),
        ("zero_dead_channels", zero_dead_channels),
        ("same_on_all_ranks", same_on_all_ranks),
    ):
        check_bool(flag, value)
    mode, method = method_of(mode)
    if target_params is not None or target_macs is not None:
        method, ratio = _with_target(method, ratio, target_params, target_macs)
    amount = Amount(ratio, allocation, min_ratio, max_ratio, from_remaining)
    units = units_of_gates(mode, method, granularity)
    if method is None:
        put_gates(model, PruneMode(mode), amount, units, ignored_scope, examples_inputs, same_on_all_ranks)
        return model
    if same_on_all_ranks:
        warnings.warn(f"same_on_all_ranks does nothing in mode {mode}: masks have no noise", stacklevel=3)
    put_masks(
        model,
        method,
        amount,
        ignored_scope=ignored_scope,
        examples_inputs=examples_inputs,
        calibration=calibration,
        zero_dead_channels=zero_dead_channels,
    )
    return model


def _with_target(
    method: Method | None, ratio: object, params: float | None, macs: float | None
) -> tuple[Method, float]:
    """Return a method whose ratio is one of parameters or multiply-accumulates, and that ratio."""
    name, target = ("target_params", params) if macs is None else ("target_macs", macs)
    if ratio is not None or (params is not None and macs is not None):
        raise ValueError("give one of ratio, target_params and target_macs: each says how much goes")
    if method is None or method.granularity.coupled is None:
        raise ValueError(
            f"{name} counts what is left once units are removed as a whole; give a Method with "
            "granularity.coupled(), or a ratio"
        )
    what = "the fraction of the model that is to be left, a number in (0, 1]"
    left = check_number(name, target, what=what, least=2.0**-53, most=1)  # 1 - less is 1
    of: RatioOf = "parameters" if macs is None else "macs"
    return replace(method, granularity=counting(method.granularity, of)), 1 - left


@torch.inference_mode(False)
def update_masks(model: nn.Module, mode: PruneMode | str, ratio: float) -> None:
    """Compute the masks that a model carries anew, from the raw weights, in place.

    Args:
        model: a model that `prune` put masks on.
        mode: one of the magnitude modes, or its name.
        ratio: fraction of the elements to remove, in [0, 1).

    Raises:
        TypeError, ValueError: as `prune` does, and if there are no masks. The model is then as it was.

    Example:
        >>> linear = prune(nn.Linear(4, 4), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.75)
        >>> update_masks(linear, "UNSTRUCTURED_MAGNITUDE_LOCAL", 0.25)
        >>> int(linear.weight.count_nonzero())
        12
    """
    mode = check_mode(mode)
    if mode not in METHODS:
        raise ValueError(f"mode is {mode.value}; masks are computed by {', '.join(known.value for known in METHODS)}")
    amount = check_amount(METHODS[mode], Amount(ratio))
    targets = masked_targets(model)
    check_no_coupled(model, METHODS[mode], stay=False)
    for target in targets:
        check_prunable(target)
    with Change(model), changing_masks(masks_in(model)):
        choice = choose_masks(METHODS[mode], amount, targets, {})
        choice.check()
        choice.tell(model, ())
        attach_masks(model, list(choice.masks.values()))


def masked_targets(model: nn.Module) -> list[Target]:
    """Return the weights that carry masks; raise ValueError if there are none."""
    targets = [target for target, mask in masks_by_target(model).items() if mask.on_target]
    if not targets:
        raise ValueError(f"{type(model).__name__} carries no masks; call pyprune.prune in a magnitude mode first")
    return targets


def ends_of(model: nn.Module, method: Method, inputs: Any) -> Sequence[nn.Module]:
    """Return the layers that put out what the model does, if a method may take their outputs."""
    return last_layers(model, inputs) if method.granularity.name == 'channel("out")' else ()


def method_of(mode: PruneMode | str | Method, name: str = "mode") -> tuple[str, Method | None]:
    """Return the method, or None if the mode means gates, and its name for messages."""
    if isinstance(mode, Method):
        return mode.importance.name, mode
    member = check_mode(mode, name)
    return member.value, METHODS.get(member)


def method_with_ratios(mode: PruneMode | str | Method) -> Method:
    """Return the method that ``mode`` is or names.

    Raises:
        TypeError, ValueError: if it is none, or means gates, whose ratio belongs to a loss.
    """
    name, method = method_of(mode, "method")
    if method is None:
        raise ValueError(f"method is {name}, which trains gates by a loss; give a Method or a magnitude mode")
    return method


# ---- masks ----


def put_masks(
    model: nn.Module,
    method: Method,
    amount: Amount,
    *,
    ignored_scope: IgnoredScope | None,
    examples_inputs: Any,
    calibration: Calibration | None,
    zero_dead_channels: bool,
) -> None:
    """Do what `prune` says of masks."""
    amount = check_amount(method, amount)
    check_follows(method, zero_dead_channels)
    check_module(model)
    with Change(model), changing_masks(masks_in(model)):
        check_no_coupled(model, method, stay=amount.has_bases)
        statistics, found = targets_with_statistics(model, method, ignored_scope, examples_inputs, calibration)
        amount = replace(amount, left_out=found.left_out)
        choice = choose_masks(method, amount, list(statistics), statistics, coupled=found.coupled)
        choice.check()
        choice.tell(model, ends_of(model, method, examples_inputs))
        followers = new_followers(model, choice.masks, examples_inputs, ignored_scope) if zero_dead_channels else []
        attach_masks(model, list(choice.masks.values()), followers)


def targets_with_statistics(
    model: nn.Module,
    method: Method,
    ignored_scope: IgnoredScope | None,
    examples_inputs: Any,
    calibration: Calibration | None,
) -> tuple[dict[Target, Tensor | None], Prunable]:
    """Return the parameters that a method prunes, with statistics of their scores; and what else was found."""
    found = find_prunable(model, method, ignored_scope, examples_inputs)
    check_kind(found.targets, Mask)
    statistics = statistics_of(model, method.importance, found, calibration, examples_inputs)
    has_inputs = examples_inputs is not None
    tell_missed(model, method, ignored_scope, found, statistics, has_inputs=has_inputs)
    return {target: statistics[target] for target in found.targets if target in statistics}, found


def statistics_of(
    model: nn.Module, importance: Importance, prunable: Prunable, calibration: object, inputs: Any
) -> dict[Target, Tensor | None]:
    """Return the statistic of each target that the importance can score; of coupled units of all, if with None."""
    if importance.needs in ("none", "norm scale", "given") and calibration is not None:
        raise ValueError(f"importance {importance.name} takes no calibration; leave it out")
    targets, coupled = prunable.targets, prunable.coupled
    if importance.needs == "none" or (coupled is not None and importance.needs in ("norm scale", "given")):
        return dict.fromkeys(targets)
    if importance.needs == "norm scale":
        return dict(_norm_scales(model, targets, inputs))
    if importance.needs == "given":
        return dict(_given(importance, targets, prunable.left_out))
    if not isinstance(calibration, Calibration):
        raise TypeError(
            f"importance {importance.name} needs statistics, and calibration is {shown(calibration)}; give "
            "calibration=pyprune.calibrate(model, dataset, importance, ...)"
        )
    if (calibration.statistic, calibration.options) != (importance.needs, importance.options):
        raise ValueError(
            f"calibration has {calibration.statistic}, and importance {importance.name} needs {importance.needs} "
            "with the same options; calibrate with this importance"
        )
    found = _by_name(calibration.tensors, targets)
    if coupled is not None:
        check_scored(coupled, importance, found)
        return {target: found.get(target) for target in targets}
    # Tables were left out with a warning.
    missing = [target.name for target in targets if target not in found and not target.layout.is_table]
    if missing:
        raise ValueError(
            f"calibration lacks {', '.join(missing)}; calibrate with the same ignored_scope, and with the weights "
            "loaded: what is zero everywhere then is left out"
        )
    return {target: statistic.to(target.parameter.device) for target, statistic in found.items()}


def _by_name(tensors: Mapping[str, Tensor], targets: Sequence[Target]) -> dict[Target, Tensor]:
    """Return the tensor that one of its names has, of each target that has one."""
    named = ((target, tensors.get(owner.name)) for target in targets for owner in target.owners)
    return {target: tensor for target, tensor in named if isinstance(tensor, Tensor)}


def _given(importance: Importance, targets: Sequence[Target], left_out: Sequence[str]) -> dict[Target, Tensor]:
    scores = importance.options[0]
    assert isinstance(scores, Mapping)
    found = _by_name(scores, targets)
    missing = [target.name for target in targets if target not in found]
    unknown = sorted(set(scores) - {owner.name for target in targets for owner in target.owners}.union(left_out))
    if missing or unknown:
        raise ValueError(
            f"the scores have no tensor for {', '.join(missing) or 'none'}, and unknown names "
            f"{', '.join(unknown) or 'none'}; give one for each weight that is pruned, and name the others in "
            "ignored_scope"
        )
    return found


def _norm_scales(model: nn.Module, targets: Sequence[Target], inputs: Any) -> dict[Target, Tensor]:
    layers = {layer: target for target in targets for layer in output_layers(target)}
    norms = norms_after(model, layers, inputs, "batch_norm_scale")
    # The parameters themselves, which have their raw values, of dead channels too, where masks are chosen.
    raw = by_place(model)
    scales: dict[Target, Tensor] = {
        layers[layer]: raw[norm, "weight"].parameter for layer, norm in norms.items() if (norm, "weight") in raw
    }
    if not scales:
        raise ValueError(f"no layer of {type(model).__name__} is followed by a BatchNorm with a scale")
    return scales
