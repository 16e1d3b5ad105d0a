"""What pruning leaves in a module."""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pyprune.checks import shown
from pyprune.modules.attachments import check_module
from pyprune.modules.memory import prefer_huge_pages


class NoSuchParameter(AttributeError, ValueError):
    """A name that is none: an AttributeError as in torch, and a ValueError as everywhere here."""


class Product(torch.autograd.Function):
    """Mask times parameter, into memory that is quick to write for the first time."""

    @staticmethod
    def forward(ctx: Any, orig: Tensor, mask: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(mask)
        return torch.mul(mask, orig, out=prefer_huge_pages(torch.empty_like(orig)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Mask the gradient."""
        (mask,) = ctx.saved_tensors
        return grad * mask, None


class OutProjection(NonDynamicallyQuantizableLinear):
    """The output projection of attention while it is pruned: what is pruned is made when it is read."""

    def __getattr__(self, name: str) -> Any:
        mask = self.__dict__.get("_buffers", {}).get(name + "_mask")
        if mask is None:
            return super().__getattr__(name)
        orig = getattr(self, name + "_orig")
        return mask.to(orig.dtype) * orig


def hook_keys(module: nn.Module, name: str) -> list[int]:
    """Return where the hook of a parameter is: nowhere, or in one place."""
    return [
        key
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, torch_prune.BasePruningMethod) and hook._tensor_name == name
    ]


def parts(module: nn.Module, name: str) -> tuple[nn.Parameter, Tensor | None]:
    """Return the parameter itself, and the mask that it has already."""
    check_module(module, "module")
    if not isinstance(name, str):
        raise TypeError(f"name is {shown(name)}; give the name of a parameter")
    if hook_keys(module, name):
        return getattr(module, name + "_orig"), getattr(module, name + "_mask")
    there = ", ".join(key for key, value in module._parameters.items() if value is not None)
    try:
        orig = getattr(module, name)
    except AttributeError as error:
        raise NoSuchParameter(
            f"{type(module).__name__} has no parameter {shown(name)}, as name says; it has {there or 'none'}"
        ) from error
    if not isinstance(orig, nn.Parameter):
        raise TypeError(f"{name} of {type(module).__name__} is a {type(orig).__name__}; give the name of a parameter")
    return orig, None


def _hooks(module: nn.Module) -> list[Any]:
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, torch_prune.BasePruningMethod)]


def _parameter_order(module: nn.Module) -> tuple[str, ...]:
    """Name the parameters in the order they had before any was pruned; hooks of torch do not know it."""
    known = (hook._parameter_order for hook in _hooks(module) if hasattr(hook, "_parameter_order"))
    return next(known, tuple(module._parameters))


def attach(module: nn.Module, name: str, hook: Any, mask: Tensor, product: Tensor | None = None) -> None:
    """Give a module what pruning needs; call it within a `Change` of the module."""
    keys = hook_keys(module, name)
    if not keys:
        hook._parameter_order = _parameter_order(module)
        module.register_parameter(name + "_orig", module._parameters[name])
        del module._parameters[name]
    module.register_buffer(name + "_mask", mask)
    product = hook.apply_mask(module) if product is None else product
    if type(module) is NonDynamicallyQuantizableLinear:
        module.__class__ = OutProjection
    show_product(module, name, product)
    hook._module = weakref.ref(module)
    if keys:
        module._forward_pre_hooks[keys[0]] = hook
    else:
        keys = [module.register_forward_pre_hook(hook).id]
    if any(_reads(other, name) for other in module._forward_pre_hooks.values()):
        hooks = module._forward_pre_hooks
        _replace(hooks, {keys[0]: hooks[keys[0]], **hooks})


def _reads(hook: Any, name: str) -> bool:
    """Whether a hook of torch makes another weight of the one with this name, and so must come after ours."""
    made_of = {WeightNorm: ("_g", "_v"), SpectralNorm: ("_orig",)}.get(type(hook), ())
    return any(hook.name + end == name for end in made_of)


def show_product(module: nn.Module, name: str, product: Tensor) -> None:
    """Let ``module.<name>`` be the product of parameter and mask."""
    if not isinstance(module, OutProjection):
        setattr(module, name, product)


def copy_product(module: nn.Module, name: str, memo: dict[int, Any]) -> None:
    """Give deepcopy, which refuses what autograd made, the product of the copies of parameter and mask."""
    product = vars(module).get(name)
    if product is not None and not product.is_leaf:
        mask, orig = (copy.deepcopy(getattr(module, name + end), memo) for end in ("_mask", "_orig"))
        memo[id(product)] = mask.to(orig) * orig


def detach(module: nn.Module, hook: torch_prune.BasePruningMethod) -> None:
    """Undo what `attach` did, but for the values and for the hook itself."""
    order = {name: place for place, name in enumerate(getattr(hook, "_parameter_order", ()))}
    projection = isinstance(module, OutProjection)
    if projection:
        module.__class__ = NonDynamicallyQuantizableLinear
    torch_prune.BasePruningMethod.remove(hook, module)
    if projection and len(_hooks(module)) > 1:
        module.__class__ = OutProjection
    names = sorted(module._parameters, key=lambda name: order.get(name.removesuffix("_orig"), len(order)))
    _replace(module._parameters, {name: module._parameters[name] for name in names})


def _replace(table: dict[Any, Any], entries: dict[Any, Any]) -> None:
    table.clear()
    table.update(entries)
