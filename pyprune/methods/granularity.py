"""What disappears as one: single elements, blocks, channels, convolution kernels, attention heads, coupled units.

Each function returns the granularity of a `Method`. A *unit* is what it removes; the ratio counts units. Outputs and
inputs are those of the layer, wherever its weight has them; where that cannot be told, `prune` raises. A channel of a
convolution with groups, or of experts in one weight, is a channel of one group, or of one expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pyprune.checks import check_bool, check_choice, check_count, check_names, shown
from pyprune.methods.unit_groups import Reduction, Weight


@dataclass(frozen=True)
class Granularity:
    """How weights are cut into units; made by the functions of this module.

    Args:
        name: what it is called.
        block_of: returns the size of a unit of a weight along each of its dimensions, or raises ValueError.
        reduction: how scores of elements become the score of their unit.
        heads: for attention heads, how many there are.
        coupled: for units that lie in several weights, which of them, and how they are scored and counted.
    """

    name: str
    block_of: Callable[[Weight], tuple[int, ...]]
    reduction: Reduction = "sum"
    heads: "Heads | None" = None
    coupled: "Coupled | None" = None


@dataclass(frozen=True)
class Heads:
    """Attention heads: those that share a key and value head are one unit."""

    num_heads: int
    num_kv_heads: int
    names: tuple[str, str, str, str] | None = None


RatioOf = Literal["units", "parameters", "macs"]


@dataclass(frozen=True)
class Coupled:
    """Coupled units, as `coupled` was told of them."""

    heads: bool = True
    width: bool = False
    reduce: Reduction = "mean"
    normalize: Reduction | None = "mean"
    round_to: int = 1
    min_units: int = 1
    ratio_of: RatioOf = "units"


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


def coupled(
    heads: bool = True,
    width: bool = False,
    *,
    reduce: Reduction = "mean",
    normalize: Reduction | None = "mean",
    round_to: int = 1,
    min_units: int = 1,
    ratio_of: RatioOf = "units",
) -> Granularity:
    """Remove what can only go together: channels with all that reads them, heads, groups of convolutions.

    `pyprune.coupled_groups` finds the units and groups of them on ``examples_inputs``, which is needed. A mask drops
    a unit from all weights that it lies in, and from biases and the parameters of norms, so that it stays dead in
    training; running statistics are left as they are. What is dropped can be removed from the model.

    The score of a unit is the ``reduce`` of its scores in each weight of two dimensions or more that it lies in. The
    score in one weight is the sum over the unit's elements there (for `importance.wanda` the root of the sum of
    squares), divided by the ``normalize`` of all units', so that a large weight does not outvote a small one.
    Activations count in weights that read the unit (`importance.wanda`), or that make it (`importance.apoz`).

    With `scope.tensor` the units of each group compete, with `scope.model` those of all groups of a kind: channels,
    heads, or groups of convolutions. Something of each group is always left.

    Args:
        heads: whether heads of attention go.
        width: whether units go without which the model is another one than with zeros in their place: the width of
            a residual stream under LayerNorm, say. If not, a warning names them.
        reduce: "mean", "sum" or "max", over the weights of a group.
        normalize: what scores in a weight are divided by: "mean", "sum" or "max" over the units; or None.
        round_to: the number of channels that remain is rounded up to a multiple of this; heads, and groups of
            convolutions, are not rounded. So less may go than was asked for, never more.
        min_units: how many units of each group are left at least.
        ratio_of: what a ratio is the fraction of: "units"; or "parameters" or "macs" of the whole model, counted as
            they are without the units: as few go as that takes. Then there is one ratio for all.

    Raises:
        TypeError, ValueError: for other values.

    Papers: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning"; Ma et al. 2023, "LLM-Pruner: On the
    Structural Pruning of Large Language Models".

    Example:
        >>> coupled(heads=False).coupled.width
        False
    """
    check_bool("heads", heads)
    check_bool("width", width)
    check_choice("reduce", reduce, ("mean", "sum", "max"))
    if normalize is not None:
        check_choice("normalize", normalize, ("mean", "sum", "max"))
    round_to = check_count("round_to", round_to, least=1)
    min_units = check_count("min_units", min_units, least=1)
    check_choice("ratio_of", ratio_of, ("units", "parameters", "macs"))

    def block_of(weight: Weight) -> tuple[int, ...]:
        raise AssertionError("coupled units are found in a forward pass of the model")

    units = Coupled(heads, width, reduce, normalize, round_to, min_units, ratio_of)
    return Granularity("coupled", block_of, coupled=units)


def check_reduction(reduction: Reduction) -> Reduction:
    """Return the reduction; raise TypeError or ValueError if it is none."""
    check_choice("reduction", reduction, ("sum", "mean", "max"))
    return reduction
