"""What the dimensions of a weight count: outputs, inputs, and groups that have outputs and inputs of their own."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Side = Literal["out", "in"]


@dataclass(frozen=True)
class Layout:
    """Which dimension of a weight counts outputs, and which inputs.

    Linear layers and convolutions are (0, 1), what is used as ``x @ w`` and transposed convolutions (1, 0). Groups
    (of a convolution, or the experts of one weight) lie one after the other along the first dimension: a transposed
    convolution of 4 groups is (1, 0, 4), eight experts with outputs before inputs are (1, 2, 8).

    Args:
        outputs, inputs: dimensions; None where it cannot be told. Others count positions of a kernel, or experts.
        groups: how many groups the first dimension has.
        problem: why it cannot be told.
        is_table: whether rows are looked up, as in an embedding, and nothing is multiplied with them.
    """

    outputs: int | None = 0
    inputs: int | None = 1
    groups: int = 1
    problem: str = ""
    is_table: bool = False

    @property
    def is_clear(self) -> bool:
        """Whether both directions are known."""
        return self.outputs is not None and self.inputs is not None


LINEAR = Layout()


def groups_first(tensor: Tensor, layout: Layout) -> Tensor:
    """Return a view with one more dimension in front, which counts groups.

    Example:
        >>> import torch
        >>> tuple(groups_first(torch.empty(8, 3, 5), Layout(1, 0, groups=4)).shape)
        (4, 2, 3, 5)
    """
    return tensor.view(layout.groups, tensor.shape[0] // layout.groups, *tensor.shape[1:])


def channels_shape(shape: tuple[int, ...], layout: Layout, side: Side) -> tuple[int, int]:
    """Return how many groups of channels a weight has on a side, and how many channels are in one.

    Example:
        >>> channels_shape((8, 3, 5), Layout(1, 0, groups=4), "out")
        (4, 3)
    """
    dim = layout.outputs if side == "out" else layout.inputs
    assert dim is not None
    return layout.groups, shape[dim] if dim else shape[0] // layout.groups


def as_matrices(tensor: Tensor, layout: Layout) -> Tensor:
    """Return a weight as matrices: (groups, outputs of one, inputs of one times positions of a kernel).

    A vector is a matrix of one output. The layout must be clear.

    Example:
        >>> import torch
        >>> tuple(as_matrices(torch.empty(8, 3, 5), Layout(1, 0, groups=4)).shape)
        (4, 3, 10)
    """
    if tensor.dim() < 2:
        return tensor.reshape(1, 1, -1)
    return groups_first(tensor, layout).permute(_matrix_dims(tensor.dim(), layout)).flatten(2)


def from_matrices(matrices: Tensor, like: Tensor, layout: Layout) -> Tensor:
    """Return what `as_matrices` made matrices of, in the shape of ``like``.

    Example:
        >>> import torch
        >>> weight, layout = torch.rand(8, 3, 5), Layout(1, 0, groups=4)
        >>> from_matrices(as_matrices(weight, layout), weight, layout).equal(weight)
        True
    """
    if like.dim() < 2:
        return matrices.reshape(like.shape)
    dims = _matrix_dims(like.dim(), layout)
    shape = groups_first(like, layout).shape
    back = [dims.index(dim) for dim in range(len(dims))]
    return matrices.reshape([shape[dim] for dim in dims]).permute(back).reshape(like.shape)


def _matrix_dims(dims: int, layout: Layout) -> list[int]:
    """Return the order in which dimensions, groups first, are groups, outputs, inputs and the rest."""
    assert layout.outputs is not None
    assert layout.inputs is not None
    first = [0, layout.outputs + 1, layout.inputs + 1]
    return first + [dim for dim in range(dims + 1) if dim not in first]
