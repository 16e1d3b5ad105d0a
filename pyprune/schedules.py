"""Which ratio to prune to at which epoch: pure functions."""

import math
import numbers
from collections.abc import Mapping

from pyprune.allocation import check_ratio


def multi_step(epoch: int, steps: Mapping[int, float]) -> float:
    """Return the ratio of the last step that has begun: that of the greatest key of ``steps`` up to ``epoch``.

    Args:
        epoch: number of the epoch, from 0.
        steps: ratio in [0, 1) from each of these epochs on; one of them is 0. It may fall as well as rise.

    Raises:
        TypeError, ValueError: for epochs that are no integers or negative, for a ratio outside [0, 1), and without
            a ratio for epoch 0.

    Example:
        >>> [multi_step(epoch, {0: 0.3, 5: 0.5, 10: 0.7}) for epoch in (0, 4, 5, 100)]
        [0.3, 0.3, 0.5, 0.7]
    """
    now = check_epoch(epoch)
    if not isinstance(steps, Mapping):
        raise TypeError(f"steps is a {type(steps).__name__}; give a dict from epoch to ratio, as {{0: 0.3, 5: 0.5}}")
    ratios = {check_epoch(start): check_ratio(ratio) for start, ratio in steps.items()}
    if 0 not in ratios:
        raise ValueError(f"steps begin at {min(ratios, default='no epoch')}; give the ratio for epoch 0 too")
    return ratios[max(start for start in ratios if start <= now)]


def exponential(epoch: int, initial_ratio: float, target_ratio: float, target_epoch: int) -> float:
    """Return the ratio at which the same fraction of what is left goes every epoch.

    With i = initial_ratio, t = target_ratio and T = target_epoch::

        1 - (1 - i) * ((1 - t) / (1 - i)) ** (epoch / T)    before T, and t from T on

    Args:
        epoch: number of the epoch, from 0.
        initial_ratio: the ratio at epoch 0, in [0, 1).
        target_ratio: the ratio from ``target_epoch`` on, above ``initial_ratio`` and below 1.
        target_epoch: at least 1.

    Raises:
        TypeError, ValueError: for epochs that are no integers or out of range, and ratios that are not numbers with
            0 <= initial_ratio < target_ratio < 1.

    Example:
        >>> [round(exponential(epoch, 0.2, 0.8, target_epoch=10), 4) for epoch in (0, 1, 5, 10, 99)]
        [0.2, 0.3036, 0.6, 0.8, 0.8]
    """
    now, last = check_epoch(epoch), check_epoch(target_epoch)
    initial, target = check_ratio(initial_ratio), check_ratio(target_ratio)
    if last == 0:
        raise ValueError("target_epoch is 0; give at least 1, or prune to target_ratio at once")
    if initial >= target:
        raise ValueError(
            f"initial_ratio is {initial} and target_ratio {target}; the target must be above the initial ratio "
            "(the multi-step schedule can stay or fall)"
        )
    if now == 0 or now >= last:
        return initial if now == 0 else target  # exactly, not rounded by the formula
    ratio = 1 - (1 - initial) * math.pow((1 - target) / (1 - initial), now / last)
    return min(max(initial, ratio), target)


def check_epoch(epoch: object) -> int:
    """Return ``epoch`` as an int.

    Raises:
        TypeError: if it is not an integer (a bool is not one).
        ValueError: if it is negative.

    Example:
        >>> check_epoch(3)
        3
    """
    if isinstance(epoch, bool) or not isinstance(epoch, numbers.Integral):
        raise TypeError(f"an epoch is {epoch!r}; epochs are integers, counted from 0")
    if epoch < 0:
        raise ValueError(f"an epoch is {epoch}; epochs are counted from 0")
    return int(epoch)
