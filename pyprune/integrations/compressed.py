"""Models of transformers in compressed checkpoints; `pyprune.integrations.transformers` has this function."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pyprune.checks import check_choice, check_path
from pyprune.integrations.pretrained import save_pretrained
from pyprune.sparse.codec import zstd
from pyprune.sparse.convert import compress_checkpoint
from pyprune.sparse.format import CODECS
from pyprune.sparse.model_config import CONFIG
from pyprune.sparse.writing import Written

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def save_compressed(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    codec: str | None = None,
    max_shard_size: int | str | None = None,
) -> Written:
    """Save a model of transformers, masked or stripped, in files that hold its zeros as bits.

    ``from_pretrained`` of transformers (5.24) reads the folder after ``import pyprune.integrations.transformers``:
    the model is then a plain one, whose weights have zeros. Without that import it fails at their shapes. What
    `pyprune.save_sparse` says of its files is true of these.

    Args:
        model: of transformers.
        folder: where to; it is made if it is not there, and must have no weights in it. The dense files are beside
            it while this runs.
        codec: as in `pyprune.save_sparse`: "zstd" is smaller and slower.
        max_shard_size: of the dense tensors in one file, as transformers takes it ("5GB").

    Returns:
        The bytes of all files and of the dense tensors, and what was kept of each tensor, by its name in the files.

    Raises:
        TypeError: if ``model`` is none of transformers.
        ValueError: if it has gates, is quantised or has adapters, if the folder is a file or has weights in it, or
            for what `save_pretrained` refuses; nothing is written then.
        ImportError: if the codec's package is missing.

    Example:
        >>> save_compressed(model, "small", codec="zstd")  # doctest: +SKIP
        >>> again = AutoModelForCausalLM.from_pretrained("small")  # doctest: +SKIP
    """
    check_path("folder", folder)
    if codec is not None:
        check_choice("codec", codec, CODECS)
        zstd()
    _check_plain(model)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    found = [file.name for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))]
    if found:
        raise ValueError(f"{folder} has weights in it ({found[0]}); give another folder, or remove them")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        dense, small = Path(beside, "dense"), Path(beside, "small")
        save_pretrained(model, dense, max_shard_size=max_shard_size)
        written = compress_checkpoint(dense, small, codec=codec)
        folder.mkdir(exist_ok=True)
        # The config comes last: without it there is no model in the folder.
        for file in sorted(small.iterdir(), key=lambda one: (one.name == CONFIG, one.name)):
            os.replace(file, folder / file.name)
    return _sum(written)


def _check_plain(model: Any) -> None:
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError("the model is quantised; prune and save it before it is quantised")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has adapters, and only these would be saved; merge them, or delete_adapter() before"
        )


def _sum(done: Sequence[Written]) -> Written:
    return Written(
        sum(one.file_bytes for one in done),
        sum(one.dense_bytes for one in done),
        {name: count for one in done for name, count in one.kept.items()},
        {name: count for one in done for name, count in one.negative_zeros.items()},
    )
