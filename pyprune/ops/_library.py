"""Load the native kernels and check what every operator takes."""

import ctypes
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.ops._blocks import unit_shape

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


def check_tensors(tensors: Sequence[Tensor], name: str, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless all tensors are strided, of an allowed dtype, and on one device that has kernels."""
    for index, tensor in enumerate(tensors):
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{name}[{index}] has dtype {tensor.dtype}; allowed are {allowed}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}[{index}] has layout {tensor.layout}; only dense (strided) tensors are allowed")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{name}[{index}] is on {tensor.device} and {name}[0] on {tensors[0].device}; "
                "one call takes tensors of one device"
            )
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(f"{name}[{index}] is on {tensor.device}; kernels exist for cpu and cuda")
        if tensor.is_cuda and not CUDA_KERNELS_LOADED:
            raise RuntimeError(
                f"{name}[{index}] is on {tensor.device}, but {CUDA_PROBLEM} (see pyprune.build_info())"
            )


def check_masks(masks: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Raise unless there is one bool mask per weight, of its shape and on its device."""
    if len(masks) != len(weights):
        raise ValueError(f"got {len(masks)} masks for {len(weights)} weights; give one mask per weight")
    check_tensors(masks, "masks", (torch.bool,))
    for index, (mask, weight) in enumerate(zip(masks, weights, strict=True)):
        if mask.shape != weight.shape or mask.device != weight.device:
            raise ValueError(
                f"masks[{index}] is {tuple(mask.shape)} on {mask.device}, its weight {tuple(weight.shape)} "
                f"on {weight.device}; they must agree"
            )
        check_not_expanded(mask, f"masks[{index}]")


def check_unit_masks(
    unit_masks: Sequence[Tensor], name: str, blocks: Sequence[Sequence[int]], tensors: Sequence[Tensor]
) -> None:
    """Raise unless there is one bool mask per tensor, with one element per unit, on its device."""
    if len(unit_masks) != len(tensors):
        raise ValueError(f"got {len(unit_masks)} {name} for {len(tensors)} tensors; give one per tensor")
    check_tensors(unit_masks, name, (torch.bool,))
    for index, (units, block, tensor) in enumerate(zip(unit_masks, blocks, tensors, strict=True)):
        expected = unit_shape(tensor.shape, block)
        if units.shape != expected or units.device != tensor.device:
            raise ValueError(
                f"{name}[{index}] is {tuple(units.shape)} on {units.device}; units of {tuple(block)} in a "
                f"tensor of shape {tuple(tensor.shape)} on {tensor.device} need {expected} there"
            )


def check_bases(bases: Sequence[Tensor | None], weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Raise unless each weight has None or a bool base, of its shape and device, apart from the masks to write."""
    if len(bases) != len(weights):
        raise ValueError(f"got {len(bases)} bases for {len(weights)} weights; give a base or None per weight")
    written = {mask.untyped_storage().data_ptr() for mask in masks if mask.numel() and mask.device.type != "meta"}
    for index, (base, weight) in enumerate(zip(bases, weights, strict=True)):
        if base is None:
            continue
        if base.dtype is not torch.bool or base.layout is not torch.strided:
            raise TypeError(f"bases[{index}] is {base.dtype} with layout {base.layout}; give a dense bool tensor")
        if base.shape != weight.shape or base.device != weight.device:
            raise ValueError(
                f"bases[{index}] is {tuple(base.shape)} on {base.device}, its weight {tuple(weight.shape)} "
                f"on {weight.device}; they must agree"
            )
        if base.numel() and base.untyped_storage().data_ptr() in written:
            raise ValueError(
                f"bases[{index}] shares memory with a mask that is to be written; give masks of their own, and copy "
                "them into the bases afterwards"
            )


def check_not_expanded(tensor: Tensor, name: str) -> None:
    """Raise if elements of a tensor that is to be written share memory."""
    if tensor.is_contiguous():  # at once, because this is asked of every weight at every training step
        return
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    if tensor.numel() and any(size > 1 and stride == 0 for size, stride in strides):
        raise ValueError(f"{name} is expanded: elements share memory. Give a tensor of its own, as clone() does")


def refuse_second_derivative(name: str) -> None:
    """Let differentiating through a backward operator be an error, not a silent zero."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{name} has no derivative: gates can be differentiated once, not twice")

    torch.library.register_autograd(name, backward, setup_context=setup_context)
