"""What goes wrong with gates behind the back of their loss: a layer is replaced, an optimizer does not train them.

Both are looked for where a loss is called, and outside of compiled code.
"""

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from pyprune.modules.attachments import gate_name, parameters_of
from pyprune.modules.gates import StochasticGate, gates_of

# So often may optimizers step between two calls of the loss without one that has the gates: they may take turns.
_PATIENCE = 3


class GatePlaces:
    """Where the gates of a loss were in the model when the loss was made.

    Args:
        model: the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> StochasticGate((2, 2)).put_on(model[0], "weight")
        >>> places = GatePlaces(model)
        >>> model[0] = nn.Linear(2, 2)
        >>> places.check()
        Traceback (most recent call last):
        ValueError: gates of this loss are in the model no more: 0.weight. ...
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {
            module: name.removesuffix(gate_name("")) or "the gate"
            for name, module in model.named_modules()
            if isinstance(module, StochasticGate)
        }
        self._follow()

    def logits(self) -> dict[nn.Parameter, str]:
        """Return what is to be trained, and the names of the weights that it is for."""
        return {gate.logits: name for gate, name in self._names.items() if gate.logits.requires_grad}

    def parameters(self) -> set[nn.Parameter]:
        """Return all parameters of the model."""
        return set(parameters_of(self._model))

    def check(self) -> None:
        """Raise ValueError if gates are in the model no more, and name them."""
        for parent, name, child in self._links:
            if parent.get(name) is not child:
                break
        else:
            return
        there = set(gates_of(self._model))
        gone = [name for gate, name in self._names.items() if gate not in there]
        if gone:
            raise ValueError(
                f"gates of this loss are in the model no more: {', '.join(gone)}. Their layers were replaced after "
                "the loss was made; prune the model again if the new ones are to have gates, and make a new loss"
            )
        self._follow()  # what is around them was replaced

    def _follow(self) -> None:
        """Note one way from the model to each gate, as links from modules to submodules."""
        ways: dict[nn.Module, tuple[tuple[dict[str, nn.Module | None], str, nn.Module], ...]] = {self._model: ()}
        for module in self._model.modules():  # parents come first
            for name, child in module._modules.items():
                if child is not None and child not in ways:
                    ways[child] = (*ways[module], (module._modules, name, child))
        links = {(id(link[0]), link[1]): link for gate in self._names for link in ways[gate]}
        self._links = list(links.values())


class OptimizerWatch:
    """Looks at the first steps of optimizers, and warns once if they do not train the gates as they should.

    It sees optimizers of torch that have parameters of the model. A copy begins anew.
    """

    def __init__(self) -> None:
        # What no optimizer that stepped has in its groups, by its name; None before the first call.
        self._missing: dict[nn.Parameter, str] | None = None
        self._parameters: set[nn.Parameter] = set()
        self._steppers: dict[str, None] = {}
        self._stepped = False
        self._held = False
        self._misses = 0
        self._handle: RemovableHandle | None = None

    def __reduce__(self) -> tuple[type["OptimizerWatch"], tuple[()]]:
        return OptimizerWatch, ()

    def loss_is_called(self, places: GatePlaces) -> None:
        """Begin to watch at the first call; count the steps without gates that were made since the last."""
        if self._missing is None:
            self._missing, self._parameters = places.logits(), places.parameters()
            watch = weakref.ref(self)

            def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                itself = watch()
                if itself is not None and not torch.compiler.is_compiling():
                    itself._look(optimizer)

            self._handle = register_optimizer_step_post_hook(look)
            weakref.finalize(self, self._handle.remove)
        if not self._stepped:
            return
        self._misses = 0 if self._held else self._misses + 1
        self._stepped = self._held = False
        if self._misses == _PATIENCE:
            self._stop()
            warnings.warn(
                f"gates get gradients, but {', '.join(self._steppers)} stepped without them: "
                f"{', '.join(self._missing.values())}. Build the optimizer after prune(), or give it "
                "add_param_group({'params': pyprune.gate_parameters(model)})",
                stacklevel=6,
            )

    def _look(self, optimizer: Optimizer) -> None:
        """See what an optimizer that has stepped has of the gates."""
        if not self._missing or self._handle is None:
            return
        has_gradients = any(one.grad is not None for one in self._missing)
        trains_model, decayed = False, []
        for group in optimizer.param_groups:
            trains_model = trains_model or any(one in self._parameters for one in group["params"])
            held = [one for one in group["params"] if one in self._missing]
            if held and group.get("weight_decay"):
                decayed += [self._missing[one] for one in held]
            for one in held:
                del self._missing[one]
                self._held = True
        if decayed:
            self._stop()
            warnings.warn(
                f"{type(optimizer).__name__} has weight decay on gates, which pulls them to a probability of 1/2: "
                f"{', '.join(decayed)}. Put pyprune.gate_parameters(model) in a group with weight_decay=0",
                stacklevel=4,
            )
        if not self._missing:
            self._stop()
        elif has_gradients and trains_model:
            self._stepped = True
            self._steppers[type(optimizer).__name__] = None

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle, self._parameters = None, set()
