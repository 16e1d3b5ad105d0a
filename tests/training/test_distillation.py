"""Tests of distillation: losses against sums by hand, and a teacher beside a model in a loop."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyprune
from pyprune import Distillation, distillation_loss, squarehead_loss


def log_softmax(row):
    row = row - row.max()
    return row - np.log(np.exp(row).sum())


def by_hand(student, teacher, temperature, counted):
    """Return T^2 KL, mean over the positions that count, one by one."""
    total, count = 0.0, 0
    classes = student.shape[-1]
    rows = zip(student.reshape(-1, classes), teacher.reshape(-1, classes), counted.flatten(), strict=True)
    for s, t, counts in rows:
        if counts:
            log_s, log_t = log_softmax(s / temperature), log_softmax(t / temperature)
            total += sum(math.exp(b) * (b - a) for a, b in zip(log_s, log_t, strict=True))
            count += 1
    return temperature**2 * total / max(1, count)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7)])
def test_distillation_loss_is_the_mean_of_what_is_computed_by_hand(shape, with_labels, with_mask, temperature, dtype):
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(shape).to(dtype) for _ in range(2))
    counted, given = torch.ones(shape[:-1], dtype=torch.bool), {}
    if with_mask:
        given["mask"] = (torch.rand(shape[:-1]) > 0.3).long()
        counted &= given["mask"] == 1
    if with_labels:
        given["labels"] = torch.where(torch.rand(shape[:-1]) > 0.3, 3, -100)
        counted &= given["labels"] != -100
    loss = distillation_loss(student, teacher, temperature=temperature, **given)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = by_hand(student.double().numpy(), teacher.double().numpy(), temperature, counted.numpy())
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_distillation_loss_has_the_gradient_of_soft_targets():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    distillation_loss(student, teacher, temperature=3.0).backward()
    expected = 3 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 6
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


@pytest.mark.parametrize("which", ["distillation_loss", "squarehead_loss"])
def test_positions_that_do_not_count_may_be_nan(which):
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    student[mask == 0], teacher[mask == 0] = math.nan, math.inf
    student.requires_grad_()
    loss = getattr(pyprune, which)(student, teacher, mask=mask)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert not student.grad[mask == 0].any()
    nothing = getattr(pyprune, which)(student, teacher, mask=torch.zeros_like(mask))
    assert float(nothing.detach()) == 0
    nothing.backward()


def test_distillation_loss_takes_classes_that_are_ruled_out():
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    expected = distillation_loss(student[:, 1:], teacher[:, 1:])
    student[:, 0] = teacher[:, 0] = -math.inf
    student.requires_grad_()
    loss = distillation_loss(student, teacher)
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("with_mask", [False, True])
def test_squarehead_loss_is_the_sum_of_what_is_computed_by_hand(with_mask):
    torch.manual_seed(0)
    teacher = [scale * torch.randn(2, 3, width) for scale, width in ((1, 4), (1000, 6), (1e-3, 5))]
    student = [one + 0.1 * one.abs().max() * torch.randn_like(one) for one in teacher]
    mask = torch.tensor([[True, True, False], [True, False, False]]) if with_mask else None
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        s, t = (one.double().numpy()[mask.numpy() if with_mask else ...] for one in (s, t))
        expected += ((s - t) ** 2).mean() / (t**2).mean()
    assert float(squarehead_loss(student, teacher, mask=mask)) == pytest.approx(expected, rel=1e-5)
    alone = sum(float(squarehead_loss(s, t, mask=mask)) for s, t in zip(student, teacher, strict=True))
    assert alone == pytest.approx(expected, rel=1e-5)


def test_squarehead_loss_of_a_teacher_of_zeros_is_the_mean_of_squares():
    assert float(squarehead_loss(torch.full((2, 3), 2.0), torch.zeros(2, 3))) == 4.0


LOGITS = torch.zeros(2, 3)
WRONG = {
    "another shape": (lambda: distillation_loss(LOGITS, torch.zeros(2, 4)), ValueError, "teacher"),
    "no tensor": (lambda: distillation_loss([1.0], LOGITS), TypeError, "student"),
    "integers": (lambda: distillation_loss(LOGITS, LOGITS.long()), TypeError, "teacher"),
    "a number": (lambda: distillation_loss(torch.tensor(1.0), torch.tensor(1.0)), ValueError, "student"),
    "cold": (lambda: distillation_loss(LOGITS, LOGITS, temperature=0), ValueError, "temperature"),
    "a word": (lambda: distillation_loss(LOGITS, LOGITS, temperature="hot"), TypeError, "temperature"),
    "another mask": (lambda: distillation_loss(LOGITS, LOGITS, mask=torch.ones(3)), ValueError, "mask"),
    "a mask of classes": (lambda: distillation_loss(LOGITS, LOGITS, mask=torch.ones(2, 3)), ValueError, "mask"),
    "other labels": (lambda: distillation_loss(LOGITS, LOGITS, labels=torch.ones(3)), ValueError, "labels"),
    "a list of labels": (lambda: distillation_loss(LOGITS, LOGITS, labels=[1, 2]), TypeError, "labels"),
    "fewer layers": (lambda: squarehead_loss([LOGITS], [LOGITS] * 2), ValueError, "layers"),
    "no layers": (lambda: squarehead_loss([], []), ValueError, "layers"),
    "a set": (lambda: squarehead_loss({1}, LOGITS), TypeError, "student"),
    "another layer": (lambda: squarehead_loss([LOGITS], [torch.zeros(3)]), ValueError, "teacher"),
    "a mask of other positions": (lambda: squarehead_loss(LOGITS, LOGITS, mask=torch.ones(3)), ValueError, "mask"),
}


@pytest.mark.parametrize("name", WRONG)
def test_losses_of_distillation_refuse_what_does_not_fit(name):
    call, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        call()


# ---- a teacher beside a model ----


class Tagger(nn.Module):
    """Layers with dropout and a mask of padding, as keyword; one of them is called twice."""

    def __init__(self, width=8, recompute=False, reentrant=False):
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.dropout, self.recompute, self.reentrant = nn.Dropout(0.5), recompute, reentrant

    def forward(self, x, attention_mask=None):
        x = self.dropout(self.first(x).relu())
        for _ in range(2):
            x = checkpoint(self.shared, x, use_reentrant=self.reentrant) if self.recompute else self.shared(x)
        return {"logits": self.head(x), "states": x}


def pair(**options):
    torch.manual_seed(0)
    model = Tagger(**options)
    return model, copy.deepcopy(model)


def expected_loss(task, model, teacher, x, mask, seed, weights=(0.5, 0.5, 1.0), temperature=2.0):
    """Compute the loss by hand, in plain torch, running both models layer by layer."""
    torch.manual_seed(seed)
    states = {}
    for name, one in (("student", model), ("teacher", teacher)):
        first = one.first(x)
        y = first.relu()
        y = nn.functional.dropout(y, 0.5, training=name == "student")
        shared = [one.shared(y)]
        shared.append(one.shared(shared[0]))
        states[name] = ([first, *shared], one.head(shared[1]))
    (layers, logits), (goals, goal) = states["student"], states["teacher"]
    hidden = sum(((s - t)[mask] ** 2).mean() / (t[mask] ** 2).mean() for s, t in zip(layers, goals, strict=True))
    s, t = (one[mask] / temperature for one in (logits, goal))
    kl = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean() * temperature**2
    return weights[0] * task + weights[1] * kl + weights[2] * hidden


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("weights", [(0.5, 0.5, 1.0), (0.0, 2.0, 0.0), (1.0, 0.0, 0.25)])
def test_distillation_gives_the_loss_and_gradients_by_hand(weights, recompute):
    model, teacher = pair(recompute=recompute)
    teacher.train()
    distillation = Distillation(
        model, teacher, pairs=["first", "shared"], temperature=2.0,
        task_weight=weights[0], logits_weight=weights[1], hidden_weight=weights[2],
    )  # fmt: skip
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    other = copy.deepcopy(teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    for seed in range(3):
        x = torch.randn(2, 3, 4)
        plain = copy.deepcopy(model)
        torch.manual_seed(seed)
        task = model(x, attention_mask=mask)["logits"].square().mean()
        loss = distillation.loss(task)
        model.zero_grad()
        loss.backward()
        wanted = expected_loss(task.detach(), plain, other, x, mask == 1, seed, weights)
        torch.testing.assert_close(loss.detach(), wanted.detach())
        torch.manual_seed(seed)
        by_task = weights[0] * plain(x)["logits"].square().mean()
        plain.zero_grad()
        (by_task + expected_loss(0, plain, other, x, mask == 1, seed, weights)).backward()
        for one, by_hand_ in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, by_hand_.grad)
    assert all(module.training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    distillation.remove()
    model(x)
    with pytest.raises(ValueError, match="not called"):
        distillation.loss(task)


def test_distillation_draws_a_pruned_model_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    teacher = copy.deepcopy(model)
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.7)
    distillation = Distillation(model, teacher, pairs={"0": "0"}, task_weight=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs, losses = torch.randn(3, 8), []  # of rank 3, so that what is left can make up for what is gone
    for _ in range(60):
        model(torch.randn(64, 3) @ inputs)
        loss = distillation.loss(torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert pyprune.pruning_statistic(model).global_pruning_ratio > 0.6


def test_distillation_leaves_copies_and_pickles_alone():
    model, teacher = pair()
    size = len(pickled(model))
    distillation = Distillation(model, teacher, pairs=["first"])
    model(torch.randn(2, 4))
    assert len(pickled(model)) < size + 2000
    other = copy.deepcopy(model)
    other(torch.randn(5, 4))
    assert distillation.extra_loss().isfinite()
    loaded = torch.load(io.BytesIO(pickled(model)), weights_only=False)
    assert loaded(torch.randn(5, 4))["logits"].shape == (5, 3)
    assert set(model.state_dict()) == set(teacher.state_dict())


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def test_distillation_does_not_see_evaluation():
    model, teacher = pair()
    distillation = Distillation(model, teacher, pairs=["first"])
    with torch.no_grad():
        model(torch.randn(2, 4))
    with pytest.raises(ValueError, match="not called with gradients"):
        distillation.loss(torch.zeros(()))
    model(torch.randn(2, 4))
    distillation.extra_loss()
    with pytest.raises(ValueError, match="once for each call"):
        distillation.extra_loss()


def test_distillation_refuses_layers_without_gradients():
    model, teacher = pair(recompute=True, reentrant=True)
    # Reentrant recomputation makes no graph in the forward pass.
    teacher.recompute = False
    distillation = Distillation(model, teacher, pairs=["shared"])
    model(torch.randn(2, 4))
    with pytest.raises(ValueError, match="shared of the model was called 0 times with gradients"):
        distillation.extra_loss()


def in_the_memory_of(model, **assign):
    teacher = copy.deepcopy(model)
    teacher.load_state_dict(model.state_dict(), **assign)
    return teacher


def with_weight_of(model):
    teacher = copy.deepcopy(model)
    teacher.first.weight = model.first.weight
    return teacher


REFUSED = {
    "its memory": (lambda model, _: {"teacher": in_the_memory_of(model, assign=True)}, ValueError, "in the memory"),
    "its weight": (lambda model, _: {"teacher": with_weight_of(model)}, ValueError, "in the memory"),
    "the model": (lambda model, _: {"teacher": model}, ValueError, "teacher"),
    "a part of it": (lambda model, _: {"teacher": nn.Sequential(model.first)}, ValueError, "teacher"),
    "a function": (lambda *_: {"teacher": len}, TypeError, "teacher"),
    "an unknown name": (lambda *_: {"pairs": ["nowhere"]}, ValueError, "'nowhere', which is no module of the model"),
    "another name": (lambda *_: {"pairs": {"first": "last"}}, ValueError, "no module of the teacher"),
    "a module twice": (lambda *_: {"pairs": {"first": "first", "head": "first"}}, ValueError, "twice"),
    "a word": (lambda *_: {"pairs": "first"}, TypeError, "pairs"),
    "a negative weight": (lambda *_: {"task_weight": -1}, ValueError, "task_weight"),
    "cold": (lambda *_: {"temperature": 0}, ValueError, "temperature"),
    "nothing": (lambda *_: {"logits_weight": 0}, ValueError, "nothing is distilled"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_distillation_refuses_wrong_arguments(name):
    change, error, words = REFUSED[name]
    model, teacher = pair()
    with pytest.raises(error, match=words):
        Distillation(model, **{"teacher": teacher, **change(model, teacher)})
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_of_a_call_within_a_call_the_inner_one_counts():
    """DDP calls forward, which Lightning has replaced by a training step, which calls the model."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.is_outer = nn.Linear(4, 3), True

        def forward(self, inputs):
            if self.is_outer:
                self.is_outer = False
                return self(inputs["images"]).sum()
            return self.layer(inputs)

    torch.manual_seed(0)
    model, teacher, images = Wrapped(), nn.Linear(4, 3), torch.randn(5, 4)
    distillation = pyprune.Distillation(model, teacher)
    loss = distillation.loss(model({"images": images}))
    logits = model.layer(images)
    expected = 0.5 * logits.sum() + 0.5 * pyprune.distillation_loss(logits, teacher(images))
    torch.testing.assert_close(loss, expected)


def test_a_teacher_may_share_what_does_not_train():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3))
    teacher = copy.deepcopy(model)
    teacher[0] = nn.Linear(4, 4)
    teacher[0].weight = model[0].weight
    Distillation(model, teacher)


class InDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch, more):
        batch["x"] = self.layer(batch["x"])
        return batch.pop("x") + more.pop()


def test_a_teacher_sees_what_the_model_was_called_with():
    torch.manual_seed(0)
    model = InDict()
    distillation = Distillation(model, copy.deepcopy(model))
    model({"x": torch.randn(5, 4)}, more=[torch.randn(5, 4)])
    assert distillation.extra_loss().item() == 0


class Scales(nn.Linear):
    def forward(self, x):
        x /= 255
        return super().forward(x)


@pytest.mark.parametrize("by", ["the model", "the loop"])
def test_inputs_that_were_changed_in_place_are_an_error(by):
    model = Scales(4, 3) if by == "the model" else nn.Linear(4, 3)
    distillation = Distillation(model, copy.deepcopy(model))
    x = torch.randn(5, 4)
    model(x)
    if by == "the loop":
        x += 1
    with pytest.raises(ValueError, match="changed in place"):
        distillation.extra_loss()
    x = torch.randn(5, 4)
    if by == "the loop":  # nothing is left of it
        model(x)
        assert distillation.extra_loss().item() == 0
