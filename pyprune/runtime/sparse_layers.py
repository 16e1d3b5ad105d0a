"""Which layers can have packed weights, and how they get and lose them."""

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.modules.gated_classes import set_class
from pyprune.ops.sparse_linear import sparse_linear_unchecked
from pyprune.runtime.sparse_attention import SparseMultiheadAttention
from pyprune.runtime.sparse_layer import LAYOUT, PARTS, SparseLayer

_OURS = ("layout", "dense_class", "weight_dtype", "weight_requires_grad")


class SparseLinear(SparseLayer, nn.Linear):
    """An `nn.Linear` whose weight is packed."""

    weight = property(SparseLayer.dense)

    def shape(self) -> tuple[int, int]:
        """Return outputs and inputs."""
        return self.out_features, self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``."""
        return sparse_linear_unchecked(input, self.packed(), self.bias)


class SparseConv1D(SparseLayer):
    """A ``Conv1D`` of transformers whose weight is packed."""

    inputs_first = True
    nf: int
    nx: int
    weight = property(SparseLayer.dense)

    def shape(self) -> tuple[int, int]:
        """Return outputs and inputs."""
        return self.nf, self.nx

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight + bias``."""
        return sparse_linear_unchecked(x, self.packed(), self.bias)  # type: ignore[arg-type]


def sparse_class(module: nn.Module) -> type[SparseLayer] | None:
    """Return the class that stands for a layer with a packed weight; None if there is none.

    Example:
        >>> sparse_class(nn.Linear(2, 2)).__name__, sparse_class(nn.Bilinear(2, 2, 2))
        ('SparseLinear', None)
    """
    cls = type(module)
    if cls is nn.Linear or cls is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return SparseLinear
    if cls is nn.MultiheadAttention and module._parameters["in_proj_weight"] is not None:
        return SparseMultiheadAttention
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return SparseConv1D
    return None


def put(module: nn.Module, packed: ops.SparseWeight) -> None:
    """Let a layer compute with its packed weight; to be undone by a `Change`, or by `take`."""
    sparse = sparse_class(module)
    assert sparse is not None
    name = sparse.packed_name
    weight = module._parameters.pop(name)
    assert weight is not None
    ours = (packed.layout, type(module), weight.dtype, weight.requires_grad)
    module.__dict__.update(zip(_OURS, ours, strict=True))
    for part in PARTS:
        module._buffers[f"{name}_{part}"] = getattr(packed, part)
    number = ops.SPARSE_LAYOUTS.index(packed.layout)
    module._buffers[f"{name}_{LAYOUT}"] = torch.tensor([number], dtype=torch.uint8, device=packed.values.device)
    set_class(module, sparse)


def take(module: SparseLayer, weight: nn.Parameter | None = None) -> None:
    """Undo `put`, with the weight that there was, or the one that is packed."""
    name = module.packed_name
    if weight is None:
        weight = nn.Parameter(module.dense().contiguous(), requires_grad=module.weight_requires_grad)
    set_class(module, module.dense_class)
    for part in (*PARTS, LAYOUT):
        module._buffers.pop(f"{name}_{part}", None)
    for attribute in _OURS:
        del module.__dict__[attribute]
    # It is the first in all of these classes.
    others = {other: one for other, one in module._parameters.items() if other != name}
    module._parameters.clear()
    module._parameters.update({name: weight, **others})


def is_semi_structured(parameter: Tensor | None) -> bool:
    """Whether a weight is one of torch's 2:4 tensors."""
    return isinstance(parameter, torch.sparse.SparseSemiStructuredTensor)
