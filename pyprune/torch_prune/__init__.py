"""A drop-in for ``torch.nn.utils.prune``: change the import, keep the code.

``import pyprune.torch_prune as prune`` has its classes, functions, arguments and rounding, and leaves modules in the
same state: ``<name>_orig`` a parameter, ``<name>_mask`` a buffer in its dtype, ``<name>`` their product, which a
forward pre-hook makes anew at each call. Classes are subclasses of torch's: either library recognises, extends and
removes what the other has put on, and methods written for one work with the other. Where scores do not tie, the masks
are the same. What differs from the original:

* L1 masks, of one tensor and of many, come from `ops.threshold`; of equal scores the one with the lowest index goes
  (there: any). A random method draws the same numbers from the same seed, but for half types float32 (there: numbers
  so coarse that many tie). Channel norms are summed in float64 (there: in the dtype of the weight).
* Nothing changes unless the whole call works: masks are computed first (there: an int that exceeds what is left takes
  the hook off, and `remove` refuses what remains).
* Pruning again looks at the weights as they are (there: as they were at the last forward pass).
* `copy.deepcopy` works after a forward pass with gradients (there: an error). So do channels_last weights, a
  generator of parameters, more than 2^31 elements, and parameters on several devices: scores meet on that of the
  first.
* ``nn.MultiheadAttention`` reads ``out_proj.weight`` without calling ``out_proj``, so no hook runs (there: the weight
  goes stale, and a second backward pass fails). While it is pruned, its class is a subclass that multiplies at each
  reading.
* `remove` puts the parameter back in its place (there: at the end). A later hook takes the place of the one before
  (there: comes after all hooks). Where torch's `weight_norm` or `spectral_norm` makes the weight of the parameter
  that is pruned (``weight_v``), the hook comes before theirs (there: the weight is made of what was pruned a pass
  ago, and a second backward pass fails).
* Masks that were given, as `global_unstructured` does, are merged in a `PruningContainer` (there: it keeps those of
  all rounds, and memory grows).
* Scores or a mask of another shape are a ValueError (there: an AssertionError); what is no parameter is a TypeError
  before anything changes; for `global_unstructured`, no parameters or the same twice are a ValueError.

The same as there: of importance scores the magnitude counts; NaN and infinity count as largest and are kept; between
``optimizer.step()`` or ``load_state_dict`` and the next forward pass, ``module.weight`` is that of the last one; tied
parameters are pruned one by one; a bias is not pruned with its channel.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from pyprune.checks import check_items, shown
from pyprune.modules.attachments import check_module
from pyprune.modules.memory import prefer_huge_pages
from pyprune.modules.undo import Change
from pyprune.torch_prune.amount import Amount, count
from pyprune.torch_prune.amount import _compute_nparams_toprune as _compute_nparams_toprune
from pyprune.torch_prune.amount import _validate_pruning_amount as _validate_pruning_amount
from pyprune.torch_prune.amount import _validate_pruning_amount_init as _validate_pruning_amount_init
from pyprune.torch_prune.choice import without_smallest
from pyprune.torch_prune.methods import (
    BasePruningMethod,
    CustomFromMask,
    Identity,
    L1Unstructured,
    LnStructured,
    PruningContainer,
    RandomStructured,
    RandomUnstructured,
    check_scores,
    takes_smallest,
    with_method,
)
from pyprune.torch_prune.state import Product, attach, parts

_M = TypeVar("_M", bound=nn.Module)

__all__ = [
    "BasePruningMethod",
    "CustomFromMask",
    "Identity",
    "L1Unstructured",
    "LnStructured",
    "PruningContainer",
    "RandomStructured",
    "RandomUnstructured",
    "custom_from_mask",
    "global_unstructured",
    "identity",
    "is_pruned",
    "l1_unstructured",
    "ln_structured",
    "random_structured",
    "random_unstructured",
    "remove",
]

Place: TypeAlias = tuple[nn.Module, str]


def identity(module: _M, name: str) -> _M:
    """Put a mask of ones on a parameter.

    Example:
        >>> identity(nn.Linear(3, 1), "bias").bias_mask
        tensor([1.])
    """
    Identity.apply(module, name)
    return module


def random_unstructured(module: _M, name: str, amount: Amount) -> _M:
    """Prune elements of a parameter at random.

    Args:
        module: owns the parameter.
        name: of the parameter.
        amount: a float in [0, 1] of what is still kept, rounded as `round` does, or an int of elements.

    Example:
        >>> int(random_unstructured(nn.Linear(5, 2), "weight", amount=0.3).weight_mask.sum())
        7
    """
    RandomUnstructured.apply(module, name, amount)
    return module


def l1_unstructured(module: _M, name: str, amount: Amount, importance_scores: Tensor | None = None) -> _M:
    """Prune the elements of a parameter, or those of its scores, that have the smallest magnitude.

    Args:
        module: owns the parameter.
        name: of the parameter.
        amount: a float in [0, 1] of what is still kept, rounded as `round` does, or an int of elements.
        importance_scores: in place of the parameter, of its shape. Of these too the magnitude counts.

    Example:
        >>> linear = nn.Linear(4, 1)
        >>> linear.weight.data = torch.tensor([[1.0, -3.0, 0.5, 2.0]])
        >>> l1_unstructured(linear, "weight", amount=0.5).weight
        tensor([[ 0., -3.,  0.,  2.]], grad_fn=<MulBackward0>)
    """
    L1Unstructured.apply(module, name, amount, importance_scores=importance_scores)
    return module


def random_structured(module: _M, name: str, amount: Amount, dim: int) -> _M:
    """Prune channels of a parameter at random.

    Args:
        module: owns the parameter.
        name: of the parameter.
        amount: a float in [0, 1] of the channels that are not all gone, or an int of channels.
        dim: along which channels are counted.

    Example:
        >>> linear = random_structured(nn.Linear(5, 2), "weight", amount=3, dim=1)
        >>> int((linear.weight_mask.sum(dim=0) == 0).sum())
        3
    """
    RandomStructured.apply(module, name, amount, dim)
    return module


def ln_structured(
    module: _M,
    name: str,
    amount: Amount,
    n: float | str,
    dim: int,
    importance_scores: Tensor | None = None,
) -> _M:
    """Prune the channels of a parameter, or of its scores, that have the smallest norm.

    Args:
        module: owns the parameter.
        name: of the parameter.
        amount: a float in [0, 1] of the channels that are not all gone, or an int of channels.
        n: the order of the norm, any that `torch.norm` takes: a number, inf, -inf, "fro" or "nuc".
        dim: along which channels are counted.
        importance_scores: in place of the parameter, of its shape.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> linear.weight.data = torch.tensor([[1.0, -3.0], [2.0, 2.5]])
        >>> ln_structured(linear, "weight", amount=1, n=2, dim=0).weight_mask
        tensor([[0., 0.],
                [1., 1.]])
    """
    LnStructured.apply(module, name, amount, n, dim, importance_scores=importance_scores)
    return module


def custom_from_mask(module: _M, name: str, mask: Tensor) -> _M:
    """Prune a parameter where a mask of its shape is zero.

    Example:
        >>> custom_from_mask(nn.Linear(1, 3), "bias", mask=torch.tensor([0, 1, 0])).bias_mask
        tensor([0., 1., 0.])
    """
    CustomFromMask.apply(module, name, mask)
    return module


def global_unstructured(
    parameters: Iterable[Place],
    pruning_method: Any,
    importance_scores: dict[Place, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Prune elements of several parameters that compete with each other.

    Args:
        parameters: pairs of a module and the name of its parameter.
        pruning_method: a class of unstructured methods, from here, from torch, or your own.
        importance_scores: by pair, in place of parameters, of their shapes.
        kwargs: for the class, as ``amount``: a float in [0, 1] of all that is still kept, or an int of elements.

    Example:
        >>> net = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 1))
        >>> global_unstructured([(layer, "weight") for layer in net], L1Unstructured, amount=10)
        >>> sum(int((mask == 0).sum()) for mask in net.buffers())
        10
    """
    places = _check_places(parameters)
    if not isinstance(importance_scores, dict | None):
        raise TypeError(
            f"importance_scores is a {type(importance_scores).__name__}; give a dict from (module, name) to a tensor"
        )
    if not isinstance(pruning_method, type) or not issubclass(pruning_method, torch_prune.BasePruningMethod):
        raise TypeError(f"pruning_method is {shown(pruning_method)}; give a class of methods, as L1Unstructured")
    if "amount" in kwargs:
        _validate_pruning_amount_init(kwargs["amount"])
    method: Any = pruning_method(**kwargs)
    if method.PRUNING_TYPE != "unstructured":
        raise TypeError(
            f"pruning_method is {pruning_method}, of type {method.PRUNING_TYPE!r}; only methods of type "
            "'unstructured' compare elements of different parameters"
        )
    found = [parts(module, name) for module, name in places]
    scores = [(importance_scores or {}).get(place, orig) for place, (orig, _) in zip(places, found, strict=True)]
    for score, (orig, _), (_, name) in zip(scores, found, places, strict=True):
        check_scores(score, orig, name)
    masks = [mask for _, mask in found]
    choose = _l1_masks if takes_smallest(method) else _joint_masks
    with Change(*dict.fromkeys(module for module, _ in places)):
        kept = choose(method, scores, masks)
        for (module, name), (orig, _), one in zip(places, found, kept, strict=True):
            mask = prefer_huge_pages(torch.empty_like(orig, requires_grad=False)).copy_(one)
            hook = with_method(module, name, CustomFromMask(mask))
            attach(module, name, hook, mask, Product.apply(orig, mask))


def remove(module: _M, name: str) -> _M:
    """Fold the mask into a parameter for good, and leave no trace of pruning.

    Raises:
        ValueError: if that parameter is not pruned.

    Example:
        >>> linear = remove(l1_unstructured(nn.Linear(4, 1), "weight", amount=2), "weight")
        >>> [name for name, _ in linear.named_parameters()], int((linear.weight == 0).sum())
        (['weight', 'bias'], 2)
    """
    check_module(module, "module")
    if not isinstance(name, str):
        raise TypeError(f"name is {shown(name)}; give the name of a parameter")
    orig = module._parameters.get(name + "_orig")
    try:
        with Change(module, values=[] if orig is None else [orig]):
            torch_prune.remove(module, name)
    except ValueError as error:
        raise ValueError(f"name is {shown(name)}: {error}") from error
    return module


def is_pruned(module: nn.Module) -> bool:
    """Whether a parameter of a module, or of one inside it, is pruned.

    Example:
        >>> linear = nn.Linear(4, 1)
        >>> is_pruned(linear), is_pruned(identity(linear, "weight"))
        (False, True)
    """
    check_module(module, "module")
    return torch_prune.is_pruned(module)


def _check_places(parameters: Iterable[Place]) -> list[Place]:
    what = "pairs of a module and a parameter's name"
    places = []
    for pair in check_items("parameters", parameters, what):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], nn.Module):
            raise TypeError(f"parameters has {shown(pair)} in it; give {what}")
        places.append((pair[0], pair[1]))
    if not places:
        raise ValueError("parameters is empty; give pairs of a module and a parameter's name")
    if len(set(places)) < len(places):
        raise ValueError("parameters names a parameter of a module twice; give each pair once")
    return places


def _l1_masks(method: L1Unstructured, scores: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
    bases = [None if mask is None else (mask == 1).to(scores[0].device) for mask in masks]
    left = sum(score.numel() if base is None else int(base.sum()) for score, base in zip(scores, bases, strict=True))
    return without_smallest(scores, count(method.amount, left), bases)


def _joint_masks(
    method: torch_prune.BasePruningMethod, scores: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> list[Tensor]:
    """Let any method choose in one long tensor."""
    device = scores[0].device
    joined = torch.cat([score.detach().reshape(-1).to(device) for score in scores])
    bases = [torch.ones_like(score) if mask is None else mask for score, mask in zip(scores, masks, strict=True)]
    default_mask = torch.cat([base.reshape(-1).to(device) for base in bases])
    container = PruningContainer()
    container._tensor_name = method._tensor_name = "joined"
    container.add_pruning_method(method)
    mask = container.compute_mask(joined, default_mask)
    split = torch.split(mask, [score.numel() for score in scores])
    return [one.view(score.shape) for one, score in zip(split, scores, strict=True)]
