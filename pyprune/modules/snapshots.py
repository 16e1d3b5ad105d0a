"""What a model was, and how it becomes that again."""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyprune.modules.attachments import dense_modules, dense_parameters, detach, parameters_of
from pyprune.modules.mask_states import load_states, state_of
from pyprune.modules.masks import masks_by_target
from pyprune.modules.undo import Before
from pyprune.modules.watching import unwatch
from pyprune.modules.zeros import hold_zeros, holds_in, release


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Weights, buffers and masks of a model at one time.

    Args:
        state: its state_dict, copied to the CPU.
        masks: of each weight with a mask its `state_of`.
    """

    state: dict[str, Tensor]
    masks: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """Copy what a model is."""
        copies: dict[int, Tensor] = {}  # tied weights stay one
        state = {
            name: copies.setdefault(id(value), value.detach().to("cpu", copy=True))
            if isinstance(value, Tensor)
            else value
            for name, value in model.state_dict(keep_vars=True).items()
        }
        return cls(state, {target.name: state_of(mask) for target, mask in masks_by_target(model).items()})

    def restore(self, model: nn.Module) -> None:
        """Make the model what it was; masks that were put on since are taken off."""
        release(holds_in(model))
        for target in reversed(masks_by_target(model)):
            if target.name not in self.masks:
                detach(target.owners[::-1])
        unwatch(model)
        model.load_state_dict(self.state)
        masks = masks_by_target(model)
        load_states([(mask, self.masks[target.name]) for target, mask in masks.items() if mask.on_target])
        # Those that follow have changed with them, unless what they follow is no part of the model.
        load_states([(mask, self.masks[target.name]) for target, mask in masks.items() if mask.is_raw])


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[Snapshot]:
    """Yield what the model is, and make it that again if the body, which may do anything to it, fails.

    Python's and NumPy's random numbers are given back then, as torch's are.
    """
    before = Snapshot.of(model)
    everything = _Everything(model, before)
    with ExitStack() as stack:
        # Twice, so that it is begun again if it is interrupted.
        stack.push(everything.restore_after)
        stack.push(everything.restore_after)
        yield before


class _Everything:
    """What a model is, with copies on the CPU of all that it computes with."""

    def __init__(self, model: nn.Module, snapshot: Snapshot) -> None:
        self._before = Before(model)
        # Of what is saved there are copies already.
        copies = {id(value): snapshot.state[name] for name, value in model.state_dict(keep_vars=True).items()}
        parameters = parameters_of(model)
        tensors = [*parameters, *model.buffers(), *(p.grad for p in parameters if p.grad is not None)]
        self._values = [(one, copies[id(one)] if id(one) in copies else _copy(one)) for one in tensors]
        self._parked = [(hold, _copy(hold.parked)) for hold in holds_in(model) if hold.parked is not None]
        self._random = random.getstate(), np.random.get_state()

    def restore_after(self, kind: type[BaseException] | None, *error: object) -> None:
        """Restore it after a failure."""
        if kind is not None:
            self._before.restore()
            self._copy_back()
            random.setstate(self._random[0])
            np.random.set_state(self._random[1])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _copy_back(self) -> None:
        for tensor, values in self._values:
            if tensor.shape == values.shape and tensor.dtype == values.dtype:
                tensor.copy_(values)
            else:
                tensor.data = values.to(tensor.device)
        for hold, values in self._parked:
            assert hold.parameter is not None
            hold.parked = values.to(hold.parameter.device, copy=True)
            hold.saw()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def dense_tensors(model: nn.Module, *, plain: bool = True) -> dict[str, Tensor]:
    """Return parameters and saved buffers by the names that they have in the state_dict of the dense model.

    If not ``plain``, by those that they have in that of this one, which something may wrap (`dense_modules`).

    Example:
        >>> list(dense_tensors(nn.Linear(2, 2)))
        ['weight', 'bias']
    """
    tensors: dict[str, Tensor] = {owner.name: parameter for owner, parameter in dense_parameters(model, plain=plain)}
    for prefix, module in dense_modules(model, plain=plain):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def check_rewindable(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise unless a state_dict of the dense model fits a model, masked or not, and wrapped or not.

    Raises:
        TypeError, ValueError: with what is missing, too much or of another shape.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"rewind_to is a {type(state).__name__}; give a state_dict of the dense model")
    tensors = _named_as_in(state, model)
    lacks = [name for name in tensors if not isinstance(state.get(name), Tensor)]
    strange = [str(name) for name in state if name not in tensors and not str(name).endswith("_extra_state")]
    shapes = [name for name in tensors if name not in lacks and state[name].shape != tensors[name].shape]
    if lacks or strange or shapes:
        raise ValueError(
            f"rewind_to is no state_dict of this model before pruning: it lacks {_some(lacks)}, has besides "
            f"{_some(strange)}, and has other shapes of {_some(shapes)}"
        )


@torch.no_grad()
def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set weights and buffers to those of a state_dict of the dense model; masks stay."""
    holds = holds_in(model)
    release(holds)
    for name, tensor in _named_as_in(state, model).items():
        tensor.copy_(state[name])
    hold_zeros(holds)


def _named_as_in(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model by the names that a state_dict has, which may be of the wrapped model."""
    wrapped = dense_tensors(model, plain=False)
    return wrapped if set(wrapped) <= set(state) else dense_tensors(model)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
