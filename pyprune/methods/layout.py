"""What the dimensions of a weight count: outputs, inputs, and groups that have outputs and inputs of their own."""

from collections.abc import Sequence
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
    """Return a weight, or a mask of it, as (groups, outputs of one, inputs of one); a view where that is possible.

    The columns of a convolution are positions of its kernel by channels: so neighbours of N:M, which are channels at
    one position, are neighbouring columns.

    Args:
        tensor: the weight; of one dimension, it is one row.
        layout: what its dimensions count.

    Raises:
        ValueError: if the layout does not say what counts outputs and inputs.

    Example:
        >>> import torch
        >>> tuple(as_matrices(torch.empty(6, 2, 3, 3), Layout(0, 1, groups=2)).shape)
        (2, 3, 18)
    """
    if tensor.dim() < 2:
        return tensor.reshape(1, 1, -1)
    by_group = groups_first(tensor, layout)
    return by_group.permute(_order(layout, by_group.dim())).flatten(2)


def from_matrices(matrices: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor:
    """Undo `as_matrices`.

    Example:
        >>> import torch
        >>> layout = Layout(1, 0, groups=2)
        >>> kernel = torch.randn(4, 3, 5)
        >>> torch.equal(from_matrices(as_matrices(kernel, layout), layout, kernel.shape), kernel)
        True
    """
    if len(shape) < 2:
        return matrices.reshape(shape)
    split = (layout.groups, shape[0] // layout.groups, *shape[1:])
    order = _order(layout, len(split))
    back = [order.index(dim) for dim in range(len(split))]
    return matrices.reshape([split[dim] for dim in order]).permute(back).reshape(shape)


def _order(layout: Layout, dims: int) -> list[int]:
    """Return the dimensions of a weight, with groups first: groups, outputs, all others, inputs."""
    if layout.outputs is None or layout.inputs is None:
        raise ValueError(f"which dimensions of the weight count outputs and inputs is not known: {layout.problem}")
    outputs, inputs = layout.outputs + 1, layout.inputs + 1
    return [0, outputs, *(dim for dim in range(1, dims) if dim not in (outputs, inputs)), inputs]
