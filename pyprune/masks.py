"""Masks on the weights of modules: how they are put on, found, and taken off.

A mask sits between a parameter and whoever reads it, through ``torch.nn.utils.parametrize``:
``module.weight`` becomes ``where(mask, weight, 0)``, and the parameter itself, the same object as before, moves
to ``module.parametrizations.weight.original``. Write to that one: what is written into ``module.weight`` is lost.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Masking moves parameters; this attribute of a masked module names its parameters in the order before.
_ORDER = "_dense_parameter_names"


class Mask(nn.Module):
    """A bool tensor that zeroes part of a weight and of its gradient; all owners of a tied weight share one.

    ``where``, not a product: a dropped infinity must give 0, not NaN.

    Example:
        >>> Mask(torch.tensor([True, False]))(torch.tensor([1.0, torch.inf])).tolist()
        [1.0, 0.0]
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros where the mask is False."""
        return torch.where(self.mask, weight, 0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Mask":
        # model.type(dtype), unlike model.to(dtype), converts bool buffers too.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mask = self.mask.bool()
        return self


@dataclass(frozen=True, eq=False)
class Owner:
    """One place that holds a parameter: ``module.attribute``, called ``name`` in the dense model."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def mask(self) -> Mask | None:
        """The mask on this place, if there is one."""
        return _mask_of(_lists(self.module).get(self.attribute, ()))

    @property
    def foreign_steps(self) -> list[str]:
        """Class names of other parametrizations on this place."""
        steps = _lists(self.module).get(self.attribute, ())
        return [type(step).__name__ for step in steps if not isinstance(step, Mask)]


def dense_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``model.named_modules(remove_duplicate=False)`` would yield without masks."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not _comes_with_masks(module):
            yield name, module


def dense_parameters(model: nn.Module) -> Iterator[tuple[Owner, nn.Parameter]]:
    """Yield every place of every parameter, in the order and under the names of the model without masks."""
    for prefix, module in dense_modules(model):
        lists = _lists(module)
        for attribute in _dense_order(module):
            masked = _mask_of(lists.get(attribute, ())) is not None
            parameter = _original(lists[attribute]) if masked else module._parameters.get(attribute)
            if parameter is not None:
                yield Owner(f"{prefix}.{attribute}" if prefix else attribute, module, attribute), parameter


def shared_mask(owners: Sequence[Owner]) -> Mask | None:
    """Return the mask that these owners of one parameter share."""
    return next((owner.mask for owner in owners if owner.mask is not None), None)


def attach(masks: Iterable[tuple[Sequence[Owner], Tensor]]) -> None:
    """Put each mask on all owners of one parameter; change nothing if one of them refuses.

    Where a `Mask` is there already it is kept, and updated in place, so that nothing is recompiled.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> attach([([Owner("weight", linear, "weight")], torch.eye(2, dtype=torch.bool))])
        >>> bool(linear.weight[0, 1] == 0)
        True
    """
    new: list[Owner] = []
    updates: list[tuple[Mask, Tensor]] = []
    try:
        for owners, mask in masks:
            shared = shared_mask(owners)
            if shared is None:
                shared = Mask(mask)
            else:
                updates.append((shared, mask))
            for owner in owners:
                # A module reached under two names has two owners but takes one mask.
                if owner.mask is None:
                    new.append(owner)
                    _register(owner.module, owner.attribute, shared)
        for shared, mask in updates:
            # Checked before the first is written, so that no copy of the old masks is needed.
            if mask.shape != shared.mask.shape or shared.mask.is_inference():
                raise ValueError(
                    f"a mask of shape {tuple(shared.mask.shape)} cannot take one of {tuple(mask.shape)}, or it was "
                    "loaded under torch.inference_mode; load the state_dict outside it"
                )
    except BaseException:
        detach(new)
        raise
    with torch.no_grad():
        for shared, mask in updates:
            shared.mask.copy_(mask)


def detach(owners: Sequence[Owner]) -> None:
    """Take the masks off these owners and leave no trace: class, parameter, name and order are the dense ones."""
    for owner in owners:
        if owner.mask is not None:
            _unregister(owner.module, owner.attribute)


def _lists(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Return the parametrizations of a module, by attribute."""
    if not parametrize.is_parametrized(module):
        return {}
    return dict(cast(nn.ModuleDict, module.parametrizations).items())  # type: ignore[arg-type]


def _mask_of(steps: Iterable[nn.Module]) -> Mask | None:
    return next((step for step in steps if isinstance(step, Mask)), None)


def _comes_with_masks(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleDict):
        return len(module) > 0 and all(_comes_with_masks(child) for child in module.values())
    if isinstance(module, parametrize.ParametrizationList):
        return _mask_of(module) is not None
    return isinstance(module, Mask)


def _original(steps: parametrize.ParametrizationList) -> nn.Parameter:
    return cast(nn.Parameter, steps.original)


def _dense_order(module: nn.Module) -> list[str]:
    """Name the parameters of a module in the order that they have without masks."""
    return list(dict.fromkeys((*getattr(module, _ORDER, ()), *module._parameters)))


def _register(module: nn.Module, attribute: str, mask: Mask) -> None:
    order = _dense_order(module)
    if parametrize.is_parametrized(module):
        _unshare_class(module)
    # unsafe=True skips a trial run of the mask, which keeps shape and dtype.
    parametrize.register_parametrization(module, attribute, mask, unsafe=True)
    setattr(module, _ORDER, order)
    if isinstance(module, nn.RNNBase):
        for name, value in _RNN_OVERRIDES.items():
            setattr(type(module), name, value)
        module.__dict__.pop("_flat_weights", None)


def _unregister(module: nn.Module, attribute: str) -> None:
    # Not parametrize.remove_parametrizations: it edits the module's class, which deep copies share, and puts
    # the parameter last.
    _unshare_class(module)
    order = _dense_order(module)
    parameter = _original(_lists(module)[attribute])
    delattr(type(module), attribute)
    del cast(nn.ModuleDict, module.parametrizations)[attribute]
    module.register_parameter(attribute, parameter)
    for name in order:
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)
    lists = _lists(module)
    if not any(_mask_of(steps) for steps in lists.values()):
        delattr(module, _ORDER)
        if isinstance(module, nn.RNNBase):
            for name in _RNN_OVERRIDES:
                delattr(type(module), name)
    if not lists:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _unshare_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own again; a deep copy shares its original's."""
    shared = type(module)
    namespace = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, namespace)


def _masked_flat_weights(rnn: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(rnn, name, None) for name in rnn._flat_weights_names]


def _nothing(rnn: nn.RNNBase, value: object = None) -> None:
    pass


# RNN modules run on a list of weights that they cache. While masks are on, the list is made anew at each reading:
# a cached one would go stale, and would hold non-leaf tensors, which deepcopy refuses.
_RNN_OVERRIDES = {
    "_flat_weights": property(_masked_flat_weights, _nothing),
    "_init_flat_weights": _nothing,
    "_update_flat_weights": _nothing,
    "flatten_parameters": _nothing,
}
