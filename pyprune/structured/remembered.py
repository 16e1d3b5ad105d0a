"""What a model remembers of how it became smaller: each module has a plan of its own tensors and attributes.

It is a plain attribute, which copies and pickles with the module, and goes where the module goes: into another model,
or to another place in a list.
"""

from dataclasses import replace

from torch import nn

from pyprune.modules.attachments import check_module, unwrapped
from pyprune.structured.plan import Plan

_PLACE = "_pyprune_plan"


def plan_of(model: nn.Module) -> Plan | None:
    """Return how a model became smaller than what its code makes, however often it was shrunk; None if it did not.

    Args:
        model: a model, or a part of one; wrapped (compiled, in parallel) or not.

    Returns:
        A plan for `rebuild` of a fresh dense model.

    Raises:
        TypeError: if ``model`` is no module.

    Example:
        >>> import torch
        >>> from pyprune import shrink
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[2:].zero_(), model[0].bias[2:].zero_()
        >>> _ = shrink(model, torch.ones(1, 4))
        >>> plan_of(model).tensors["2.weight"]
        {1: [0, 1]}
    """
    check_module(model)
    model = unwrapped(model)
    plans = {
        name: plan
        for name, module in model.named_modules(remove_duplicate=False)
        if (plan := vars(module).get(_PLACE)) is not None
    }
    if not plans:
        return None
    return Plan(
        {_join(path, name): dims for path, plan in plans.items() for name, dims in plan.tensors.items()},
        {_join(path, name): shape for path, plan in plans.items() for name, shape in plan.shapes.items()},
        [[path, *setting[1:]] for path, plan in plans.items() for setting in plan.attributes],
        [_join(path, name) for path, plan in plans.items() for name in plan.biases],
        type(model).__name__,
    )


def remember(model: nn.Module, plan: Plan) -> None:
    """Let a model remember what was done to it, after what was done before.

    Args:
        model: as the plan has left it.
        plan: its positions are those of the model as it was right before.
    """
    parts: dict[str, Plan] = {}

    def part(path: str) -> Plan:
        return parts.setdefault(path, Plan())

    for name, dims in plan.tensors.items():
        path, _, leaf = name.rpartition(".")
        part(path).tensors[leaf] = dims
        part(path).shapes[leaf] = plan.shapes[name]
    for path, *setting in plan.attributes:
        part(path).attributes.append(["", *setting])
    for name in plan.biases:
        path, _, leaf = name.rpartition(".")
        part(path).biases.append(leaf)
    modules = {path: model.get_submodule(path) for path in parts}
    # A module with several names has one plan.
    for path in {module: path for path, module in reversed(modules.items())}.values():
        known = vars(modules[path])
        known[_PLACE] = known[_PLACE].then(parts[path]) if _PLACE in known else parts[path]


def lose_entries(module: nn.Module, name: str, dim: int, left: int) -> None:
    """Let what a module remembers be of a dense model without entries that `drop_experts` took of one of its tensors.

    Example:
        >>> linear = nn.Linear(2, 3)
        >>> remember(linear, Plan({"weight": {1: [0, 2]}}, {"weight": [4, 5]}))
        >>> lose_entries(linear, "weight", 0, 3)
        >>> plan_of(linear).shapes
        {'weight': [3, 5]}
    """
    plan = vars(module).get(_PLACE)
    if plan is None or name not in plan.tensors:
        return
    dims = {other: kept for other, kept in plan.tensors[name].items() if other != dim}
    shape = [left if other == dim else size for other, size in enumerate(plan.shapes[name])]
    tensors, shapes = {**plan.tensors, name: dims}, {**plan.shapes, name: shape}
    vars(module)[_PLACE] = replace(plan, tensors=tensors, shapes=shapes)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
