"""Dense layers again."""

from typing import TypeVar

import torch
from torch import nn

from pyprune.modules.attachments import check_module
from pyprune.modules.undo import Change
from pyprune.runtime.sparse_layer import SparseLayer
from pyprune.runtime.sparse_layers import is_semi_structured, take

_M = TypeVar("_M", bound=nn.Module)


@torch.inference_mode(False)
@torch.no_grad()
def densify(model: _M) -> _M:
    """Undo `accelerate`, in place: dense weights as they were, but for values that were rounded.

    Returns:
        The model.

    Raises:
        TypeError: if it is no module.

    Example:
        >>> densify(nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    check_module(model)
    with Change(model):
        for module in list(model.modules()):
            if isinstance(module, SparseLayer):
                take(module)
            else:
                for name, parameter in module._parameters.items():
                    if is_semi_structured(parameter):
                        assert parameter is not None
                        dense = parameter.to_dense()
                        module._parameters[name] = nn.Parameter(dense, parameter.requires_grad)
    return model
