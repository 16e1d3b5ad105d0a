"""Put learned gates into an optimizer: they need a group of their own, without weight decay."""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from pyprune.modules.attachments import check_module, parameters_of
from pyprune.modules.gates import gates_of


def innermost(optimizer: object, otherwise: str = "") -> Optimizer:
    """Return an optimizer without the wrappers that have it as ``.optimizer``, as those of Accelerate and Lightning.

    Raises:
        TypeError: if there is none inside; ends with ``otherwise``.

    Example:
        >>> import torch
        >>> innermost(torch.optim.SGD([nn.Parameter(torch.ones(1))])).defaults["lr"]
        0.001
    """
    inner = optimizer
    while not isinstance(inner, Optimizer) or hasattr(inner, "optimizer"):
        wrapped = getattr(inner, "optimizer", None)
        if wrapped is None:
            raise TypeError(
                f"optimizer is of type {type(optimizer).__name__}; give a torch.optim.Optimizer, or a wrapper that "
                f"has one as .optimizer{otherwise}"
            )
        inner = wrapped
    return inner


def innermost_of(given: object, otherwise: str = "") -> list[Optimizer]:
    """Return the `innermost` of one optimizer or of several; none of None.

    Example:
        >>> innermost_of(None)
        []
    """
    if given is None:
        return []
    try:
        several = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else [given]
    except TypeError:  # a tensor without dimensions says that it is iterable
        several = [given]
    return [innermost(one, otherwise) for one in several]


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the logits of all learned gates of a model, each once; none without gates.

    Gates want no weight decay, and a learning rate of their own: a logit starts at 4.6 (Bernoulli) or 3.0 (hard
    concrete) and closes its gate at 0 or -2.4, so rate times steps must be above 5 with an optimizer like Adam.

    Example:
        >>> import torch
        >>> from pyprune import prune
        >>> model = prune(nn.Linear(4, 2), "UNSTRUCTURED_REGULARIZATION_BASED")
        >>> optimizer = torch.optim.AdamW(
        ...     [
        ...         {"params": weight_parameters(model), "lr": 1e-4},
        ...         {"params": gate_parameters(model), "lr": 1e-2, "weight_decay": 0.0},
        ...     ]
        ... )
        >>> check_optimizer(model, optimizer)
    """
    check_module(model)
    return list(dict.fromkeys(gate.logits for gate in gates_of(model)))


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return all parameters of a model but the logits of its gates, each once, in the order of the model.

    Example:
        >>> from pyprune import prune
        >>> model = prune(nn.Linear(4, 2), "UNSTRUCTURED_REGULARIZATION_BASED")
        >>> sorted(tuple(parameter.shape) for parameter in weight_parameters(model))
        [(2,), (2, 4)]
    """
    logits = set(gate_parameters(model))
    return [parameter for parameter in parameters_of(model) if parameter not in logits]


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise if an optimizer would not train the gates of a model, or would pull on them by weight decay.

    Weight decay draws a logit to 0, and so the probability of its gate to 1/2, whatever the loss says.

    Args:
        model: the model with learned gates.
        optimizer: the one that is to train the gates; its other groups do not matter.

    Raises:
        TypeError: if ``optimizer`` has no parameter groups.
        ValueError: if the model has no gates, if a group with ``weight_decay`` holds logits, or if logits that
            require gradients are in no group: an optimizer built before `prune` does not know them. Names them.

    Example:
        >>> import torch
        >>> from pyprune import prune
        >>> model = prune(nn.Linear(4, 2), "UNSTRUCTURED_REGULARIZATION_BASED")
        >>> check_optimizer(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    """
    logits = set(gate_parameters(model))
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer")
    if not logits:
        raise ValueError(
            f"{type(model).__name__} has no learned gates; prune it in a mode with gates, then build the optimizer"
        )
    grouped = {parameter for group in groups for parameter in group["params"]}
    decayed = {parameter for group in groups if group.get("weight_decay") for parameter in group["params"]}
    names = {parameter: name for name, parameter in model.named_parameters() if parameter in logits}
    pulled = [name for parameter, name in names.items() if parameter in decayed]
    if pulled:
        raise ValueError(
            f"weight decay would pull gates to a probability of 1/2: {', '.join(pulled)}. Put "
            "gate_parameters(model) in a group with weight_decay=0"
        )
    missing = [name for parameter, name in names.items() if parameter.requires_grad and parameter not in grouped]
    if missing:
        raise ValueError(
            f"gates are in no group of the optimizer, so they would not learn: {', '.join(missing)}. Build the "
            "optimizer after prune(), or give it add_param_group({'params': gate_parameters(model)})"
        )
