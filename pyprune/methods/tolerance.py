"""How much worse a score is than another, and how much worse it may be."""

import math

from pyprune.checks import check_number


def worsening(baseline: float, score: float, higher_is_better: bool) -> float:
    """Return by how much a score is worse than the baseline; NaN is infinitely worse.

    Example:
        >>> worsening(0.75, 0.5, higher_is_better=True), worsening(2.0, 1.5, higher_is_better=False)
        (0.25, -0.5)
    """
    drop = baseline - score if higher_is_better else score - baseline
    return math.inf if math.isnan(drop) else drop


def check_drop(name: str, drop: object) -> float | None:
    """Return an argument that says how much of a score may be lost, or None.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is negative, NaN or infinite.

    Example:
        >>> check_drop("max_drop", 1)
        1.0
    """
    if drop is None:
        return None
    what = "what the score may lose, a number, 0 or more, in its own units"
    return check_number(name, drop, what=f"{what}, or None", least=0)
