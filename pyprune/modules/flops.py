"""What weights cost in a forward pass."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyprune.modules.attachments import gate_name
from pyprune.modules.evaluation import check_initialized, check_inputs, look, recurrence_unfused
from pyprune.modules.gates import StochasticGate
from pyprune.modules.targets import Target
from pyprune.modules.undo import undoing

_Key = TypeVar("_Key")

# Products that torch does not count: from arguments and result.
_FLOPS: dict[str, Callable[[tuple[Any, ...], Any], int]] = {
    "mv": lambda args, made: 2 * args[0].numel(),
    "addmv": lambda args, made: 2 * args[1].numel(),
    "dot": lambda args, made: 2 * args[0].numel(),
    "addbmm": lambda args, made: 2 * args[1].numel() * args[2].shape[-1],
    # Groups of rows, each with a matrix of its own.
    "_grouped_mm": lambda args, made: 2 * made.numel() * args[0].shape[-1],
    "grouped_mm_fallback": lambda args, made: 2 * made.numel() * args[0].shape[-1],
    # x1 W x2: rows of x1 times all of W.
    "_trilinear": lambda args, made: 2 * args[1].numel() * (args[0].numel() // max(1, args[0].shape[-1])),
}


class _FlopCounter(TorchDispatchMode, Generic[_Key]):  # type: ignore[no-untyped-call]
    """Counts the FLOPs of a pass, and of the operators that take certain tensors, or views or copies of them.

    Args:
        keys: whose tensors these are: gates, or weights.
    """

    def __init__(self, keys: Iterable[_Key]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.flops = dict.fromkeys(keys, 0)
        # By storage, which views share, and recurrent layers' weights. The tensors are kept, so that no other gets
        # the memory of one.
        self._places: dict[int, list[tuple[range, _Key]]] = {}
        self._kept: list[Tensor] = []

    def see(self, key: _Key, tensor: Tensor) -> None:
        """Count from now on what takes a tensor."""
        size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        place = range(tensor.data_ptr(), tensor.data_ptr() + size * tensor.element_size())
        self._places.setdefault(tensor.untyped_storage().data_ptr(), []).append((place, key))
        self._kept.append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if count := _FLOPS.get(func.overloadpacket.__name__):
            flops = count(args, result)
        elif func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        else:
            flops = 0
        self.total += flops
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for key in {key for leaf in leaves if leaf.layout is torch.strided for key in self._keys_of(leaf)}:
            self.flops[key] += flops
            if func.overloadpacket.__name__ in ("clone", "_to_copy", "index", "index_select"):
                self.see(key, result)
        return result

    def _keys_of(self, tensor: Tensor) -> list[_Key]:
        places = self._places.get(tensor.untyped_storage().data_ptr(), [])
        return [key for place, key in places if tensor.data_ptr() in place]


@contextmanager
def _unfused() -> Iterator[None]:
    """Keep torch from fused attention and recurrent kernels, whose products could not be counted."""
    gradients = torch.is_grad_enabled()
    with recurrence_unfused(), sdpa_kernel(SDPBackend.MATH), undoing(partial(torch.set_grad_enabled, gradients)):
        torch.set_grad_enabled(True)  # the fast path of TransformerEncoder is for inference only
        yield


def flop_costs(
    model: nn.Module, gates: Iterable[StochasticGate], examples_inputs: Any
) -> dict[StochasticGate, float]:
    """Return the FLOPs per logit of each gate, counted in one forward pass.

    Those are the FLOPs of the matrix products and convolutions that take the gated weight. It warns of gates without
    any.

    Args:
        model: the model, which is left as it was.
        gates: its gates.
        examples_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model.

    Raises:
        TypeError, ValueError: for other inputs, if there are none at all, or if the model is not initialised.

    Example:
        >>> from pyprune.modules.forward_pass import attach_gate
        >>> from pyprune.modules.gates import gates_of
        >>> linear = attach_gate(nn.Linear(4, 2), "weight", StochasticGate((2, 4)))
        >>> list(flop_costs(linear, gates_of(linear), torch.ones(3, 4)).values())
        [6.0]
    """
    counter = _count(model, {gate: gate for gate in gates}, examples_inputs)
    if not any(counter.flops.values()):
        raise ValueError("the forward pass has no countable FLOPs with gated weights; leave examples_inputs out")
    names = {module: name.removesuffix(gate_name("")) for name, module in model.named_modules()}
    free = [names[gate] for gate, flops in counter.flops.items() if flops == 0]
    if free:
        warnings.warn(
            f"no FLOPs were counted for the weights of {', '.join(free)}; the loss leaves them alone", stacklevel=3
        )
    return {gate: flops / max(1, gate.logits.numel()) for gate, flops in counter.flops.items()}


def _count(model: nn.Module, sources: Mapping[_Key, nn.Module | Tensor], examples_inputs: Any) -> _FlopCounter[_Key]:
    """Count the FLOPs of one forward pass with certain tensors, or with what certain modules put out."""
    check_inputs(examples_inputs)
    check_initialized(model)
    counter = _FlopCounter(sources)
    after = []
    for key, source in sources.items():
        if isinstance(source, nn.Module):
            after.append((source, partial(_see_output, counter, key)))
        else:
            counter.see(key, source)
    look(model, examples_inputs, counter, after=after, within=_unfused)
    return counter


def _see_output(counter: _FlopCounter[_Key], key: _Key, module: nn.Module, args: object, output: Tensor) -> None:
    counter.see(key, output)


def macs_of(model: nn.Module, targets: Sequence[Target], examples_inputs: Any) -> tuple[int, dict[Target, int]]:
    """Return the multiply-accumulates of one forward pass, and those of the operators that take each weight.

    They are those of matrix products and convolutions, half of what torch counts as FLOPs. The pass runs in
    evaluation mode, and leaves the model as it was.

    Example:
        >>> from pyprune.modules.targets import find_targets
        >>> linear = nn.Linear(4, 2)
        >>> macs_of(linear, find_targets(linear), torch.ones(3, 4))[0]
        24
    """
    in_use = {t: gate if isinstance(gate := t.attachment, nn.Module) else t.parameter for t in targets}
    counter = _count(model, in_use, examples_inputs)
    return counter.total // 2, {target: flops // 2 for target, flops in counter.flops.items()}
