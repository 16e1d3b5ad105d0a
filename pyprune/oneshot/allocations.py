"""How much each block of a model loses, where all together lose a ratio.

Each function returns the ``allocation`` of a one-shot pruning; `ratios` says what it gives a model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pyprune.calibration.calibrate import Calibration
from pyprune.checks import check_number, shown
from pyprune.console import listed
from pyprune.methods.allocation import check_ratio
from pyprune.methods.importance import Statistic, wanda
from pyprune.methods.layout import as_matrices
from pyprune.methods.unit_groups import Weight
from pyprune.modules.attachments import check_module
from pyprune.modules.ignored_scope import IgnoredScope
from pyprune.modules.targets import Target, find_targets_and_zeros
from pyprune.oneshot.find_blocks import find_blocks
from pyprune.oneshot.share_out import share_out
from pyprune.oneshot.spectra import tail_exponent

__all__ = ["BlockAllocation", "alpha_pruning", "owl", "progression", "ratios"]


@dataclass(frozen=True)
class BlockAllocation:
    """How a ratio is shared out among blocks; made by the functions of this module.

    Args:
        name: what it is called.
        figure: what is looked at of a block, given its weights.
        shares: what each block loses, given the figures of all, in their order, and the ratio; limits come later.
        needs: the statistic of its weights that the figure is computed from.
        scales: whether the shares are scaled, not shifted, to the ratio.
    """

    name: str
    figure: Callable[[Sequence[Weight]], float]
    shares: Callable[[Sequence[float], float], list[float]]
    needs: Statistic = "none"
    scales: bool = False


def progression(beta: float = 0.1) -> BlockAllocation:
    """Let later blocks lose more: block l of L loses s + beta (l - (L - 1) / 2), if all lose s.

    Args:
        beta: by how much the ratio rises from block to block, in [-1, 1]; below 0 it falls.

    Raises:
        TypeError, ValueError: for another number.

    Paper: arXiv 2502.14770, "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical
    Perspective".

    Example:
        >>> [round(ratio, 2) for ratio in progression(0.1).shares([0.0, 0.0, 0.0], 0.5)]
        [0.4, 0.5, 0.6]
    """
    rise = check_number("beta", beta, what="a number in [-1, 1]", least=-1, most=1)

    def shares(figures: Sequence[float], ratio: float) -> list[float]:
        return [ratio + rise * (place - (len(figures) - 1) / 2) for place in range(len(figures))]

    return BlockAllocation(f"progression(beta={rise:g})", lambda weights: 0.0, shares)


def owl(m: float = 3.0, spread: float = 0.08) -> BlockAllocation:
    """Let blocks with many outliers lose less: weights whose score by `importance.wanda` is above m times the mean.

    With D the share of outliers of a block, brought to [0, 2 spread] by the smallest and the largest of all blocks,
    the block loses s - (D - mean D), if all lose s. Scores are compared with the mean of their block.

    Args:
        m: how many times the mean an outlier is.
        spread: the ratios of two blocks are at most 2 spread apart; in (0, 1), lambda in the paper.

    Raises:
        TypeError, ValueError: for other numbers.

    Paper: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
    Sparsity".

    Example:
        >>> [round(ratio, 2) for ratio in owl(spread=0.1).shares([2.0, 4.0], 0.7)]
        [0.8, 0.6]
    """
    times = check_number("m", m, what="a positive number", least=0, open_ends=True)
    width = check_number("spread", spread, what="a number in (0, 1)", least=0, most=1, open_ends=True)

    def shares(figures: Sequence[float], ratio: float) -> list[float]:
        outliers = [2 * width * part for part in _from_0_to_1(figures, 0.0)]
        mean = math.fsum(outliers) / len(outliers)
        return [ratio - (one - mean) for one in outliers]

    return BlockAllocation(
        f"owl(m={times:g}, spread={width:g})", lambda weights: _outliers(weights, times), shares, needs="input norm"
    )


def alpha_pruning(epsilon: float = 0.2) -> BlockAllocation:
    """Let blocks whose weights have heavier tails lose less, which are those that training has shaped more; no data.

    alpha is the exponent of the power law that the larger half of the eigenvalues of W^T W follows, by Hill's
    estimate, the mean over the weights of a block. The smallest alpha becomes 1 - epsilon and the largest
    1 + epsilon, linearly, and these are scaled to the ratio. It takes the singular values of every weight.

    Args:
        epsilon: in (0, 1).

    Raises:
        TypeError, ValueError: for another number.

    Paper: Lu et al. 2024, "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise
    Pruning of Large Language Models".

    Example:
        >>> alpha_pruning(0.5).shares([3.0, 2.0, 4.0], 0.7)
        [1.0, 0.5, 1.5]
    """
    width = check_number("epsilon", epsilon, what="a number in (0, 1)", least=0, most=1, open_ends=True)

    def shares(figures: Sequence[float], ratio: float) -> list[float]:
        return [1 + width * (2 * part - 1) for part in _from_0_to_1(figures, 0.5)]

    return BlockAllocation(f"alpha_pruning(epsilon={width:g})", _alpha, shares, scales=True)


def ratios(
    model: nn.Module,
    allocation: BlockAllocation,
    ratio: float,
    *,
    blocks: str | Sequence[str] | None = None,
    calibration: Calibration | None = None,
    max_ratio: float = 1.0,
    ignored_scope: IgnoredScope | None = None,
) -> dict[str, float]:
    """Return a ratio for each weight of a model's blocks, with which all together lose exactly the one that is given.

    Weights of one block lose the same, up to rounding. Of n elements floor(ratio * n + 0.5) go, within
    `scope.tensor`; within rows and N:M, whose counts are rounded by themselves, about as many.

    Args:
        model: the dense model.
        allocation: what a function of `pyprune.allocations` returned.
        ratio: the fraction of all elements of these weights to remove, in [0, 1).
        blocks: the name of the list whose members are the blocks, such as ``"model.layers"``, or several names, of
            lists and of blocks, in the order of a pass; None for the lists of layers that repeat.
        calibration: for `owl`: ``calibrate(model, batches, importance.wanda())``, from the dense model.
        max_ratio: what a weight loses at most, such as 0.5 for 2 of 4.
        ignored_scope: weights to leave out.

    Returns:
        What ``prune(model, Method(..., scope=scope.tensor()), ratio=...)`` takes. Weights outside of blocks, and
        embeddings in them, are not in it, and lose nothing.

    Raises:
        TypeError, ValueError: for wrong arguments, if there are no such blocks, no weights in them, no statistics of
            a weight, or a weight is not finite.

    Example:
        >>> import torch
        >>> from pyprune import allocations
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        >>> allocations.ratios(model, allocations.progression(0.25), 0.5)
        {'0.weight': 0.25, '1.weight': 0.5, '2.weight': 0.75}
    """
    if not isinstance(allocation, BlockAllocation):
        raise TypeError(f"allocation is {shown(allocation)}; give what a function of pyprune.allocations returns")
    check_module(model)
    wanted = check_ratio(ratio)
    most = check_number("max_ratio", max_ratio, what="a number in (0, 1]", least=0, most=1)
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(f"calibration is {shown(calibration)}; give what pyprune.calibrate returned")
    targets = _targets_of_blocks(model, blocks, ignored_scope)
    statistics = _statistics(allocation, targets, calibration)
    weights = [[_weight(target, statistics) for target in block] for block in targets]
    sizes = [{weight.name: weight.values.numel() for weight in block} for block in weights]
    figures = [allocation.figure(block) for block in weights]
    return share_out(sizes, allocation.shares(figures, wanted), wanted, max_ratio=most, scales=allocation.scales)


def _targets_of_blocks(
    model: nn.Module, blocks: str | Sequence[str] | None, ignored_scope: IgnoredScope | None
) -> list[list[Target]]:
    """Return the weights of each block but tables, each once: a tied one counts for the first that has it."""
    there = find_blocks(model, blocks)
    within = {part for block in there for part in block.module.modules()}
    targets, _ = find_targets_and_zeros(model, ignored_scope, within=within)
    left = [target for target in targets if not target.layout.is_table]
    found: list[list[Target]] = []
    for block in there:
        parts = set(block.module.modules())
        inside = [target for target in left if any(owner.module in parts for owner in target.owners)]
        left = [target for target in left if target not in inside]
        found.append(inside)
    if not any(found):
        raise ValueError("blocks have no weight to prune: ignored_scope leaves out all of them")
    return [inside for inside in found if inside]


def _statistics(
    allocation: BlockAllocation, blocks: Sequence[Sequence[Target]], calibration: Calibration | None
) -> Mapping[str, Tensor]:
    if allocation.needs == "none":
        if calibration is not None:
            raise ValueError(f"{allocation.name} takes no calibration; leave it out")
        return {}
    if calibration is None:
        raise ValueError(f"{allocation.name} needs calibration=pyprune.calibrate(model, batches, importance.wanda())")
    if calibration.statistic != allocation.needs:
        raise ValueError(f"calibration has {calibration.statistic}, and {allocation.name} needs {allocation.needs}")
    missing = [target.name for block in blocks for target in block if target.name not in calibration.tensors]
    if missing:
        raise ValueError(f"calibration lacks {listed(missing)}; calibrate with the same ignored_scope")
    return calibration.tensors


def _weight(target: Target, statistics: Mapping[str, Tensor]) -> Weight:
    values = target.parameter.detach()
    statistic = statistics.get(target.name)
    return Weight(
        target.name, values, target.layout, statistic=None if statistic is None else statistic.to(values.device)
    )


def _from_0_to_1(figures: Sequence[float], alike: float) -> list[float]:
    """Bring the smallest figure to 0 and the largest to 1; all to ``alike`` if they do not differ, and NaN."""
    known = [one for one in figures if not math.isnan(one)]
    least, most = min(known, default=0.0), max(known, default=0.0)
    if least == most:
        return [alike] * len(figures)
    return [alike if math.isnan(one) else (one - least) / (most - least) for one in figures]


def _outliers(weights: Sequence[Weight], times: float) -> float:
    """Return which share of the weights of a block have a score above so many times the mean."""
    rule = wanda()

    def scores(weight: Weight) -> Tensor:
        assert weight.statistic is not None
        return rule.score(weight.values, weight.statistic)

    count = sum(weight.values.numel() for weight in weights)
    mean = math.fsum(float(scores(weight).double().sum()) for weight in weights) / max(1, count)
    _check_finite(mean, weights)
    return sum(int((scores(weight) > times * mean).sum()) for weight in weights) / max(1, count)


def _alpha(weights: Sequence[Weight]) -> float:
    """Return the mean of the exponents of a block; NaN if none can be told."""
    found = []
    for weight in weights:
        _check_finite(float(weight.values.double().abs().sum()), [weight])
        if weight.values.dim() > 1 and not weight.layout.is_clear:
            raise ValueError(
                f"which dimensions of {weight.name} count outputs and inputs cannot be told: "
                f"{weight.layout.problem}. Name it in ignored_scope"
            )
        found += [tail_exponent(matrix) for matrix in as_matrices(weight.values, weight.layout)]
    known = [one for one in found if one is not None]
    return math.fsum(known) / len(known) if known else math.nan


def _check_finite(total: float, weights: Sequence[Weight]) -> None:
    if not math.isfinite(total):
        raise ValueError(
            f"{listed([weight.name for weight in weights])}: NaN or infinite, in weights or their inputs"
        )
