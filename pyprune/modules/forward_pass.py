"""Where a forward pass of a model begins and ends: with the outermost call of a module that has gates below it.

All uses of a weight in one pass must see the same sample of its gate: tied owners, a module that is called twice,
and the recomputation of checkpointed activations. A gate sees only a weight, so something has to tell it the pass.

- Calls inside the outermost one change nothing. Modules with gates below them get a subclass of their class whose
  ``__call__`` opens a pass and closes it in ``finally``. Hooks would not do: an interrupt from the keyboard goes
  past them and leaves the pass open, and attention leaves its fast path when it sees any. ``_call_impl`` does the
  same, because what was compiled before it was pruned has kept the old ``__call__``. When a module's parts have
  been stripped one by one, its next call or copy gives it its class back. A ``forward`` that is a generator runs
  outside of its pass.
- torch.compile: that ``__call__`` is marked to run in Python, and what it calls is compiled with the seed as an
  input, so a compiled block shares the sample of its eager model, and can be checkpointed. If the caller is
  compiled as a whole, the draw is part of the graph, and checkpointing too. Nothing that changes per step is
  guarded. One gap is left: a block whose ``forward`` is torch's own (``nn.Sequential``), compiled by
  ``torch.compile(block)`` and checkpointed from outside, draws anew in the recomputation; torch notices this unless
  the checkpoint is reentrant.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from pyprune.checks import shown
from pyprune.modules.attachments import (
    Attachment,
    Owner,
    attach,
    check_module,
    dense_modules,
    shared_attachment,
)
from pyprune.modules.gated_classes import (
    SAMPLER,
    begin,
    class_with_gates,
    end,
    forget_passes,
    gated_attributes,
    set_class,
)
from pyprune.modules.gates import StochasticGate, gates_of
from pyprune.modules.sampling import Sampler
from pyprune.modules.undo import Change
from pyprune.modules.unit_gates import UnitGates

_Module = TypeVar("_Module", bound=nn.Module)
# They hold modules or parameters, and are not called.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@contextmanager
def one_gate_sample(model: nn.Module) -> Iterator[None]:
    """Let all gates of a model keep one sample, for code that calls parts of the model one by one.

    A call of a model that `prune` put gates on does this by itself. It is needed around code that goes past that:
    ``model.encode(x)`` or ``model.forward(x)``, a ``forward`` that is a generator and so runs when its call is over,
    and parts whose gates were put on by hand (`attach_gate`). `torch.compile` may come before or after `prune`, and
    around this.

    Args:
        model: the model, or the part, whose gates keep their sample; a pass that is open already goes on.

    Raises:
        TypeError: if it is no module.

    Example:
        >>> import torch
        >>> from pyprune import StochasticGate
        >>> gate, weight = StochasticGate((100,), keep_probability=0.5), torch.ones(100)
        >>> with one_gate_sample(gate):
        ...     bool((gate(weight) == gate(weight)).all())
        True
    """
    check_module(model)
    opened = begin(model, None)
    try:
        yield
    finally:
        end(opened)


def attach_and_share(model: nn.Module, attachments: Sequence[tuple[Sequence[Owner], Attachment]]) -> None:
    """Put masks and gates on a model, and let its gates share samples; call it within a `Change` of the model.

    Raises:
        ValueError: if the model is in DistributedDataParallel already, which would not know the new logits.
    """
    adds_logits = any(
        isinstance(attachment, (StochasticGate, UnitGates)) and shared_attachment(owners) is None
        for owners, attachment in attachments
    )
    if adds_logits and any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is in DistributedDataParallel, which would not average the gradients of new gates; put gates "
            "on first, then wrap"
        )
    attach(attachments)
    share_samples(model)


def attach_gate(module: _Module, attribute: str, gate: StochasticGate) -> _Module:
    """Put a gate on one parameter of a module by hand, as `prune` does on all weights of a model; return the module.

    From then on ``module.weight`` is what the gate makes of the raw weight, which stays the same `Parameter` under
    the same name in ``named_parameters()``; what is written in place into ``module.weight`` is lost. Losses,
    statistics, configs and `strip` treat the gate like one of `prune`. In training, each call of the module draws a
    new sample, unless it is part of the call of a module that `prune` put gates on, or `one_gate_sample` is around.

    Args:
        module: the layer that holds the parameter.
        attribute: its name there, such as ``"weight"``, or ``"0"`` in a ParameterList.
        gate: the gate, for a weight of this shape. Tied weights want the same gate on each of their owners.

    Returns:
        ``module``.

    Raises:
        TypeError, ValueError: for other arguments, a parameter that carries a mask or gate or is not there, a gate
            for another shape, or a class that cannot have it. The module is then as it was.

    Example:
        >>> linear = attach_gate(nn.Linear(3, 4), "weight", StochasticGate((4, 3), gate_shape=(4, 1)))
        >>> [name for name, _ in linear.named_parameters()]
        ['weight', 'bias', 'weight_mask.logits']
    """
    check_module(module, "module")
    if not isinstance(gate, StochasticGate):
        raise TypeError(f"gate is of type {type(gate).__name__}; give a StochasticGate or a HardConcreteGate")
    parameter = module._parameters.get(attribute) if isinstance(attribute, str) else None
    if parameter is None:
        there = ", ".join(name for name, value in module._parameters.items() if value is not None)
        raise ValueError(
            f"{type(module).__name__} has no parameter {shown(attribute)} itself, as attribute says; it has "
            f"{there or 'none'}"
        )
    owner = Owner(attribute, module, attribute)
    if owner.attachment is not None:
        raise ValueError(
            f"{attribute} carries a {type(owner.attachment).__name__} already; call pyprune.strip first, or leave it"
        )
    if tuple(parameter.shape) != gate.shape:
        raise ValueError(
            f"the gate is for a weight of shape {gate.shape}, and {attribute} is {tuple(parameter.shape)}"
        )
    with Change(module, gate):
        attach([([owner], gate)])
        gate.folded = False
        module.__dict__.setdefault(SAMPLER, gate.sampler)
    return module


def share_samples(model: nn.Module) -> None:
    """Make each call of the model, or of a part of it, a pass in which all gates keep one sample."""
    sampler = Sampler()
    classes = {
        module: class_with_gates(module, gated_attributes(module))
        for _, module in dense_modules(model)
        if not isinstance(module, _CONTAINERS) and gates_of(module)
    }
    for stream, gate in enumerate(gates_of(model)):
        gate.sampler, gate.stream = sampler, stream
    for module, cls in classes.items():
        module.__dict__[SAMPLER] = sampler
        set_class(module, cls)


def unshare_samples(model: nn.Module) -> None:
    """Undo `share_samples`: a module without gates of its own has the class again that it had before."""
    for module in model.modules():
        forget_passes(module)
