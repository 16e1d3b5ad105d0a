"""Tensors as one bit per element and the values of those that are not zero, and back."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from pyprune.checks import check_bool, check_count, check_items
from pyprune.ops._library import WEIGHT_DTYPES, check_masks, check_one_each, check_tensors, register_fake
from pyprune.ops._memory import check_memory

# All whose elements have 1, 2, 4 or 8 bytes, of which none that is set means zero.
PACK_DTYPES = (
    *WEIGHT_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int8,
    torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64, torch.bool,
    torch.complex64,
)  # fmt: skip
_BITS = (torch.uint8,)


@torch.no_grad()
def pack(
    tensors: Sequence[Tensor], masks: Sequence[Tensor] | None = None, *, negative_zeros: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Return for each tensor the bits of what is kept, and its values: ``tensor[mask]``.

    On a GPU this waits for the device, because the sizes of the results depend on what is zero.

    Args:
        tensors: of ``PACK_DTYPES``, on one device; tensors that are not contiguous are copied.
        masks: one bool tensor per tensor, of its shape, True = kept. Without them, what is not zero is kept.
        negative_zeros: whether -0.0 is kept. Otherwise it is a zero like others, and its sign is lost. Given masks
            keep it where they are True.

    Returns:
        The bits, and the values. A tensor of n elements has the bits ``[ceil(n / 8)]``, uint8, where bit i is
        element i in the order of the flat index, least significant first, and those beyond n are 0. Its values
        are what is kept, in that order, ``[kept]``, of its dtype.

    Raises:
        TypeError, ValueError: for other dtypes, mixed devices, or masks that do not fit.

    Example:
        >>> bits, values = pack([torch.tensor([[0.0, 2.0, 0.0], [4.0, -0.0, 6.0]])])
        >>> f"{bits[0].item():06b}", values[0].tolist()
        ('101010', [2.0, 4.0, 6.0])
    """
    check_tensors(tensors, "tensors", PACK_DTYPES)
    if masks is not None:
        check_masks(masks, tensors, "tensor")
    negative_zeros = check_bool("negative_zeros", negative_zeros)
    if not tensors:
        return [], []
    flat = [tensor.detach().contiguous() for tensor in tensors]
    keep = [] if masks is None else [mask.detach().contiguous() for mask in masks]
    bits, values = torch.ops.pyprune.pack(flat, keep, negative_zeros)
    return list(bits), list(values)


@torch.no_grad()
def unpack(
    bits: Sequence[Tensor],
    values: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    *,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the tensors that `pack` took: values where bits are set, zeros elsewhere.

    Bits are counted before memory is taken for the results, or written to.

    Args:
        bits, values: what `pack` returned.
        shapes: of the tensors.
        out: contiguous tensors of these shapes, of the dtypes and devices of their values, which become the results.
            Fresh memory takes longer than all else.

    Raises:
        TypeError, ValueError: for other dtypes or mixed devices; if bits are set beyond the last element, or if
            there are not as many values as bits that are set. ``out`` then is as it was.

    Example:
        >>> [tensor] = unpack([torch.tensor([0b101010], dtype=torch.uint8)], [torch.tensor([2, 4, 6])], [(2, 3)])
        >>> tensor.tolist()
        [[0, 2, 0], [4, 0, 6]]
    """
    sizes = _check_rows(bits, values, shapes)
    counts = [prod(shape) for shape in sizes]
    if out is not None:
        _check_out(out, bits, values, sizes)
    if not bits:
        return []
    rows, packed = [one.detach().contiguous() for one in bits], [one.detach().contiguous() for one in values]
    try:
        if out is not None:
            torch.ops.pyprune.unpack_into(rows, packed, [one.detach() for one in out])
            torch.autograd.graph.increment_version(list(out))
            return list(out)
        tensors = torch.ops.pyprune.unpack(rows, packed, counts)
    except RuntimeError:  # it counts anyway, and returns nothing if something does not fit
        _check_bits(rows, packed, counts)
        raise
    return [tensor.view(shape) for tensor, shape in zip(tensors, sizes, strict=True)]


def check_packed(bits: Tensor, values: Tensor, shape: Sequence[int]) -> None:
    """Raise what `unpack` would raise for a tensor, without memory for it.

    Example:
        >>> check_packed(torch.tensor([3], dtype=torch.uint8), torch.ones(1), (2,))
        Traceback (most recent call last):
        ValueError: values[0] has 1 values for 2 bits that are set; there must be as many
    """
    [checked] = _check_rows([bits], [values], [shape])
    _check_bits([bits], [values], [prod(checked)])


def _check_rows(
    bits: Sequence[Tensor], values: Sequence[Tensor], shapes: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    check_tensors(bits, "bits", _BITS)
    check_tensors(values, "values", PACK_DTYPES)
    check_one_each(values, "values", bits, "row of bits")
    if isinstance(shapes, Tensor):
        raise TypeError(f"shapes is a {type(shapes).__name__}; give {_SHAPES}")
    sizes = [_shape(f"shapes[{index}]", shape) for index, shape in enumerate(check_items("shapes", shapes, _SHAPES))]
    if len(sizes) != len(bits):
        raise ValueError(f"got {len(sizes)} shapes for {len(bits)} rows of bits; give one per row")
    for index, (row, some, shape) in enumerate(zip(bits, values, sizes, strict=True)):
        count = prod(shape)
        if row.shape != (-(-count // 8),):
            raise ValueError(
                f"bits[{index}] has shape {tuple(row.shape)}; {count} elements need {-(-count // 8)} bytes in a row"
            )
        if some.dim() != 1 or some.device != row.device:
            raise ValueError(
                f"values[{index}] has shape {tuple(some.shape)} on {some.device}; give a row of values on the device "
                f"of its bits, {row.device}"
            )
    return sizes


def _check_out(
    out: Sequence[Tensor], bits: Sequence[Tensor], values: Sequence[Tensor], sizes: list[tuple[int, ...]]
) -> None:
    check_tensors(out, "out", PACK_DTYPES)
    check_one_each(out, "out", bits, "row of bits")
    for index, (tensor, some, shape) in enumerate(zip(out, values, sizes, strict=True)):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"out[{index}] has shape {tuple(tensor.shape)} and strides {tensor.stride()}; it must be contiguous, "
                f"of shape {shape}"
            )
        if tensor.dtype != some.dtype or tensor.device != some.device:
            raise ValueError(
                f"out[{index}] is {tensor.dtype} on {tensor.device}; values[{index}] is {some.dtype} on {some.device}"
            )
    check_memory({"out": out}, {"bits": bits, "values": values})


def count_bits(bits: Sequence[Tensor]) -> list[int]:
    """Return how many bits are set in each row of bytes, contiguous on the CPU.

    Example:
        >>> count_bits([torch.tensor([3, 255], dtype=torch.uint8)])
        [10]
    """
    found: list[int] = torch.ops.pyprune.count_bits(list(bits)).tolist()
    return found


_SHAPES = "a shape per row of bits, as in shapes=[(2, 3)]"


def _shape(name: str, shape: object) -> tuple[int, ...]:
    sizes = tuple(check_count(name, size) for size in check_items(name, shape, "a shape, as in (2, 3)"))
    check_count(f"the number of elements of {name}", prod(sizes))
    return sizes


def _check_bits(bits: Sequence[Tensor], values: Sequence[Tensor], counts: Sequence[int]) -> None:
    for index, (row, some, count) in enumerate(zip(bits, values, counts, strict=True)):
        if count % 8 and int(row[-1]) >> count % 8:
            raise ValueError(f"bits[{index}] has bits set beyond the last of its {count} elements; they must be 0")
        [kept] = count_bits([row.cpu()])
        if kept != some.numel():
            raise ValueError(
                f"values[{index}] has {some.numel()} values for {kept} bits that are set; there must be as many"
            )


def _fake_pack(tensors: list[Tensor], masks: list[Tensor], negative_zeros: bool) -> tuple[list[Tensor], list[Tensor]]:
    context = torch.library.get_ctx()
    bits = [tensor.new_empty((tensor.numel() + 7) // 8, dtype=torch.uint8) for tensor in tensors]
    return bits, [tensor.new_empty(context.new_dynamic_size()) for tensor in tensors]


def _fake_unpack(bits: list[Tensor], values: list[Tensor], counts: list[int]) -> list[Tensor]:
    return [some.new_empty(count) for some, count in zip(values, counts, strict=True)]


register_fake("pyprune::pack", _fake_pack)
register_fake("pyprune::unpack", _fake_unpack)
register_fake("pyprune::count_bits", lambda rows: rows[0].new_empty(len(rows), dtype=torch.int64))
register_fake("pyprune::unpack_into", lambda bits, values, out: None)
