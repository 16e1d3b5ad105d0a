"""What layers with packed weights have in common: a module in its place, under its name, of another class.

The weight's parameter is gone, and buffers ``weight_values``, ``weight_index``, ... stand for it: they are saved,
copied and moved with the module. All else of it is as it was: bias, hooks, attributes. The attribute is computed from
them, so that who asks for its dtype or values gets them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops

PARTS = ("values", "index", "offsets", "scale")
LAYOUT = "layout"


class SparseLayer(nn.Module):
    """What layers with packed weights have in common; `put` makes one of a dense layer."""

    layout: str
    dense_class: type[nn.Module]
    weight_dtype: torch.dtype
    weight_requires_grad: bool
    # Which weight is packed, and whether it has inputs first.
    packed_name = "weight"
    inputs_first = False

    def shape(self) -> tuple[int, int]:
        """Return outputs and inputs."""
        raise NotImplementedError

    def packed(self) -> ops.SparseWeight:
        """Return the weight as operators take it."""
        values, index, offsets, scale = (self._buffers[f"{self.packed_name}_{part}"] for part in PARTS)
        assert values is not None
        assert index is not None
        assert offsets is not None
        return ops.SparseWeight(values, index, offsets, scale, self.layout, self.shape())

    def dense(self) -> Tensor:
        """Return the dense weight, made anew."""
        dense = ops.unpack_sparse(self.packed()).to(self.weight_dtype)
        return dense.t() if self.inputs_first else dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        scale = self._buffers[f"{self.packed_name}_scale"]
        if scale is not None:  # operators take no other
            self._buffers[f"{self.packed_name}_scale"] = scale.float()
        return self

    def extra_repr(self) -> str:
        """Say what is computed, and the layout."""
        outputs, inputs = self.shape()
        return f"in_features={inputs}, out_features={outputs}, layout={self.layout}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        name, errors = f"{prefix}{self.packed_name}", lists[2]
        if name in state_dict:
            errors.append(
                f"{name} is a dense weight, and the layer is accelerated; load it into pyprune.densify(model), and "
                "accelerate that"
            )
        elif f"{name}_{LAYOUT}" in state_dict:
            try:
                packed = packed_in(state_dict, name, self.shape())
            except (TypeError, ValueError) as error:
                errors.append(f"{name}: {error}")
                return
            # As large as what comes, which torch then copies or assigns.
            here = self.get_buffer(f"{self.packed_name}_{LAYOUT}").device
            for part in PARTS:
                tensor = getattr(packed, part)
                empty = None if tensor is None else torch.empty_like(tensor, device=here)
                self._buffers[f"{self.packed_name}_{part}"] = empty
            self.layout = packed.layout
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)


def packed_in(state_dict: Mapping[str, Any], name: str, shape: tuple[int, int]) -> ops.SparseWeight:
    """Return the packed weight of a name that is in a state, which may be anyone's.

    Raises:
        TypeError, ValueError: if tensors are missing, or are no packed weight of this shape.
    """
    number = state_dict[f"{name}_{LAYOUT}"]
    if not isinstance(number, Tensor) or number.numel() != 1 or not 0 <= int(number) < len(ops.SPARSE_LAYOUTS):
        raise ValueError(f"there is no layout {number!s:.40}; known are {', '.join(ops.SPARSE_LAYOUTS)}")
    values, index, offsets, scale = (state_dict.get(f"{name}_{part}") for part in PARTS)
    if values is None or index is None or offsets is None:
        raise ValueError(f"{name}_values, {name}_index or {name}_offsets is missing")
    packed = ops.SparseWeight(values, index, offsets, scale, ops.SPARSE_LAYOUTS[int(number)], shape)
    ops.check_sparse(packed)
    return packed
