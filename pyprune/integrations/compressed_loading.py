"""Compressed checkpoints in ``from_pretrained`` of transformers: a quantiser by the name "pyprune".

transformers asks the quantiser that ``config.json`` names about the model, and then reads the files itself. Tensors
are handed to it in their place, each read and checked when its turn comes, so that all that follows (names that
changed, fused experts, ties, types, devices, shards of ranks) is its own business. No hook of a quantiser reaches
that place: the function that reads the files is wrapped, and passes on all other checkpoints as they are.
"""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from pyprune.sparse.format import KEY
from pyprune.sparse.header import NAMES
from pyprune.sparse.model_config import METHOD
from pyprune.sparse.reading import SparseFile

_PARAMETERS = ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"]


def register() -> None:
    """Let ``from_pretrained`` read what `save_compressed` wrote; a transformers that cannot says so then."""
    quantizers = _quantizers()
    if quantizers is None or METHOD in quantizers.AUTO_QUANTIZER_MAPPING:
        return
    from transformers.quantizers import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class PypruneConfig(QuantizationConfigMixin):
        """What ``config.json`` says of a compressed checkpoint."""

        dequantize = True  # the model is a plain one once it is loaded

        def __init__(self, quant_method: str = METHOD) -> None:
            self.quant_method = quant_method

    class PypruneQuantizer(HfQuantizer):
        """Loads compressed checkpoints; see the head of this file."""

        def validate_environment(self, *, device_map: Any, weights_only: bool) -> None:
            """Raise ImportError where nothing can be handed over."""
            if not self.pre_quantized:
                raise ValueError(
                    "this checkpoint is not compressed; load it without quantization_config, and save it by "
                    "pyprune.integrations.transformers.save_compressed"
                )
            if not _is_wrapped():
                raise ImportError(
                    f"pyprune does not know how transformers {transformers.__version__} reads files, and loads "
                    "compressed checkpoints with 5.24; or read the tensors by pyprune.load_sparse"
                )

        def is_serializable(self) -> bool:
            """Whether ``save_pretrained`` may be called."""
            return True

        @property
        def is_trainable(self) -> bool:
            """Whether the model can be trained."""
            return True

    quantizers.register_quantization_config(METHOD)(PypruneConfig)
    quantizers.register_quantizer(METHOD)(PypruneQuantizer)
    _wrap()


def _quantizers() -> Any:
    try:
        from transformers.quantizers import auto
    except ImportError:
        return None
    return auto if hasattr(auto, "register_quantizer") else None


def _wrap() -> None:
    read: Any = getattr(PreTrainedModel, "_load_pretrained_model", None)
    if read is None or list(inspect.signature(read).parameters) != _PARAMETERS:
        return

    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        if state_dict is not None or not _are_ours(checkpoint_files, load_config.hf_quantizer):
            return read(model, state_dict, checkpoint_files, load_config, expected_keys)
        if "disk" in (load_config.device_map or {}).values():
            raise ValueError(
                "weights of a compressed checkpoint cannot stay on the disk (device_map); save the model dense, by "
                "save_pretrained, and load that"
            )
        with ExitStack() as stack:
            tensors = _tensors_in([stack.enter_context(SparseFile(file)) for file in checkpoint_files])
            result = read(model, tensors, checkpoint_files, load_config, expected_keys)
            # transformers goes on without a tensor that cannot be read, and tells its log.
            for tensor in tensors.values():
                if tensor.error is not None:
                    raise tensor.error
        return result

    _load_pretrained_model.wrapped_by = METHOD  # type: ignore[attr-defined]
    PreTrainedModel._load_pretrained_model = staticmethod(_load_pretrained_model)


def _are_ours(files: Sequence[str] | None, quantizer: Any) -> bool:
    """Whether a config says that files are compressed, or they themselves do, which `save_sparse` wrote."""
    if quantizer is not None:
        return bool(quantizer.quantization_config.quant_method == METHOD)
    return any(file.endswith(".safetensors") and _is_compressed(file) for file in files or ())


def _is_compressed(file: str) -> bool:
    with safe_open(file, framework="pt") as opened:
        return KEY in (opened.metadata() or {})


def _is_wrapped() -> bool:
    return getattr(PreTrainedModel._load_pretrained_model, "wrapped_by", None) == METHOD


class _Unread:
    """A tensor that is not read yet, as transformers knows them from safetensors."""

    def __init__(self, file: SparseFile, name: str) -> None:
        self.file, self.name = file, name
        self.error: ValueError | ImportError | None = None

    def get_dtype(self) -> str:
        return NAMES[self.file.dtype(self.name)]

    def get_shape(self) -> list[int]:
        return list(self.file.shape(self.name))

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return self.file.read(self.name)[index]
        except (ValueError, ImportError) as error:
            self.error = error
            raise


def _tensors_in(files: Sequence[SparseFile]) -> dict[str, _Unread]:
    return {name: _Unread(file, name) for file in files for name in file.names}
