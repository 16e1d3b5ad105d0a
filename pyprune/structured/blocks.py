"""Blocks of a model that can go: modules that return a tensor of the shape of their input, once in a pass.

Without such a module the model goes on with what the module was given.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune.modules.attachments import dense_modules
from pyprune.modules.evaluation import forward, using
from pyprune.structured.passes import Hooks, first_argument, hooked

# They call what is in them, or nothing at all, and are no blocks themselves.
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Block:
    """A module that can be bypassed.

    Args:
        name: its first name in the model.
        module: itself.
        items: how many items has the tuple that it returns, of which the first is the tensor; 0 if it returns that.
        is_residual: whether it adds something to its input.
    """

    name: str
    module: nn.Module
    items: int = 0
    is_residual: bool = True


class Bypass(nn.Module):
    """What stands where a block was: returns its first argument as the block would, alone or first in a tuple.

    Args:
        items: how many items the tuple has; what is behind the first is None. 0 for the argument itself.

    Example:
        >>> Bypass(2)("hidden", mask=None), Bypass()("hidden")
        (('hidden', None), 'hidden')
    """

    def __init__(self, items: int = 0) -> None:
        super().__init__()
        self.items = items

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Return the first argument."""
        first = first_argument(args, keywords)
        return (first, *(None,) * (self.items - 1)) if self.items else first

    def extra_repr(self) -> str:
        """Say what a print of the model shows."""
        return f"items={self.items}" if self.items else ""


@dataclass
class _Seen:
    """What the calls of one module were like."""

    calls: int = 0
    items: int = 0
    problem: str = ""
    output: Callable[[], Any] = field(default=lambda: None)


def find_blocks(model: nn.Module, examples: Iterable[Any]) -> tuple[dict[str, Block], dict[str, str]]:
    """Run the examples; return the modules that can be bypassed, and why all others cannot, by all names."""
    names = list(dense_modules(model))
    by_name = dict(names)
    seen = {module: _Seen() for _, module in names}
    sums = _Sums()

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        sums.enter(module, first_argument(args, keywords))

    def after(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
        sums.leave(module)
        _look(seen[module], first_argument(args, keywords), output)

    parts = [module for module in seen if module is not model]
    with hooked(model, [(one, before) for one in parts], [(one, after) for one in parts]), using(sums):
        for inputs in examples:
            earlier = {module: one.calls for module, one in seen.items()}
            forward(model, inputs, "examples")
            seen[model].calls += 1
            calls = {name: seen[module].calls - earlier[module] for name, module in names}
            for name, module in by_name.items():
                if calls[name] > _calls_around(name, calls) and not seen[module].problem:
                    seen[module].problem = "it is used several times in a pass"
    places = Counter(child for module in seen for child in module._modules.values())
    blocks: dict[str, Block] = {}
    problems: dict[str, str] = {}
    for name, module in names:
        one = seen[module]
        if not name:
            problems[name] = "it is the model"
        elif places[module] > 1:
            problems[name] = f"it is at {places[module]} places of the model"
        elif not one.calls:
            problems[name] = "the examples do not reach it"
        elif one.problem:
            problems[name] = one.problem
        else:
            blocks[name] = Block(name, module, one.items, module in sums.residual)
    return blocks, problems


# They add to a tensor of the same shape; and they only move or copy a tensor (views share its memory).
_SUMS = {"add": 2, "add_": 2, "sub": 2, "sub_": 2, "rsub": 2, "lerp": 2, "lerp_": 2}
_SUMS |= {"addcmul": 1, "addcmul_": 1, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}  # the others are factors
_COPIES = ("clone", "_to_copy", "copy", "_reshape_copy", "contiguous", "roll", "flip")


class _Sums(TorchDispatchMode):
    """Sees which modules add something to the tensor that they are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.residual: set[nn.Module] = set()
        # The modules that are running, with what they were given and copies of it.
        self.given: dict[nn.Module, list[Tensor]] = {}

    def enter(self, module: nn.Module, given: Any) -> None:
        self.given[module] = [given] if isinstance(given, Tensor) and given.layout is torch.strided else []

    def leave(self, module: nn.Module) -> None:
        self.given.pop(module, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        operands = [one for one in args[: _SUMS.get(name, 1)] if isinstance(one, Tensor)]
        if name in _SUMS and len(operands) == _SUMS[name]:
            for module, tensors in self.given.items():
                if any(_is_part(one, x) and one.numel() == output.numel() for one in operands for x in tensors):
                    self.residual.add(module)
        elif name in _COPIES and operands:
            for tensors in self.given.values():
                if any(_is_part(operands[0], x) for x in tensors):
                    tensors.append(output)
        return output


def _is_part(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors with as many elements lie in the same memory."""
    return one.numel() == other.numel() and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _look(seen: _Seen, given: Any, output: Any) -> None:
    seen.calls += 1
    items = len(output) if isinstance(output, tuple) else 0
    first = output[0] if items else output
    if not isinstance(given, Tensor):
        seen.problem = f"its first argument is a {type(given).__name__}"
    elif not isinstance(first, Tensor):
        seen.problem = f"it returns a {type(first).__name__}"
    elif first.shape != given.shape or first.dtype != given.dtype:
        seen.problem = f"it makes {_shape(first)} of {_shape(given)}"
    elif seen.calls > 1 and items != seen.items:
        seen.problem = "it returns now a tensor, now a tuple, or tuples of several lengths"
    elif given is seen.output():
        seen.problem = "it is used several times in a pass, on its own output"
    seen.items = items
    seen.output = weakref.ref(first) if isinstance(first, Tensor) else lambda: None


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _calls_around(name: str, calls: Mapping[str, int]) -> int:
    """Return how often the next module around another was called."""
    while name:
        name = name.rpartition(".")[0]
        if calls[name]:
            break
    return max(1, calls[name])


def repeated(model: nn.Module, blocks: Mapping[str, Block]) -> list[Block]:
    """Return the outermost blocks of which a model has several: residual members of its lists, of one class.

    Example:
        >>> import torch
        >>> model = nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, 4, batch_first=True) for _ in range(2)))
        >>> [block.name for block in repeated(model, find_blocks(model, [torch.ones(1, 2, 4)])[0])]
        ['0', '1']
    """
    members = {child for module in model.modules() if isinstance(module, _LISTS) for child in module.children()}
    found: dict[nn.Module, Block] = {}
    for block in blocks.values():
        module = block.module
        if block.is_residual and module in members and type(module) not in _LISTS and _has_weights(module):
            found.setdefault(module, block)
    classes = Counter(map(type, found))
    several = [block for module, block in found.items() if classes[type(module)] > 1]
    inner = {part for block in several for part in block.module.modules() if part is not block.module}
    return [block for block in several if block.module not in inner]


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def bypassing(blocks: Iterable[Block]) -> tuple[Hooks, Hooks]:
    """Return hooks, for before and after, with which blocks count as if they were not there."""
    given: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given[module] = first_argument(args, keywords).clone()  # blocks may write into it

    def after(module: nn.Module, args: Any, keywords: Any, output: Any) -> Any:
        first = given.pop(module)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    blocks = list(blocks)
    return [(block.module, before) for block in blocks], [(block.module, after) for block in blocks]
