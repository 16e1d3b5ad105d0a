"""Which layers may compute with packed weights, what they are called with, and why others stay dense."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pyprune import ops
from pyprune.modules.gated_classes import set_class
from pyprune.modules.targets import Target, all_parameters
from pyprune.modules.undo import Before, undoing
from pyprune.runtime.runs import run, still
from pyprune.runtime.sparse_attention import attends_itself
from pyprune.runtime.sparse_layers import sparse_class

# Shape and dtype of an input.
Input = tuple[torch.Size, torch.dtype]
# With fewer zeros no layout is smaller, or faster where dense products are good.
FEWEST_ZEROS = 0.3
_ATTENDED = ("query", "key", "value")


@dataclass
class Layer:
    """A weight, and what is known of it.

    Args:
        name: of its module, or of the weight where that is no layer that could be replaced.
        module: where it is.
        weight: its parameter.
        zeros: the share of zeros in it.
        calls: how often it is called with which inputs.
        problem: why it stays dense.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    zeros: float
    calls: Counter[Input] = field(default_factory=Counter)
    problem: str = ""

    @property
    def matrix(self) -> Tensor:
        """The weight as (outputs, inputs)."""
        cls = sparse_class(self.module)
        return self.weight.detach().t() if cls is not None and cls.inputs_first else self.weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """The bias that is added to products with it."""
        return self.module._parameters["in_proj_bias" if isinstance(self.module, nn.MultiheadAttention) else "bias"]

    @property
    def product(self) -> Callable[[Tensor], Tensor]:
        """What the dense layer makes of an input."""
        if isinstance(self.module, nn.MultiheadAttention):
            return lambda input: nn.functional.linear(input, self.weight, self.bias)
        return cast(Callable[[Tensor], Tensor], self.module.forward)


def find_layers(model: nn.Module, inputs: Sequence[Any]) -> list[Layer]:
    """List the weights of a model that have zeros, after a pass over the inputs, which leaves it as it was."""
    targets = [target for target in all_parameters(model) if target.parameter.dim() >= 2]
    layers = [layer for layer in map(_layer, targets) if layer.zeros or sparse_class(layer.module)]
    watched = {layer.module: layer for layer in layers if not layer.problem}
    read: set[nn.Module] = set()
    with still(model), _watching(watched, read):
        run(model, *inputs)
    for module, layer in watched.items():
        if layer.problem:
            continue
        if module in read:
            layer.problem = "its weight is read past its call, by a kernel for several layers or by other code"
        elif not layer.calls:
            layer.problem = "the examples do not call it"
        elif layer.weight.is_floating_point() and {dtype for _, dtype in layer.calls} != {layer.weight.dtype}:
            layer.problem = "it is called with other dtypes than its weight has"
    return layers


def _layer(target: Target) -> Layer:
    owner, weight = target.owners[0], target.parameter
    cls = sparse_class(owner.module)
    is_layer = cls is not None and owner.attribute == cls.packed_name
    plain = not is_traceable_wrapper_subclass(weight) and weight.layout is torch.strided and not weight.is_quantized
    counted = plain and weight.dtype in ops.WEIGHT_DTYPES
    zeros = int(ops.count_zeros([weight])) / max(1, weight.numel()) if counted else 0.0
    others = [one.name for one in target.owners if one.module is not owner.module or one.attribute != owner.attribute]
    name = owner.name.rpartition(".")[0] if is_layer and owner.attribute == "weight" else owner.name
    layer = Layer(name, owner.module, weight, zeros)
    kind = parametrize.type_before_parametrizations(owner.module).__name__
    if not counted:
        layer.problem = f"its weight is {type(weight).__name__} of {weight.dtype}"
    elif not is_layer:
        layer.problem = f"no operator takes {owner.attribute} of {kind}"
    elif others:
        layer.problem = f"its weight is also {others[0]}"
    elif not zeros:
        layer.problem = "no zeros"
    elif zeros < FEWEST_ZEROS:
        layer.problem = f"{zeros:.0%} zeros are too few"
    return layer


@contextmanager
def _watching(layers: dict[nn.Module, Layer], read: set[nn.Module]) -> Iterator[None]:
    """Note the calls of layers, and whose weights are read otherwise, by classes of which they are meanwhile.

    Hooks would switch kernels for several layers off, which read weights past the calls of their layers.
    """
    inside: set[nn.Module] = set()

    def watched(cls: type[nn.Module]) -> type[nn.Module]:
        is_attention = issubclass(cls, nn.MultiheadAttention)
        name = "in_proj_weight" if is_attention else "weight"

        def weight(self: nn.Module) -> Any:
            if self not in inside:
                read.add(self)
            return self._parameters[name]

        def forward(self: nn.Module, *args: Any, **keywords: Any) -> Any:
            # Attention reads the weight of its output projection, and does not call it.
            parts: list[nn.Module] = [self, self.out_proj] if is_attention else [self]  # type: ignore[list-item]
            _note(layers, parts, args, keywords)
            before = set(inside)
            inside.update(parts)
            try:
                return cls.forward(self, *args, **keywords)
            finally:
                inside.intersection_update(before)

        return type(cls.__name__, (cls,), {name: property(weight), "forward": forward})

    watching = {cls: watched(cls) for cls in {type(module) for module in layers}}
    was = [Before(module) for module in layers]
    with undoing(lambda: [one.restore() for one in was]):  # type: ignore[func-returns-value]
        for module in layers:
            set_class(module, watching[type(module)])
        yield


def _note(
    layers: dict[nn.Module, Layer], parts: Sequence[Any], args: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Take down the call of a layer; of attention, for both of its projections."""
    module, inputs = parts[0], [*args, *keywords.values()]
    if isinstance(module, nn.MultiheadAttention):
        query, key, value = (keywords.get(n, args[i] if i < len(args) else None) for i, n in enumerate(_ATTENDED))
        if not attends_itself(module, query, key, value):
            layers[module].problem = "it attends to something else than its own input, or has keys of its own"
        inputs = [query]
    for part in parts:
        if part in layers:
            layers[part].calls[inputs[0].shape, inputs[0].dtype] += 1
