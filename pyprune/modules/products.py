"""The products of torch below autograd: what in their arguments may be a weight, and what is beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input: one number for each dimension of the kernel."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    is_transposed: bool
    output_padding: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Operand:
    """What may be a weight in a product: which of its dimensions count what, and what is beside it."""

    weight: Tensor
    outputs: int | None
    inputs: int | None
    batch: int | None = None
    given: Tensor | None = None
    made: Tensor | None = None
    groups: int = 1  # of a convolution
    window: Window | None = None
    entries: Tensor | None = None
    problem: str = ""
    is_table: bool = False


def _matrices(a: Tensor, b: Tensor, made: Tensor | None) -> list[Operand]:
    """Operands of products of one matrix each, or of batches of them."""
    if a.dim() == 2:
        made = None if made is None else made[None]
        first, second, batch = a[None], b[None], None
    else:
        first, second, batch = a, b, 0
    skip = a.dim() - 2
    return [
        Operand(b, skip + 1, skip, batch, first, made),
        Operand(a, skip, skip + 1, batch, second.mT, None if made is None else made.mT),
    ]


def _vectors(a: Tensor, b: Tensor, made: Tensor) -> list[Operand]:
    """Operands of a matrix times a vector, or of a vector times a vector."""
    rows = a if a.dim() == 2 else a[None]
    return [
        Operand(a, 0 if a.dim() == 2 else None, a.dim() - 1, None, b[None, None], made.reshape(1, 1, -1)),
        Operand(b, None, 0, None, rows[None], made.reshape(1, -1, 1)),
    ]


def _convolution(args: tuple[Any, ...], made: Tensor) -> list[Operand]:
    given, weight, is_transposed, groups = args[0], args[1], args[6], args[8]

    def by_groups(tensor: Tensor) -> Tensor:
        split = tensor.view(tensor.shape[0], groups, tensor.shape[1] // groups, *tensor.shape[2:])
        return split.movedim((1, 2), (0, -1))

    outputs, inputs = (1, 0) if is_transposed else (0, 1)
    kernel = tuple(weight.shape[2:])
    stride, padding, dilation, output_padding = (
        tuple(one) * (1 if len(one) == len(kernel) else len(kernel)) for one in (*args[3:6], args[7])
    )
    window = Window(kernel, stride, padding, dilation, is_transposed, output_padding)
    return [Operand(weight, outputs, inputs, None, by_groups(given), by_groups(made), groups, window)]


def _grouped(args: tuple[Any, ...], made: Tensor) -> list[Operand]:
    given, weight = args[0], args[1]
    ends = args[2] if len(args) > 2 else None
    if given.dim() != 2 or weight.dim() != 3 or ends is None:
        return [Operand(weight, weight.dim() - 1, weight.dim() - 2, 0 if weight.dim() == 3 else None)]
    rows = torch.arange(len(given), device=given.device)
    entries = torch.searchsorted(ends.to(rows.dtype), rows, right=True)
    used = entries < len(weight)
    return [Operand(weight, 2, 1, 0, given[used][:, None], made[used][:, None], entries=entries[used])]


PRODUCTS: dict[str, Callable[[tuple[Any, ...], Any], list[Operand]]] = {
    "mm": lambda args, made: _matrices(args[0], args[1], made),
    "bmm": lambda args, made: _matrices(args[0], args[1], made),
    "addmm": lambda args, made: _matrices(args[1], args[2], made),
    "_addmm_activation": lambda args, made: _matrices(args[1], args[2], None),
    "baddbmm": lambda args, made: _matrices(args[1], args[2], made),
    "addbmm": lambda args, made: _matrices(args[1], args[2], None),
    "mv": lambda args, made: _vectors(args[0], args[1], made),
    "dot": lambda args, made: _vectors(args[0], args[1], made),
    "addmv": lambda args, made: _vectors(args[1], args[2], made),
    "convolution": _convolution,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,  # of transformers
    "_trilinear": lambda args, made: [Operand(args[1], 0, None, problem="it multiplies two inputs at once")],
    **dict.fromkeys(
        ("embedding", "_embedding_bag", "_embedding_bag_forward_only"),
        lambda args, made: [Operand(args[0], 0, 1, is_table=True)],
    ),
}
for _name in ("addmm", "baddbmm", "addbmm", "addmv"):
    PRODUCTS[f"{_name}_"] = PRODUCTS[_name]
