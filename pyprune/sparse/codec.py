"""The codec "zstd": exponents and bits as zstd frames, mantissas, which are noise, as they are."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVEL = 3
# Smaller tensors are not worth a frame, and types that are no weights not worth a thought.
LEAST = 256
_SPLIT = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def is_coded(dtype: torch.dtype, count: int) -> bool:
    """Whether a tensor is coded: it then is bytes, which come last in a file.

    Example:
        >>> is_coded(torch.bfloat16, 1000), is_coded(torch.int64, 1000), is_coded(torch.bfloat16, 8)
        (True, False, False)
    """
    return count >= LEAST and (dtype.is_floating_point or dtype in (torch.int8, torch.uint8))


def zstd() -> Any:
    """Return the package zstandard.

    Raises:
        ImportError: if it is not installed, with what to do.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            'codec "zstd" needs the package zstandard: pip install "pyprune[zstd]", or pip install zstandard'
        ) from error
    return zstandard


def split(values: Tensor) -> tuple[Bytes, Bytes]:
    """Return the lower bytes of contiguous values, [n, bytes - 1], and the upper ones, [n].

    Bits are rotated left by one before, so that the upper byte of bfloat16 and float32 is the exponent.

    Example:
        >>> low, high = split(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
        >>> high.tolist(), low.tolist()
        ([127, 128], [[0], [1]])
    """
    size = values.dtype.itemsize
    if size == 1:
        high = values.reshape(-1).view(torch.uint8).numpy()
        return np.empty((high.size, 0), np.uint8), high
    words = values.reshape(-1).view(_SPLIT[size]).numpy()
    planes = ((words << 1) | (words >> (8 * size - 1))).view(np.uint8).reshape(-1, size)
    return np.ascontiguousarray(planes[:, :-1]), np.ascontiguousarray(planes[:, -1])


def join(low: Bytes, high: Bytes, dtype: torch.dtype) -> Tensor:
    """Return the values that were split.

    Example:
        >>> join(*split(torch.tensor([1.0, -2.0])), torch.float32)
        tensor([ 1., -2.])
    """
    size = dtype.itemsize
    planes = np.empty((high.size, size), np.uint8)
    planes[:, :-1], planes[:, -1] = low, high
    if size == 1:
        return torch.from_numpy(planes.reshape(-1)).view(dtype)
    words = planes.reshape(-1).view(f"<u{size}")
    return torch.from_numpy((words >> 1) | (words << (8 * size - 1))).view(dtype)


def compress(data: Bytes) -> Bytes:
    """Return a zstd frame that knows its size and has a checksum."""
    frame = zstd().ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True).compress(data.data)
    return np.frombuffer(frame, np.uint8)


def decompress(frame: Any, size: int) -> Bytes:
    """Return what was compressed, which must be so many bytes; nothing is allocated for a frame that says otherwise.

    Raises:
        ValueError: for any other frame, or damage.

    Example:
        >>> decompress(compress(np.arange(5, dtype=np.uint8)), 5).tolist()
        [0, 1, 2, 3, 4]
    """
    package = zstd()
    try:
        if package.get_frame_parameters(frame).content_size != size:
            raise ValueError(f"its zstd frame is not of the {size} bytes that it must have")
        data = package.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except package.ZstdError as error:
        raise ValueError(f"its zstd frame is damaged: {error}") from error
    if len(data) != size:
        raise ValueError(f"its zstd frame has {len(data)} bytes, and must have {size}")
    return np.frombuffer(data, np.uint8)
