"""Which parameter a tensor is a part of: views by their strides, copies and what is computed of weights by shapes.

A view shares the storage of what it looks at, and its strides say along which dimensions of that it moves. So no
operation that makes views need be known. Copies (casts, ``contiguous``, entries picked by an index) and what is
computed from weights alone (standardised, scaled) lie elsewhere, and are remembered as long as they live.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyprune.modules.attachments import parameters_of

# What comes out of these has entries at other places than what went in, or mixes them.
_MOVING = {
    *("flip", "roll", "rot90", "sort", "topk", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"),
    *("gather", "take", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
    *("linalg_qr", "linalg_inv_ex", "linalg_matrix_exp", "linalg_householder_product", "_linalg_svd", "_fft_r2c"),
}
# These put entries of other arguments than the first at other places.
_PUTTING = {
    *("scatter", "scatter_add", "scatter_reduce", "masked_scatter", "put", "slice_scatter", "select_scatter"),
    *("index_put", "_index_put_impl", "index_copy", "index_add", "index_reduce"),
}


@dataclass(frozen=True, eq=False)
class Part:
    """What a tensor is a part of.

    Args:
        parameter: of this.
        dims: for each dimension of the tensor, along which dimensions of the parameter it moves.
        ranges: for each dimension of the parameter, which of its entries the tensor has.
        entries: which of the first dimension, where they were picked by an index.
        is_moved: whether entries lie at other places than in the parameter; then ``dims`` says nothing.
    """

    parameter: nn.Parameter
    dims: tuple[frozenset[int], ...]
    ranges: tuple[range, ...]
    entries: Tensor | None = None
    is_moved: bool = False


@dataclass(frozen=True, eq=False)
class _Whole:
    """A tensor as it was made, that views look at, and the part of a parameter that it is."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    part: Part


class Origins:
    """What is known of tensors: of the parameters and buffers of a model, and what is made of these alone.

    Example:
        >>> linear = nn.Linear(3, 5)
        >>> (part,) = Origins(linear).parts(linear.weight.detach()[1:].t())
        >>> part.parameter is linear.weight, [set(dims) for dims in part.dims], part.ranges
        (True, [{1}, {0}], (range(1, 5), range(0, 3)))
    """

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[int, tuple[StorageWeakRef, list[_Whole]]] = {}
        self._full = 1000  # forget then what is gone
        for tensor in model.buffers():
            self._remember(tensor, [])
        for parameter in parameters_of(model):
            dims = tuple(frozenset([dim]) for dim in range(parameter.dim()))
            self._remember(parameter, [Part(parameter, dims, tuple(map(range, parameter.shape)))])

    def parts(self, tensor: Tensor) -> list[Part]:
        """Return what parameters a tensor is a part of; several if it was computed from several."""
        return [
            part
            for whole in self._wholes(tensor) or ()
            if (part := _part_of_view(tensor, whole)) is not None
        ]  # fmt: skip

    def is_known(self, tensor: Tensor) -> bool:
        """Whether a tensor comes from parameters, buffers and single numbers alone."""
        return tensor.dim() == 0 or self._wholes(tensor) is not None

    def follow(self, func: Any, arguments: Iterable[Any], result: Any) -> None:
        """Take in what an operation made."""
        if isinstance(result, tuple) and result:  # of a norm, what comes first is normalised
            result = result[0]
        if not isinstance(result, Tensor) or not _has_storage(result):
            return
        arguments = list(arguments)
        tensors = [tensor for tensor in tensors_in(arguments) if _has_storage(tensor)]
        name = func.overloadpacket.__name__
        moved = self._moved_by(name.removesuffix("_"), tensors)
        known = self._wholes(result)
        if known is not None:
            if moved:  # in place
                known[:] = [replace(whole, part=replace(whole.part, is_moved=True)) for whole in known]
        elif moved:
            self._remember(result, [replace(part, dims=(frozenset(),) * result.dim()) for part in moved])
        elif name in ("index", "index_select"):
            self._follow_index(arguments, result)
        elif func.namespace == "pyprune":  # a gate; what it has besides the weight is no part of it
            self._remember(result, [part for part in self.parts(tensors[0]) if result.shape == tensors[0].shape])
        elif tensors and any(t.dim() for t in tensors) and all(map(self.is_known, tensors)):
            self._remember(result, [])
            for tensor in tensors:
                if tensor.shape == result.shape:
                    self._add(result, [_copied(result, tensor, whole) for whole in self._wholes(tensor) or ()])

    def _moved_by(self, name: str, tensors: list[Tensor]) -> list[Part]:
        """Return what an operation moves entries of."""
        if name in _MOVING:
            parts = self.parts(tensors[0])
        elif name in _PUTTING and any(map(self.parts, tensors[1:])):
            parts = [part for tensor in tensors for part in self.parts(tensor)]
        else:
            return []
        return [replace(part, is_moved=True) for part in parts]

    def _follow_index(self, arguments: list[Any], result: Tensor) -> None:
        """Take in entries of a weight of three or more dimensions. Of two, it is a table, whose rows are inputs."""
        source, index = arguments[0], arguments[-1]
        picked = [index] if isinstance(index, Tensor) else list(index)
        first = picked[0] if picked else None
        is_first = arguments[1] == 0 if isinstance(index, Tensor) else all(one is None for one in picked[1:])
        if not is_first:
            moves = (frozenset[int](),) * result.dim()
            self._remember(result, [replace(part, dims=moves, is_moved=True) for part in self.parts(source)])
            return
        if source.dim() < 3 or not isinstance(first, Tensor) or first.dim() != 1:
            return
        first = first.nonzero()[:, 0] if first.dtype == torch.bool else first % source.shape[0]
        parts = []
        for part in self.parts(source):
            if part.dims[0] == {0}:
                there = torch.tensor(part.ranges[0], device=first.device) if part.entries is None else part.entries
                parts.append(replace(part, entries=there[first]))
        if parts:
            self._remember(result, parts)

    def _remember(self, tensor: Tensor, parts: list[Part]) -> None:
        if _has_storage(tensor):
            offset = int(tensor.storage_offset())
            self._add(tensor, [_Whole(tuple(tensor.shape), tensor.stride(), offset, part) for part in parts])

    def _add(self, tensor: Tensor, wholes: Iterable[_Whole | None]) -> None:
        found = [whole for whole in wholes if whole is not None]
        known = self._wholes(tensor)
        if known is not None:
            known.extend(found)  # parameters may lie in one storage
            return
        if len(self._known) >= self._full:
            self._known = {key: pair for key, pair in self._known.items() if not _is_gone(pair[0])}
            self._full = 2 * len(self._known) + 1000
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._known[storage._cdata] = (reference, found)

    def _wholes(self, tensor: Tensor) -> list[_Whole] | None:
        known = self._known.get(tensor.untyped_storage()._cdata) if _has_storage(tensor) else None
        return None if known is None or _is_gone(known[0]) else known[1]


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, and in their lists."""
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from tensors_in(argument)
        elif isinstance(argument, Tensor):
            yield argument


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor)


def _part_of_view(view: Tensor, whole: _Whole) -> Part | None:
    """Say what part of a parameter a view has, of a tensor that is one."""
    starts = _starts(view, whole)
    if starts is None:
        return None
    ranges, entries = list(whole.part.ranges), whole.part.entries
    over = [_over(size, stride, whole) for size, stride in zip(view.shape, view.stride(), strict=True)]
    taken = {dim: slice(starts[dim], starts[dim] + 1) for dim in _moving(whole)}
    for size, stride, dims in zip(view.shape, view.stride(), over, strict=True):
        for dim in dims:
            step = max(1, stride // whole.strides[dim])
            some = slice(starts[dim], starts[dim] + (size - 1) * step + 1, step)
            taken[dim] = some if len(dims) == 1 else slice(None)
    for dim, some in taken.items():
        of = whole.part.dims[dim]
        if len(of) == 1:
            (only,) = of
            if len(ranges[only]) == whole.shape[dim]:
                ranges[only] = ranges[only][some]
            if entries is not None and only == 0:
                entries = entries[some]
    moves = tuple(frozenset[int]().union(*(whole.part.dims[dim] for dim in dims)) for dims in over)
    return Part(whole.part.parameter, moves, tuple(ranges), entries, whole.part.is_moved)


def _copied(copy: Tensor, view: Tensor, whole: _Whole) -> _Whole | None:
    """Say of a copy of a view, of one shape, what it is in the dimensions of what the view looks at.

    A dimension of the view that several of these went into, in their order, is taken apart again.
    """
    part = _part_of_view(view, whole)
    if part is None:
        return None
    shape: list[int] = []
    strides: list[int] = []
    dims: list[frozenset[int]] = []
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        over = _over(size, stride, whole)
        if len(over) > 1 and math.prod(whole.shape[one] for one in over) == size:
            shape += [whole.shape[one] for one in over]
            strides += [copy.stride(dim) * (whole.strides[one] // stride) for one in over]
            dims += [whole.part.dims[one] for one in over]
        else:
            shape.append(size)
            strides.append(copy.stride(dim))
            dims.append(part.dims[dim])
    return _Whole(tuple(shape), tuple(strides), int(copy.storage_offset()), replace(part, dims=tuple(dims)))


def _moving(whole: _Whole) -> list[int]:
    return [dim for dim, size in enumerate(whole.shape) if size > 1 and whole.strides[dim] > 0]


def _starts(view: Tensor, whole: _Whole) -> dict[int, int] | None:
    """Return at which entry of each dimension a view begins; None if it lies elsewhere in the memory."""
    offset = int(view.storage_offset()) - whole.offset
    extent = 1 + sum((size - 1) * stride for size, stride in zip(whole.shape, whole.strides, strict=True))
    if not 0 <= offset < max(1, extent):
        return None
    starts = {}
    for dim in sorted(_moving(whole), key=lambda dim: -whole.strides[dim]):
        starts[dim], offset = divmod(offset, whole.strides[dim])
    return starts


def _over(size: int, stride: int, whole: _Whole) -> list[int]:
    """Return along which dimensions one dimension of a view moves."""
    return [
        dim
        for dim in _moving(whole)
        if stride and whole.strides[dim] <= (size - 1) * stride and stride < whole.strides[dim] * whole.shape[dim]
    ]
