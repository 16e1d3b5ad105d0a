"""Losses that draw learned gates to a target ratio, or put a price on every open gate.

They hold the gates of a model without registering their logits as parameters of the loss: the logits belong to the
model, and move, train and are saved with it. After `strip` they raise RuntimeError, and where a layer with gates was
replaced in the model, ValueError. They warn once if optimizers step without the gates, or with weight decay on them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.checks import check_count, check_number
from pyprune.methods.allocation import check_ratio
from pyprune.modules.attachments import check_module
from pyprune.modules.flops import flop_costs
from pyprune.modules.gates import HardConcreteGate, StochasticGate, gates_of
from pyprune.modules.mask_states import check_tensors
from pyprune.modules.sharding import sum_of_parts
from pyprune.modules.unit_gates import UnitGates
from pyprune.training.gate_checks import GatePlaces, OptimizerWatch


@dataclass(frozen=True)
class _Group:
    """Gates that one call of the operator sums, and what it costs to open one gate of each."""

    gates: tuple[StochasticGate, ...]
    shift: float
    costs: Tensor


class _GateLoss(nn.Module):
    """What the losses share: the gates of a model, and the share of the whole that is kept."""

    # Count the gates that are open at test time, or sum the probabilities that gates are open.
    _hard = False

    def __init__(self, model: nn.Module, gates: Mapping[StochasticGate, float]) -> None:
        """Take the gates and the cost of each logit; the whole is what all open gates cost."""
        super().__init__()
        self._places = GatePlaces(model)
        self._watch = OptimizerWatch()
        self._whole = math.fsum(cost * gate.logits.numel() for gate, cost in gates.items())
        members: dict[tuple[torch.device, float], list[StochasticGate]] = {}
        for gate in gates:
            # load_state_dict(..., assign=True) brings what is on the meta device to another one.
            device = torch.device("cpu") if gate.logits.is_meta else gate.logits.device
            members.setdefault((device, gate.shift), []).append(gate)
        self._groups = [
            _Group(
                tuple(group), shift, torch.tensor([gates[gate] for gate in group], dtype=torch.float64, device=device)
            )
            for (device, shift), group in members.items()
        ]

    @property
    def current_ratio(self) -> float:
        """The ratio that the gates have reached now; reading it waits for the device."""
        with torch.no_grad():
            return 1 - self._kept().item()

    def check(self) -> None:
        """Raise RuntimeError if the gates were stripped, ValueError if layers that had them were replaced."""
        if any(gate.folded for group in self._groups for gate in group.gates):
            raise RuntimeError("the gates of this loss were folded in by strip, and train nothing; drop the loss")
        if not torch.compiler.is_compiling():
            self._places.check()

    def _kept(self) -> Tensor:
        """Return the kept share of the whole: float64, on the device of the first gate."""
        self.check()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._watch.loss_is_called(self._places)
        parts = []
        for group in self._groups:
            logits = [gate.logits for gate in group.gates]
            # The costs move only if the model did since the loss was made.
            costs = group.costs.to(logits[0].device, non_blocking=True)
            penalty = partial(ops.gate_penalty, hard=self._hard, shift=group.shift)
            parts += sum_of_parts(logits, penalty, costs)
        home = parts[0].device
        return torch.stack([part.to(home, non_blocking=True) for part in parts]).sum() / self._whole

    def _rounded(self, loss: Tensor) -> Tensor:
        """Return the loss in float32, or as it is if all logits are float64."""
        dtypes = {gate.logits.dtype for group in self._groups for gate in group.gates}
        return loss if dtypes == {torch.float64} else loss.float()


class RBLoss(_GateLoss):
    """Draw the gates of `PruneMode.UNSTRUCTURED_REGULARIZATION_BASED` to a ratio; add it to the loss of the task.

    With ``kept`` the number of weights whose gate is open at test time (logit m > 0), of N::

        ((kept / N - (1 - target_ratio)) / p) ** 2

    The gradient passes straight through the comparison: d kept / dm = sigma'(m) for each weight of the gate. Calling
    the loss never waits for the device.

    Args:
        model: the pruned model. A gate counts once, however many places its weight is tied to. Prune again to add
            gates, and make a new loss.
        target_ratio: the fraction of the weights to remove, in [0, 1); may be set later, as the schedulers do.
        p: tolerance: an error of p costs 1, and half the p pulls four times as hard. Where all gates close at
            once, or the ratio swings, the pull outweighs the task: give a larger p or the gates a smaller rate.

    Returns:
        A scalar on the device of the first gate; float32, or float64 if all logits are.

    Raises:
        TypeError, ValueError: for wrong arguments, without gates, or with hard-concrete gates.

    Paper: Kozlov et al. 2020, "Neural Network Compression Framework for fast model inference".

    Example:
        >>> from pyprune import prune
        >>> model = prune(nn.Linear(10, 10), "UNSTRUCTURED_REGULARIZATION_BASED")
        >>> rb_loss = RBLoss(model, target_ratio=0.5)
        >>> rb_loss().item()
        100.0
        >>> rb_loss.current_ratio
        0.0
    """

    _hard = True

    def __init__(self, model: nn.Module, target_ratio: float, p: float = 0.05) -> None:
        gates = _find_gates(model)
        if any(isinstance(gate, HardConcreteGate) for gate in gates):
            raise ValueError("the model has hard-concrete gates; train those with LagrangianLoss or L0Loss")
        super().__init__(model, gates)
        # Checked here: torch would take a module past the property.
        self.target_ratio = check_ratio(target_ratio, "target_ratio")
        self._p = _check_positive(p, "p")

    @property
    def target_ratio(self) -> float:
        """The fraction of the weights to remove."""
        return self._target_ratio

    @target_ratio.setter
    def target_ratio(self, ratio: float) -> None:
        self._target_ratio = check_ratio(ratio, "target_ratio")

    def forward(self) -> Tensor:
        """Return the loss at the present logits."""
        excess = self._kept() - (1 - self._target_ratio)
        return self._rounded((excess / self._p).square())


class L0Loss(_GateLoss):
    """Put a price on every weight, or every FLOP, that the gates are expected to keep.

    With P(z > 0) = sigma(m + shift) the probability that a gate is open in training (shift is 0 for Bernoulli and
    -beta * log(-gamma / zeta) for hard-concrete gates) and c the cost of a weight, over all weights::

        weight * sum(c * P(z > 0)) / sum(c)

    Args:
        model: the pruned model, with gates of any kind.
        weight: the price of the whole model. What ratio it leads to must be tried out; `LagrangianLoss` takes the
            ratio instead.
        examples_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model. If given, one
            forward pass counts FLOPs, and a weight costs those of the products that it is in; otherwise all cost
            the same.

    Returns:
        A scalar on the device of the first gate; float32, or float64 if all logits are.

    Raises:
        TypeError, ValueError: for wrong arguments, without gates, or if no FLOPs are found. It warns of gates
            whose weights take part in none that can be counted (embeddings), so are free.

    Paper: Louizos, Welling, Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization".

    Example:
        >>> from pyprune import prune
        >>> model = prune(nn.Linear(10, 10), "UNSTRUCTURED_HARD_CONCRETE")
        >>> round(L0Loss(model, weight=2.0)().item(), 2)
        1.98
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, *, examples_inputs: Any = None) -> None:
        gates = _find_gates(model)
        price = _check_positive(weight, "weight")
        if examples_inputs is not None and any(isinstance(module, UnitGates) for module in model.modules()):
            raise ValueError(
                "the model has gates of coupled units, whose FLOPs depend on each other; leave examples_inputs out, "
                "and all units cost the same"
            )
        super().__init__(model, gates if examples_inputs is None else flop_costs(model, gates, examples_inputs))
        self.weight = price

    def forward(self) -> Tensor:
        """Return the loss at the present logits."""
        return self._rounded(self.weight * self._kept())


class LagrangianLoss(_GateLoss):
    """Draw gates of any kind to a ratio with two multipliers that find their own strength.

    With s the expected sparsity, 1 - mean of P(z > 0) over all weights, and t the target::

        lambda1 * (s - t) + lambda2 * (s - t) ** 2

    The model's optimizer minimises it; `step` moves the multipliers up its gradient, (s - t) and (s - t)**2, with
    Adam, from 0. So lambda1 is negative while too little is pruned, positive while too much is, and s settles at t.
    The target rises in a straight line from ``start_ratio`` to ``target_ratio`` during the first ``warmup_steps``.

    The multipliers are buffers, not parameters: no optimizer of the user can minimise them by mistake, and scaling
    the loss does not change them. ``state_dict`` holds them with all that `step` needs to go on.

    Args:
        model: the pruned model.
        target_ratio: the fraction of the weights to remove, in [0, 1).
        warmup_steps: how many calls of `step` it takes to get there.
        start_ratio: the target at the start, in [0, 1).
        learning_rate: of the multipliers.

    Returns:
        A scalar on the device of the first gate; float32, or float64 if all logits are.

    Raises:
        TypeError, ValueError: for wrong arguments or without gates.

    Papers: Wang, Wohlwend, Lei 2020, "Structured Pruning of Large Language Models"; Xia, Zhong, Chen 2022,
    "Structured Pruning Learns Compact and Accurate Models".

    Example:
        >>> from pyprune import gate_parameters, prune
        >>> model = prune(nn.Linear(10, 10), "UNSTRUCTURED_HARD_CONCRETE")
        >>> loss = LagrangianLoss(model, target_ratio=0.6)
        >>> optimizer = torch.optim.Adam(gate_parameters(model), lr=0.1)
        >>> for _ in range(300):
        ...     optimizer.zero_grad()
        ...     loss().backward()  # a real training adds the loss of the task
        ...     optimizer.step()
        ...     loss.step()
        >>> round(loss.current_ratio, 1)
        0.6
    """

    multipliers: Tensor
    _mean: Tensor
    _mean_square: Tensor
    _steps: Tensor

    def __init__(
        self,
        model: nn.Module,
        target_ratio: float,
        *,
        warmup_steps: int = 0,
        start_ratio: float = 0.0,
        learning_rate: float = 0.1,
    ) -> None:
        super().__init__(model, _find_gates(model))
        what = "a number of optimizer steps, 0 or more"
        self._warmup_steps: int = check_count("warmup_steps", warmup_steps, what=what)
        self._target_ratio: float = check_ratio(target_ratio, "target_ratio")
        self._start_ratio: float = check_ratio(start_ratio, "start_ratio")
        self._learning_rate: float = _check_positive(learning_rate, "learning_rate")
        zeros = torch.zeros(2, dtype=torch.float64, device=self._groups[0].costs.device)
        self.register_buffer("multipliers", zeros)
        self.register_buffer("_mean", zeros.clone())
        self.register_buffer("_mean_square", zeros.clone())
        self.register_buffer("_steps", zeros.new_zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """Return the loss at the present logits and multipliers."""
        gap = self._gap()
        multipliers = self.multipliers.to(gap.device, non_blocking=True)
        return self._rounded((multipliers * torch.stack([gap, gap.square()])).sum())

    @property
    def current_target(self) -> float:
        """The target at this point of the warm-up; reading it waits for the device."""
        return self._target().item()

    @torch.no_grad()
    def step(self) -> None:
        """Move the multipliers, and the target of a warm-up; call it after the model's ``optimizer.step()``."""
        gap = self._gap()
        if self.multipliers.device != gap.device:
            self.to(gap.device)
        gradient = torch.stack([gap, gap.square()])
        count = self._steps + 1
        steps = count.double()
        means = self._mean.lerp(gradient, 1 - 0.9), self._mean_square.lerp(gradient.square(), 1 - 0.999)
        mean, mean_square = means[0] / (1 - 0.9**steps), means[1] / (1 - 0.999**steps)
        multipliers = self.multipliers + self._learning_rate * mean / (mean_square.sqrt() + 1e-8)
        # At once, though someone may interrupt.
        before = [self._steps, self._mean, self._mean_square, self.multipliers]
        torch._foreach_copy_(before, [count, *means, multipliers])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Go on with the multipliers of a state_dict.

        Raises:
            ValueError: if a tensor of it is of another shape, or not finite; nothing is changed then.
            RuntimeError: as torch does, for names that are missing or too many.
        """
        check_tensors("multipliers", state_dict, integers=True)
        for name, buffer in self.named_buffers():
            if name in state_dict and state_dict[name].shape != buffer.shape:
                raise ValueError(
                    f"state_dict has {name} of shape {tuple(state_dict[name].shape)}, and this loss "
                    f"{tuple(buffer.shape)}; load what its state_dict() returned"
                )
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "LagrangianLoss":
        # model.half(), of a model that holds its loss, must not round what is float64 here.
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def _gap(self) -> Tensor:
        """Return s - t."""
        kept = self._kept()
        return 1 - kept - self._target().to(kept.device, non_blocking=True)

    def _target(self) -> Tensor:
        # A tensor, like the number of steps: no synchronisation, and compiled code stays valid.
        progress = self._steps.double() / self._warmup_steps if self._warmup_steps else torch.ones_like(self._mean[0])
        return self._start_ratio + (self._target_ratio - self._start_ratio) * progress.clamp(max=1)


def _find_gates(model: nn.Module) -> dict[StochasticGate, float]:
    """Return the gates of a model, with the number of weights that each logit stands for."""
    check_module(model)
    gates = gates_of(model)
    if not any(gate.logits.numel() for gate in gates):
        raise ValueError(
            f"{type(model).__name__} has no learned gates; prune it first, with mode "
            "UNSTRUCTURED_REGULARIZATION_BASED or UNSTRUCTURED_HARD_CONCRETE"
        )
    return {gate: float(gate.weights_per_gate) for gate in gates}


def _check_positive(value: object, name: str) -> float:
    return check_number(name, value, what="a finite number above 0", least=0, open_ends=True)
