import copy
import re

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Recipe

pytest.importorskip("yaml")
STAGES = "stages: [prune: {final: 0.5, end: 2}]\n"


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def other():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)


def train(student, pruner, optimizer, steps, loss):
    for step in steps:
        inputs, labels = batch(step)
        loss(pruner, step, nn.functional.cross_entropy(student(inputs), labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    return student


def check_same(one, two):
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("fields", "expected", "due"),
    [
        ("{}", {}, range(6)),
        ("", {}, range(6)),
        ("{pairs: [0], end: 2}", {"pairs": ["0"]}, range(4)),
        ("{pairs: {0: 0, '2': '2'}, start: 1}", {"pairs": {"0": "0", "2": "2"}}, range(2, 6)),
        ("{temperature: 3, start: 0.5, end: 1.5}", {"temperature": 3.0}, range(1, 3)),
        (
            "{task_weight: 0, logits_weight: 2, hidden_weight: 1e-1, pairs: ['1']}",
            {"task_weight": 0.0, "logits_weight": 2.0, "hidden_weight": 0.1, "pairs": ["1"]},
            range(6),
        ),
    ],
)
def test_a_recipe_learns_from_its_teacher_as_distillation_does(fields, expected, due):
    recipe = Recipe.from_string(STAGES + "teacher: " + fields)
    student = model()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    pruner = recipe.apply(student, optimizer, 2, teacher=other())
    train(student, pruner, optimizer, range(6), lambda pruner, _, task: pruner.loss(task))
    by_hand = model()
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.1)
    distillation = pyprune.Distillation(by_hand, other(), **expected)
    plain = Recipe.from_string(STAGES).apply(by_hand, optimizer, 2)
    train(
        by_hand, plain, optimizer, range(6),
        lambda _, step, task: distillation.loss(task) if step in due else plain.loss(task),
    )  # fmt: skip
    check_same(pruner.finish(), by_hand)
    assert not student._forward_hooks
    assert not student._forward_pre_hooks


def test_a_teacher_of_a_part_sees_that_part_alone():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model()

        def forward(self, inputs):
            return self.net(inputs) * 100

    recipe = Recipe.from_string(STAGES + "teacher: {module: net, pairs: [0]}")
    student = Outer()
    pruner = recipe.apply(student, None, 2, teacher=model())
    loss = pruner.loss(student(batch(0)[0]).sum() * 0)
    assert loss.item() < 1  # outputs of the whole are 100 times as large


def test_a_recipe_with_a_teacher_resumes():
    recipe = Recipe.from_string(STAGES + "teacher: {pairs: [0], end: 2}")
    learn = lambda pruner, _, task: pruner.loss(task)  # noqa: E731
    ends = []
    for stop in (None, 3):
        student = model()
        optimizer = torch.optim.SGD(student.parameters(), 0.1)
        pruner = recipe.apply(student, optimizer, 2, teacher=other())
        train(student, pruner, optimizer, range(6 if stop is None else stop), learn)
        if stop is not None:
            states = [copy.deepcopy(one.state_dict()) for one in (student, optimizer, pruner)]
            student = model()
            optimizer = torch.optim.SGD(student.parameters(), 0.1)
            pruner = recipe.apply(student, optimizer, 2, teacher=other())
            for one, state in zip((student, optimizer, pruner), states, strict=True):
                one.load_state_dict(state)
            train(student, pruner, optimizer, range(stop, 6), learn)
        ends.append(pruner.finish())
    check_same(*ends)


def test_a_step_that_did_not_learn_from_a_teacher_that_is_due_is_an_error():
    student = model()
    pruner = Recipe.from_string(STAGES + "teacher: {start: 1, end: 2}").apply(student, None, 1, teacher=other())
    pruner.step()  # not due yet
    with pytest.raises(ValueError, match=r"nothing was learned from it in this step; train with pruner\.loss"):
        pruner.step()
    assert pruner.step_count == 1
    pruner.loss(student(batch(0)[0]).sum())
    pruner.step()
    pruner.step()  # no longer due


def test_without_a_teacher_the_loss_is_that_of_the_task():
    task = torch.tensor(3.0)
    assert Recipe.from_string(STAGES).apply(model(), None, 2).loss(task) is task


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{temprature: 2}", "r.yaml:2: teacher.temprature: 'temprature' is unknown here; did you mean temperature?"),
        ("{temperature: 0}", "r.yaml:2: teacher.temperature: 0 is not a temperature; give a number above 0"),
        ("{task_weight: -1}", "r.yaml:2: teacher.task_weight: -1 is not a weight"),
        ("{start: 2, end: 1}", "r.yaml:2: teacher.end: the teacher ends at epoch 1, but starts at 2"),
        ("{end: ten}", "r.yaml:2: teacher.end: 'ten' is not a number of epochs"),
        ("{pairs: encoder}", "r.yaml:2: teacher.pairs: 'encoder' is no list"),
        ("{module: [a]}", "r.yaml:2: teacher.module: ['a'] is no name"),
        ("dense.pt", "r.yaml:2: teacher: 'dense.pt' is no dict"),
        ("{end: 9}\nepochs: 8", "r.yaml:3: epochs: there are 8, but a stage or the teacher needs 9"),
    ],
)
def test_from_string_names_line_and_field_of_a_teacher(fields, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Recipe.from_string(STAGES + "teacher: " + fields, "r.yaml")


@pytest.mark.parametrize(
    ("fields", "given", "error", "message"),
    [
        ("{}", None, TypeError, "<string>:2: teacher: the recipe has a teacher, and the one given is None"),
        ("{}", "dense.pt", TypeError, "<string>:2: teacher: the recipe has a teacher, and the one given is"),
        ("{pairs: [9]}", other(), ValueError, "<string>:2: teacher: pairs has '9', which is no module of the model"),
        ("{module: net}", other(), ValueError, "<string>:2: teacher.module: 'net' is no module of the model"),
        ("{logits_weight: 0}", other(), ValueError, "<string>:2: teacher: logits_weight is 0"),
        (
            "{start: 0.6, end: 0.7}",
            other(),
            ValueError,
            "<string>:2: teacher: from epoch 0.6 to 0.7 there is no step",
        ),
        (None, other(), ValueError, "teacher was given, and the recipe has none"),
    ],
)
def test_apply_refuses_a_teacher_that_does_not_fit(fields, given, error, message):
    recipe = Recipe.from_string(STAGES + ("" if fields is None else "teacher: " + fields))
    student = model()
    before = copy.deepcopy(vars(student[0]))
    with pytest.raises(error, match="^" + re.escape(message)):
        recipe.apply(student, None, 2, teacher=given)
    assert vars(student[0]).keys() == before.keys()
    assert not student._forward_hooks
