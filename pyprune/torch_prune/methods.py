"""The methods: torch's classes, with masks and hooks of our own."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import prune as torch_prune

from pyprune.checks import shown
from pyprune.modules.mask_states import is_plain
from pyprune.modules.undo import Change
from pyprune.torch_prune.amount import _validate_pruning_amount_init, channel_count, count
from pyprune.torch_prune.choice import channel_norms, without_channels, without_smallest
from pyprune.torch_prune.state import attach, copy_product, detach, hook_keys, parts, show_product


class BasePruningMethod(torch_prune.BasePruningMethod):
    """What a method is and how it is put on; subclass it, and say ``PRUNING_TYPE`` and ``compute_mask``.

    ``compute_mask(t, default_mask)`` returns the mask for the scores t. A type of ``"unstructured"`` sees what is
    still kept, ``"structured"`` the channels along ``self.dim`` that are not all gone, ``"global"`` everything.

    Example:
        >>> class EveryOther(BasePruningMethod):
        ...     PRUNING_TYPE = "unstructured"
        ...
        ...     def compute_mask(self, t, default_mask):
        ...         mask = default_mask.clone()
        ...         mask.view(-1)[::2] = 0
        ...         return mask
        >>> linear = nn.Linear(4, 1)
        >>> _ = EveryOther.apply(linear, "weight")
        >>> linear.weight_mask
        tensor([[0., 1., 0., 1.]])
    """

    _module: Callable[[], nn.Module | None] | None = None  # a weak reference; for deepcopy alone

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Multiply parameter and mask before a forward pass."""
        if not torch.compiler.is_compiling() and self._module is None:  # the hook was loaded
            self._module = weakref.ref(module)
        show_product(module, self._tensor_name, self.apply_mask(module))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_module"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the hook; if its module is being copied, also what it multiplies, which comes later in the module."""
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        module = self._module and self._module()
        if module is not None and id(module) in memo:
            copied._module = weakref.ref(memo[id(module)])
            copy_product(module, self._tensor_name, memo)
        return copied

    @classmethod
    def apply(
        cls, module: nn.Module, name: str, *args: Any, importance_scores: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Prune a parameter of a module, and return the hook that keeps it so.

        Args:
            module: owns the parameter.
            name: of the parameter.
            args: for the class.
            importance_scores: in place of the parameter, of its shape.
            kwargs: for the class.
        """
        if "amount" in kwargs:
            _validate_pruning_amount_init(kwargs["amount"])
        method = cls(*args, **kwargs)
        orig, mask = parts(module, name)
        hook = with_method(module, name, method)
        with Change(module):
            if importance_scores is None:
                importance_scores = orig if mask is None else hook.apply_mask(module)
            else:
                check_scores(importance_scores, orig, name)
            default_mask = torch.ones_like(orig) if mask is None else mask.detach().clone()
            mask = hook.compute_mask(importance_scores, default_mask=default_mask)
            attach(module, name, hook, mask)
        return hook

    def prune(self, t: Tensor, default_mask: Tensor | None = None, importance_scores: Tensor | None = None) -> Tensor:
        """Return a tensor times its mask, without a module."""
        if importance_scores is not None:
            check_scores(importance_scores, t, "t")
        pruned: Tensor = super().prune(t, default_mask, importance_scores)  # type: ignore[no-untyped-call]
        return pruned

    def remove(self, module: nn.Module) -> None:
        """Fold the mask into the parameter, and give it its name and place back; the hook itself stays."""
        detach(module, self)


class PruningContainer(torch_prune.PruningContainer, BasePruningMethod):
    """The methods that were put on one parameter, one after the other; the last one computes masks.

    Masks that were given (`CustomFromMask`, which `global_unstructured` puts on too) are merged into the latest of
    them, their product, so that a model that is pruned again and again does not fill the memory with masks. Torch's
    own container keeps them all.

    Example:
        >>> linear = nn.Linear(4, 4)
        >>> for _ in range(2):
        ...     _ = L1Unstructured.apply(linear, "weight", amount=0.5)
        >>> (container,) = linear._forward_pre_hooks.values()
        >>> len(container), int(linear.weight_mask.sum())
        (2, 4)
    """

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the default mask without what the last method takes from it."""
        method = self[-1]
        if takes_smallest(method):
            base = default_mask == 1
            (kept,) = without_smallest([t], count(method.amount, int(base.sum())), [base])
            return default_mask.to(t.dtype, copy=True).masked_fill_(~kept, 0)
        mask: Tensor = super().compute_mask(t, default_mask)  # type: ignore[no-untyped-call]
        return mask


# Torch's own `apply` of each class names its arguments, and passes them on to that of `BasePruningMethod`.
class Identity(torch_prune.Identity, BasePruningMethod):  # type: ignore[misc]
    """Prune nothing."""


class RandomUnstructured(torch_prune.RandomUnstructured, BasePruningMethod):  # type: ignore[misc]
    """Prune ``amount`` elements at random, as `torch.manual_seed` says."""

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the default mask without so many elements, of all."""
        removed = count(self.amount, t.numel())
        if removed == 0:
            return default_mask.clone()
        noise = torch.rand(t.shape, dtype=torch.float64 if t.dtype == torch.float64 else None, device=t.device)
        (kept,) = without_smallest([1 - noise], removed)  # the original takes the largest
        return default_mask.clone().masked_fill_(~kept, 0)


class L1Unstructured(torch_prune.L1Unstructured, BasePruningMethod):  # type: ignore[misc]
    """Prune the ``amount`` elements of the smallest magnitude."""

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the default mask without so many elements, of all."""
        (kept,) = without_smallest([t], count(self.amount, t.numel()))
        return default_mask.clone().masked_fill_(~kept, 0)


class RandomStructured(torch_prune.RandomStructured, BasePruningMethod):  # type: ignore[misc]
    """Prune ``amount`` channels along ``dim`` at random, as `torch.manual_seed` says."""

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the default mask without so many channels, of all."""
        removed = channel_count(self.amount, t, self.dim)
        scores = torch.rand(t.shape[self.dim] if removed else 0)
        return without_channels(default_mask.to(t.dtype), self.dim, scores, removed)


class LnStructured(torch_prune.LnStructured, BasePruningMethod):  # type: ignore[misc]
    """Prune the ``amount`` channels along ``dim`` of the smallest ``n``-norm."""

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the default mask without so many channels, of all."""
        removed = channel_count(self.amount, t, self.dim)
        return without_channels(default_mask.to(t.dtype), self.dim, channel_norms(t, self.n, self.dim), removed)


class CustomFromMask(torch_prune.CustomFromMask, BasePruningMethod):  # type: ignore[misc]
    """Prune where a mask is zero."""

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the product of both masks."""
        check_dense("mask", self.mask)
        if default_mask.shape != self.mask.shape:
            raise ValueError(
                f"mask has shape {tuple(self.mask.shape)}; give one of the parameter's, {tuple(default_mask.shape)}"
            )
        mask: Tensor = super().compute_mask(t, default_mask)  # type: ignore[no-untyped-call]
        return mask


def takes_smallest(method: torch_prune.BasePruningMethod) -> bool:
    """Whether a method is L1 as it is here; a subclass may compute other masks."""
    return type(method).compute_mask is L1Unstructured.compute_mask


def check_scores(scores: Tensor, like: Tensor, name: str) -> None:
    """Raise unless scores are a dense tensor of the shape of what they are for."""
    check_dense("importance_scores", scores)
    if scores.shape != like.shape:
        raise ValueError(
            f"importance_scores has shape {tuple(scores.shape)}; give one of {name}'s shape, {tuple(like.shape)}"
        )


def check_dense(argument: str, tensor: object) -> None:
    """Raise TypeError unless an argument is a tensor whose values can be read."""
    if not isinstance(tensor, Tensor) or isinstance(tensor, FakeTensor) or not is_plain(tensor):
        kind = type(tensor).__name__
        raise TypeError(f"{argument} is {shown(tensor)}, a {kind}; give a dense tensor with values")


def with_method(module: nn.Module, name: str, method: torch_prune.BasePruningMethod) -> Any:
    """Return the method, or a new container of those that are on the parameter and the method."""
    method._tensor_name = name
    keys = hook_keys(module, name)
    if not keys:
        return method
    before = module._forward_pre_hooks[keys[0]]
    container: Any = PruningContainer()
    container._tensor_name = name
    container._parameter_order = getattr(before, "_parameter_order", ())
    for one in before if isinstance(before, torch_prune.PruningContainer) else (before,):
        if not _takes_in(method, one):
            container.add_pruning_method(one)
    container.add_pruning_method(method)
    return container


def _takes_in(method: Any, before: Any) -> bool:
    """Merge a mask that was given earlier into the one that comes; return whether that could be done."""
    kinds = (torch_prune.CustomFromMask, CustomFromMask)  # what subclasses make of their mask is not known
    if type(method) not in kinds or type(before) not in kinds or method.mask.shape != before.mask.shape:
        return False
    method.mask = before.mask.to(method.mask.device) * method.mask
    return True
