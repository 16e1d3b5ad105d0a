"""Gates: learned stochastic masks on weights."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyprune import ops
from pyprune.checks import check_bool, check_count, check_number, shown
from pyprune.modules.attachments import Attachment, gate_name
from pyprune.modules.gated_classes import gated_attributes, put_gate, take_gate
from pyprune.modules.sampling import Sampler, Seat
from pyprune.modules.sharding import whole


class StochasticGate(nn.Module, Attachment):
    """A straight-through Bernoulli gate on a weight, NNCF's regularization-based mask.

    In training, element w of the weight is kept with probability sigma(m), where m is the logit of its gate:
    ``keep = m + logit(u) > 0`` with u uniform in (0, 1), and the output is w or 0. The gradient passes the comparison
    straight through: dL/dm is the sum of g * w * sigma'(m + logit(u)) over the elements of the gate, dL/dw is g where
    w was kept and 0 elsewhere. In evaluation there is no noise: ``keep = m > 0``.

    All owners of a tied weight share one gate. `prune` puts gates on a model; by hand, a gate goes on any parameter
    with `attach_gate`, or is called with a weight. Then every call in training draws a new sample, unless it happens
    inside `one_gate_sample`. On a layer it is a submodule, named after its parameter: ``layer.weight_mask``.

    Weight decay on the logits would pull every probability to 0.5: give them an optimizer group without it
    (`gate_parameters`, `check_optimizer`).

    Args:
        shape: shape of the weight.
        gate_shape: shape of the logits, by default that of the weight. As many dimensions as the weight; a
            size l on a dimension of size w, which it divides, makes w / l neighbours share a gate: ``(out, 1, 1, 1)``
            are output channels, ``(heads, 1)`` heads of a ``(heads * head_dim, in)`` weight.
        keep_probability: probability in training that a gate is not zero, at the start; in (0, 1).
        same_on_all_ranks: draw the same noise on all ranks of ``torch.distributed``, if their generators are at the
            same state (``torch.manual_seed``); otherwise ranks draw different noise even then.
        dtype: of the logits; float32 by default, or that of the weight.
        device: of the logits.

    Raises:
        TypeError, ValueError: for shapes that do not fit, probabilities out of range, and other dtypes.

    Papers: Srinivas et al. 2017, "Training Sparse Neural Networks"; Kozlov et al. 2020, "Neural Network Compression
    Framework for fast model inference".

    Example:
        >>> gate = StochasticGate((4, 3), gate_shape=(4, 1))
        >>> gate.weights_per_gate, round(gate.logits[0].item(), 4)
        (3, 4.5951)
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        gate_shape: Sequence[int] | None = None,
        keep_probability: float = 0.99,
        same_on_all_ranks: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        start = _logit(keep_probability)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in ops.WEIGHT_DTYPES):
            raise TypeError(f"dtype is {shown(dtype)}; allowed are {', '.join(map(str, ops.WEIGHT_DTYPES))}")
        _check_device(device)
        self.shape = _sizes("shape", shape)
        self.gate_shape = self.shape if gate_shape is None else _sizes("gate_shape", gate_shape)
        self.same_on_all_ranks = check_bool("same_on_all_ranks", same_on_all_ranks)
        self.sampler, self.seat = Sampler(), Seat()
        # Whether `strip` made it part of the weights: it changes nothing any more.
        self.folded = False
        # Tells gates apart that share a sampler.
        self.stream = 0
        try:
            ops.check_gate_shape(self.shape, self.gate_shape)
        except ValueError as error:
            raise ValueError(f"shape and gate_shape do not fit: {error}") from error
        self.logits = nn.Parameter(torch.full(self.gate_shape, start, dtype=dtype or torch.float32, device=device))

    @property
    def weights_per_gate(self) -> int:
        """How many elements of the weight share one gate."""
        return math.prod(self.shape) // max(1, math.prod(self.gate_shape))

    @property
    def shift(self) -> float:
        """What makes ``sigma(logits + shift)`` the probability that a gate is not zero in training."""
        return 0.0

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that make such a gate, but for ``keep_probability`` and ``device``."""
        return {
            "gate_shape": self.gate_shape,
            "same_on_all_ranks": self.same_on_all_ranks,
            "dtype": self.logits.dtype,
        }

    def put_on(self, module: nn.Module, attribute: str) -> None:
        """Let ``module.attribute`` be what the gate makes of the parameter, which stays where it is."""
        put_gate(module, attribute, self)

    def take_off(self, module: nn.Module, attribute: str) -> None:
        """Let ``module.attribute`` be the parameter again."""
        take_gate(module, attribute)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight times a sample of the gates, or, in evaluation, times their `values`."""
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight is of type {type(weight).__name__}; give the tensor to gate")
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the gate is for a weight of shape {self.shape}, not {tuple(weight.shape)}")
        seed = None
        if self.training:
            seed = self.seat.seed
            if seed is None:
                seed = self.sampler.seed(weight.device, self.stream)
        return self._gated(weight, self.logits, seed)

    def deterministic(self, weight: Tensor) -> Tensor:
        """Return what the gate makes of a weight in evaluation."""
        return self._gated(weight, self.logits, None)

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return the values in [0, 1] that the gates have in evaluation, of shape ``gate_shape``.

        Of logits that FSDP2 has sharded they are gathered, so all ranks must call this.
        """
        logits = whole(self.logits)
        return self._gated(torch.ones_like(logits), logits, None)

    def _gated(self, weight: Tensor, logits: Tensor, seed: Tensor | None) -> Tensor:
        return ops.bernoulli_gate(weight, logits, seed, stream=self._noise_stream())

    def _noise_stream(self) -> int:
        # Other noise on each rank, even where all ranks draw the same seeds.
        if self.same_on_all_ranks or not (dist.is_available() and dist.is_initialized()):
            return 0
        return dist.get_rank() << 32

    def extra_repr(self) -> str:
        """Say what the gate is for."""
        return f"shape={self.shape}, gate_shape={self.gate_shape}"


class HardConcreteGate(StochasticGate):
    """A hard-concrete gate on a weight, in [0, 1] with some probability of being exactly 0 or 1.

    In training ``s = sigma((m + logit(u)) / beta)``, in evaluation ``s = sigma(m)``; then
    ``z = clamp(s * (zeta - gamma) + gamma, 0, 1)``, and the output is w * z. The gradient goes through the clamp,
    and is zero outside of (0, 1). The expected number of gates that are not zero is the sum of ``sigma(m + shift)``.

    Args:
        shape, gate_shape, keep_probability, same_on_all_ranks, dtype, device: as in `StochasticGate`.
        beta: temperature, above 0.
        gamma, zeta: the ends of the stretched interval, gamma < 0 and zeta > 1.
        straight_through: multiply by 1 where z > 0, and take the gradient of the logits from the soft z.

    Raises:
        TypeError, ValueError: for shapes that do not fit, numbers out of range, and other dtypes.

    Paper: Louizos, Welling, Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization".

    Example:
        >>> gate = HardConcreteGate((3,)).eval()
        >>> _ = gate.logits.data.copy_(torch.tensor([-4.0, 0.0, 4.0]))
        >>> gate(torch.tensor([2.0, 2.0, 2.0])).tolist()
        [0.0, 1.0, 2.0]
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        gate_shape: Sequence[int] | None = None,
        keep_probability: float = 0.99,
        beta: float = 2 / 3,
        gamma: float = -0.1,
        zeta: float = 1.1,
        straight_through: bool = False,
        same_on_all_ranks: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("beta", beta), ("gamma", gamma), ("zeta", zeta)):
            check_number(name, value, what="a number", advice="it must be a finite number")
        ops.check_hard_concrete(beta, gamma, zeta)
        check_bool("straight_through", straight_through)
        super().__init__(
            shape,
            gate_shape=gate_shape,
            keep_probability=keep_probability,
            same_on_all_ranks=same_on_all_ranks,
            dtype=dtype,
            device=device,
        )
        self.beta, self.gamma, self.zeta = float(beta), float(gamma), float(zeta)
        self.straight_through = straight_through
        nn.init.constant_(self.logits, _logit(keep_probability) - self.shift)

    @property
    def shift(self) -> float:
        """``-beta * log(-gamma / zeta)``: P(z > 0) is ``sigma(logits + shift)``."""
        return -self.beta * math.log(-self.gamma / self.zeta)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that make such a gate, but for ``keep_probability`` and ``device``."""
        own = {name: getattr(self, name) for name in ("beta", "gamma", "zeta", "straight_through")}
        return super().options() | own

    def _gated(self, weight: Tensor, logits: Tensor, seed: Tensor | None) -> Tensor:
        return ops.hard_concrete_gate(
            weight,
            logits,
            seed,
            beta=self.beta,
            gamma=self.gamma,
            zeta=self.zeta,
            straight_through=self.straight_through,
            stream=self._noise_stream(),
        )


def _logit(probability: float) -> float:
    chance = check_number(
        "keep_probability",
        probability,
        what="a number in (0, 1)",
        least=0,
        most=1,
        open_ends=True,
        advice="it must be in (0, 1)",
    )
    return math.log(chance / (1 - chance))


def _sizes(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, (str, bytes, bytearray)) or not isinstance(shape, Sequence):
        raise TypeError(f"{name} is {shown(shape)}; give the sizes of the dimensions, as (4, 3)")
    sizes = tuple(check_count(f"a size of {name}", size) for size in shape)
    check_count(f"the product of {name}", math.prod(sizes))
    return sizes


def _check_device(device: object) -> None:
    try:
        torch.empty(0, device=device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError, OverflowError, AssertionError) as error:  # all are torch's
        raise ValueError(f"device is {shown(device)}; give one of torch's that there is: {error}") from error


def gates_of(model: nn.Module) -> list[StochasticGate]:
    """List the gates of a model, each once, wherever they are."""
    return [module for module in model.modules() if isinstance(module, StochasticGate)]


def check_gates(model: nn.Module) -> None:
    """Raise ValueError if a gate was put on in a way that `strip` could not undo.

    Example:
        >>> linear = nn.Linear(3, 4)
        >>> _ = parametrize.register_parametrization(linear, "weight", StochasticGate((4, 3)))
        >>> check_gates(linear)
        Traceback (most recent call last):
        ValueError: weight carries a StochasticGate by torch's parametrize; take it off by ...
    """
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            weight = name.replace("parametrizations.", "")
            for step in module:
                if isinstance(step, StochasticGate):
                    raise ValueError(
                        f"{weight} carries a {type(step).__name__} by torch's parametrize; take it off by "
                        "torch.nn.utils.parametrize.remove_parametrizations(..., leave_parametrized=False), and put "
                        "it on by pyprune.attach_gate"
                    )
        for attribute in gated_attributes(module):
            if attribute not in module._parameters or gate_name(attribute) not in module._modules:
                raise ValueError(
                    f"{name}.{attribute} lost its parameter or its gate while it was gated; build the model anew, "
                    "and call pyprune.strip before something else computes the weight"
                )
