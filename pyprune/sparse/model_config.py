"""What ``config.json`` of transformers says of how the weights beside it are stored."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from pyprune.checks import shown
from pyprune.console import warn
from pyprune.sparse.format import Stored
from pyprune.sparse.reading import SparseFile

CONFIG = "config.json"
METHOD = "pyprune"
_ENTRY = "quantization_config"
_THEIRS = "compressed-tensors"
_SPARSE_FORMATS = ("sparse-bitmask", "sparse-24-bitmask")


def say_how_stored(folder: Path, names: list[str], layout: str | None) -> None:
    """Let the config in a folder say how its weights are packed, or no longer say it; a config of others stays.

    With the layout of pyprune, transformers stops without `pyprune.integrations.transformers`, and loads the model
    once that is imported. With that of compressed-tensors it asks that library.

    Args:
        folder: in which the config is to be changed.
        names: of the files with weights.
        layout: of `save_sparse`, or None if they are dense.
    """
    config = _config(folder / CONFIG)
    if config is None:
        return
    entry = config.get(_ENTRY)
    if entry and not _is_of_zeros(entry):
        if layout is not None:
            method = entry.get("quant_method") if isinstance(entry, dict) else entry
            warn(
                f"{CONFIG} says that the model is quantised ({shown(method)}), and cannot say that it is packed, "
                "too: transformers will not load it; expand it before"
            )
        return
    config.pop(_ENTRY, None)
    if layout is not None:
        config[_ENTRY] = {"quant_method": METHOD} if layout == "pyprune" else _theirs(folder, names)
    elif not entry:
        return
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(path: Path) -> dict[str, Any] | None:
    """Return a config of transformers, or None if there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_theirs = isinstance(config, dict) and ("model_type" in config or "architectures" in config)
    return config if is_theirs else None


def _is_of_zeros(entry: Any) -> bool:
    """Whether an entry says no more than how zeros are stored."""
    if not isinstance(entry, dict):
        return False
    sparsity = entry.get("sparsity_config")
    in_theirs = isinstance(sparsity, dict) and sparsity.get("format") in _SPARSE_FORMATS
    theirs = entry.get("quant_method") == _THEIRS and in_theirs and not entry.get("config_groups")
    return entry.get("quant_method") == METHOD or theirs


def _theirs(folder: Path, names: list[str]) -> dict[str, Any]:
    packed = dict(_packed(folder, names))
    size = sum(prod(one.shape or ()) for one in packed.values())
    kept = sum(one.nnz or 0 for one in packed.values())
    return {
        "quant_method": _THEIRS,
        "format": "dense",
        "quantization_status": "compressed",
        "sparsity_config": {
            "format": _SPARSE_FORMATS[0],
            "global_sparsity": 1 - kept / size if size else 0.0,
            "ignore": [],
            "registry_requires_subclass": False,
            "sparsity_structure": "unstructured",
            "targets": [name.removesuffix(".weight") for name in packed],
        },
    }


def _packed(folder: Path, names: list[str]) -> Iterator[tuple[str, Stored]]:
    for name in names:
        with SparseFile(folder / name) as file:
            yield from ((tensor, stored) for tensor, stored in file.tensors.items() if stored.sparse)
