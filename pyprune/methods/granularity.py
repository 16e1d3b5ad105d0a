"""What disappears as one: single elements, blocks, channels, convolution kernels, attention heads.

Each function returns the granularity of a `Method`. A *unit* is what it removes; the ratio counts units. Outputs and
inputs are those of the layer, wherever its weight has them; where that cannot be told, `prune` raises. A channel of a
convolution with groups, or of experts in one weight, is a channel of one group, or of one expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pyprune.checks import check_choice, check_count, check_names, shown
from pyprune.methods.unit_groups import Reduction, Weight


@dataclass(frozen=True)
class Granularity:
    """How weights are cut into units; made by the functions of this module.

    Args:
        name: what it is called.
        block_of: returns the size of a unit of a weight along each of its dimensions, or raises ValueError.
        reduction: how scores of elements become the score of their unit.
        heads: for attention heads, how many there are.
    """

    name: str
    block_of: Callable[[Weight], tuple[int, ...]]
    reduction: Reduction = "sum"
    heads: "Heads | None" = None


@dataclass(frozen=True)
class Heads:
    """Attention heads: those that share a key and value head are one unit."""

    num_heads: int
    num_kv_heads: int
    names: tuple[str, str, str, str] | None = None


def element() -> Granularity:
    """Remove single elements.

    Example:
        >>> element().name
        'element'
    """
    return Granularity("element", lambda weight: (1,) * weight.values.dim())


def block(n: int | Literal["channel"], m: int | Literal["channel"], reduction: Reduction = "mean") -> Granularity:
    """Remove blocks of ``n`` outputs by ``m`` inputs, in a convolution at one position of the kernel.

    "channel" stands for all outputs, or all inputs, of a group: ``block(1, "channel")`` is one output with all its
    inputs, and in a convolution one position of a filter. Where the sizes of a weight do not divide, the
    blocks at its edges are smaller; the mean is over what they have.

    Raises:
        TypeError, ValueError: unless both are at least 1. `prune` raises if a block is larger than a weight.

    Paper: Lagunas et al. 2021, "Block Pruning For Faster Transformers".

    Example:
        >>> import torch
        >>> block(4, 1).block_of(Weight("conv", torch.empty(8, 6, 3, 3)))
        (4, 1, 1, 1)
        >>> block("channel", 1).block_of(Weight("conv", torch.empty(8, 6, 3, 3)))
        (8, 1, 1, 1)
    """
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, str) and value != "channel":
            raise ValueError(f'{name} is {shown(value)}; give an int, or "channel" for all outputs or inputs')
        if not isinstance(value, str):
            check_count(name, value, least=1)

    def block_of(weight: Weight) -> tuple[int, ...]:
        shape = weight.values.shape
        sizes = [1] * len(shape)
        for size, dim in ((n, weight.out_dim), (m, weight.in_dim)):
            if len(shape) < 2 or (size != "channel" and size > shape[dim]):
                raise ValueError(
                    f"a block of {n} outputs by {m} inputs is larger than {weight.name} of shape {tuple(shape)}; "
                    "name it in ignored_scope, or choose smaller blocks"
                )
            groups = weight.layout.groups if dim == 0 else 1
            sizes[dim] = max(1, shape[dim] // groups) if size == "channel" else size
        return tuple(sizes)

    return Granularity(f"block({n}, {m})", block_of, check_reduction(reduction))


def channel(side: Literal["out", "in"] = "out", reduction: Reduction = "sum") -> Granularity:
    """Remove whole output channels (filters, rows of a linear layer or an embedding), or input channels.

    Example:
        >>> import torch
        >>> channel("in").block_of(Weight("conv", torch.empty(8, 6, 3, 3)))
        (8, 1, 3, 3)
    """
    check_choice("side", side, ("out", "in"))

    def block_of(weight: Weight) -> tuple[int, ...]:
        sizes = list(weight.values.shape)
        if sizes:
            sizes[0] //= weight.layout.groups
            sizes[weight.out_dim if side == "out" else weight.in_dim] = 1
        return tuple(max(1, size) for size in sizes)

    return Granularity(f'channel("{side}")', block_of, check_reduction(reduction))


def kernel(reduction: Reduction = "sum") -> Granularity:
    """Remove convolution kernels: all positions of one pair of output and input channel.

    Example:
        >>> import torch
        >>> kernel().block_of(Weight("conv", torch.empty(8, 6, 3, 3)))
        (1, 1, 3, 3)
    """

    def block_of(weight: Weight) -> tuple[int, ...]:
        shape = weight.values.shape
        if len(shape) < 3 or {weight.out_dim, weight.in_dim} != {0, 1}:
            raise ValueError(
                f"{weight.name} of shape {tuple(shape)} has no convolution kernels; name it in ignored_scope"
            )
        return (1, 1, *(max(1, size) for size in shape[2:]))

    return Granularity("kernel", block_of, check_reduction(reduction))


def head(
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    names: Sequence[str] | None = None,
    reduction: Reduction = "sum",
) -> Granularity:
    """Remove attention heads, from the query, key, value and output projections at once.

    With grouped key/value heads a unit is a key/value head with all query heads that read it. Weights outside of
    attention are left alone.

    Args:
        num_heads: query heads of each attention layer.
        num_kv_heads: key and value heads; as many if None. It must divide ``num_heads``.
        names: how the query, key, value and output projection are called, from the module that holds the query;
            a path that begins with "../" starts at its parent. The first three are the same where all are stacked in
            one weight. If None, the names that Hugging Face, timm, diffusers and ``nn.MultiheadAttention`` use.
        reduction: over all elements of a head.

    Raises:
        TypeError, ValueError: for numbers that do not fit each other, or the weights.

    Paper: Michel et al. 2019, "Are Sixteen Heads Really Better than One?".

    Example:
        >>> head(num_heads=32, num_kv_heads=8).heads.num_kv_heads
        8
    """
    num_heads = check_count("num_heads", num_heads, least=1)
    groups = num_heads if num_kv_heads is None else check_count("num_kv_heads", num_kv_heads, least=1)
    if num_heads % groups:
        raise ValueError(f"num_kv_heads is {groups}, which does not divide num_heads, {num_heads}")
    projections = None
    if names is not None:
        if len(check_names("names", names)) != 4:
            raise ValueError(f"names is {names!r:.80}; give those of the query, key, value and output projection")
        projections = (names[0], names[1], names[2], names[3])
    heads = Heads(num_heads, groups, projections)

    def block_of(weight: Weight) -> tuple[int, ...]:
        raise AssertionError("heads are found with the attention layers of a model")

    return Granularity(f"head({num_heads}, {groups})", block_of, check_reduction(reduction), heads)


def check_reduction(reduction: Reduction) -> Reduction:
    """Return the reduction; raise TypeError or ValueError if it is none."""
    check_choice("reduction", reduction, ("sum", "mean", "max"))
    return reduction
