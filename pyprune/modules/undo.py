"""Changes that are made whole or not at all, whatever stops them: an error, Ctrl-C, an exit.

A `Change` takes down what may be changed (`Before`), and if its body fails, brings all of it back. It knows modules,
parameters, masks and other objects by what their attributes refer to, not by copies of tensors: what a body computes
goes into new ones, and what it writes into those that are there is left to `Change.finish`. Only zeros are written
into weights at once, because what was there is parked, and can be put back (`pyprune.modules.zeros`).

An interruption at the very end of a ``with`` statement may keep Python from calling ``__exit__``. So `Change` has
nothing to do there: without a failure, all is done. What has to be undone in any case is undone by a generator
(`undoing`), which Python closes then.
"""

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.modules.attachments import parameters_of
from pyprune.modules.holding import HELD, Hold, MasksOfModule, look_at_torch
from pyprune.modules.zeros import hold_zeros, holds_in, is_there


class Before:
    """What there was before a change.

    Args:
        models: modules with their attributes, hooks, classes, flags, parameters, what hangs on these, and masks; and
            torch's random numbers. Not the values of tensors, but weights under masks that change.
        holds: masks, besides those of the models.
        objects: other things with their attributes, and the dicts, lists and sets in these.
        values: tensors whose values are to come back, of which it takes copies.
        with_attributes: whether what is in the modules besides what torch puts there counts too.
    """

    def __init__(
        self,
        *models: nn.Module,
        holds: Iterable[Hold] = (),
        objects: Iterable[object] = (),
        values: Iterable[Tensor] = (),
        with_attributes: bool = True,
    ) -> None:
        self._models = models
        modules = dict.fromkeys(module for model in models for module in model.modules())
        parameters = dict.fromkeys(one for model in models for one in parameters_of(model))
        found = [*holds, *(hold for model in models for hold in holds_in(model))]
        followers = [follower for hold in found for follower in getattr(hold, "followers", ())]
        self._holds = {hold: _HoldBefore(hold) for hold in [*found, *followers]}
        names = None if with_attributes else _STRUCTURE
        self._others: list[_ObjectBefore | _ParameterBefore] = [
            *(_ObjectBefore(module, names) for module in modules),
            *map(_ObjectBefore, objects),
            *map(_ParameterBefore, parameters),
        ]
        self._values = [(tensor, tensor.detach().clone()) for tensor in values]
        self._random = _random_state([*parameters]) if models else {}
        self._gradients = torch.is_grad_enabled()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _restore(self) -> None:
        new = {hold for model in self._models for hold in holds_in(model)}.difference(self._holds)
        changed = [hold for hold, before in self._holds.items() if before.is_changed(hold)]
        for hold in new:
            _make_raw(hold, hold.parameter)
        for hold in changed:
            _make_raw(hold, self._holds[hold].values["parameter"])
        for hold in new:
            if HELD.get(id(hold.parameter)) is hold:
                del HELD[id(hold.parameter)]
        for one in self._others:
            one.restore()
        for hold, before in self._holds.items():
            before.restore(hold)
        look_at_torch()
        zeroed = [hold for hold in changed if not self._holds[hold].values["is_raw"]]
        hold_zeros(zeroed)
        for hold in zeroed:
            hold.changed_at = self._holds[hold].values["changed_at"]
            hold.masked_gradient = self._holds[hold].values["masked_gradient"]
        for tensor, value in self._values:
            tensor.copy_(value)
        for hold, before in self._holds.items():
            if not (hold.is_raw or before.was_written):
                hold.saw()

    def restore(self) -> None:
        """Bring it back; this may be done again, from wherever it was interrupted."""
        self._restore()
        for device, state in self._random.items():
            if device is None:
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)
        torch.set_grad_enabled(self._gradients)


class Change(ExitStack):
    """The body of this ``with`` statement is done as a whole, or was never begun.

    Args:
        models, holds, objects, values: what may be changed, as for `Before`.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> with Change(linear):
        ...     _ = linear.eval().requires_grad_(False)
        ...     raise RuntimeError("whatever it is")
        Traceback (most recent call last):
        RuntimeError: whatever it is
        >>> linear.training, linear.weight.requires_grad
        (True, True)
    """

    def __init__(
        self,
        *models: nn.Module,
        holds: Iterable[Hold] = (),
        objects: Iterable[object] = (),
        values: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self._undo: Callable[[], object] = Before(*models, holds=holds, objects=objects, values=values).restore
        self._settle: Callable[[], object] = self._undo
        self._gradients = torch.is_grad_enabled()
        self._is_settled = False
        # Twice: if the first is interrupted, the second begins again.
        self.push(self._end)
        self.push(self._end)

    def finish(self, action: Callable[[], object]) -> None:
        """Do what cannot be taken back, as the last thing; a failure then does it again, to its end, not the undoing.

        So it may be done twice.
        """
        self._settle = action
        action()

    @property
    def is_finishing(self) -> bool:
        """Whether it is too late to take anything back."""
        return self._settle is not self._undo

    def _end(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None and not self._is_settled:
            self._settle()
            torch.set_grad_enabled(self._gradients)  # torch was interrupted where it would do this
            self._is_settled = True


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Undo what the body does, whatever happens; ``undo`` may be run twice.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> with undoing(linear.train):
        ...     linear.eval().training
        False
        >>> linear.training
        True
    """
    try:
        try:
            yield
        finally:
            undo()
    except BaseException:
        undo()  # if it was interrupted
        raise


# ---- what there was ----


class _HoldBefore:
    """What a hold refers to, but for what is parked, which comes back with the zeros and would take memory."""

    def __init__(self, hold: Hold) -> None:
        self.values = {name: value for name, value in vars(hold).items() if name != "parked"}
        self.parked = None if hold.parked is None else weakref.ref(hold.parked)
        self.followers = list(getattr(hold, "followers", ()))
        self.was_written = hold.is_written()
        self.was_held = HELD.get(id(hold.parameter)) is hold

    def is_changed(self, hold: Hold) -> bool:
        """Whether zeros may be elsewhere now."""
        parked = None if self.parked is None else self.parked()
        return (
            hold._mask is not self.values["_mask"]
            or hold.is_raw is not self.values["is_raw"]
            or hold.parked is not parked
            or (parked is None and self.parked is not None)
        )

    def restore(self, hold: Hold) -> None:
        is_raw = hold.is_raw  # until there are zeros again
        vars(hold).update(self.values, is_raw=is_raw)
        if self.followers:
            hold.followers[:] = self.followers  # type: ignore[attr-defined]
        elif "followers" in self.values:
            self.values["followers"].clear()
        if self.was_held:
            HELD[id(hold.parameter)] = hold


class _ObjectBefore:
    """What the attributes of an object refer to, and what was in those that are dicts, lists or sets."""

    def __init__(self, thing: object, names: Set[str] | None = None) -> None:
        self.thing = thing
        self.cls = type(thing)
        self.names = names
        self.values = {name: value for name, value in vars(thing).items() if names is None or name in names}
        self.tables = [(table, table.copy()) for table in self.values.values() if type(table) in _TABLES]

    def restore(self) -> None:
        if type(self.thing) is not self.cls:
            object.__setattr__(self.thing, "__class__", self.cls)  # past a __setattr__ of the user
        there = vars(self.thing)
        others = {} if self.names is None else {key: there[key] for key in there if key not in self.names}
        refill(there, self.values | others)
        for table, content in self.tables:
            refill(table, content)


class _ParameterBefore:
    """Flags and hooks of a parameter, and which tensor its gradient was."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.requires_grad = parameter.requires_grad
        self.gradient = parameter.grad
        self.hooks = {name: dict(getattr(parameter, name) or {}) for name in _HOOKS_OF_PARAMETERS}

    def restore(self) -> None:
        if self.parameter.requires_grad != self.requires_grad:
            self.parameter.requires_grad_(self.requires_grad)
        if self.parameter.grad is not self.gradient:
            self.parameter.grad = self.gradient
        for name, hooks in self.hooks.items():
            table = getattr(self.parameter, name)
            if table is not None:
                refill(table, hooks)


# What torch gives every module.
_STRUCTURE = frozenset(vars(nn.Module()))
_TABLES = (dict, OrderedDict, list, deque, set, MasksOfModule)
_HOOKS_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def refill(table: Any, content: Any) -> None:
    """Let a dict, list or set have a content again; one that has it is not touched."""
    if isinstance(table, dict):
        is_same = list(map(id, table)) == list(map(id, content)) and all(table[key] is content[key] for key in table)
    elif isinstance(table, (list, deque)):
        is_same = list(map(id, table)) == list(map(id, content))
    else:
        is_same = table == content
    if is_same:
        return
    if isinstance(table, dict):
        # Nothing that is to be there is ever missing: an interruption here finds a module that can be looked at.
        table.update(content)
        for key in [key for key in table if key not in content]:
            del table[key]
        if list(map(id, table)) != list(map(id, content)):
            for key in content:
                table[key] = table.pop(key)
        return
    table.clear()
    if isinstance(table, (list, deque)):
        table.extend(content)
    else:
        table.update(content)


def _make_raw(hold: Hold, parameter: nn.Parameter | None) -> None:
    """Put back what a hold has parked, whether it was zeroed already or not."""
    if parameter is None or not is_there(parameter):
        return
    # A mask on a weight that was made smaller, and has all of its values again, has nothing to give back.
    if hold.parked is not None and hold.parked.numel() and hold._mask.shape == parameter.shape:
        ops.unpark([parameter], [hold._mask], [hold.parked])
    vars(hold).update(parked=None, is_raw=True)


def _random_state(parameters: list[nn.Parameter]) -> dict[torch.device | None, Tensor]:
    states: dict[torch.device | None, Tensor] = {None: torch.get_rng_state()}
    for device in {parameter.device for parameter in parameters if parameter.is_cuda}:
        if device.index < torch.cuda.device_count():
            states[device] = torch.cuda.get_rng_state(device)
    return states
