"""How much a weight matters: rules that give scores, of which the lowest go.

Each function returns the importance of a `Method`. In the formulas w is the raw weight, and g the gradient of the
loss with respect to the weight in use, from `calibrate`.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyprune import ops
from pyprune.checks import check_bool, check_choice, check_count, check_number, shown
from pyprune.methods.lamp import lamp_scores
from pyprune.methods.relative import relative_importance

Normalization = Literal["none", "l2", "mean", "gaussian", "lamp"]
Statistic = Literal[
    "none",
    "gradient",
    "squared gradient",
    "momentum",
    "input norm",
    "zero outputs",
    "mean output",
    "norm scale",
    "given",
    "gram",
]


@dataclass(frozen=True)
class Importance:
    """A rule that gives scores; made by the functions of this module.

    Args:
        name: what it is called.
        score: takes a weight and its statistic and returns scores of what ``scores_of`` says.
        scores_of: "elements" (scores shaped like the weight, which granularity reduces), "matrices" (the same, but
            the weight comes as matrices of outputs by inputs), "channels" (one per output channel), "rows" (takes
            the units as rows of a matrix, returns one per row) or "names" (noise).
        needs: the statistic that `calibrate` has to gather; "gram" is for solvers of `prune_one_shot` alone.
        power: p if the score is ``|w|^p``, which the kernels compute themselves.
        normalize: what the scores of each weight are divided by.
        signed: whether scores can be negative.
        options: what the statistic depends on: the activation function, or the decay and the scale of momentum.
        joint: whether scores of elements have signs, and the score of a unit is |their sum|.
    """

    name: str
    score: Callable[[Tensor, Tensor], Tensor]
    scores_of: Literal["elements", "matrices", "channels", "rows", "names"] = "elements"
    needs: Statistic = "none"
    power: float | None = None
    normalize: Normalization = "none"
    signed: bool = False
    options: tuple[object, ...] = ()
    joint: bool = False


def magnitude(p: float = 1.0, normalize: Normalization = "none") -> Importance:
    """Score ``|w|^p``. Summed over a channel, p = 1 and p = 2 order like its L1 and L2 norm.

    Args:
        p: any positive power.
        normalize: what makes the scores s of different weights comparable, so it only matters where weights compete
            with each other: "l2" divides by ||s||_2, "mean" by the mean of s, "gaussian" takes (s - mean) /
            deviation, "lamp" s^2 / (the sum of the squares of s and all larger ones). s are the scores of units.

    Raises:
        TypeError, ValueError: for another power or name.

    Papers: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks"; Li et al. 2017,
    "Pruning Filters for Efficient ConvNets"; Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based
    pruning".

    Example:
        >>> magnitude().score(torch.tensor([-2.0, 1.0]), None).tolist()
        [2.0, 1.0]
    """
    power = _positive("p", p)

    def score(weight: Tensor, statistic: Tensor) -> Tensor:
        return _wide(weight).abs() ** power

    return Importance(f"magnitude(p={p:g})", score, power=power, normalize=_check_normalization(normalize))


def random(seed: int = 0) -> Importance:
    """Score by noise that depends on the seed and the name of the weight alone: the same on every device.

    Example:
        >>> random(seed=3).scores_of
        'names'
    """
    seed = check_count("seed", seed)

    def score(units: Tensor, statistic: Tensor) -> Tensor:
        raise AssertionError("noise needs only the name and the number of units")

    return Importance(f"random(seed={seed})", score, scores_of="names", options=(seed,))


def random_scores(seed: int, name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return uniform noise in (0, 1) for the units of a weight."""
    return ops.gate_noise(shape, torch.tensor([seed], device=device), stream=zlib.crc32(name.encode()))


def gradient(normalize: Normalization = "none") -> Importance:
    """Score |g|, with the gradient averaged over the batches.

    Example:
        >>> gradient().score(torch.ones(2), torch.tensor([-3.0, 1.0])).tolist()
        [3.0, 1.0]
    """
    return Importance(
        "gradient", lambda weight, g: g.abs(), "elements", "gradient", None, _check_normalization(normalize)
    )


def snip(normalize: Normalization = "none") -> Importance:
    """Score |w g|, with the gradient averaged over the batches.

    Paper: Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity".

    Example:
        >>> snip().score(torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 1.0])).tolist()
        [6.0, 1.0]
    """
    return Importance(
        "snip",
        lambda weight, g: (_wide(weight) * g).abs(),
        "elements",
        "gradient",
        None,
        _check_normalization(normalize),
    )


def snip_momentum(decay: float = 0.9, scale: float = 1.0, normalize: Normalization = "none") -> Importance:
    """Score S, where each batch makes S = decay * S + scale * |w g|, from zero.

    Example:
        >>> snip_momentum().score(torch.ones(1), torch.tensor([1.9])).item()
        1.899999976158142
    """
    options = (_positive("decay", decay), _positive("scale", scale))
    return Importance(
        "snip_momentum",
        lambda weight, s: s,
        "elements",
        "momentum",
        None,
        _check_normalization(normalize),
        False,
        options,
    )


def taylor(normalize: Normalization = "none", *, joint: bool = False) -> Importance:
    """Score (w g)^2, averaged over the batches; granularity sums it over a unit.

    With ``joint=True`` the score of a unit is |sum of w g| over its elements, with the gradient averaged over the
    batches: what the loss would change by, to first order, if all went at once. For `granularity.coupled` the sum is
    over all weights that the unit lies in.

    Papers: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning"; Ma et al. 2023, "LLM-Pruner: On
    the Structural Pruning of Large Language Models" (joint).

    Example:
        >>> taylor().score(torch.tensor([2.0, -1.0]), torch.tensor([9.0, 1.0])).tolist()  # squares of g
        [36.0, 1.0]
        >>> taylor(joint=True).score(torch.tensor([2.0, -1.0]), torch.tensor([3.0, 1.0])).tolist()
        [6.0, -1.0]
    """
    if check_bool("joint", joint):
        return Importance(
            "taylor(joint)",
            lambda weight, g: _wide(weight) * g,
            "elements",
            "gradient",
            None,
            _check_normalization(normalize),
            joint=True,
        )
    return Importance(
        "taylor", _weighted_square, "elements", "squared gradient", None, _check_normalization(normalize)
    )


def fisher(damp: float = 0.0, normalize: Normalization = "none") -> Importance:
    """Score w^2 (E[g^2] + damp) / 2: what optimal brain damage expects the loss to rise by, with the Fisher diagonal.

    E is over the batches of `calibrate`: batches of one sample give the Fisher information, larger ones less of it.
    Without ``damp`` it orders like `taylor` on the same batches.

    Papers: LeCun et al. 1990, "Optimal Brain Damage"; Kurtic et al. 2022, "The Optimal BERT Surgeon".

    Example:
        >>> fisher().score(torch.tensor([2.0, -1.0]), torch.tensor([9.0, 1.0])).tolist()
        [18.0, 0.5]
    """
    added = _positive("damp", damp, zero=True)

    def score(weight: Tensor, squares: Tensor) -> Tensor:
        return _weighted_square(weight, squares + added) / 2

    return Importance("fisher", score, "elements", "squared gradient", None, _check_normalization(normalize))


def wanda(normalize: Normalization = "none") -> Importance:
    """Score |w| ||x||_2, where x is the input that the weight multiplies, over all samples and positions.

    Made for `scope.row` and `scope.n_of_m`, where weights of one output compete.

    Paper: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models".

    Example:
        >>> wanda().score(torch.tensor([[1.0, -2.0, 3.0, -4.0]]), torch.tensor([[1.0, 2.0, 1.0, 0.5]])).tolist()
        [[1.0, 4.0, 3.0, 2.0]]
    """
    return Importance(
        "wanda",
        lambda weight, norm: _wide(weight).abs() * norm,
        needs="input norm",
        normalize=_check_normalization(normalize),
    )


def obs() -> Importance:
    """Score w^2 / (H^-1)_jj, the error that is left when other weights make up for w: what solvers choose by.

    H is the damped Gram of what goes into the layer. It is for `prune_one_shot` with a solver; other calls refuse it.

    Paper: Hassibi and Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon".

    Example:
        >>> obs().name
        'obs'
    """

    def score(weight: Tensor, statistic: Tensor) -> Tensor:
        raise ValueError("importance obs is the own one of solvers; give it to pyprune.prune_one_shot with a solver")

    return Importance("obs", score, needs="gram")


def ria(power: float = 0.5, normalize: Normalization = "none") -> Importance:
    """Score (|w| / sum of |row| + |w| / sum of |column|) ||x||_2^power: relative importance and activations.

    Rows are outputs and columns inputs, in a convolution each at one position of its kernel; groups and experts are
    matrices of their own. Relative importance keeps a layer from losing all of a row or column, so all elements of a
    weight may compete (`scope.tensor`). x is the input, as in `wanda`.

    Args:
        power: of the norm of the input; with 0 the score is that of the weights alone, and needs no calibration.
        normalize: as in `magnitude`.

    Raises:
        TypeError, ValueError: for a power that is no number or below 0, or another name.

    Paper: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models".

    Example:
        >>> weight = torch.tensor([[1.0, -3.0], [1.0, 0.0]])
        >>> ria().score(weight, torch.tensor([[1.0, 4.0]])).tolist()
        [[0.75, 3.5], [1.5, 0.0]]
    """
    power = _positive("power", power, zero=True)

    def score(matrices: Tensor, norm: Tensor) -> Tensor:
        relative = relative_importance(_wide(matrices))
        return relative * norm**power if power else relative

    needs: Statistic = "input norm" if power else "none"
    return Importance(f"ria(power={power:g})", score, "matrices", needs, normalize=_check_normalization(normalize))


def geometric_median() -> Importance:
    """Score a channel by the sum of its L2 distances to the other channels of its weight: the most replaceable goes.

    Paper: He et al. 2019, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration".

    Example:
        >>> geometric_median().score(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), None).tolist()
        [5.0, 10.0, 5.0]
    """
    return Importance("geometric_median", lambda units, _: _distance_sums(units), scores_of="rows")


def batch_norm_scale() -> Importance:
    """Score an output channel by |gamma| of the BatchNorm that follows; other layers are left alone.

    Needs ``examples_inputs`` in `prune`, to see which BatchNorm follows which layer.

    Paper: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".

    Example:
        >>> batch_norm_scale().score(torch.ones(2, 1), torch.tensor([-0.5, 0.1])).tolist()
        [0.5, 0.10000000149011612]
    """
    return Importance("batch_norm_scale", lambda weight, scale: scale.abs(), "channels", "norm scale")


def apoz(activation: Callable[[Tensor], Tensor] = torch.relu) -> Importance:
    """Score an output channel by how often it is not zero after ``activation``: 1 - (average percentage of zeros).

    The activation function is applied to the output of the layer itself.

    Paper: Hu et al. 2016, "Network Trimming: A Data-Driven Neuron Pruning Approach".

    Example:
        >>> apoz().score(torch.ones(2, 1), torch.tensor([0.25, 1.0])).tolist()
        [0.75, 0.0]
    """
    return Importance(
        "apoz", lambda _, zeros: 1 - zeros, "channels", "zero outputs", options=(_function("activation", activation),)
    )


def mean_activation(activation: Callable[[Tensor], Tensor] = torch.relu) -> Importance:
    """Score an output channel by the mean of ``activation`` of the layer's output, over samples and positions.

    Paper: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference".

    Example:
        >>> mean_activation().score(torch.ones(2, 1), torch.tensor([0.25, 1.0])).tolist()
        [0.25, 1.0]
    """
    return Importance(
        "mean_activation",
        lambda _, mean: mean,
        "channels",
        "mean output",
        signed=True,
        options=(_function("activation", activation),),
    )


def custom(function: Callable[[Tensor], Tensor], name: str = "custom") -> Importance:
    """Score by a function of the weight; it returns finite numbers of the same shape, the lowest of which go.

    A `Method` also takes the function itself.

    Example:
        >>> custom(lambda weight: -weight).score(torch.tensor([1.0, 2.0]), None).tolist()
        [-1.0, -2.0]
    """
    score = _function("function", function)
    if not isinstance(name, str):
        raise TypeError(f"name is {shown(name)}; give a string, for messages")
    return Importance(name, lambda weight, _: score(weight), signed=True)


def given(scores: Mapping[str, Tensor]) -> Importance:
    """Take the scores from a dict, by the name of the weight: one per element, or one per unit of the granularity.

    Example:
        >>> given({"fc.weight": torch.ones(2, 3)}).options[0].keys()
        dict_keys(['fc.weight'])
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores is a {type(scores).__name__}; give a dict of weight names to tensors")
    for weight, tensor in scores.items():
        if not isinstance(weight, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"scores has {shown(tensor)} for {shown(weight)}; give a dict of weight names to tensors")
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
            raise TypeError(f"scores has a tensor for {weight} that is no dense one of real numbers; give such a one")
    return Importance("given", lambda _, given_scores: given_scores, needs="given", signed=True, options=(scores,))


def normalized(scores: Tensor, how: Normalization) -> Tensor:
    """Make the scores of one weight comparable with those of others; where one is not finite, some remain so.

    Example:
        >>> normalized(torch.tensor([1.0, 3.0]), "mean").tolist()
        [0.5, 1.5]
    """
    if how == "none" or scores.numel() == 0:
        return scores
    if how == "lamp":
        return torch.where(scores.isfinite(), lamp_scores(scores), torch.nan)
    if how == "l2":
        norm = ops.norms([scores])[0]
        return torch.where(norm == 0, 0, scores / norm).to(scores.dtype)
    center = scores.mean(dtype=torch.float64)
    if how == "mean":
        return torch.where(center == 0, 0, scores / center).to(scores.dtype)
    deviation = (scores - center).square().mean().sqrt()
    return torch.where(deviation == 0, 0, (scores - center) / deviation).to(scores.dtype)


def without_signs(scores: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors that order like these, and have the same ties, but are not negative: float64, exactly.

    Example:
        >>> [round(x - 2**31) for x in without_signs([torch.tensor([-0.0, 0.0])])[0].tolist()]
        [0, 0]
    """
    if any(score.dtype == torch.float64 for score in scores):
        flat = torch.cat([score.double().flatten() for score in scores])
        ranks = torch.unique(flat, return_inverse=True)[1].double()
        ranks = torch.where(flat.isfinite(), ranks, math.nan)
        split = torch.split(ranks, [score.numel() for score in scores])
        return [part.reshape(score.shape) for part, score in zip(split, scores, strict=True)]
    keys = []
    for score in scores:
        # The bits of floats order like integers, but those below zero the wrong way round. + 0.0 ends -0.0.
        bits = (score.float() + 0.0).view(torch.int32)
        ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).double() + 2.0**31
        keys.append(torch.where(score.isfinite(), ordered, math.nan))
    return keys


def _weighted_square(weight: Tensor, squares: Tensor) -> Tensor:
    return _wide(weight).square() * squares


def _distance_sums(units: Tensor) -> Tensor:
    # From products of all pairs: one matrix product instead of n^2 differences. In float64, because near neighbours
    # differ by little beside their lengths.
    rows = units.double()
    squares = rows.square().sum(1)
    sums = torch.empty_like(squares)
    step = max(1, 2**24 // max(1, len(rows)))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        distances = (squares[start : start + step, None] + squares).addmm_(part, rows.T, alpha=-2)
        own = torch.arange(len(part), device=rows.device)
        distances[own, own + start] = 0
        sums[start : start + step] = distances.clamp_(min=0).sqrt_().sum(1)
    return sums.to(_wide(units).dtype)


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def _positive(name: str, value: float, *, zero: bool = False) -> float:
    what = "finite number, 0 or more" if zero else "positive, finite number"
    return check_number(name, value, what=f"a {what}", least=0, open_ends=not zero)


def _function(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if not callable(function):
        raise TypeError(f"{name} is {shown(function)}, a {type(function).__name__}; give a function of a tensor")
    return function


def _check_normalization(how: Normalization) -> Normalization:
    check_choice("normalize", how, ("none", "l2", "mean", "gaussian", "lamp"))
    return how
