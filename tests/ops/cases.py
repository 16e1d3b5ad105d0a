"""Weights to test on, shared by the tests of all operators."""

import torch
from torch import Tensor

from pyprune import ops

DTYPES = ops.WEIGHT_DTYPES


def adversarial(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return a finite weight with the named distribution."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    tiny = torch.finfo(dtype).tiny
    values = {
        "normal": normal,
        "equal": torch.full(shape, -0.25, dtype=torch.float64),
        "zeros": normal * 0,  # both +0.0 and -0.0
        "two values": torch.where(uniform < 0.7, 0.5, -1.0),
        "mostly zeros": torch.where(uniform < 0.7, 0.0, normal),
        "sorted": normal.flatten().sort().values.reshape(shape),
        "heavy tail": (normal / uniform.clamp(min=1e-3)).clamp(-6e4, 6e4),
        "one binade": 1 + uniform,
        "denormal": normal * tiny / 8,
        "few values": (normal * 2).round(),
    }[kind]
    return values.to(dtype)


KINDS = (
    "normal", "equal", "zeros", "two values", "mostly zeros", "sorted", "heavy tail", "one binade", "denormal",
    "few values",
)  # fmt: skip


def layouts(weight: Tensor) -> dict[str, Tensor]:
    """Return tensors with the values of a 4-d weight and other strides."""
    wide = torch.zeros(*weight.shape[:-1], weight.shape[-1] * 2 + 1, dtype=weight.dtype, device=weight.device)
    wide[..., 1::2] = weight
    padded = torch.zeros(weight.numel() + 3, dtype=weight.dtype, device=weight.device)
    padded[3:] = weight.flatten()
    return {
        "contiguous": weight.contiguous(),
        "channels_last": weight.contiguous(memory_format=torch.channels_last),
        "transposed": weight.transpose(0, 1).contiguous().transpose(0, 1),
        "reversed": weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "sliced": wide[..., 1::2],
        "unaligned": padded[3:].view(weight.shape),
    }
