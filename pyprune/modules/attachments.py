"""What sits on the parameters of a model, masks and gates: how it is put on, found, and taken off.

Parameters stay where they are, under the name that they had. A mask lies beside its parameter, in an attribute of the
module that torch does not know of (`MASKS`). A gate takes part in every forward pass, so it is a submodule, called
after its parameter (`gate_name`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

# The attribute of a module with its masks, by the names of the parameters they hold. Copies and pickles with it.
MASKS = "_pyprune_masks"


class Attachment:
    """What can sit on a parameter, at one place or, if it is tied, at several."""

    # Whether what it sits on is pruned for its own sake, and so a target.
    on_target = True

    def put_on(self, module: nn.Module, attribute: str) -> None:
        """Let it sit on a parameter that has nothing on it yet; change nothing if that cannot be."""
        raise NotImplementedError

    def take_off(self, module: nn.Module, attribute: str) -> None:
        """Leave no trace of it at this place. The values of the parameter stay as they are."""
        raise NotImplementedError


def gate_name(attribute: str) -> str:
    """Name the submodule that is the gate of a parameter.

    Example:
        >>> gate_name("weight")
        'weight_mask'
    """
    return f"{attribute}_mask"


@dataclass(frozen=True, eq=False)
class Owner:
    """One place that holds a parameter: ``module.attribute``, called ``name`` in the model."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def attachment(self) -> Attachment | None:
        """What sits on this place, if anything does."""
        # Looked up as the module itself does, because a mask update asks for every weight.
        masks = self.module.__dict__.get(MASKS)
        found = None if masks is None else masks.get(self.attribute)
        if found is None and not isinstance(self.module, torch.jit.ScriptModule):  # its tables are no dicts
            found = self.module._modules.get(gate_name(self.attribute))
        return found if isinstance(found, Attachment) else None

    @property
    def parameter(self) -> nn.Parameter | None:
        """What is there now: raw below a gate, with zeros below a mask."""
        return self.module._parameters.get(self.attribute)

    @property
    def foreign_steps(self) -> list[str]:
        """Class names of the parametrizations on this place; pyprune makes none."""
        if not parametrize.is_parametrized(self.module, self.attribute):
            return []
        return [type(step).__name__ for step in self.module.parametrizations[self.attribute]]  # type: ignore[index]


def check_module(model: object, name: str = "model") -> None:
    """Raise TypeError unless a model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} is of type {type(model).__name__}; give a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{name} is a TorchScript module, whose layers cannot be changed; prune before tracing it")


# What wraps a whole module passes its calls on, and puts a word into the names of what is inside.
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_WRAPPED_AS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


def wrapped_name(module: nn.Module) -> str | None:
    """Return the name of the module that another only wraps (compiled, in parallel, sharded), or None.

    Example:
        >>> wrapped_name(nn.DataParallel(nn.Linear(2, 2))), wrapped_name(nn.Linear(2, 2))
        ('module', None)
    """
    if isinstance(module, _WRAPPERS):
        return "module"
    if isinstance(module, torch.jit.ScriptModule):
        return None
    return next((name for name in _WRAPPED_AS if name in module._modules and _wraps(module, name)), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that a wrapper, or several, only wrap; itself if nothing does.

    Example:
        >>> unwrapped(nn.DataParallel(nn.Linear(2, 2)))
        Linear(in_features=2, out_features=2, bias=True)
    """
    while (name := wrapped_name(model)) is not None:
        model = model.get_submodule(name)
    return model


def _wraps(module: nn.Module, name: str) -> bool:
    """Whether there is nothing in a module but what is in this child; wrappers may know it by other names, too."""
    wrapped, others = module._modules[name], [child for child in module._modules.values() if child is not None]
    return wrapped is not None and not module._parameters and set(others) <= set(wrapped.modules())


def dense_modules(model: nn.Module, *, plain: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``model.named_modules(remove_duplicate=False)`` would yield without gates, and without wrappers.

    Names are those of the plain model, whatever wraps it or a part of it; those of its state_dict if not ``plain``.
    """
    yield from _walk(model, "", plain)


def _walk(module: nn.Module, name: str, plain: bool) -> Iterator[tuple[str, nn.Module]]:
    wrapped = wrapped_name(module)
    if wrapped is not None:  # they pass reading and writing of attributes on to what is inside
        yield from _walk(module._modules[wrapped], name if plain else f"{name}.{wrapped}".lstrip("."), plain)  # type: ignore[arg-type]
    elif not isinstance(module, Attachment):
        yield name, module
        for child_name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{name}.{child_name}".lstrip("."), plain)


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Return all parameters of a model, each once; ``parameters()`` of some returns groups for an optimizer."""
    held = (parameter for module in model.modules() for parameter in module._parameters.values())
    return list(dict.fromkeys(parameter for parameter in held if parameter is not None))


def dense_parameters(model: nn.Module, *, plain: bool = True) -> Iterator[tuple[Owner, nn.Parameter]]:
    """Yield every place of every parameter but those of gates, in the order of the model; names: `dense_modules`."""
    for prefix, module in dense_modules(model, plain=plain):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield Owner(f"{prefix}.{attribute}" if prefix else attribute, module, attribute), parameter


def shared_attachment(owners: Sequence[Owner]) -> Attachment | None:
    """Return what these owners of one parameter share."""
    for owner in owners:  # not next(): a mask update asks for every weight
        found = owner.attachment
        if found is not None:
            return found
    return None


def attach(attachments: Iterable[tuple[Sequence[Owner], Attachment]]) -> None:
    """Put each attachment on those owners of one parameter that have none; call it within a `Change` of the model."""
    for owners, attachment in attachments:
        for owner in owners:
            # A module reached under two names has two owners but takes one attachment.
            if owner.attachment is None:
                attachment.put_on(owner.module, owner.attribute)


def detach(owners: Sequence[Owner]) -> None:
    """Take attachments off these owners and leave no trace of them."""
    for owner in owners:
        attachment = owner.attachment
        if attachment is not None:
            attachment.take_off(owner.module, owner.attribute)
