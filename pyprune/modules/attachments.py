"""How something is put on the weights of modules, found, and taken off.

An attachment sits between a parameter and whoever reads it, through ``torch.nn.utils.parametrize``:
``module.weight`` becomes ``attachment(weight)``, and the parameter itself, the same object as before, moves
to ``module.parametrizations.weight.original``. Write to that one: what is written into ``module.weight`` is lost.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

# Attaching moves parameters; this attribute of a module names its parameters in the order before.
_ORDER = "_dense_parameter_names"


class Attachment(nn.Module):
    """What can sit on a weight: a module that takes it and returns a tensor of the same shape and dtype."""

    # Whether what it sits on is pruned for its own sake, and so a target.
    on_target = True


@dataclass(frozen=True, eq=False)
class Owner:
    """One place that holds a parameter: ``module.attribute``, called ``name`` in the dense model."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def attachment(self) -> Attachment | None:
        """What sits on this place, if anything does."""
        return _attachment_of(_steps(self.module, self.attribute))

    @property
    def parameter(self) -> nn.Parameter | None:
        """What is there now, below what sits on it."""
        steps = _steps(self.module, self.attribute)
        below = steps._parameters.get("original") if isinstance(steps, nn.Module) else None
        return self.module._parameters.get(self.attribute) if below is None else below

    @property
    def foreign_steps(self) -> list[str]:
        """Class names of other parametrizations on this place."""
        steps = _steps(self.module, self.attribute)
        return [type(step).__name__ for step in steps if not isinstance(step, Attachment)]


def check_module(model: object) -> None:
    """Raise TypeError unless a model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; give a torch.nn.Module")


def dense_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``model.named_modules(remove_duplicate=False)`` would yield without attachments.

    But no wrappers of ``torch.compile``: they pass reading and writing of attributes on to the module inside.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if not (_comes_with_attachments(module) or "_orig_mod" in module._modules):
            yield name, module


def dense_parameters(model: nn.Module) -> Iterator[tuple[Owner, nn.Parameter]]:
    """Yield every place of every parameter, in the order and under the names of the dense model."""
    for prefix, module in dense_modules(model):
        lists = _lists(module)
        for attribute in _dense_order(module):
            attached = _attachment_of(lists.get(attribute, ())) is not None
            parameter = _original(lists[attribute]) if attached else module._parameters.get(attribute)
            if parameter is not None:
                yield Owner(f"{prefix}.{attribute}" if prefix else attribute, module, attribute), parameter


def shared_attachment(owners: Sequence[Owner]) -> Attachment | None:
    """Return what these owners of one parameter share."""
    return next((found for owner in owners if (found := owner.attachment) is not None), None)


def attach(attachments: Iterable[tuple[Sequence[Owner], Attachment]]) -> list[Owner]:
    """Put each attachment on those owners of one parameter that have none; change nothing if one refuses.

    Returns:
        The owners that had none.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> _ = attach([([Owner("weight", linear, "weight")], Attachment())])
        >>> [name for name, _ in linear.named_parameters()]
        ['bias', 'parametrizations.weight.original']
    """
    new: list[Owner] = []
    try:
        for owners, attachment in attachments:
            for owner in owners:
                # A module reached under two names has two owners but takes one attachment.
                if owner.attachment is None:
                    new.append(owner)
                    _register(owner.module, owner.attribute, attachment)
    except BaseException:
        detach(new)
        raise
    return new


def detach(owners: Sequence[Owner]) -> None:
    """Take attachments off these owners and leave no trace: class, parameter, name and order are the dense ones."""
    for owner in owners:
        if owner.attachment is not None:
            _unregister(owner.module, owner.attribute)


def _lists(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Return the parametrizations of a module, by attribute."""
    if not parametrize.is_parametrized(module):
        return {}
    return dict(cast(nn.ModuleDict, module.parametrizations).items())  # type: ignore[arg-type]


def _steps(module: nn.Module, attribute: str) -> Iterable[nn.Module]:
    """Return the parametrizations of one attribute."""
    # Looked up as the module itself does, because a mask update asks for every weight.
    lists = module._modules.get("parametrizations")
    steps = lists._modules.get(attribute) if isinstance(lists, nn.ModuleDict) else None
    return cast(parametrize.ParametrizationList, steps) if steps is not None else ()


def _attachment_of(steps: Iterable[nn.Module]) -> Attachment | None:
    for step in steps:  # not next(): a mask update asks for every weight
        if isinstance(step, Attachment):
            return step
    return None


def _comes_with_attachments(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleDict):
        return len(module) > 0 and all(_comes_with_attachments(child) for child in module.values())
    if isinstance(module, parametrize.ParametrizationList):
        return _attachment_of(module) is not None
    return isinstance(module, Attachment)


def _original(steps: parametrize.ParametrizationList) -> nn.Parameter:
    return cast(nn.Parameter, steps.original)


def _dense_order(module: nn.Module) -> list[str]:
    """Name the parameters of a module in the order that they have in the dense model."""
    # What was put on by register_parametrization, without `attach`, comes last.
    by_hand = (attribute for attribute, steps in _lists(module).items() if _attachment_of(steps) is not None)
    return list(dict.fromkeys((*getattr(module, _ORDER, ()), *module._parameters, *by_hand)))


def _register(module: nn.Module, attribute: str, attachment: Attachment) -> None:
    order = _dense_order(module)
    if parametrize.is_parametrized(module):
        _unshare_class(module)
    cls, parameters = type(module), dict(module._parameters)
    try:
        # torch sets the parameter to itself, by which it loses the gradient accumulator that DistributedDataParallel
        # hooked into. So that is done to a stand-in.
        own = parameters.get(attribute)
        if own is not None:
            module._parameters[attribute] = nn.Parameter(own.detach(), False)
        # unsafe=True skips a trial run of the attachment, which keeps shape and dtype.
        parametrize.register_parametrization(module, attribute, attachment, unsafe=True)
        if own is not None:
            _lists(module)[attribute]._parameters["original"] = own
    except BaseException:
        # It takes the parameter off first, and may fail then, if the class of the user refuses to have subclasses.
        module._parameters.clear()
        module._parameters.update(parameters)
        object.__setattr__(module, "__class__", cls)
        raise
    module.__dict__[_ORDER] = order
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
    if not any(_attachment_of(steps) for steps in lists.values()):
        # Neither is there if it was attached by hand.
        module.__dict__.pop(_ORDER, None)
        for name in _RNN_OVERRIDES:
            if name in vars(type(module)):
                delattr(type(module), name)
    if not lists:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


class _Quiet:
    def __init_subclass__(cls, **kwargs: object) -> None:
        pass


def copied_class(cls: type, bases: tuple[type, ...]) -> type:
    """Return a class like this one, with other bases, whose ``__init_subclass__`` does not hear of it."""
    namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    copied = type(cls.__name__, (_Quiet, *bases), namespace)
    copied.__bases__ = bases
    return copied


def _unshare_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own again; a deep copy shares its original's."""
    module.__class__ = copied_class(type(module), type(module).__bases__)


def _attached_flat_weights(rnn: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(rnn, name, None) for name in rnn._flat_weights_names]


def _nothing(rnn: nn.RNNBase, value: object = None) -> None:
    pass


# RNN modules run on a list of weights that they cache. While something is attached, the list is made anew at each
# reading: a cached one would go stale, and would hold non-leaf tensors, which deepcopy refuses.
_RNN_OVERRIDES = {
    "_flat_weights": property(_attached_flat_weights, _nothing),
    "_init_flat_weights": _nothing,
    "_update_flat_weights": _nothing,
    "flatten_parameters": _nothing,
}
