"""What a model costs besides time: parameters, multiply-accumulates, and bytes in memory and on a disk."""

import copy
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyprune.modules.attachments import parameters_of
from pyprune.modules.statistics import pruning_statistic
from pyprune.modules.targets import all_parameters
from pyprune.sparse.save_sparse import save_sparse

_PIECE = 1 << 24


def memory_of(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, of each once.

    Example:
        >>> memory_of(nn.BatchNorm1d(2))
        40
    """
    tensors = [*parameters_of(model), *model.buffers(), *tree_leaves(model.state_dict())]
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), storage.device] = max(tensor.nbytes, storage.nbytes())
    return sum(storages.values())


def files_of(model: nn.Module, dense: nn.Module) -> tuple[int, int, int]:
    """Return the bytes of the state as it is, zipped (level 6 of zlib), and of the dense model's in a sparse file.

    Raises:
        TypeError, ValueError: if the state cannot be saved in a sparse file.
    """
    with tempfile.TemporaryDirectory() as folder:
        packed = save_sparse(dense, Path(folder, "model.safetensors"))
    state = {(one.data_ptr(), one.shape): one for one in model.state_dict().values() if one.numel()}
    return sum(one.nbytes for one in state.values()), sum(map(_zipped, state.values())), packed.file_bytes


def _zipped(tensor: Tensor) -> int:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    zipper = zlib.compressobj(6)
    size = 0
    for start in range(0, len(data), _PIECE):
        size += len(zipper.compress(data[start : start + _PIECE]))
    return size + len(zipper.flush())


class _OnCopies(nn.Module):
    """Gives a model copies of its inputs, which may be caches that it adds to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.training = model.training

    def forward(self, *args: Any, **keywords: Any) -> Any:
        return self.inner(*copy.deepcopy(args), **copy.deepcopy(keywords))


def counts_of(model: nn.Module, inputs: Sequence[Any]) -> tuple[int, int, int, int]:
    """Return parameters and zeros in them, the multiply-accumulates of all inputs, and those without zeros.

    Raises:
        ValueError: if zeros cannot be counted.
    """
    parameters = sum(target.parameter.numel() for target in all_parameters(model))
    statistics = [pruning_statistic(_OnCopies(model), examples_inputs=one) for one in inputs]
    zeros = round(statistics[0].global_pruning_ratio * parameters)
    macs = sum(one.macs or 0 for one in statistics)
    return parameters, zeros, macs, sum(one.macs_without_zeros or 0 for one in statistics)
