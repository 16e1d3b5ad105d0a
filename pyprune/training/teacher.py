"""A teacher beside a model in training: what both make of the same batch, and the loss of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pyprune.checks import check_number, shown
from pyprune.modules.attachments import check_module, parameters_of
from pyprune.modules.evaluation import evaluating
from pyprune.training.distillation import check_temperature, distillation_loss, squarehead_loss


class Distillation:
    """A teacher for a model in training: ``task_weight * task + logits_weight * KL + hidden_weight * SquareHead``.

    Hooks see what the model's last call was given and returned, and what its layers returned. `loss` calls the
    teacher with the same, in evaluation mode and without gradients, so that the training loop gains one line. What
    the model makes without gradients (evaluation) is not seen. Copies and pickles of the model know nothing of it.

    Args:
        model: the model in training, which the loop calls.
        teacher: the dense model, on the same device; a copy made before pruning (``copy.deepcopy(model)``) or a
            larger one. It is not changed.
        pairs: names of modules whose outputs are compared: a list of names that both have, or a dict from names in
            the model to names in the teacher. Of an output that is a tuple or mapping the first tensor counts.
        temperature: as for `distillation_loss`.
        task_weight, logits_weight, hidden_weight: what each loss counts, 0 or more. With 0 for the logits these may
            be of different shapes, or none.

    Raises:
        TypeError, ValueError: for a teacher that is the model, or has weights in its memory, names that a model does
            not have, weights below 0, or nothing to learn from the teacher.

    Example:
        >>> import copy, pyprune
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> distillation = Distillation(model, copy.deepcopy(model), pairs=["0"], temperature=2.0)
        >>> _ = pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
        >>> task = nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,)))
        >>> distillation.loss(task).backward()
        >>> distillation.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *,
        pairs: Sequence[str] | Mapping[str, str] = (),
        temperature: float = 1.0,
        task_weight: float = 0.5,
        logits_weight: float = 0.5,
        hidden_weight: float = 1.0,
    ) -> None:
        check_module(model)
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher is {shown(teacher)}; give an nn.Module")
        if set(model.modules()) & set(teacher.modules()):
            raise ValueError(
                "teacher has modules of the model in it; give a model of its own, as copy.deepcopy makes"
            )
        learning = [one for one in parameters_of(model) if one.requires_grad]
        if set(map(_place, learning)) & set(map(_place, parameters_of(teacher))):
            raise ValueError(
                "teacher has weights in the memory of the model's, as load_state_dict(assign=True) makes them, and "
                "would change with it; give a model of its own, as copy.deepcopy makes"
            )
        self._temperature = check_temperature(temperature)
        self._weights = {
            name: check_number(f"{name}_weight", weight, what="a finite number, at least 0", least=0)
            for name, weight in (("task", task_weight), ("logits", logits_weight), ("hidden", hidden_weight))
        }
        self._pairs = _checked_pairs(pairs, model, teacher)
        if not self._weights["logits"] and not (self._pairs and self._weights["hidden"]):
            raise ValueError(
                "logits_weight is 0, and there are no pairs, or hidden_weight is 0; nothing is distilled"
            )
        self._model, self._teacher = model, teacher
        self._seen = _Pass()
        self._handles = [
            model.register_forward_pre_hook(_Begin(self._seen), with_kwargs=True),
            *(model.get_submodule(name).register_forward_hook(_See(self._seen, name)) for name in self._pairs),
            model.register_forward_hook(_End(self._seen)),
        ]

    def loss(self, task: Tensor, *, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the loss to train with: that of the task, and what the model's last call has to learn.

        Args:
            task: the loss of the task for that call.
            mask: as for `distillation_loss`, of the positions; None for the ``attention_mask`` that the model was
                called with, if it was. It counts for what has these positions; other outputs count as a whole.
            labels: as for `distillation_loss`.

        Raises:
            ValueError: if the model was not called with gradients since the last loss, or not those of its layers
                that are paired, or wrote into its inputs, or outputs do not fit.
        """
        if not isinstance(task, Tensor):
            raise TypeError(f"task is {shown(task)}; give the loss of the task, a tensor")
        return self.task_weight * task + self.extra_loss(mask=mask, labels=labels)

    @property
    def task_weight(self) -> float:
        """What the loss of the task counts."""
        return self._weights["task"]

    def extra_loss(self, *, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the part of `loss` that is not the task's."""
        seen = self._seen
        if seen.inputs is None or not seen.ended:
            raise ValueError(
                "the model was not called with gradients since the last loss; call the model that Distillation was "
                "given, and then loss, once for each call"
            )
        (args, keywords), output, student = seen.inputs, seen.output, seen.layers
        is_same = seen.versions == _versions(seen.inputs)
        seen.clear()
        if not is_same:
            raise ValueError(
                "what the model was called with was changed in place since, so the teacher would see other inputs; "
                "make new tensors in its forward and in the loop (x = x / 255, not x /= 255)"
            )
        if mask is None:
            mask = keywords.get("attention_mask")
        taught = _Pass()
        taught.inputs = args, keywords
        teacher = self._teacher
        handles = [
            teacher.get_submodule(name).register_forward_hook(_See(taught, name)) for name in self._pairs.values()
        ]
        try:
            with torch.no_grad(), evaluating(teacher):
                goal = teacher(*args, **keywords)
        finally:
            for handle in handles:
                handle.remove()
        losses = []
        if self._weights["logits"]:
            logits, goals = _logits("the model", output), _logits("the teacher", goal)
            loss = distillation_loss(
                logits, goals, temperature=self._temperature, mask=_fitting(mask, logits.shape[:-1]), labels=labels
            )
            losses.append(self._weights["logits"] * loss)
        if self._weights["hidden"]:
            for name, other in self._pairs.items():
                states, goals_of = student.get(name, []), taught.layers.get(other, [])
                if not states or len(states) != len(goals_of):
                    raise ValueError(
                        f"pairs: {name} of the model was called {len(states)} times with gradients, and {other} of "
                        f"the teacher {len(goals_of)} times; pair modules that are called in each pass, as often"
                    )
                for state, its_goal in zip(states, goals_of, strict=True):
                    loss = squarehead_loss(state, its_goal, mask=_fitting(mask, state.shape[:-1]))
                    losses.append(self._weights["hidden"] * loss)
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()

    def remove(self) -> None:
        """Let go of the model."""
        for handle in self._handles:
            handle.remove()
        self._seen.clear()


class _Pass:
    """What a pass of a model was given, what came out, and what its layers returned, each time they were called."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.versions: list[int] = []
        self.output: Any = None
        self.ended = self.gradients = False
        self.layers: dict[str, list[Tensor]] = {}


class _Begin:
    """A hook before the model; a copy or pickle of it has a pass of its own, which nobody reads."""

    def __init__(self, seen: _Pass | None = None) -> None:
        self.seen = seen

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self.seen is not None:
            self.seen.clear()
            if torch.is_grad_enabled():
                # Dicts and lists of one's own: a forward may take things out of those that it is given.
                self.seen.inputs, self.seen.gradients = tree_map(lambda value: value, (args, keywords)), True
                self.seen.versions = _versions(self.seen.inputs)


class _End(_Begin):
    """A hook after the model."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Of a call within a call, as a wrapper makes that goes through forward to a training step, the inner counts.
        if self.seen is not None and self.seen.inputs is not None and not self.seen.ended:
            self.seen.output, self.seen.ended = output, True


class _See(_Begin):
    """A hook after a layer."""

    def __init__(self, seen: _Pass | None = None, name: str = "") -> None:
        super().__init__(seen)
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen = self.seen
        # What is computed again in the backward pass comes after the end; what is computed without gradients in a
        # pass that has them will be computed again.
        if seen is not None and seen.inputs is not None and not seen.ended:
            if torch.is_grad_enabled() != seen.gradients:
                return
            seen.layers.setdefault(self.name, []).append(_first_tensor(self.name, output))


def _place(parameter: nn.Parameter) -> int:
    """Return what only the same parameter has, or another one in the same memory."""
    if type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel():
        return parameter.data_ptr()
    return id(parameter)


def _versions(inputs: Any) -> list[int]:
    """Return how often each tensor was written to, of those that count it."""
    return [one._version for one in tree_leaves(inputs) if isinstance(one, Tensor) and not one.is_inference()]


def _checked_pairs(pairs: object, model: nn.Module, teacher: nn.Module) -> dict[str, str]:
    if isinstance(pairs, (list, tuple)) and all(isinstance(name, str) for name in pairs):
        pairs = {name: name for name in pairs}
    if not isinstance(pairs, Mapping) or not all(isinstance(name, str) for pair in pairs.items() for name in pair):
        raise TypeError(f"pairs is {shown(pairs)}; give a list of names of modules, or a dict of them")
    for what, one, names in (("the model", model, pairs.keys()), ("the teacher", teacher, pairs.values())):
        known = {name for name, _ in one.named_modules(remove_duplicate=False)}
        for name in names:
            if name not in known:
                raise ValueError(f"pairs has {name!r}, which is no module of {what}; see its named_modules()")
    if len(set(pairs.values())) < len(pairs):
        raise ValueError("pairs has a module of the teacher twice; give each a module of its own")
    return dict(pairs)


def _first_tensor(name: str, output: Any) -> Tensor:
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    )
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"pairs: {name} returns a {type(output).__name__} without a tensor in it; pair another module")


def _logits(whose: str, output: Any) -> Tensor:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{whose} returns a {type(output).__name__} without logits; give a model that returns a tensor or has "
            "logits in what it returns, or logits_weight=0"
        )
    return found


def _fitting(mask: Tensor | None, positions: torch.Size) -> Tensor | None:
    return mask if mask is not None and mask.shape == positions else None
