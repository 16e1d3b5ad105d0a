"""The state of a model by the names of the plain one, whatever wraps it or its parts."""

from typing import Any

from torch import nn

from pyprune.modules.attachments import dense_modules


def plain_state(model: nn.Module) -> dict[str, Any]:
    """Return ``model.state_dict()`` with the names of the plain model.

    Example:
        >>> list(plain_state(nn.DataParallel(nn.Linear(2, 2))))
        ['weight', 'bias']
    """
    plain = plain_names(model)
    return {plain.get(name, name): tensor for name, tensor in model.state_dict().items()}


def plain_names(model: nn.Module) -> dict[str, str]:
    """Return the names of the plain model by those of the state_dict.

    Example:
        >>> plain_names(nn.DataParallel(nn.Linear(2, 2)))
        {'module.weight': 'weight', 'module.bias': 'bias'}
    """
    pairs = zip(dense_modules(model, plain=False), dense_modules(model), strict=True)
    modules = {wrapped: plain for (wrapped, _), (plain, _) in pairs}
    names = {}
    for name in model.state_dict():
        module, _, attribute = name.rpartition(".")
        names[name] = f"{modules.get(module, module)}.{attribute}".lstrip(".")
    return names
