"""Which tensors a forward pass uses as weights, and how."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from pyprune.methods.layout import Layout
from pyprune.modules.evaluation import evaluating, forward, untouched
from pyprune.modules.uses import Use, watching_uses

BOTH = "it is used in both directions, as x @ w and as F.linear(x, w)"


def used_as_weights(model: nn.Module, inputs: Any) -> dict[nn.Parameter, Layout]:
    """Run the model once; return what a linear, convolution, matmul or embedding takes as its weight, and how.

    Both sides of a matrix product count; views and copies (casts, ``contiguous``, entries picked by an index) of a
    parameter count as the parameter, and so does what is computed from weights alone. The pass runs in evaluation
    mode without gradients; buffers, training flags and torch's random state are given back.

    Returns:
        What the dimensions of each count, if all its products say the same.

    Example:
        >>> import torch
        >>> linear = nn.Linear(2, 3)
        >>> layout = used_as_weights(linear, torch.ones(1, 2))[linear.weight]
        >>> layout.outputs, layout.inputs
        (0, 1)
    """
    seen: dict[nn.Parameter, set[Layout]] = {}

    def on_use(use: Use) -> None:
        seen.setdefault(use.part.parameter, set()).add(use.layout)

    with evaluating(model), untouched(model), watching_uses(model, on_use, in_recurrent_layers=False):
        forward(model, inputs)
    return {parameter: one_layout(layouts) for parameter, layouts in seen.items()}


def one_layout(layouts: Iterable[Layout]) -> Layout:
    """Return what several uses of a weight agree on; rows that are only looked up do not count beside products.

    Example:
        >>> one_layout([Layout(1, 0), Layout(is_table=True)]) == Layout(1, 0)
        True
        >>> one_layout([Layout(1, 0), Layout(0, 1)]).problem
        'it is used in both directions, as x @ w and as F.linear(x, w)'
    """
    found = set(layouts)
    products = {one for one in found if not one.is_table} or found
    # What says less than others is no contradiction.
    said = {one for one in products if one.is_clear} or products
    if len(said) == 1:
        return next(iter(said))
    problems = [one.problem for one in said if one.problem]
    return Layout(None, None, problem=problems[0] if problems else BOTH)
