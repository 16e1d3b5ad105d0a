"""Mixtures of experts in a model: which tensors or modules are experts, and what routes to them.

They are known by structure: a list of modules of one class, or tensors with an axis of experts, and near to them a
router, whose weight has an axis of the same size; and by the words for these in names of modules and classes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Attributes of modules and configs.
_COUNT = re.compile(r"((moe|local|routed)_)?(num|n|nb)_((local|routed)_)?experts")
_TOP_K = re.compile(r"(moe_)?top_?k(_experts)?|(num_)?experts_per_tok(en)?|num_selected_experts|k")
_GROUPS = re.compile(r"(n|num)_(expert_)?groups?")
_TOP_GROUPS = re.compile(r"top_?k_groups?")
# Names of what routes, and words in those of experts.
_ROUTER = re.compile(r".*(router|gat(e|ing)|classifier|wg|switch)", re.IGNORECASE)
_EXPERT = re.compile(r".*(expert|moe|mixture)", re.IGNORECASE)
# What one expert of its own has, or what all tokens use.
_SHARED = re.compile(r".*shared", re.IGNORECASE)
_BY_EXPERT = re.compile(r".*(bias|expert|correction)", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor with an axis of experts: ``module.attribute``, called ``name``, with so many rows for each of them."""

    name: str
    module: nn.Module
    attribute: str
    dim: int = 0
    rows: int = 1

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        found = self.module._parameters.get(self.attribute)
        return self.module._buffers[self.attribute] if found is None else found  # type: ignore[return-value]

    def put(self, tensor: Tensor) -> None:
        """Let another tensor be there."""
        if self.module._parameters.get(self.attribute) is None:
            self.module._buffers[self.attribute] = tensor
        else:
            self.module._parameters[self.attribute] = nn.Parameter(tensor, requires_grad=False)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Experts that one router chooses from.

    Args:
        name: of the module that has the experts; they are called ``name.0``, ``name.1`` and so on.
        module: it.
        block: the module that has experts and router, and its name.
        count: how many experts there are.
        members: the keys of the experts, if they are modules in a list; else none.
        fused: the tensors that hold the experts, if they are not.
        router: the tensors of the router; first its weight.
    """

    name: str
    module: nn.Module
    block: nn.Module
    block_name: str
    count: int
    members: tuple[str, ...]
    fused: tuple[Part, ...]
    router: tuple[Part, ...]

    @property
    def experts(self) -> list[str]:
        """The names of the experts."""
        return [f"{self.name}.{key}".lstrip(".") for key in self.members or range(self.count)]

    @property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """The block and what is in it, but for experts that are modules."""
        inside = [f"{self.name}.{key}" for key in self.members]
        return [
            (name, module)
            for name, module in self.block.named_modules(prefix=self.block_name)
            if not any(name == one or name.startswith(f"{one}.") for one in inside)
        ]

    def numbers(self, pattern: re.Pattern[str]) -> Iterator[int]:
        """Yield the integers that its modules have in attributes of such names."""
        for _, module in self.modules:
            for key, value in vars(module).items():
                if type(value) is int and pattern.fullmatch(key):
                    yield value

    @property
    def top_k(self) -> int:
        """How many experts a token gets, as far as modules or their configs say it."""
        found = list(self.numbers(_TOP_K))
        if not found:
            configs = [vars(module).get("config") for _, module in self.modules]
            values = [vars(one) for one in configs if hasattr(one, "__dict__")]
            found = [v for one in values for key, v in one.items() if type(v) is int and _TOP_K.fullmatch(key)]
        return max((one for one in found if 0 < one <= self.count), default=1)

    @property
    def groups(self) -> tuple[int, int] | None:
        """How many groups of experts the router chooses from first, and how many of them; None if it does not."""
        groups = max(self.numbers(_GROUPS), default=None)
        return None if groups is None else (groups, max(self.numbers(_TOP_GROUPS), default=groups))


def is_count(attribute: str) -> bool:
    """Whether a number with this name says how many experts there are.

    Example:
        >>> [is_count(name) for name in ("num_local_experts", "n_routed_experts", "num_experts_per_tok")]
        [True, True, False]
    """
    return _COUNT.fullmatch(attribute) is not None


def find_mixtures(model: nn.Module) -> list[Mixture]:
    """Find all mixtures of experts of a model, by their structure.

    Example:
        >>> class MoE(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate = nn.Linear(2, 3)
        ...         self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        >>> [(one.experts, one.router[0].name) for one in find_mixtures(nn.Sequential(MoE()))]
        [(['0.experts.0', '0.experts.1', '0.experts.2'], '0.gate.weight')]
    """
    found: list[Mixture] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        members = _members(module)
        sizes = [len(members)] if members else _fused_sizes(name, module)
        for count in sizes:
            mixture = _with_router(modules, name, module, count, members)
            if mixture is not None:
                found.append(mixture)
                break
    return _joined(found)


def mixtures_of(model: nn.Module) -> list[Mixture]:
    """Return what `find_mixtures` finds; raise ValueError if that is nothing."""
    mixtures = find_mixtures(model)
    if not mixtures:
        raise ValueError(
            f"{type(model).__name__} has no mixture of experts that is known: a list of modules of one class or "
            "parameters with an axis of experts, and beside them a router (gate, router, classifier) that has as "
            "many outputs"
        )
    return mixtures


def _members(module: nn.Module) -> tuple[str, ...]:
    """Return the keys of what may be experts: the modules of one class, with weights, in a list."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return ()
    children = [(key, child) for key, child in module.named_children() if any(True for _ in child.parameters())]
    is_one_class = len({type(child) for _, child in children}) == 1
    return tuple(key for key, _ in children) if is_one_class and len(children) > 1 else ()


def _fused_sizes(name: str, module: nn.Module) -> list[int]:
    """Return how many experts there may be in the tensors of a module."""
    words = f"{name.rpartition('.')[2]} {type(module).__name__}"
    said = {value for key, value in vars(module).items() if type(value) is int and is_count(key) and value > 1}
    if not (said or _EXPERT.match(words)):
        return []
    stacked = [p.shape[0] for p in module._parameters.values() if p is not None and p.dim() > 2 and p.shape[0] > 1]
    if stacked or "expert" not in words.lower():
        return list(dict.fromkeys(stacked))
    # Tensors of all experts, one below the other, in a part of it.
    return [one for one in said if all(p.dim() and p.shape[0] % one == 0 for p in module.parameters())]


def _with_router(
    modules: dict[str, nn.Module], name: str, module: nn.Module, count: int, members: tuple[str, ...]
) -> Mixture | None:
    block_name = name.rpartition(".")[0] if members else name
    while True:
        block = modules[block_name]
        router = _router(block_name, block, None if block is module else name, count)
        if router:
            own = {part.name for part in router}
            fused = () if members else tuple(part for part in _fused(name, module, count) if part.name not in own)
            if not members and not fused:
                return None
            return Mixture(name, module, block, block_name, count, members, fused, router)
        if not block_name:
            return None
        if members and not _EXPERT.match(name):
            return None  # without the word, the router must be beside the list
        block_name = block_name.rpartition(".")[0]


def _tensors(name: str, module: nn.Module, *, below: bool = True) -> Iterator[Part]:
    for prefix, part in module.named_modules(prefix=name) if below else [(name, module)]:
        for attribute, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield Part(f"{prefix}.{attribute}" if prefix else attribute, part, attribute)


def _fused(name: str, module: nn.Module, count: int) -> Iterator[Part]:
    parts = [part for part in _tensors(name, module) if part.tensor.dim() and part.tensor.shape[0] % count == 0]
    # A router has one row for each expert, and no more.
    if any(part.tensor.dim() > 2 or (part.tensor.dim() == 2 and part.tensor.shape[0] > count) for part in parts):
        for part in parts:
            yield Part(part.name, part.module, part.attribute, 0, part.tensor.shape[0] // count)


def _router(block_name: str, block: nn.Module, experts: str | None, count: int) -> tuple[Part, ...]:
    """Return the tensors of the router in a block, first its weight; none if there is none that is known as such."""
    weights: list[Part] = []
    for part in _tensors(block_name, block):
        inner = part.name.removeprefix(block_name).lstrip(".")
        is_weight = part.tensor.dim() == 2 and isinstance(part.tensor, nn.Parameter) and "bias" not in part.attribute
        if not is_weight or _SHARED.match(inner):
            continue
        if experts is not None and part.name.startswith(f"{experts}."):
            continue
        dim = 0 if part.tensor.shape[0] == count else 1 if part.tensor.shape[1] == count else None
        if dim is None or (dim == 1 and isinstance(part.module, nn.Linear)) or not _ROUTER.match(inner):
            continue
        weights.append(Part(part.name, part.module, part.attribute, dim))
    if not weights:
        return ()
    weight = weights[0]
    # All that is with it, in the child of the block that it is in.
    child = weight.name.removeprefix(block_name).lstrip(".").partition(".")[0]
    child_name = f"{block_name}.{child}".lstrip(".")
    is_own = weight.module is block
    home = _tensors(block_name, block, below=False) if is_own else _tensors(child_name, block.get_submodule(child))
    near = [part for part in home if part.name != weight.name]
    others = [] if is_own else list(_tensors(block_name, block, below=False))
    # Weights for the noise of a router are like its own.
    same = [part for part in near if part.tensor.shape == weight.tensor.shape]
    is_clear = count != weight.tensor.shape[1 - weight.dim]
    found = [_by_expert(part, count, is_clear) for part in (*near, *others) if part not in same]
    return (
        weight,
        *(Part(part.name, part.module, part.attribute, weight.dim) for part in same),
        *(part for part in found if part is not None),
    )


def _by_expert(part: Part, count: int, is_clear: bool) -> Part | None:
    """Return a tensor beside a router's weight with its axis of experts, if it has one."""
    shape = tuple(part.tensor.shape)
    if len(shape) > 2 or (len(shape) == 2 and 1 not in shape) or count not in shape:
        return None
    if not is_clear and not _BY_EXPERT.match(part.attribute):
        return None
    return Part(part.name, part.module, part.attribute, shape.index(count))


def _joined(found: list[Mixture]) -> list[Mixture]:
    """Join those that one router chooses from: experts whose first and second layers are modules of their own."""
    by_router: dict[Any, Mixture] = {}
    for one in found:
        key = one.router[0].module, one.router[0].attribute
        other = by_router.get(key)
        if other is None:
            by_router[key] = one
        elif not one.members and not other.members:
            known = {part.name for part in other.fused}
            fused = (*other.fused, *(part for part in one.fused if part.name not in known))
            by_router[key] = Mixture(
                other.name, other.module, other.block, other.block_name, other.count, (), fused, other.router
            )
    return list(by_router.values())
