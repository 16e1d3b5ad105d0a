"""Load the native kernels and check what every operator takes."""

import ctypes
import math
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyprune.checks import LARGEST_INT, check_count
from pyprune.ops._blocks import units_along
from pyprune.ops._memory import has_no_addresses

try:
    # Python that starts in a checkout finds its folder before the installed package, which has the native module.
    package = sys.modules["pyprune"]
    package.__path__ = pkgutil.extend_path(package.__path__, "pyprune")
    from pyprune import _C
except ImportError as error:
    raise ImportError(
        "pyprune's native module could not be loaded. Likely causes: pyprune was imported from a source tree "
        "and is not installed (run `pip install .` there), the wheel was built for another Python, or torch is "
        f"older than 2.11 (found {torch.__version__}). The loader said: {error}"
    ) from error

WEIGHT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_BOOL = (torch.bool,)
_PLAIN = (Tensor, nn.Parameter)


def _load_cuda_kernels() -> str:
    """Load the CUDA kernels; return why they are not there, or nothing if they are."""
    library = Path(_C.__file__).with_name("_cuda.so")
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    if not library.exists():
        return f"pyprune was built without CUDA kernels: {_C.build_info()['cuda'].removeprefix('none: ')}"
    # The stream and device functions live in torch's CUDA library, which a build against a CPU-only torch could
    # not name: make its symbols visible first.
    torch_cuda = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    try:
        if torch_cuda.exists():
            ctypes.CDLL(str(torch_cuda), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        # The CPU kernels work all the same; who brings a CUDA tensor is told.
        return f"the CUDA kernels could not be loaded: {error}"
    return ""


CUDA_PROBLEM = _load_cuda_kernels()
CUDA_KERNELS_LOADED = not CUDA_PROBLEM


def check_tensors(
    tensors: Sequence[Tensor], name: str, dtypes: Sequence[torch.dtype], *, values: bool = True
) -> None:
    """Raise unless this is a list of dense tensors with values, of an allowed dtype, on one device that has kernels.

    Args:
        tensors: what was given.
        name: of the argument.
        dtypes: which are allowed.
        values: whether values are needed: otherwise meta tensors will do.
    """
    _check_list(tensors, name)
    device = None
    for index, tensor in enumerate(tensors):
        # Most fit, and are many.
        if type(tensor) not in _PLAIN or tensor.dtype not in dtypes or not _is_dense(tensor):
            check_tensor(tensor, name, dtypes, index=index)
        if device is None:
            device = tensor.device
            _check_device(tensor, f"{name}[0]", values)
        elif tensor.device != device:
            raise ValueError(
                f"{name}[{index}] is on {tensor.device} and {name}[0] on {device}; "
                "one call takes tensors of one device"
            )


def check_tensor(
    tensor: Tensor,
    name: str,
    dtypes: Sequence[torch.dtype],
    *,
    index: int | None = None,
    like: Tensor | None = None,
    values: bool | None = None,
) -> None:
    """Raise unless this is a dense tensor of an allowed dtype.

    Args:
        tensor: what was given.
        name: of the argument.
        dtypes: which are allowed.
        index: in the argument, which is a list.
        like: a tensor of the same call; this one must have its shape and device.
        values: None if a device is as good as any other; otherwise as in `check_tensors`.
    """
    check_type(tensor, _place(name, index))
    if tensor.dtype not in dtypes:
        allowed = ", ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
        raise TypeError(f"{_place(name, index)} has dtype {tensor.dtype}; allowed are {allowed}")
    if not _is_dense(tensor):
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{_place(name, index)} has layout {layout}; only dense (strided) tensors are allowed")
    if like is not None and (tensor.shape != like.shape or tensor.device != like.device):
        raise ValueError(
            f"{_place(name, index)} is {tuple(tensor.shape)} on {tensor.device}, its weight {tuple(like.shape)} "
            f"on {like.device}; they must agree"
        )
    if values is not None:
        _check_device(tensor, _place(name, index), values)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _place(name: str, index: int | None) -> str:
    return name if index is None else f"{name}[{index}]"


def _check_list(tensors: object, name: str) -> None:
    if isinstance(tensors, str) or not isinstance(tensors, (Sequence, nn.ParameterList)):
        raise TypeError(f"{name} is a {type(tensors).__name__}; give a list of tensors")


def check_type(tensor: object, name: str, *, wrappers: bool = False) -> None:
    """Raise unless this is a tensor that has values and, where ``wrappers`` are not allowed, memory of its own."""
    if type(tensor) in _PLAIN:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a tensor")
    if has_no_addresses():
        return
    if isinstance(tensor, FakeTensor):
        raise ValueError(f"{name} is a fake tensor, which has no values outside of its mode; give a real one")
    if is_lazy(tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__} without values; call its module once before")
    if not wrappers and is_traceable_wrapper_subclass(tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; the kernels take plain tensors: give what it holds")


def _check_device(tensor: Tensor, name: str, values: bool) -> None:
    if tensor.is_meta and values:
        raise ValueError(f"{name} is on the meta device and has no values; load it first")
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} is on {tensor.device}; kernels exist for cpu and cuda")
    if tensor.is_cuda and not CUDA_KERNELS_LOADED:
        raise RuntimeError(f"{name} is on {tensor.device}, but {CUDA_PROBLEM} (see pyprune.build_info())")


def check_masks(masks: Sequence[Tensor], weights: Sequence[Tensor], of: str = "weight") -> None:
    """Raise unless there is one bool mask per weight, of its shape and on its device."""
    check_one_each(masks, "masks", weights, of)
    for index, (mask, weight) in enumerate(zip(masks, weights, strict=True)):
        if type(mask) not in _PLAIN or mask.dtype is not torch.bool or not _is_dense(mask):
            check_tensor(mask, "masks", _BOOL, index=index)
        if mask.shape != weight.shape or mask.device != weight.device:
            raise ValueError(
                f"masks[{index}] is {tuple(mask.shape)} on {mask.device}, its {of} {tuple(weight.shape)} "
                f"on {weight.device}; they must agree"
            )


def check_unit_masks(
    unit_masks: Sequence[Tensor], name: str, blocks: Sequence[Sequence[int]], tensors: Sequence[Tensor]
) -> None:
    """Raise unless there is one bool mask per tensor, with one element per unit, on its device."""
    check_one_each(unit_masks, name, tensors, "tensor")
    for index, (units, block, tensor) in enumerate(zip(unit_masks, blocks, tensors, strict=True)):
        check_tensor(units, name, _BOOL, index=index)
        expected = units_along(tensor.shape, block)
        if units.shape != expected or units.device != tensor.device:
            raise ValueError(
                f"{name}[{index}] is {tuple(units.shape)} on {units.device}; units of {tuple(block)} in a "
                f"tensor of shape {tuple(tensor.shape)} on {tensor.device} need {expected} there"
            )


def check_scales(scales: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise unless there is one positive, finite float64 scale per weight, on its device."""
    check_tensor(scales, "scales", (torch.float64,))
    if scales.shape != (len(weights),) or (weights and scales.device != weights[0].device):
        raise ValueError(
            f"scales is of shape {tuple(scales.shape)} on {scales.device}; expected ({len(weights)},) on the device "
            "of the weights"
        )
    # On a GPU they are not read: that would wait for it.
    if scales.is_cpu and not has_no_addresses():
        for index, scale in enumerate(scales.tolist()):
            if not 0 < scale < math.inf:
                raise ValueError(f"scales[{index}] is {scale}; scales must be positive and finite")


def check_bases(bases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> None:
    """Raise unless each weight has None or a bool base, of its shape and device."""
    check_one_each(bases, "bases", weights, what="a base or None")
    for index, (base, weight) in enumerate(zip(bases, weights, strict=True)):
        if base is not None:
            check_tensor(base, "bases", _BOOL, index=index, like=weight)


def check_one_each(
    tensors: Sequence[object], name: str, weights: Sequence[Tensor], of: str = "weight", what: str = "one"
) -> None:
    """Raise unless this is a list as long as that of the weights."""
    _check_list(tensors, name)
    if len(tensors) != len(weights):
        raise ValueError(f"got {len(tensors)} {name} for {len(weights)} {of}s; give {what} per {of}")


def check_int64(name: str, value: int) -> int:
    """Return an integer that the kernels can hold."""
    if type(value) is int and -LARGEST_INT <= value <= LARGEST_INT:
        return value
    return check_count(name, value, least=-LARGEST_INT, what="an integer of 64 bits")


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Register what an operator returns without values, for tensors of one device.

    Torch calls it with real tensors, too, if one of them is on the meta device: the results would be memory that
    nobody has written.
    """

    def checked(*arguments: Any) -> Any:
        lists = [one if isinstance(one, (list, tuple)) else [one] for one in arguments]
        devices = {str(one.device) for some in lists for one in some if isinstance(one, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: all tensors must be on one device, not on {' and '.join(sorted(devices))}")
        return fake(*arguments)

    torch.library.register_fake(name, checked)


def refuse_second_derivative(name: str) -> None:
    """Let differentiating through a backward operator be an error, not a silent zero."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{name} has no derivative: gates can be differentiated once, not twice")

    torch.library.register_autograd(name, backward, setup_context=setup_context)
