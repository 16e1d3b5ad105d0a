"""Zeros that are held in a parameter, and what was there before, which is parked.

A held parameter is an ordinary one that has zeros where its mask says so. Gradients are zeroed there as they arrive,
and weights and the optimizer's state in its step (`pyprune.modules.steps`). What else writes to the parameter is seen
before the next forward pass (`pyprune.modules.watching`): what was written over the zeros is parked as the new raw
values, and zeroed.
"""

import copy
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.modules.attachments import MASKS, Attachment, Owner
from pyprune.modules.sharding import is_sharded, local_part, local_part_like

# What is held now, by the id of its parameter, which lives as long as this refers to it.
HELD: "weakref.WeakValueDictionary[int, Hold]" = weakref.WeakValueDictionary()

# Numbers the changes of masks, so that an optimizer can tell which ones its state has not seen.
_CHANGES = itertools.count(1)


class MasksOfModule(dict[str, "Hold"]):
    """What a module has at `MASKS`: its holds, each of which knows the dicts that it is in."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # a place, not a value

    def __eq__(self, other: object) -> bool:
        return self is other

    def __init__(self, holds: "dict[str, Hold] | None" = None) -> None:
        super().__init__()
        for attribute, hold in (holds or {}).items():
            self[attribute] = hold

    def __setitem__(self, attribute: str, hold: "Hold") -> None:
        super().__setitem__(attribute, hold)
        hold.kept_in.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MasksOfModule":
        copied = MasksOfModule(copy.deepcopy(dict(self), memo))
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[type["MasksOfModule"], tuple[dict[str, "Hold"]]]:
        return MasksOfModule, (dict(self),)


class Hold(Attachment):
    """Zeros of one parameter, which may be at several places (tied).

    Args:
        mask: bool, True = kept.

    Attributes:
        parameter: what is held; None before `bind`.
        parked: what was dropped, packed in the order of the flat index; None if nothing can come back.
        parks: whether what is dropped is parked at all.
        changed_at: the number of the last change of the mask.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self.parameter: nn.Parameter | None = None
        self.parked: Tensor | None = None
        self.parks = True
        self.is_raw = False
        self.changed_at = 0
        self._masked_gradient = (0, 0)
        self.is_stepping = False  # what an optimizer writes in its step is no raw value
        self._written = (-1, 0)
        self._places: list[tuple[weakref.ref[nn.Module], str]] = []
        # The dicts of all modules that have it, in copies too, which do not know their places.
        self.kept_in: weakref.WeakSet[MasksOfModule] = weakref.WeakSet()
        # Of those that were copied with their models, for averages.
        self.copies: weakref.WeakSet[Hold] = weakref.WeakSet()
        self.untied_from: Hold | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    @property
    def mask(self) -> Tensor:
        """The mask, on the device of its parameter; True = kept."""
        parameter = self.parameter
        if parameter is not None and not parameter.is_meta:
            if self._mask.device != parameter.device:
                with torch.inference_mode(False):
                    self._mask = self._mask.to(parameter.device)  # the model was moved
            if self._mask.shape != parameter.shape and not is_sharded(parameter):
                self._resize(parameter.shape)
        return self._mask

    @property
    def local_mask(self) -> Tensor:
        """The part of the mask that belongs to this rank's part of a sharded parameter; else all of it."""
        assert self.parameter is not None
        return local_part_like(self.mask, self.parameter)

    def bind(self, parameter: nn.Parameter) -> None:
        """Hold this parameter from now on, and no other; its values are looked at before the next forward pass."""
        self.unbind()
        self.parameter = parameter
        self._written = (-1, 0)
        self._masked_gradient = (0, 0)
        self.changed_at = next(_CHANGES)
        HELD[id(parameter)] = self
        _look_at_torch()
        self.watch_gradient()

    def unbind(self) -> None:
        """Hold nothing any more."""
        if self.parameter is not None and HELD.get(id(self.parameter)) is self:
            del HELD[id(self.parameter)]
        if self._hook is not None:
            self._hook.remove()
        self.parameter = self._hook = None
        _look_away()

    def watch_gradient(self) -> None:
        """Zero gradients as they arrive, if the parameter can have any."""
        if self._hook is None and self.parameter is not None and self.parameter.requires_grad:
            mask_it = partial(_mask_gradient, weakref.ref(self))
            self._hook = self.parameter.register_post_accumulate_grad_hook(mask_it)  # type: ignore[no-untyped-call]

    @property
    def gradient_is_masked(self) -> bool:
        """Whether the gradient is one that was zeroed as it arrived; it may have been scaled since."""
        gradient = None if self.parameter is None else self.parameter.grad
        if gradient is None or is_sharded(gradient):
            return False
        place, version = self._masked_gradient
        return place != 0 and gradient.data_ptr() == place and gradient._version >= version

    def is_written(self) -> bool:
        """Whether something wrote to the parameter since `settle` or `saw` was called; not through ``.data``."""
        parameter = self.parameter
        assert parameter is not None
        if is_sharded(parameter) or parameter.is_meta or parameter.is_inference():
            return False
        return self._written != (parameter._version, parameter.data_ptr())

    def saw(self) -> None:
        """Take the values as they are for known."""
        parameter = self.parameter
        if parameter is None or is_sharded(parameter) or parameter.is_meta:
            return
        if not parameter.is_inference():
            self._written = (parameter._version, parameter.data_ptr())

    def _resize(self, shape: torch.Size) -> None:
        """Follow a parameter whose rows have become more or fewer, as ``resize_token_embeddings`` does it."""
        old = self._mask
        if len(shape) != old.dim() or shape[1:] != old.shape[1:] or not old.dim():
            raise ValueError(
                f"a weight under a mask of shape {tuple(old.shape)} has become one of shape {tuple(shape)}; call "
                "pyprune.strip before weights are resized, and prune again"
            )
        warnings.warn(
            f"a weight under a mask of shape {tuple(old.shape)} has become one of shape {tuple(shape)}: its new rows "
            "are kept, and the others go on as they were",
            stacklevel=2,
        )
        rows = min(shape[0], old.shape[0])
        with torch.inference_mode(False):
            self._mask = torch.ones(shape, dtype=torch.bool, device=old.device)
            self._mask[:rows] = old[:rows]
            if self.parked is not None:
                self.parked = self.parked[: int((~old[:rows]).sum())].clone()

    def find_shard(self) -> None:
        """Hold the sharded parameter that has taken the place of the plain one (``fully_shard``)."""
        for place, attribute in self._places:
            module = place()
            there = None if module is None else module._parameters.get(attribute)
            if there is not None and there is not self.parameter and is_sharded(there):
                self.bind(there)
                return

    def put_on(self, module: nn.Module, attribute: str) -> None:
        """Be the mask of a place, next to its other ones; `hold_zeros` makes the zeros."""
        parameter = module._parameters[attribute]
        assert parameter is not None
        if self.parameter is None:
            self.bind(parameter)
        module.__dict__.setdefault(MASKS, MasksOfModule())[attribute] = self
        self.add_place(module, attribute)

    def take_off(self, module: nn.Module, attribute: str) -> None:
        """Hold nothing at a place any more. The zeros stay there."""
        holds = module.__dict__[MASKS]
        del holds[attribute]
        if not holds:
            del module.__dict__[MASKS]
        if self._leave(module, attribute):
            self.unbind()

    def move_to(self, module: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
        """Hold another parameter at a place, which is about to take the place of the one that is there."""
        holds, other = module.__dict__[MASKS], HELD.get(id(parameter))
        del holds[attribute]
        is_alone = self._leave(module, attribute)
        if other is not None:  # it is tied to another weight with a mask now
            holds[attribute] = other
            other.add_place(module, attribute)
            if is_alone:
                self.unbind()
            return
        moved = self if is_alone else self._untied()
        holds[attribute] = moved
        moved.bind(parameter)
        moved.add_place(module, attribute)

    def _untied(self) -> "Hold":
        copied = copy.copy(self)  # binds the copy to the same parameter
        copied.unbind()
        copied.untied_from = self
        copied._mask = self._mask.clone()
        copied.parked = None if self.parked is None else self.parked.clone()
        assert self.parameter is not None
        HELD[id(self.parameter)] = self
        return copied

    def add_place(self, module: nn.Module, attribute: str) -> None:
        """Take down where the parameter is."""
        if not any(place() is module and known == attribute for place, known in self._places):
            # Replicas of DataParallel are gone after each pass.
            there = [(place, known) for place, known in self._places if place() is not None]
            self._places = [*there, (weakref.ref(module), attribute)]

    def _leave(self, module: nn.Module, attribute: str) -> bool:
        """Forget a place; return whether it was the last."""
        self._places = [
            (place, known)
            for place, known in self._places
            if place() is not None and not (place() is module and known == attribute)
        ]
        return not any(hold is self for holds in self.kept_in for hold in holds.values())

    def raw_values(self) -> Tensor:
        """Return the values that the parameter had without zeros: itself if nothing is parked, else a new tensor."""
        assert self.parameter is not None
        settle([self] if not self.is_raw and self.is_written() else [])
        weight = self.parameter.detach()
        if self.parked is None or self.is_raw:
            return weight
        weight = weight.clone()
        ops.unpark([weight], [self.mask], [self._parked_there()])
        return weight

    def _parked_there(self) -> Tensor:
        """Return what is parked, after the model was moved or cast."""
        assert self.parked is not None
        assert self.parameter is not None
        self.parked = self.parked.to(self.parameter.device, self.parameter.dtype)
        return self.parked

    def __getstate__(self) -> dict[str, Any]:
        # Hooks of parameters are not copied or saved either; a copy is held by hooks of its own.
        return {
            **vars(self),
            "_hook": None,
            "_places": [],
            "copies": None,
            "kept_in": None,
            "_masked_gradient": (0, 0),
            "is_stepping": False,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hold":
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        self.copies.add(copied)
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, copies=weakref.WeakSet(), kept_in=weakref.WeakSet())
        parameter, self.parameter = self.parameter, None
        if parameter is not None:
            self.bind(parameter)


def _mask_gradient(held: "weakref.ref[Hold]", parameter: Tensor) -> None:
    hold = held()
    gradient = parameter.grad
    if hold is None or hold.parameter is not parameter or gradient is None:
        return
    if gradient.layout is not torch.strided:
        raise TypeError("the gradient of a pruned weight is sparse, which cannot be masked; set sparse=False")
    if gradient.requires_grad:  # create_graph=True: what is done to it is differentiated
        parameter.grad = ops.mask_weight(gradient, hold.mask)
    else:
        ops.fold([local_part(gradient)], [hold.local_mask])
    assert parameter.grad is not None
    hold._masked_gradient = (parameter.grad.data_ptr(), parameter.grad._version)


# ---- all of a model ----


def holds_in(model: nn.Module) -> list[Hold]:
    """List what is held in a model, each once."""
    found: dict[Hold, None] = {}
    for module in model.modules():
        found |= dict.fromkeys(module.__dict__.get(MASKS, {}).values())
        # A tied weight may have its mask at a place outside of this model.
        held = (HELD.get(id(parameter)) for parameter in module._parameters.values() if parameter is not None)
        found |= dict.fromkeys(hold for hold in held if hold is not None)
    return list(found)


def check_places(model: nn.Module) -> None:
    """Raise if the parameter under a mask was taken away, as a parametrization does.

    Raises:
        ValueError: with the name of the weight and what is on it.
    """
    for name, module in model.named_modules():
        for attribute in module.__dict__.get(MASKS, {}):
            owner = Owner(f"{name}.{attribute}" if name else attribute, module, attribute)
            if attribute not in module._parameters and owner.foreign_steps:
                raise ValueError(
                    f"{owner.name} got another parametrization ({', '.join(owner.foreign_steps)}) over its mask; "
                    "remove that one first"
                )


def _by_device(holds: Iterable[Hold]) -> Iterator[list[Hold]]:
    groups: dict[torch.device, list[Hold]] = {}
    for hold in holds:
        if hold.parameter is not None and not hold.parameter.is_meta and not hold.parameter.is_inference():
            groups.setdefault(hold.parameter.device, []).append(hold)
    yield from groups.values()


def hold_zeros(holds: Iterable[Hold]) -> None:
    """Zero what masks drop, and park what was there, as after any change of masks: a call of a kernel per device."""
    holds = list(holds)
    with torch.inference_mode(False), torch.no_grad():
        for group in _by_device(holds):
            parking = [one for one in group if one.parks]
            parked = ops.park([_weight(one) for one in parking], [one.mask for one in parking])
            for one, values in zip(parking, parked, strict=True):
                one.parked = values
            if others := [one for one in group if not one.parks]:
                ops.fold([local_part(_weight(one)) for one in others], [one.local_mask for one in others])
        for one in holds:
            one.is_raw = False
            one.changed_at = next(_CHANGES)
            one._masked_gradient = (0, 0)
            one.saw()


def clear(holds: Iterable[Hold]) -> None:
    """Zero what masks drop where it is not zero; it is no raw value. Where it is zero, nothing is written."""
    with torch.inference_mode(False), torch.no_grad():
        for group in _by_device(holds):
            weights, masks = [local_part(_weight(one)) for one in group], [one.local_mask for one in group]
            written = list(itertools.compress(range(len(group)), ops.probe(weights, masks, None)))
            ops.fold([weights[i] for i in written], [masks[i] for i in written])
            for i in written:
                group[i].saw()


def release(holds: Iterable[Hold]) -> None:
    """Put back what is parked; nothing is held until `hold_zeros`."""
    holds = list(holds)
    settle([one for one in holds if not one.is_raw and one.is_written()])
    with torch.inference_mode(False), torch.no_grad():
        for group in _by_device(holds):
            parked = [one for one in group if one.parked is not None]
            ops.unpark(
                [_weight(one) for one in parked],
                [one.mask for one in parked],
                [one._parked_there() for one in parked],
            )
            for one in group:
                one.is_raw = True
                one.parked = None
                one.saw()


@contextmanager
def released(holds: Iterable[Hold]) -> Iterator[None]:
    """Let parameters have their raw values; after it they have zeros where masks are False by then.

    Example:
        >>> from pyprune import prune
        >>> linear = prune(nn.Linear(2, 2), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
        >>> with released(holds_in(linear)):
        ...     int((linear.weight == 0).sum())
        0
        >>> int((linear.weight == 0).sum())
        2
    """
    holds = list(holds)
    release(holds)
    try:
        yield
    finally:
        hold_zeros(holds)


def settle_written(holds: Iterable[Hold]) -> None:
    """Do what the next forward pass would do for what was written to, before masks and raw values are looked at."""
    there = (hold for hold in holds if hold.parameter is not None and not hold.is_raw)
    settle([hold for hold in there if hold.is_written()])


def settle(holds: Sequence[Hold]) -> None:
    """Take what was written over zeros for the raw values, and zero it. A zero that was written changes nothing."""
    if not holds:
        return
    for one in holds:
        _ = one.mask  # follows a weight that was resized, and so does what is parked
    before = {one: (one.parked, one.changed_at, one._masked_gradient) for one in holds}
    hold_zeros(holds)
    for one, (parked, changed_at, masked_gradient) in before.items():
        one.changed_at, one._masked_gradient = changed_at, masked_gradient
        if parked is not None and one.parked is not None:
            written = one.parked
            one.parked = parked
            with torch.inference_mode(False), torch.no_grad():
                there = one._parked_there()
                one.parked = there if one.is_stepping else torch.where(written != 0, written, there)


def _weight(hold: Hold) -> nn.Parameter:
    assert hold.parameter is not None
    return hold.parameter


# ---- torch's hooks for all modules and optimizers, from the first mask to the last `strip` ----
# A garbage collection may come while torch goes through them, so models that are gone take none off.

# What puts such a hook on, and the hook.
HOOKS: list[tuple[Callable[..., Any], Callable[..., Any]]] = []
_handles: list[torch.utils.hooks.RemovableHandle] = []


def _look_at_torch() -> None:
    if not _handles:
        _handles.extend(put_on(hook) for put_on, hook in HOOKS)


def _look_away() -> None:
    if not HELD:
        while _handles:
            _handles.pop().remove()
