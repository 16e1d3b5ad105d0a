"""Models of transformers that were shrunk, in folders; `pyprune.integrations.transformers` has these functions."""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from pyprune.checks import check_bool, check_path, shown
from pyprune.console import listed
from pyprune.modules.gates import gates_of
from pyprune.structured.compact import named_tensors
from pyprune.structured.configs import says_all
from pyprune.structured.plan import Plan
from pyprune.structured.pretrained import ENTRY, FILE
from pyprune.structured.rebuild import rebuild
from pyprune.structured.remembered import plan_of

_M = TypeVar("_M", bound=nn.Module)


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], *, max_shard_size: int | str | None = None
) -> None:
    """Save a model of transformers, shrunk or not, so that `from_pretrained` makes it again.

    Where its config says all sizes, because all layers agree, plain ``from_pretrained`` of transformers does, too.
    Else ``pyprune_plan.json`` lies beside the config. ``model.save_pretrained(folder)`` writes the same files, so
    trainers do; this function also looks whether they are enough.

    Args:
        model: of transformers.
        folder: where to; it is made if it is not there.
        max_shard_size: of files, as transformers takes it ("5GB").

    Raises:
        TypeError: if ``model`` is none of transformers.
        ValueError: if it has gates (`pyprune.strip` it before; plain ``from_pretrained`` would load the raw weights),
            or if it is smaller than its config says, and does not remember how it became so; nothing is written then.

    Example:
        >>> save_pretrained(model, "small")  # doctest: +SKIP
        >>> again = from_pretrained(AutoModelForCausalLM, "small")  # doctest: +SKIP
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; give a model of transformers, not wrapped")
    check_path("folder", folder)
    if gates_of(model):
        raise ValueError(
            "the model has gates, and would be loaded without them, with its raw weights; call strip(model) before"
        )
    if plan_of(model) is None and not says_all(model):
        raise ValueError(
            f"the config of this {type(model).__name__} does not say its sizes, and it does not remember how it "
            "became so (pyprune.plan_of is None); it could not be loaded"
        )
    saver = cast(Any, model).save_pretrained
    saver(folder) if max_shard_size is None else saver(folder, max_shard_size=max_shard_size)


def from_pretrained(
    cls: type[_M],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    strict: bool = True,
) -> _M:
    """Load a model of transformers that was saved after `pyprune.shrink`, with its plan or without.

    It is transformers that loads: one file or shards, tied weights, types and devices are its own business.

    Args:
        cls: a class of transformers (``AutoModelForCausalLM``, ``BertModel``).
        folder: what `save_pretrained` wrote; or the name of a repository.
        dtype, device_map: as ``from_pretrained`` of transformers takes them; None leaves them out.
        strict: whether all tensors must be in the folder, and no others. Without it a head may be new, or be left
            out, as transformers does it.

    Returns:
        The small model, in evaluation.

    Raises:
        TypeError: if ``cls`` is no class of transformers.
        ValueError: if the plan is missing, damaged, or of another model, or if tensors are missing or too many.

    Example:
        >>> from_pretrained(AutoModel, "small")  # doctest: +SKIP
    """
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise TypeError(f"cls is {shown(cls)}; give a class of transformers, as AutoModel or BertModel")
    check_path("folder", folder)
    check_bool("strict", strict)
    config = AutoConfig.from_pretrained(folder)
    plan = _plan_in(folder, config)
    loader: Any = cls if plan is None else _small_class(_class_of(cls, config), plan)
    options = {"dtype": dtype, "device_map": device_map}
    model, found = loader.from_pretrained(
        folder,
        config=config,
        output_loading_info=True,
        **{key: one for key, one in options.items() if one is not None},
    )
    if plan is not None:
        model.__class__ = loader.__mro__[1]
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = sorted(map(str, found.get(what) or ()))
        if names and (strict or what in ("mismatched_keys", "error_msgs")):
            raise ValueError(
                f"{os.fspath(folder)} does not fit {type(model).__name__}: {what.replace('_', ' ')} {listed(names)}"
                + (
                    "; strict=False makes a new head, or leaves one out"
                    if what in ("missing_keys", "unexpected_keys")
                    else ""
                )
            )
    return cast(_M, model)


def _plan_in(folder: str | os.PathLike[str], config: PreTrainedConfig) -> Plan | None:
    """The plan in a folder, if its config says that there is one; the config forgets it."""
    if vars(config).pop(ENTRY, None) is None:
        return None
    file = cached_file(folder, FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise ValueError(
            f"{os.fspath(folder)} has no {FILE}, without which its model cannot be made; copy it from where the "
            "model was saved"
        )
    return Plan.load(file)


def _class_of(cls: Any, config: PreTrainedConfig) -> type[nn.Module]:
    """The class that an automatic one stands for."""
    if issubclass(cls, PreTrainedModel):
        return cast(type[nn.Module], cls)
    with torch.device("meta"):
        return type(cls.from_config(config))


def _small_class(cls: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """A class that makes models that are small already, for transformers to load."""

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        cls.__init__(self, *args, **options)
        rebuild(self, _fitting(plan, self))

    # To transformers it is the class itself.
    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__, "_pyprune_plan": plan})


def _fitting(plan: Plan, model: Any) -> Plan:
    """The plan with the names of this model, if it has a head more or less than the one that was saved."""
    names, prefix = set(named_tensors(model)), f"{model.base_model_prefix}."
    if not model.base_model_prefix or set(plan.tensors) <= names:
        return plan
    for rename in (
        lambda name: prefix + name,
        lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None,
    ):
        other = _renamed(plan, rename)
        if other.tensors and set(other.tensors) <= names:
            return other
    return plan  # which is refused by what it does not fit


def _renamed(plan: Plan, rename: Callable[[str], str | None]) -> Plan:
    tensors = {new: dims for name, dims in plan.tensors.items() if (new := rename(name)) is not None}
    shapes = {new: shape for name, shape in plan.shapes.items() if (new := rename(name)) is not None}
    attributes = []
    for name, attribute, *values in plan.attributes:
        new = rename(f"{name}.{attribute}".lstrip("."))
        if attribute.startswith("config."):  # the model itself has it in any case
            attributes.append(["", attribute, *values])
        elif new is not None:
            attributes.append([new.removesuffix(attribute).rstrip("."), attribute, *values])
    biases = [new for name in plan.biases if (new := rename(name)) is not None]
    return Plan(tensors, shapes, attributes, biases, plan.model)
