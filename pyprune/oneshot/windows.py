"""What a convolution multiplies its kernel with: a window for each position of its output."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from pyprune.modules.products import Window

# Bytes of windows that are copied at a time.
_PIECE = 2**27


def count_positions(given: Tensor, window: Window) -> tuple[int, ...]:
    """Return the sizes of the output of a convolution; for its input see `windows_of`."""
    return tuple(_unfolded(given, window).shape[2 : 2 + len(window.kernel)])


def windows_of(given: Tensor, window: Window, real: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the windows of an input, a piece at a time: (groups, samples, positions of the kernel by channels).

    Args:
        given: the input, (groups, examples, positions..., channels of a group).
        window: how the convolution moves.
        real: (examples, positions of the output), bool: which count.

    Example:
        >>> window = Window((3,), (1,), (1,), (1,), False, (0,))
        >>> [tuple(piece.shape) for piece in windows_of(torch.randn(1, 2, 5, 4), window)]
        [(1, 10, 12)]
    """
    view = _unfolded(given, window)
    positions = 1 + len(window.kernel)  # examples, and those of the output
    size = max(1, view.element_size() * view.shape[:1].numel() * view.shape[1 + positions :].numel())
    sizes = view.shape[1 : 1 + positions]
    # Along the first dimensions: the windows of one large image may be too much already.
    steps = [max(1, _PIECE // (size * sizes[i + 1 :].numel())) for i in range(positions)]
    starts = (range(0, n, step) for n, step in zip(sizes, steps, strict=True))
    for place in itertools.product(*starts):
        here = [slice(start, start + step) for start, step in zip(place, steps, strict=True)]
        everywhere = (slice(None), *here)
        piece = view[everywhere].flatten(1 + positions).flatten(1, positions)
        yield piece if real is None else piece[:, real[tuple(here)].flatten()]


def _unfolded(x: Tensor, window: Window) -> Tensor:
    """Return a view: (groups, examples, positions of the output..., positions of the kernel..., channels)."""
    dims = len(window.kernel)
    steps = window.stride
    if window.is_transposed:
        # It is a convolution of the input with zeros between and around, with the kernel turned. Here the input is.
        sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:-1], window.stride, strict=True)]
        stuffed = x.new_zeros(*x.shape[:2], *sizes, x.shape[-1])
        places = [slice(None)] * 2 + [slice(None, None, stride) for stride in window.stride]
        stuffed[tuple(places)] = x
        around = [d * (k - 1) - p for d, k, p in zip(window.dilation, window.kernel, window.padding, strict=True)]
        ends = [side + more for side, more in zip(around, window.output_padding, strict=True)]
        x = _padded(stuffed, around, ends).flip(tuple(range(2, 2 + dims)))
        steps = (1,) * dims
    else:
        x = _padded(x, window.padding, window.padding)
    for i, (kernel, step, dilation) in enumerate(zip(window.kernel, steps, window.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, step)[..., ::dilation]
    return x.movedim(2 + dims, -1)


def _padded(x: Tensor, before: tuple[int, ...] | list[int], after: tuple[int, ...] | list[int]) -> Tensor:
    sides = [0, 0]  # the channels are last
    for first, last in zip(reversed(before), reversed(after), strict=True):
        sides += [first, last]
    return F.pad(x, sides) if any(sides) else x


def real_windows(given: Tensor, window: Window, real: Tensor) -> Tensor | None:
    """Return which windows are of real positions: (examples, positions of the output); None if that cannot be said.

    Args:
        given, window: as in `windows_of`, over one dimension of positions.
        real: (examples, positions of the input).
    """
    (made,) = count_positions(given, window)
    if window.is_transposed or window.stride != (1,) or made < real.shape[1]:
        return None
    rest = torch.zeros(len(real), made - real.shape[1], dtype=torch.bool, device=real.device)
    return torch.cat([real, rest], 1)  # causal convolutions make more than is used
