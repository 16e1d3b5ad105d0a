"""Tensors to store, shared by the tests of sparse files."""

import torch
from torch import Tensor

DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip


def raw(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def some_bits(shape: tuple[int, ...], dtype: torch.dtype, zeros: float, seed: int = 0) -> Tensor:
    """Return any bits, NaN payloads and infinities among them, and so many zeros, none of which is -0.0."""
    generator = torch.Generator().manual_seed(seed)
    count, size = torch.Size(shape).numel(), dtype.itemsize
    data = torch.randint(0, 256, (count, size), dtype=torch.uint8, generator=generator)
    data[:, 0] |= 1
    data[torch.rand(count, generator=generator) < zeros] = 0
    return data.reshape(-1).view(dtype).reshape(shape)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert raw(found) == raw(wanted)
