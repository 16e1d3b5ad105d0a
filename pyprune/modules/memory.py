"""Which tensors lie in the same memory, and how large ones get it fast."""

import ctypes
import mmap
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of a tensor may share memory, as those of an expanded one do.

    Example:
        >>> overlaps_itself(torch.ones(3, 1).expand(3, 4)), overlaps_itself(torch.ones(4, 6).t()[::2])
        (True, False)
    """
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


def overlapping(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pairs of tensors that have an element in common; interleaved columns of one matrix have none.

    Example:
        >>> matrix = torch.ones(4, 4)
        >>> list(overlapping([matrix[:, :2], matrix[:, 2:]]))
        []
        >>> len(list(overlapping([matrix[:, :3], matrix[:, 2:]])))
        1
    """
    near: list[Tensor] = []
    for tensor in sorted((tensor for tensor in tensors if tensor.numel()), key=Tensor.data_ptr):
        begin = tensor.data_ptr()
        near = [other for other in near if other.data_ptr() + _extent(other) * other.element_size() > begin]
        for other in near:
            if _have_common_element(other, tensor):
                yield other, tensor
        near.append(tensor)


def _extent(tensor: Tensor) -> int:
    """Return the number of elements from the first to the last in memory."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _have_common_element(first: Tensor, second: Tensor) -> bool:
    if first.element_size() != second.element_size():
        return True
    offset = (second.data_ptr() - first.data_ptr()) // first.element_size()
    taken = torch.zeros(max(_extent(first), offset + _extent(second)), dtype=torch.bool)
    taken.as_strided(first.shape, first.stride()).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), offset).any())


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages under a large CPU tensor that nothing was written to yet, and return it.

    Fresh memory costs a fault for each page of 4 KiB, which takes longer than filling it; huge ones are of 2 MiB. It
    is a hint to the system, and the tensor is like any other.

    Example:
        >>> prefer_huge_pages(torch.empty(2, 3)).shape
        torch.Size([2, 3])
    """
    if tensor.is_cpu and tensor.nbytes >= 2**22:
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor
