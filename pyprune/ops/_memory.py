"""Whether tensors that are to be written share memory with others, or with themselves."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# Where a tensor begins and ends in bytes, whether it is written, and which it is: its argument, its index there (-1:
# it is no list), itself.
_Span = tuple[int, int, bool, str, int, Tensor]


def check_memory(
    written: Mapping[str, Tensor | Sequence[Tensor]],
    read: Mapping[str, Tensor | Sequence[Tensor | None] | None] | None = None,
) -> None:
    """Raise if a tensor that is to be written shares memory with itself, with another one or with one that is read.

    It takes as long as to sort addresses. Only tensors that lie between each other's elements, as columns of one
    matrix do, are looked at element by element.

    Args:
        written: tensors or lists of them, by the name of the argument.
        read: the same, with None where there is none.
    """
    for name, given in written.items():
        for index, tensor in _numbered(given):
            if not tensor.is_contiguous():
                check_not_overlapping(tensor, _place(name, index))
    if has_no_addresses():
        return
    spans: list[_Span] = []
    for lists, writes in ((written, True), (read or {}, False)):
        for name, some in lists.items():
            for index, one in _numbered(some):
                start = 0 if one is None else one.data_ptr()
                if one is not None and start:  # otherwise it is empty, or meta
                    size = one.nbytes if one.is_contiguous() else _extent(one) * one.element_size()
                    spans.append((start, start + size, writes, name, index, one))
    spans.sort()
    end_of_all = end_of_written = 0
    for at, span in enumerate(spans):
        start, end, writes = span[:3]
        if start < (end_of_all if writes else end_of_written):
            _check_apart(span, [one for one in spans[:at] if one[1] > start])
        end_of_all = max(end_of_all, end)
        if writes:
            end_of_written = max(end_of_written, end)


def check_not_overlapping(tensor: Tensor, name: str) -> None:
    """Raise if elements of a tensor that is to be written share memory."""
    if tensor.is_contiguous() or not tensor.numel():
        return
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride == 0:
            raise ValueError(f"{name} is expanded: elements share memory. Give a tensor of its own, as clone() does")
        if size > 1 and stride < extent:  # rows that reach into the next, or dimensions that interleave
            marks = None if has_no_addresses() else _marks(tensor, 0, _extent(tensor), tensor.element_size())
            if marks is not None and int(marks.sum()) < tensor.numel():
                raise ValueError(f"{name} overlaps itself: elements share memory. Give a tensor of its own")
            return
        extent += (size - 1) * stride


def _numbered(given: Any) -> Iterable[tuple[int, Any]]:
    return ((-1, given),) if given is None or isinstance(given, Tensor) else enumerate(given)


def _place(name: str, index: int) -> str:
    return name if index < 0 else f"{name}[{index}]"


def has_no_addresses() -> bool:
    """Whether what happens here is being traced, compiled or transformed."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active()


def _extent(tensor: Tensor) -> int:
    """Return how many elements there are from the first to the last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _check_apart(span: _Span, others: Sequence[_Span]) -> None:
    for other in others:
        if (span[2] or other[2]) and _share(span, other):
            first, second = sorted((span, other), key=lambda one: (not one[2], one[3], -one[4]))
            raise ValueError(
                f"{_place(*first[3:5])} is to be written, and shares memory with {_place(*second[3:5])}; give a "
                "tensor of its own, as clone() does"
            )


def _share(a: _Span, b: _Span) -> bool:
    """Whether two tensors have a byte in common, the last of which begins before the end of the first."""
    if a[5].is_contiguous() and b[5].is_contiguous():
        return True
    start, end = min(a[0], b[0]), max(a[1], b[1])
    unit = math.gcd(a[0] - start, b[0] - start, a[5].element_size(), b[5].element_size())
    marks = [_marks(one[5], (one[0] - start) // unit, -(-(end - start) // unit), unit) for one in (a, b)]
    return bool((marks[0] & marks[1]).any())


def _marks(tensor: Tensor, first: int, size: int, unit: int) -> Tensor:
    """Return which of ``size`` units of memory a tensor lies in, which begins at number ``first``."""
    marks = torch.zeros(size, dtype=torch.bool)
    each = tensor.element_size() // unit
    for part in range(each):
        marks.as_strided(tensor.shape, [stride * each for stride in tensor.stride()], first + part).fill_(True)
    return marks
