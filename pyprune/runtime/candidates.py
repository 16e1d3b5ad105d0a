"""What may take the place of a dense weight: layouts, where they run and how they are made."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.ops.sparse_linear import sparse_linear_unchecked


@dataclass(frozen=True)
class Candidate:
    """A layout of weights.

    Args:
        layout: its name.
        device: where it runs.
        problem: says why a weight (outputs, inputs) cannot have it, or nothing.
        pack: takes a weight and a dtype for values or None, and returns what stands for it.
        product: takes an input, what stands for the weight, and a bias or None.
    """

    layout: str
    device: str
    problem: Callable[[Tensor], str]
    pack: Callable[[Tensor, torch.dtype | None], Any]
    product: Callable[[Tensor, Any, Tensor | None], Tensor]


def candidates_for(weight: Tensor) -> tuple[list[Candidate], str]:
    """Return the layouts that a weight (outputs, inputs) can have; why not, if it has none.

    Example:
        >>> [one.layout for one in candidates_for(torch.eye(8))[0]][:1]
        ['index']
    """
    here = [one for one in CANDIDATES if one.device == weight.device.type]
    problems = {one.layout: one.problem(weight) for one in here}
    fitting = [one for one in here if not problems[one.layout]]
    if not here:
        return [], f"nothing of ours runs on {weight.device.type}"
    return fitting, "; ".join(f"{layout}: {problem}" for layout, problem in problems.items() if problem)


def _fits(weight: Tensor) -> str:
    return "" if weight.dtype in _DTYPES else f"weights are {weight.dtype}"


def _is_narrow(weight: Tensor) -> str:
    return f"{weight.shape[1]} inputs are more than {_WIDEST}" if weight.shape[1] > _WIDEST else _fits(weight)


def _has_blocks(weight: Tensor) -> str:
    """Blocks of 4 outputs that are partly zero would be stored whole."""
    problem = _fits(weight)
    if not problem and weight.shape[0] % 4 == 0:
        blocks = (weight != 0).view(-1, 4, weight.shape[1])
        if int(blocks.any(1).sum()) * 4 <= 1.1 * int(blocks.sum()):
            return ""
    return problem or "its zeros are no blocks of 4 x 1"


def _is_2_of_4(weight: Tensor) -> str:
    sparse = torch.sparse
    forced = sparse.SparseSemiStructuredTensor._FORCE_CUTLASS
    kind = sparse.SparseSemiStructuredTensorCUTLASS if forced else sparse.SparseSemiStructuredTensorCUSPARSELT
    limits = kind._DTYPE_SHAPE_CONSTRAINTS.get(weight.dtype)
    if limits is None:
        return f"torch has no 2:4 products of {weight.dtype}"
    rows, columns = weight.shape
    for size, least, what in (
        (rows, limits.sparse_min_rows, "outputs"),
        (columns, limits.sparse_min_cols, "inputs"),
    ):
        if size < least or size % least:
            return f"{size} {what} are no multiple of {least}"
    if int((weight != 0).view(rows, -1, 4).sum(-1).max()) > 2:
        return "more than 2 of 4 neighbours are not zero"
    return ""


def _semi_structured(weight: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    packed = torch.sparse.to_sparse_semi_structured(weight.to(dtype or weight.dtype).contiguous())
    return nn.Parameter(packed, requires_grad=False)


def _packed(layout: str, problem: Callable[[Tensor], str]) -> Candidate:
    def pack(weight: Tensor, dtype: torch.dtype | None) -> ops.SparseWeight:
        return ops.pack_sparse(weight, layout, dtype=dtype)

    return Candidate(layout, "cpu", problem, pack, sparse_linear_unchecked)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 65_535
CANDIDATES = (
    _packed("index", _fits),
    _packed("bitmask", _fits),
    _packed("rows", _is_narrow),
    _packed("block4", _has_blocks),
    Candidate("2:4", "cuda", _is_2_of_4, _semi_structured, nn.functional.linear),
)
