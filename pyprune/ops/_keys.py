"""Scores as integers that order like them: the bits of float32(|w| * scale), or of float64 if one weight is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Integers = np.ndarray[Any, np.dtype[Any]]
_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Keys:
    """The keys of one weight, by the bits of |w|. A key never falls as the magnitude grows.

    Args:
        dtype: of the weight.
        scale: what magnitudes are multiplied with, or None.
        wide: whether scores are compared in float64.
    """

    dtype: torch.dtype
    scale: float | None
    wide: bool

    @property
    def magnitude_bits(self) -> int:
        """How many bits a magnitude has."""
        return 8 * self.dtype.itemsize - 1

    @property
    def infinity(self) -> int:
        """The bits of infinity; those above are NaN."""
        exponent = {torch.float64: 11, torch.float32: 8, torch.bfloat16: 8, torch.float16: 5}[self.dtype]
        return ((1 << exponent) - 1) << (self.magnitude_bits - exponent)

    def of(self, bits: Integers) -> Integers:
        """Return the keys of magnitudes that are not NaN, int64."""
        if self.dtype is torch.float64:
            magnitudes = bits.astype(np.uint64).view(np.float64)
        elif self.dtype is torch.float16:
            magnitudes = bits.astype(np.uint16).view(np.float16).astype(np.float64)
        else:
            wide = bits << 16 if self.dtype is torch.bfloat16 else bits
            magnitudes = wide.astype(np.uint32).view(np.float32).astype(np.float64)
        if self.scale is not None:
            with np.errstate(over="ignore"):
                magnitudes = magnitudes * self.scale
        if self.wide:
            return magnitudes.view(np.int64)
        with np.errstate(over="ignore"):
            return magnitudes.astype(np.float32).view(np.int32).astype(np.int64)

    def bits_up_to(self, key: int) -> int:
        """Return the largest bits of a magnitude, up to infinity, whose key is not above this one; -1 if none are.

        Example:
            >>> Keys(torch.bfloat16, None, False).bits_up_to(0x3F800001) == 0x3F80
            True
        """
        below, above = -1, self.infinity + 1
        while above - below > 1:
            # Sixteen places at a time, because a call takes as long for one as for them.
            places = np.unique(np.linspace(below, above, 18)[1:-1].astype(np.int64).clip(below + 1, above - 1))
            fits = int((self.of(places) <= key).sum())
            below, above = (
                int(places[fits - 1]) if fits else below,
                int(places[fits]) if fits < len(places) else above,
            )
        return below


def magnitude_bits(tensor: Tensor) -> Tensor:
    """Return the bits of |w|, as integers of the same size, in one row."""
    flat = tensor.detach().reshape(-1)
    integers = _SAME_SIZE[flat.element_size()]
    return flat.view(integers) & torch.iinfo(integers).max


def largest_key(wide: bool) -> int:
    """Return a key that no score is above."""
    return 2**63 - 1 if wide else 2**31 - 1
