"""Losses that draw a pruned model to a dense one, its teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyprune.checks import check_number, shown


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Return how far a model's predictions are from its teacher's: T^2 KL(softmax(t / T), softmax(s / T)).

    It is the mean over positions, in float32 at least. T^2 keeps gradients as large as they are with T = 1.

    Args:
        student: logits of the model in training, (..., classes).
        teacher: logits of the teacher, of the same shape; they get no gradient.
        temperature: T, above 0; a larger one also says what the teacher thinks of the classes that are unlikely.
        mask: as ``attention_mask``, of the logits' shape without classes: positions that are 0 or False do not count.
        labels: of the same shape; positions that are -100 do not count. Those of a causal language model belong to
            the logits of the position before: give ``logits[:, :-1]`` and ``labels[:, 1:]``.

    Returns:
        A scalar; 0 if no position counts.

    Raises:
        TypeError, ValueError: for a temperature that is not above 0, and tensors that do not fit.

    Paper: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network".

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0], [5.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        >>> round(float(distillation_loss(student, teacher, temperature=2.0, labels=torch.tensor([1, -100]))), 4)
        0.4438
    """
    temperature = check_temperature(temperature)
    _check_pair("student", student, "teacher", teacher)
    if student.dim() == 0:
        raise ValueError("student has no dimensions; give logits of shape (..., classes)")
    for name, given in (("mask", mask), ("labels", labels)):
        if given is not None:
            _check_positions(name, given, student.shape, exactly=True)
    there = None if mask is None else mask != 0
    if labels is not None:
        there = labels != -100 if there is None else there & (labels != -100)
    student, teacher = (_chosen(one, there) / temperature for one in (student, teacher.detach()))
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = log_teacher.exp()
    # A class that the teacher rules out, by -inf, adds nothing: 0 log 0 = 0.
    sums = (expected * (log_teacher - log_student).masked_fill(expected == 0, 0)).sum(-1)
    return sums.sum() / max(1, sums.numel()) * temperature**2


def squarehead_loss(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], *, mask: Tensor | None = None
) -> Tensor:
    """Return how far hidden states are from the teacher's: the sum over layers of MSE(s, t) / MSE(t, 0).

    So each layer counts as much, however large its values are. It is computed in float32 at least.

    Args:
        student: hidden states of the model in training, of one layer or several, (..., features) each.
        teacher: those of the teacher, of the same shapes; they get no gradient.
        mask: as ``attention_mask``, of the first dimensions of every layer: positions that are 0 or False do not
            count.

    Returns:
        A scalar. A layer in which the teacher is zero everywhere counts by MSE(s, t) alone.

    Raises:
        TypeError, ValueError: for tensors that do not fit, or no layers.

    Paper: Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language Models".

    Example:
        >>> teacher = [torch.tensor([[3.0, 4.0]]), torch.tensor([[100.0, 0.0]])]
        >>> float(squarehead_loss([torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)], teacher))
        1.0
    """
    students, teachers = _layers("student", student), _layers("teacher", teacher)
    if len(students) != len(teachers):
        raise ValueError(f"student has {len(students)} layers, and teacher {len(teachers)}; give as many of each")
    for i, (one, other) in enumerate(zip(students, teachers, strict=True)):
        _check_pair(f"student[{i}]", one, f"teacher[{i}]", other)
        if mask is not None:
            _check_positions("mask", mask, one.shape)
    losses = []
    for one, other in zip(students, teachers, strict=True):
        there = None if mask is None else mask != 0
        state, goal = _chosen(one, there), _chosen(other.detach(), there)
        size = goal.square().sum()
        count = max(1, goal.numel())
        # Of sums, not of means: both have as many terms.
        losses.append((state - goal).square().sum() / torch.where(size > 0, size, torch.full_like(size, count)))
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def check_temperature(temperature: object) -> float:
    """Return a temperature."""
    return check_number("temperature", temperature, what="a finite number above 0", least=0, open_ends=True)


def _layers(name: str, given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    layers = [given] if isinstance(given, Tensor) else given
    if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, Tensor) for layer in layers):
        raise TypeError(f"{name} is {shown(given)}; give a tensor of hidden states, or a list of them")
    if not layers:
        raise ValueError(f"{name} has no layers; give the hidden states of at least one")
    return list(layers)


def _check_pair(name: str, student: object, other: str, teacher: object) -> None:
    for which, tensor in ((name, student), (other, teacher)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{which} is {shown(tensor)}; give a tensor")
        if not tensor.is_floating_point():
            raise TypeError(f"{which} has dtype {tensor.dtype}; give floating-point values")
    assert isinstance(student, Tensor)
    assert isinstance(teacher, Tensor)
    if student.shape != teacher.shape or student.device != teacher.device:
        raise ValueError(
            f"{name} is of shape {tuple(student.shape)} on {student.device}, and {other} of {tuple(teacher.shape)} "
            f"on {teacher.device}; give the same of both"
        )


def _check_positions(name: str, given: object, shape: torch.Size, *, exactly: bool = False) -> None:
    """Raise unless this has an element for each position: of values' first dimensions, or all but the last."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is {shown(given)}; give a tensor with an element for each position, or None")
    positions = shape[:-1] if exactly else shape[: given.dim()]
    if given.shape != positions:
        raise ValueError(
            f"{name} is of shape {tuple(given.shape)}, and values of {tuple(shape)}; give an element for each "
            "position"
        )


def _chosen(values: Tensor, there: Tensor | None) -> Tensor:
    """Return the values at the positions that count, in float32 at least; the others may be NaN."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide if there is None else wide[there.to(wide.device)]
