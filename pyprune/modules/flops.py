"""What gated weights cost in a forward pass."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyprune.modules.attachments import gate_name
from pyprune.modules.evaluation import check_initialized, check_inputs, evaluating, forward, untouched, using
from pyprune.modules.gates import StochasticGate
from pyprune.modules.undo import Before, undoing


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the FLOPs of the operators that take the output of a gate, or a view or copy of it."""

    def __init__(self, gates: Iterable[StochasticGate]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = dict.fromkeys(gates, 0)
        # By storage, which views share. The tensors are kept, so that no other gets the storage of one.
        self._gates: dict[int, StochasticGate] = {}
        self._kept: list[Tensor] = []

    def watch(self, gate: StochasticGate, inputs: Any, output: Tensor) -> None:
        """Take the output of a gate: a forward hook."""
        self._gates[output.untyped_storage().data_ptr()] = gate
        self._kept.append(output)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        pointers = {leaf.untyped_storage().data_ptr() for leaf in leaves if leaf.layout is torch.strided}
        for gate in {self._gates[pointer] for pointer in pointers if pointer in self._gates}:
            if func.overloadpacket in flop_registry:
                self.flops[gate] += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            elif func.overloadpacket.__name__ in ("clone", "_to_copy"):
                self.watch(gate, args, result)
        return result


@contextmanager
def _unfused() -> Iterator[None]:
    """Keep torch from fused attention and recurrent kernels, whose products could not be counted."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    enabled = [backend.enabled for backend in backends]

    gradients = torch.is_grad_enabled()

    def undo() -> None:
        torch.set_grad_enabled(gradients)
        for backend, value in zip(backends, enabled, strict=True):
            backend.enabled = value

    with undoing(undo):
        for backend in backends:
            backend.enabled = False
        torch.set_grad_enabled(True)  # fused attention is for inference only
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
    check_inputs(examples_inputs)
    check_initialized(model)
    gates = list(gates)
    counter = _FlopCounter(gates)
    before = Before(*gates, with_attributes=False)
    with undoing(before.restore), evaluating(model), untouched(model), _unfused(), using(counter):
        for gate in gates:
            gate.register_forward_hook(counter.watch)
        forward(model, examples_inputs)
    if not any(counter.flops.values()):
        raise ValueError("the forward pass has no countable FLOPs with gated weights; leave examples_inputs out")
    names = {module: name.removesuffix(gate_name("")) for name, module in model.named_modules()}
    free = [names[gate] for gate, flops in counter.flops.items() if flops == 0]
    if free:
        warnings.warn(
            f"no FLOPs were counted for the weights of {', '.join(free)}; the loss leaves them alone", stacklevel=3
        )
    return {gate: flops / max(1, gate.logits.numel()) for gate, flops in counter.flops.items()}
