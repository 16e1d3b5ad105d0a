"""Which layers put out what the model puts out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyprune.modules.activations import channel_dim
from pyprune.modules.channels import KEEP_MEANING, Channels, Followed
from pyprune.modules.evaluation import check_initialized, look


def last_layers(model: nn.Module, inputs: Any = None) -> Sequence[nn.Module]:
    """Return the linear and convolution layers whose channels are in the outputs of a model, by one forward pass.

    Without inputs it is the last one that the model has.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.Softmax(1))
        >>> last_layers(model) == last_layers(model, torch.ones(1, 2)) == [model[2]]
        True
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    if inputs is None:
        return layers[-1:]
    check_initialized(model)
    followed = Followed(KEEP_MEANING)

    def after_layer(layer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.layout is torch.strided:
            followed.made(output, Channels((layer,), channel_dim(layer, output)))

    outputs = look(model, inputs, followed, after=[(layer, after_layer) for layer in layers])
    seen = {layer for leaf in tree_leaves(outputs) for layer in followed.layers(leaf)}
    return [layer for layer in layers if layer in seen]
