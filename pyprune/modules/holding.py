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
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.modules.attachments import MASKS, Attachment
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
        self.masked_gradient = (0, 0)
        self.is_stepping = False  # what an optimizer writes in its step is no raw value
        self._written = (-1, 0)
        self._places: list[tuple[weakref.ref[nn.Module], str]] = []
        # The dicts of all modules that have it, in copies too, which do not know their places.
        self.kept_in: weakref.WeakSet[MasksOfModule] = weakref.WeakSet()
        # Of those that were copied with their models, for averages.
        self.copies: weakref.WeakSet[Hold] = weakref.WeakSet()
        self.untied_from: Hold | None = None
        self.overwritten: Tensor | None = None  # what was written over zeros, on its way to what is parked
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

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        # Another tensor, so that the old mask is there until all that changes with it has changed.
        self._mask = mask

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
        self.mask_changed()
        HELD[id(parameter)] = self
        look_at_torch()
        self.watch_gradient()

    def mask_changed(self) -> None:
        """Note that gradient and optimizer's state are those of another mask."""
        self.changed_at = next(_CHANGES)
        self.masked_gradient = (0, 0)

    def unbind(self) -> None:
        """Hold nothing any more."""
        if self.parameter is not None and HELD.get(id(self.parameter)) is self:
            del HELD[id(self.parameter)]
        if self._hook is not None:
            self._hook.remove()
        self.parameter = self._hook = None
        look_at_torch()

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
        place, version = self.masked_gradient
        return place != 0 and gradient.data_ptr() == place and gradient._version >= version

    def is_written(self) -> bool:
        """Whether something wrote to the parameter since `saw` was called; not through ``.data``."""
        stamp = self._stamp()
        return stamp is not None and self._written != stamp

    def saw(self) -> None:
        """Take the values as they are for known."""
        self._written = self._stamp() or self._written

    def _stamp(self) -> tuple[int, int] | None:
        """Return what changes when something writes to the parameter; None where that cannot be told."""
        parameter = self.parameter
        if parameter is None or is_sharded(parameter) or parameter.is_meta or parameter.is_inference():
            return None
        return parameter._version, parameter.data_ptr()

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
        mask, parked = _with_rows(old, shape), self.parked
        if parked is not None:
            parked = parked[: int((~old[:rows]).sum())].clone()
        vars(self).update(_mask=mask, parked=parked)  # together, though someone may interrupt

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

    def parked_there(self) -> Tensor:
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
            "masked_gradient": (0, 0),
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


@torch.inference_mode(False)
def _with_rows(mask: Tensor, shape: torch.Size) -> Tensor:
    """Return a mask with more rows, which are kept, or fewer."""
    resized = torch.ones(shape, dtype=torch.bool, device=mask.device)
    rows = min(shape[0], mask.shape[0])
    resized[:rows] = mask[:rows]
    return resized


def check_dense(gradient: Tensor) -> None:
    """Raise TypeError if a gradient is sparse."""
    if gradient.layout is not torch.strided:
        raise TypeError("the gradient of a pruned weight is sparse, which cannot be masked; set sparse=False")


def _mask_gradient(held: "weakref.ref[Hold]", parameter: Tensor) -> None:
    hold = held()
    gradient = parameter.grad
    if hold is None or hold.parameter is not parameter or gradient is None:
        return
    check_dense(gradient)
    if gradient.requires_grad:  # create_graph=True: what is done to it is differentiated
        parameter.grad = ops.mask_weight(gradient, hold.mask)
    else:
        ops.fold([local_part(gradient)], [hold.local_mask])
    assert parameter.grad is not None
    hold.masked_gradient = (parameter.grad.data_ptr(), parameter.grad._version)


# ---- torch's hooks for all modules and optimizers, from the first mask to the last `strip` ----
# A garbage collection may come while torch goes through them, so models that are gone take none off.

# The tables of such hooks, what puts one in, and the hook.
HOOKS: list[tuple[dict[int, Callable[..., Any]], Callable[..., Any], Callable[..., Any]]] = []


def look_at_torch() -> None:
    """Have the hooks on while something is held, and off while nothing is, whatever was left half done."""
    for table, put_on, hook in HOOKS:
        keys = [key for key, known in table.items() if known is hook]
        if HELD and not keys:
            put_on(hook)
        elif keys and not HELD:
            for key in keys:
                table.pop(key, None)
