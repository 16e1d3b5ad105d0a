"""Short texts that are the same only for the same bits."""

import hashlib
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

_PLAIN = (str, bytes, numbers.Number, type(None))


def digest(*values: Any) -> str:
    """Return a text that two values share only if their tensors have the same bits, and numbers and texts are equal.

    Of what is no tensor, array, number or text only the type counts.

    Example:
        >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(-torch.zeros(2))
        (True, False)
    """
    found = hashlib.blake2b(digest_size=16)
    for value in values:
        # Batches of tokenizers are mappings that torch does not look into.
        leaves, structure = tree_flatten(dict(value) if isinstance(value, Mapping) else value)
        found.update(str(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                data = leaf.detach().cpu().contiguous()
                found.update(f"{data.dtype}{tuple(data.shape)}".encode())
                found.update(data.reshape(-1).view(torch.uint8).numpy().data)
            elif isinstance(leaf, np.ndarray):
                found.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
            else:
                found.update(repr(leaf if isinstance(leaf, _PLAIN) else type(leaf)).encode())
    return found.hexdigest()
