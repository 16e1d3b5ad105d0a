"""Run a model to look at it: forward passes that leave flags, buffers and random numbers as they were."""

import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode
from torch.utils._pytree import tree_leaves

from pyprune.checks import shown
from pyprune.modules.attachments import parameters_of, unwrapped
from pyprune.modules.undo import Before, undoing

_NO_TENSORS = (np.ndarray, np.generic, int, float, complex, str, bytes, type(None))


def forward(model: nn.Module, inputs: Any, name: str = "examples_inputs") -> Any:
    """Call the model: a mapping gives keyword arguments, a tuple positional ones, anything else is the one argument.

    Raises:
        TypeError: if the model does not take as many, or such arguments, or fails because there is no tensor in them;
            ``name`` says what the inputs are.

    Example:
        >>> forward(nn.Identity(), (torch.ones(1),)).tolist()
        [1.0]
    """
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    keywords = inputs if isinstance(inputs, Mapping) else {}
    torch.clear_autocast_cache()  # under autocast, casts of an earlier pass are of what the weights were then
    try:
        return model(*args, **keywords)
    except (TypeError, AttributeError) as error:
        problem = _misfit(model, args, keywords)
        if problem is None:
            leaves = tree_leaves((args, dict(keywords)))
            if all(isinstance(leaf, _NO_TENSORS) for leaf in leaves):
                raise TypeError(
                    f"{name} is {shown(inputs)}, without a tensor in it, and {type(model).__name__} fails with it "
                    f"({error}); give tensors"
                ) from error
            raise
        given = f"a dict of {', '.join(map(str, keywords))}" if keywords else f"a tuple of {len(args)}"
        raise TypeError(
            f"{name} is {given}, whose items become the arguments of {problem}. Give what the model takes alone: of "
            "a loader with labels pyprune.Dataset(loader, transform_func=lambda batch: batch[0])"
        ) from error


def _misfit(model: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> str | None:
    """Say why the model's forward cannot be called so, if that is it: batches often have labels beside the inputs."""
    model = unwrapped(model)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of what is not written in Python
        return None
    try:
        signature.bind(*args, **keywords)
    except TypeError as error:
        return f"{type(model).__name__}.forward{signature}: {error}"
    return None


def check_inputs(examples_inputs: object) -> None:
    """Raise TypeError unless inputs say how the model is to be called with them; None is no inputs."""
    if examples_inputs is not None and not isinstance(examples_inputs, (Tensor, tuple, Mapping)):
        raise TypeError(
            f"examples_inputs is a {type(examples_inputs).__name__}; give a tensor, a tuple of positional "
            "arguments or a dict of keyword arguments"
        )


def check_initialized(model: nn.Module) -> None:
    """Raise if a parameter or buffer is lazy: a forward pass would give it values, and that changes the model."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} is lazy and has no values yet; run one forward pass first")


@contextmanager
def evaluating(model: nn.Module, *, training: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Switch gradients off and all modules but ``training`` to evaluation; give every flag back, whatever happens.

    The flags are set one by one, not by ``train()``, which some models override with side effects.
    """
    flags = [(module, module.training) for module in model.modules()]
    gradients = torch.is_grad_enabled()

    def undo() -> None:
        torch.set_grad_enabled(gradients)
        for module, flag in flags:
            module.training = flag

    with undoing(undo):
        torch.set_grad_enabled(False)
        for module, _ in flags:
            module.training = False
        for module in training:
            module.training = True
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give buffers and torch's random numbers back as they were, whatever happens; new buffers go."""
    homes = [
        (module, dict(module._buffers), set(module._non_persistent_buffers_set))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # takes no new buffers
    ]
    # Only under inference_mode could an inference tensor be written to, and it counts no versions.
    values = [(b, b._version, b.clone()) for b in model.buffers() if not b.is_inference()]
    devices = {parameter.device for parameter in parameters_of(model) if parameter.is_cuda}

    @torch.no_grad()
    def undo() -> None:
        for buffer, version, value in values:
            # BatchNorm in training does not count as a version.
            if buffer._version != version or not torch.equal(buffer, value):
                buffer.copy_(value)
        for module, buffers, not_saved in homes:
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(not_saved)

    with undoing(undo), torch.random.fork_rng(devices=list(devices)):
        yield


@contextmanager
def using(mode: TorchFunctionMode | TorchDispatchMode) -> Iterator[None]:
    """Be under a mode of torch, and leave it, whatever happens."""
    stack = (
        _get_current_function_mode_stack if isinstance(mode, TorchFunctionMode) else _get_current_dispatch_mode_stack
    )

    def undo() -> None:
        while any(one is mode for one in stack()):  # an operator that was interrupted may have left it twice
            try:
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            except IndexError:  # that was interrupted before, after it had forgotten what was before the mode
                _pop_mode()

    with undoing(undo):
        mode.__enter__()  # type: ignore[no-untyped-call]
        yield


def look(
    model: nn.Module,
    inputs: Any,
    mode: TorchFunctionMode | TorchDispatchMode,
    *,
    before: Iterable[tuple[nn.Module, Callable[..., None]]] = (),
    after: Iterable[tuple[nn.Module, Callable[..., None]]] = (),
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Any:
    """Run a model once, as `forward` does, in evaluation, and return what it puts out; it is as it was then.

    Args:
        model, inputs: as for `forward`.
        mode: sees the operations.
        before, after: modules with what is to be called before and after them, as torch calls hooks.
        within: what else holds while the model runs.
    """
    before, after = list(before), list(after)
    was = Before(*(module for module, _ in (*before, *after)), with_attributes=False)
    with undoing(was.restore), evaluating(model), untouched(model), within(), using(mode):
        for module, hook in before:
            module.register_forward_pre_hook(hook)
        for module, hook in after:
            module.register_forward_hook(hook)
        return forward(model, inputs)


@contextmanager
def recurrence_unfused() -> Iterator[None]:
    """Keep torch from the kernels of cuDNN and oneDNN that run recurrent layers as one."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    enabled = [backend.enabled for backend in backends]

    def undo() -> None:
        for backend, value in zip(backends, enabled, strict=True):
            backend.enabled = value

    with undoing(undo):
        for backend in backends:
            backend.enabled = False
        yield


@contextmanager
def layers_apart(model: nn.Module) -> Iterator[None]:
    """Keep torch from kernels that run several layers of a model as one: of recurrent ones, and of transformers."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    # Convolutions are slower without these.
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with undoing(lambda: torch.backends.mha.set_fastpath_enabled(enabled)):
        torch.backends.mha.set_fastpath_enabled(False)
        with recurrence_unfused() if is_recurrent else nullcontext():
            yield


def score_of(model: nn.Module, eval_fn: Callable[[nn.Module], object]) -> float:
    """Return the score that a function gives a model in evaluation; all but the model's values is given back.

    That is its modules, hooks, flags and buffers, and torch's random numbers, so every call sees the same ones.

    Raises:
        TypeError: if it returns no number.
        ValueError: if it trains the model.

    Example:
        >>> score_of(nn.Linear(2, 1), lambda model: model.in_features)
        2.0
    """
    weights = {name: weight for name, weight in model.named_parameters() if not weight.is_inference()}
    versions = {name: weight._version for name, weight in weights.items()}
    with undoing(Before(model, with_attributes=False).restore), untouched(model), evaluating(model):
        score = eval_fn(model)
    changed = [name for name, version in versions.items() if weights[name]._version != version]
    if changed:
        raise ValueError(f"eval_fn changed {', '.join(changed[:8])}; it is to measure the model, not to train it")
    if isinstance(score, Tensor) and score.numel() == 1:
        score = score.item()
    if isinstance(score, bool) or not isinstance(score, numbers.Real):
        raise TypeError(f"eval_fn returned {shown(score)}; it is to return a number, the score of the model")
    try:
        return float(score)
    except OverflowError as error:
        raise ValueError(f"eval_fn returned {shown(score)}, which no float can hold") from error


def check_callable(name: str, function: object) -> None:
    """Raise TypeError unless an argument is a function."""
    if not callable(function):
        raise TypeError(f"{name} is {shown(function)}; give a function that takes the model")
