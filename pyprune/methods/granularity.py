"""What disappears as one: single elements, blocks, channels, convolution kernels, attention heads.

Each function returns the granularity of a `Method`. A *unit* is what it removes; the ratio counts units. Outputs and
inputs are those of the layer, wherever its weight has them; where that cannot be told, `prune` raises. A channel of a
convolution with groups, or of experts in one weight, is a channel of one group, or of one expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

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


def block(n: int, m: int, reduction: Reduction = "mean") -> Granularity:
    """Remove blocks of ``n`` outputs by ``m`` inputs, in a convolution at one position of the kernel.

    Where the sizes of a weight do not divide, the blocks at its edges are smaller; the mean is over what they have.

    Raises:
        TypeError, ValueError: unless both are at least 1. `prune` raises if a block is larger than a weight.

    Paper: Lagunas et al. 2021, "Block Pruning For Faster Transformers".

    Example:
        >>> import torch
        >>> block(4, 1).block_of(Weight("conv", torch.empty(8, 6, 3, 3)))
        (4, 1, 1, 1)
    """
    check_count("n", n)
    check_count("m", m)

    def block_of(weight: Weight) -> tuple[int, ...]:
        shape = weight.values.shape
        if len(shape) < 2 or n > shape[weight.out_dim] or m > shape[weight.in_dim]:
            raise ValueError(
                f"a block of {n} outputs by {m} inputs is larger than {weight.name} of shape {tuple(shape)}; name it "
                "in ignored_scope, or choose smaller blocks"
            )
        sizes = [1] * len(shape)
        sizes[weight.out_dim], sizes[weight.in_dim] = n, m
        return tuple(sizes)

    return Granularity(f"block({n}, {m})", block_of, check_reduction(reduction))


def channel(side: Literal["out", "in"] = "out", reduction: Reduction = "sum") -> Granularity:
    """Remove whole output channels (filters, rows of a linear layer or an embedding), or input channels.

    Example:
        >>> import torch
        >>> channel("in").block_of(Weight("conv", torch.empty(8, 6, 3, 3)))
        (8, 1, 3, 3)
    """
    if side not in ("out", "in"):
        raise ValueError(f'side is {side!r}; allowed are "out" and "in"')

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
            a path that begins with "../" starts at its parent. If None, the names that Hugging Face, timm, diffusers
            and ``nn.MultiheadAttention`` use.
        reduction: over all elements of a head.

    Raises:
        TypeError, ValueError: for numbers that do not fit each other, or the weights.

    Paper: Michel et al. 2019, "Are Sixteen Heads Really Better than One?".

    Example:
        >>> head(num_heads=32, num_kv_heads=8).heads.num_kv_heads
        8
    """
    check_count("num_heads", num_heads)
    check_count("num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads)
    groups = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % groups:
        raise ValueError(f"{groups} key and value heads do not divide {num_heads} query heads")
    if names is not None and (isinstance(names, str) or len(names) != 4):
        raise ValueError(f"names is {names!r}; give those of the query, key, value and output projection")
    heads = Heads(num_heads, groups, None if names is None else (names[0], names[1], names[2], names[3]))

    def block_of(weight: Weight) -> tuple[int, ...]:
        raise AssertionError("heads are found with the attention layers of a model")

    return Granularity(f"head({num_heads}, {groups})", block_of, check_reduction(reduction), heads)


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless a number is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; give an int")
    if value < least:
        raise ValueError(f"{name} is {value}; give at least {least}")


def check_reduction(reduction: Reduction) -> Reduction:
    """Return the reduction; raise ValueError if it is none."""
    if reduction not in ("sum", "mean", "max"):
        raise ValueError(f'reduction is {reduction!r}; allowed are "sum", "mean" and "max"')
    return reduction
