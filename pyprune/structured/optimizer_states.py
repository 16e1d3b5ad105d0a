"""Optimizers that follow when parameters go, or become smaller. Each of these can be done twice."""

from collections.abc import Iterable, Set

from torch import nn
from torch.optim import Optimizer


def forget(optimizers: Iterable[Optimizer], gone: Set[nn.Parameter]) -> None:
    """Take parameters out of the groups of optimizers, and their states with them; groups stay.

    Example:
        >>> import torch
        >>> weight, bias = nn.Linear(2, 2).parameters()
        >>> optimizer = torch.optim.SGD([weight, bias])
        >>> forget([optimizer], {bias})
        >>> [one is weight for one in optimizer.param_groups[0]["params"]]
        [True]
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(one in gone for one in group["params"]):
                group["params"] = [one for one in group["params"] if one not in gone]
        for parameter in gone:
            optimizer.state.pop(parameter, None)
