"""Models of transformers in compressed checkpoints; `pyprune.integrations.transformers` has this function."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pyprune.checks import check_choice, check_path
from pyprune.integrations.compressed_loading import METHOD
from pyprune.integrations.pretrained import save_pretrained
from pyprune.sparse.codec import zstd
from pyprune.sparse.encoding import Options
from pyprune.sparse.format import CODECS, KEY
from pyprune.sparse.reading import SparseFile
from pyprune.sparse.writing import Source, Written, write_sparse

_CONFIG = "config.json"
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
        save_pretrained(model, beside, max_shard_size=max_shard_size)
        written = _compress(Path(beside), Options(codec))
        folder.mkdir(exist_ok=True)
        # The config comes last: without it there is no model in the folder.
        for file in sorted(Path(beside).iterdir(), key=lambda one: (one.name == _CONFIG, one.name)):
            os.replace(file, folder / file.name)
    return written


def _check_plain(model: Any) -> None:
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError("the model is quantised; prune and save it before it is quantised")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has adapters, and only these would be saved; merge them, or delete_adapter() before"
        )


def _compress(folder: Path, options: Options) -> Written:
    """Put compressed files in the place of the dense ones, one by one, and say so in the index and the config."""
    done: list[Written] = []
    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with SparseFile(path) as dense:
            sources = [
                Source(name, dense.dtype(name), dense.shape(name), lambda name=name: dense.read(name))  # type: ignore[misc]
                for name in dense.names
            ]
            metadata = {key: one for key, one in dense.metadata.items() if key != KEY}
            done.append(write_sparse(path, sources, options, metadata=metadata))
        with SparseFile(path) as sparse:
            places |= dict.fromkeys(sparse.header.entries, path.name)
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["metadata"]["total_size"] = sum(one.file_bytes for one in done)
        index["weight_map"] = dict(sorted(places.items()))
        _write_json(path, index)
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    _write_json(folder / _CONFIG, config | {"quantization_config": {"quant_method": METHOD}})
    return _sum(done)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sum(done: Sequence[Written]) -> Written:
    return Written(
        sum(one.file_bytes for one in done),
        sum(one.dense_bytes for one in done),
        {name: count for one in done for name, count in one.kept.items()},
        {name: count for one in done for name, count in one.negative_zeros.items()},
    )
