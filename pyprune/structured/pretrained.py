"""Models of transformers that are smaller than their config can say: they are saved with their plan beside it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pyprune.modules.undo import refill, undoing
from pyprune.structured.configs import (
    computes_the_same,
    find_entries,
    plain_class,
    pretrained_parts,
    says_all,
    set_entries,
    shapes_by_config,
    shapes_of,
)
from pyprune.structured.plan import Plan
from pyprune.structured.remembered import plan_of, remember

# Beside the config, which says so under this name.
FILE = "pyprune_plan.json"
ENTRY = "pyprune_plan"


def let_configs_say(model: nn.Module, inputs: Sequence[Any]) -> None:
    """Let the config of a model of transformers that became smaller say so; if it cannot, the plan is saved with it.

    Args:
        model: as it is now; what it became remembers how.
        inputs: what it is compared on with the plain model of the config.
    """
    for name, part in pretrained_parts(model):
        if plan_of(part) is None:
            continue
        entries = find_entries(part, computes_the_same(model, inputs, name))
        if entries:
            config: Any = part.config
            changes = []
            for path, value in entries.items():
                holder = config
                for one in path[:-1]:
                    holder = getattr(holder, one)
                changes.append([name, ".".join(("config", *path)), value, vars(holder).get(path[-1])])
            set_entries(config, entries)
            remember(model, Plan(attributes=changes))
        _save_with_plan(part, entries is None)


def settle_saving(model: nn.Module) -> None:
    """See to it that parts of a rebuilt model whose config does not say all are saved with their plan."""
    for _, part in pretrained_parts(model):
        if plan_of(part) is not None:
            _save_with_plan(part, not says_all(part))


def _save_with_plan(part: nn.Module, is_needed: bool) -> None:
    if is_needed:
        # An attribute of this one model, that copies and pickles with it: so trainers of others save the plan, too.
        vars(part)["save_pretrained"] = partial(save_with_plan, part)
    else:
        vars(part).pop("save_pretrained", None)


def save_with_plan(
    model: nn.Module, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **options: Any
) -> Any:
    """Save as ``save_pretrained`` of the model's class does: the dense config, the small tensors, and the plan.

    Raises:
        ValueError: with ``push_to_hub``, which would leave out the plan; or if the model has other sizes than its
            config and its plan say.
    """
    if push_to_hub:
        raise ValueError(
            "push_to_hub=True would leave out the plan; save without it, and call model.push_to_hub(name), which "
            "takes it along"
        )
    plan = plan_of(model)
    assert plan is not None
    cls: Any = plain_class(model)
    with _dense_config(model, plan):
        _check_plan_is_enough(model, plan)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        plan.save(Path(save_directory) / FILE)
        return cls.save_pretrained(model, save_directory, *args, **options)


def _check_plan_is_enough(model: nn.Module, plan: Plan) -> None:
    """Raise unless the plan makes the sizes of a model of those that its config, dense by now, says."""
    dense, small = shapes_by_config(model), shapes_of(model)
    if dense is None:
        raise ValueError(f"the plain {type(model).__name__} cannot be made of its config; what was changed in it?")
    for name in dict.fromkeys([*small, *dense]):
        dims = plan.tensors.get(name, {})
        made = [len(dims.get(dim, range(size))) for dim, size in enumerate(dense.get(name, ()))]
        is_new = name in plan.biases and name not in dense
        is_known = name in dense and plan.shapes.get(name) in (None, list(dense[name]))
        if not is_new and (not is_known or name not in small or made != list(small[name])):
            raise ValueError(
                f"this {type(model).__name__} cannot be loaded again: {name} is {tuple(small.get(name, ()))}, and "
                f"{tuple(made)} by its config and its plan. Was it changed after it was shrunk?"
            )


@contextmanager
def _dense_config(model: nn.Module, plan: Plan) -> Iterator[None]:
    """While this is on, the config says the sizes of the dense model, and where the plan is."""
    config: Any = model.config
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def undo() -> None:
        for attributes, values in reversed(before):
            refill(attributes, values)

    with undoing(undo):
        before.append((vars(config), dict(vars(config))))
        for name, attribute, _, *old in plan.attributes:
            first, *path = attribute.split(".")
            if name or first != "config" or not old or not path:
                continue
            holder = config
            for one in path[:-1]:
                holder = getattr(holder, one)
            before.append((vars(holder), dict(vars(holder))))
            if old[0] is None and path[-1] not in vars(type(holder)()):
                vars(holder).pop(path[-1], None)
            else:
                vars(holder)[path[-1]] = old[0]
        setattr(config, ENTRY, FILE)
        yield
