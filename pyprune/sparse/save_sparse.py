"""Save a sparse model in a file that is as small as its zeros allow."""

import os
from collections.abc import Mapping

from torch import Tensor, nn

from pyprune.checks import check_bool, check_choice, check_number, check_path, shown
from pyprune.modules.attachments import check_module
from pyprune.modules.gates import gates_of
from pyprune.ops._library import check_type
from pyprune.sparse.encoding import Options
from pyprune.sparse.format import CODECS, LAYOUTS
from pyprune.sparse.model_state import plain_state
from pyprune.sparse.writing import Source, Written, write_sparse


def save_sparse(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    codec: str | None = None,
    layout: str = "pyprune",
    keep_negative_zero: bool = False,
    min_zeros: float = 0.1,
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Save a model's tensors in one safetensors file, those with zeros as one bit per element and the kept values.

    Masks may be on the model; what is saved are its weights with their zeros. The new file takes the place of the old
    one when it is whole and on the disk. Tensors are written one after the other, in the memory of one. Tied ones are
    stored once. int8 and uint8 tensors ``NAME`` beside a ``NAME_zero_point`` have the zeros that it says.

    A program that does not know the format stops at the shapes of these tensors: the values have the weight's name.

    Args:
        model: the model, or its ``state_dict()``.
        path: of the file.
        codec: "zstd" compresses exponents and bits, of dense tensors too: bfloat16 becomes a third smaller, at a
            tenth of the speed. Needs the package zstandard (``pip install "pyprune[zstd]"``).
        layout: "compressed-tensors" writes weights of two and more dimensions as its "sparse-bitmask" format, which
            its versions 0.3 to 0.14 read. No codec.
        keep_negative_zero: whether -0.0 is stored as it is. Otherwise it becomes 0.0, and is counted in the result:
            ``torch.nn.utils.prune`` leaves many, each of which would take the place of a value.
        min_zeros: tensors with a smaller share of zeros stay dense, as do those that would not become smaller; 0
            stores all as sparse.
        metadata: strings that the file is to carry, for `SparseFile.metadata` and other readers.

    Returns:
        The bytes of the file and of the dense tensors, and for each tensor its kept values and -0.0 that became 0.0.

    Raises:
        TypeError, ValueError: for other values, a model with gates (`strip` it before), tensors that are on meta,
            sharded, quantised or not dense.
        ImportError: if the codec's package is missing.

    Example:
        >>> import tempfile, pyprune
        >>> model = nn.Linear(64, 64)
        >>> _ = pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.75)
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> written = pyprune.save_sparse(model, path)
        >>> written.kept, written.dense_bytes
        ({'weight': 1024}, 16640)
    """
    check_path("path", path)
    if codec is not None:
        check_choice("codec", codec, CODECS)
    options = Options(
        codec,
        check_choice("layout", layout, LAYOUTS),
        check_bool("keep_negative_zero", keep_negative_zero),
        check_number("min_zeros", min_zeros, what="a share of zeros in [0, 1]", least=0, most=1),
    )
    metadata = _check_metadata(metadata)
    tensors = _tensors_of(model)
    sources, tied = _without_ties(tensors)
    return write_sparse(path, sources, options, tied=tied, metadata=metadata)


def _check_metadata(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata is {shown(metadata)}; give a dict of strings")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata has {shown(key)}: {shown(value)} in it; both must be strings")
        if key == "pyprune":
            raise ValueError('metadata has "pyprune" in it, which is where the format itself is described')
    return dict(metadata)


def _tensors_of(model: object) -> dict[str, Tensor]:
    if isinstance(model, Mapping):
        tensors = dict(model)
    else:
        check_module(model)
        assert isinstance(model, nn.Module)
        if gates_of(model):
            raise ValueError("the model has gates, which are sampled and have no zeros yet; strip(model) before")
        tensors = plain_state(model)
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"model has the name {shown(name)}; names must be strings")
        place = f"model[{name!r}]"
        check_type(tensor, place)
        if tensor.is_meta:
            raise ValueError(f"{place} is on the meta device and has no values; load it first")
        if tensor.is_nested or str(tensor.layout) != "torch.strided":
            raise TypeError(f"{place} has layout {tensor.layout}; give dense tensors (tensor.to_dense())")
        if tensor.is_quantized:
            raise TypeError(f"{place} is quantised; save its int_repr(), scale and zero point, or dequantize() it")
    # x.conj() lies in the memory of x, and is another tensor.
    return {name: tensor.resolve_conj().resolve_neg() for name, tensor in tensors.items()}


def _without_ties(tensors: Mapping[str, Tensor]) -> tuple[list[Source], dict[str, str]]:
    """Return each tensor once, and the other names of those that are in the same memory."""
    first: dict[object, str] = {}
    sources, tied = [], {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            sources.append(Source.of(name, tensor))
    return sources, tied
