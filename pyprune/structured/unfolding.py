"""Layers as matrices: what a linear layer or a convolution multiplies its weight with, sample by sample.

The matrix of a layer is (groups, inputs of a group, outputs of a group). The inputs of a convolution are the entries
of its window, channels by positions of the kernel; a sample is one position of its output.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
# Bytes of windows that are copied at a time.
_PIECE = 2**27


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a Linear, a convolution (transposed or not), or a `Conv1D` of transformers.

    Example:
        >>> is_layer(nn.Linear(2, 2)), is_layer(nn.Bilinear(2, 2, 2))
        (True, False)
    """
    return isinstance(module, (nn.Linear, _ConvNd)) or _is_transposed_linear(module)


def _is_transposed_linear(module: nn.Module) -> bool:
    # By name: transformers is not imported.
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def groups_of(layer: nn.Module) -> int:
    """Return the number of groups of a convolution; others have one."""
    return layer.groups if isinstance(layer, _ConvNd) else 1


def matrix_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight of a layer, or a mask of it, as (groups, inputs, outputs).

    Example:
        >>> tuple(matrix_of(nn.Conv2d(4, 6, 3, groups=2), torch.ones(6, 2, 3, 3)).shape)
        (2, 18, 3)
    """
    if _is_transposed_linear(layer):
        return weight[None]
    if isinstance(layer, _ConvTransposeNd):
        turned = weight.flip(tuple(range(2, weight.dim())))
        by_group = turned.reshape(layer.groups, -1, weight.shape[1], turned[0, 0].numel())
        return by_group.transpose(2, 3).flatten(1, 2)
    return weight.reshape(groups_of(layer), -1, weight[0].numel()).mT


def weight_of(layer: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    """Undo `matrix_of`.

    Example:
        >>> layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
        >>> torch.equal(weight_of(layer, matrix_of(layer, layer.weight), layer.weight.shape), layer.weight)
        True
    """
    if _is_transposed_linear(layer):
        return matrix[0]
    if isinstance(layer, _ConvTransposeNd):
        by_group = torch.unflatten(matrix, 1, (shape[0] // layer.groups, -1)).transpose(2, 3)
        return by_group.reshape(shape).flip(tuple(range(2, len(shape))))
    return matrix.mT.reshape(shape)


def call(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Return what a layer makes of an input with another weight and bias; ``y`` has the shape that is to come out."""
    if _is_transposed_linear(layer):
        return F.linear(x, weight.T, bias)
    if isinstance(layer, _ConvTransposeNd):
        transposed: Any = _TRANSPOSED[len(layer.kernel_size)]
        padding = _output_padding(layer, x, y)
        made: Tensor = transposed(x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)
        return made
    if isinstance(layer, _ConvNd):
        convolution: Any = _CONVOLUTIONS[len(layer.kernel_size)]
        made = convolution(_padded(layer, x), weight, bias, layer.stride, 0, layer.dilation, layer.groups)
        return made
    return F.linear(x, weight, bias)


def samples(layer: nn.Module, x: Tensor, *ys: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an input and what is made of it as matrices, a piece at a time, in the accuracy that they have.

    Args:
        layer: the layer, or one of several that see this input in the same way.
        x: its input.
        ys: outputs of this shape, of one layer or of several.

    Returns:
        Pairs of (groups, samples, inputs of a group) and (groups, samples, outputs of a group, of all layers).

    Example:
        >>> conv = nn.Conv1d(2, 3, 5, padding=2)
        >>> x = torch.randn(4, 2, 7)
        >>> [(tuple(a.shape), tuple(b.shape)) for a, b in samples(conv, x, conv(x))]
        [((1, 28, 10), (1, 28, 3))]
    """
    windows = _windows(layer, x, ys[0])
    outputs = torch.cat([_by_position(layer, y) for y in ys], -1)
    positions = outputs.dim() - 2
    # Along the first dimensions of the positions: the windows of one large image may be too much already.
    size = 8 * windows[(0,) * positions].numel()
    steps = [max(1, _PIECE // max(1, size * outputs.shape[i + 1 : positions].numel())) for i in range(positions)]
    starts = (range(0, n, step) for n, step in zip(outputs.shape, steps, strict=False))
    for place in itertools.product(*starts):
        here = tuple(slice(start, start + step) for start, step in zip(place, steps, strict=True))
        a, b = windows[here].flatten(positions + 1), outputs[here]
        yield a.flatten(0, positions - 1).transpose(0, 1), b.flatten(0, positions - 1).transpose(0, 1)


def channel_dim(layer: nn.Module) -> int:
    """Return the dimension of an output of a layer that counts channels, from the end.

    Example:
        >>> channel_dim(nn.Conv2d(1, 5, 1)), channel_dim(nn.Linear(1, 5))
        (-3, -1)
    """
    return -len(layer.kernel_size) - 1 if isinstance(layer, _ConvNd) else -1


def _by_position(layer: nn.Module, y: Tensor) -> Tensor:
    """Return a view of an output: (positions, ..., groups, outputs of a group)."""
    batch = _with_batch(layer, y) if isinstance(layer, _ConvNd) else y.reshape(-1, y.shape[-1])
    return torch.unflatten(batch.movedim(channel_dim(layer), -1), -1, (groups_of(layer), -1))


def _with_batch(layer: _ConvNd, x: Tensor) -> Tensor:
    return x if x.dim() == len(layer.kernel_size) + 2 else x[None]


def _windows(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return a view of an input: (positions, ..., groups, channels of a group, *kernel)."""
    if not isinstance(layer, _ConvNd):
        return x.reshape(-1, 1, x.shape[-1])
    dims = len(layer.kernel_size)
    if isinstance(layer, _ConvTransposeNd):
        x, steps = _stuffed(layer, x, y), (1,) * dims
    else:
        x, steps = _with_batch(layer, _padded(layer, x)), layer.stride
    for i, (kernel, step, dilation) in enumerate(zip(layer.kernel_size, steps, layer.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, step)[..., ::dilation]
    return torch.unflatten(x.movedim(1, 1 + dims), 1 + dims, (layer.groups, -1))


def _padded(layer: _ConvNd, x: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode)


def _stuffed(layer: _ConvTransposeNd, x: Tensor, y: Tensor) -> Tensor:
    """Return the input with zeros between and around: a transposed convolution is one of that, with stride 1."""
    x = _with_batch(layer, x)
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], layer.stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    places = tuple(slice(None, None, stride) for stride in layer.stride)
    stuffed[(slice(None), slice(None)) + places] = x  # noqa: RUF005 (Python 3.10 unpacks nothing in an index)
    padding: list[int] = []
    for i, more in enumerate(_output_padding(layer, x, y)):
        around = layer.dilation[i] * (layer.kernel_size[i] - 1) - int(layer.padding[i])
        padding = [around, around + more, *padding]
    return F.pad(stuffed, padding)


def _output_padding(layer: _ConvTransposeNd, x: Tensor, y: Tensor) -> list[int]:
    """Say how much larger the output is than need be, which the call may have said (``output_size``)."""
    dims = len(layer.kernel_size)
    least = [
        (x.shape[i - dims] - 1) * layer.stride[i]
        - 2 * int(layer.padding[i])
        + layer.dilation[i] * (layer.kernel_size[i] - 1)
        + 1
        for i in range(dims)
    ]
    return [size - small for size, small in zip(y.shape[-dims:], least, strict=True)]
