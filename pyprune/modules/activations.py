"""What a layer is given and gives, as figures of its channels."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


def recurrent_input(module: nn.Module, attribute: str) -> str | None:
    """Say what a weight of a recurrent layer multiplies, if it can be seen: inputs of the first layer, or states."""
    if isinstance(module, nn.RNNCellBase):
        return "input" if attribute == "weight_ih" else "state"
    if isinstance(module, nn.RNNBase) and module.proj_size == 0 and module.num_layers == 1:
        if attribute.startswith("weight_ih"):
            return "input"
        if attribute.startswith("weight_hh"):
            return "backward states" if attribute.endswith("_reverse") else "states"
    return None


def input_squares(
    kind: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Tensor:
    """Sum the squares of what a weight multiplies, for each input channel; of a convolution a row for each group."""
    given = args[0] if args else kwargs["input"]
    if kind == "input":
        sums = _sum_squares(layer, given)
        return sums.reshape(layer.groups, -1) if isinstance(layer, nn.modules.conv._ConvNd) else sums
    first = args[1] if len(args) > 1 else kwargs.get("hx")
    first = first[0] if isinstance(first, tuple) else first
    direction, size = int(kind == "backward states"), cast(int, layer.hidden_size)
    if kind == "state":  # a cell; without a state it begins with zeros
        return _sum_squares(layer, first) if first is not None else given.new_zeros(size, dtype=torch.float64)
    # A layer: all states but the last, and the first one; outputs are the states of both directions side by side.
    states, last = output
    last = last[0] if isinstance(last, tuple) else last
    sums = _sum_squares(layer, states)[direction * size : (direction + 1) * size] - _sum_squares(
        layer, last[direction]
    )
    sums = sums if first is None else sums + _sum_squares(layer, first[direction])
    return sums.clamp(min=0)


def _sum_squares(layer: nn.Module, tensor: Any) -> Tensor:
    seen, others = but_channels(layer, tensor.data if isinstance(tensor, nn.utils.rnn.PackedSequence) else tensor)
    wide = torch.float64 if seen.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(seen, dim=others, dtype=wide)
    return norms.double().square()


def channel_dim(layer: nn.Module, tensor: Tensor) -> int:
    """Return which dimension of a layer's input or output counts channels: before the positions of a convolution."""
    weight = getattr(layer, "weight", None) if hasattr(layer, "kernel_size") else None
    positions = weight.dim() - 2 if isinstance(weight, Tensor) else 0
    return tensor.dim() - 1 - positions


def but_channels(layer: nn.Module, tensor: Any) -> tuple[Tensor, list[int]]:
    """Return activations, and all dimensions of them but that of the channels."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a {type(layer).__name__} has a {type(tensor).__name__} where a tensor was expected")
    tensor = tensor.detach().unsqueeze(0)  # a sample may come without a batch
    channels = channel_dim(layer, tensor)
    return tensor, [dim for dim in range(tensor.dim()) if dim != channels]
