"""Optimizers that follow when parameters go."""

from collections.abc import Iterable, Set

from torch import nn
from torch.optim import Optimizer

from pyprune.modules.attachments import parameters_of
from pyprune.modules.optimizer import innermost_of


def optimizers_of(model: nn.Module, given: object) -> list[Optimizer]:
    """Return the optimizers that a user gave, without wrappers; none of None.

    Raises:
        TypeError: if one is no optimizer.
        ValueError: if one trains nothing of the model.

    Example:
        >>> import torch
        >>> linear = nn.Linear(2, 2)
        >>> len(optimizers_of(linear, torch.optim.SGD(linear.parameters())))
        1
    """
    optimizers = innermost_of(given)
    own = {id(parameter) for parameter in parameters_of(model)}
    for one in optimizers:
        if not any(id(parameter) in own for group in one.param_groups for parameter in group["params"]):
            raise ValueError(
                f"optimizer, a {type(one).__name__}, has no parameter of this {type(model).__name__}; give the one "
                "that trains it"
            )
    return optimizers


def forget(model: nn.Module, optimizers: Iterable[Optimizer], gone: Set[nn.Parameter]) -> None:
    """Clear gradients, and take parameters out of the groups of optimizers, and their states; groups stay.

    Gradients of one step are of one model. It may be done twice.

    Example:
        >>> import torch
        >>> linear = nn.Linear(2, 2)
        >>> weight, bias = linear.parameters()
        >>> optimizer = torch.optim.SGD([weight, bias])
        >>> forget(linear, [optimizer], {bias})
        >>> [one is weight for one in optimizer.param_groups[0]["params"]]
        [True]
    """
    for parameter in parameters_of(model):
        parameter.grad = None
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(one in gone for one in group["params"]):
                group["params"] = [one for one in group["params"] if one not in gone]
        for parameter in gone:
            optimizer.state.pop(parameter, None)
