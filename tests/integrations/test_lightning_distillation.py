"""Tests of distillation in a Lightning Trainer: the weights after some steps against a loop in plain torch."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyprune
from pyprune import Recipe

lightning = pytest.importorskip("lightning.pytorch", reason="pip install 'pyprune[lightning]'")
from pyprune.integrations.lightning import DistillationCallback, PruningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning has advice for larger machines
RECIPE = "{stages: [prune: {final: 0.5, end: 1}], teacher: {%s}}"


class Net(lightning.LightningModule):
    """Training steps call the part ``net``, or the module itself; they return a loss, or a dict with one."""

    def __init__(self, calls="net", returns="loss"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.calls, self.returns = calls, returns

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy((self.net if self.calls else self)(batch[0]), batch[1])
        return {"loss": loss, "more": 1} if self.returns == "dict" else loss

    def validation_step(self, batch, index):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def batches(count=8):
    torch.manual_seed(0)
    return TensorDataset(torch.randn(4 * count, 8), torch.randint(4, (4 * count,)))


def net(*args):
    torch.manual_seed(1)
    return Net(*args)


def other():
    torch.manual_seed(2)
    return Net()


def fit(model, *callbacks, epochs=1, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    loader = DataLoader(batches(), batch_size=4)
    trainer.fit(model, loader, loader)
    return trainer


def by_hand(teacher, *, accumulated=1, until=8, weights=(0.5, 0.5, 1.0)):
    """Train by a teacher over the first so many batches, and by the labels alone over the others."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for i, (inputs, labels) in enumerate(DataLoader(batches(), batch_size=4)):
        logits = model.net(inputs)
        loss = nn.functional.cross_entropy(logits, labels)
        if i < until:
            with torch.no_grad():
                goals, hidden_goals = teacher(inputs), teacher[0](inputs)
            s, t = logits / 2, goals / 2
            kl = 4 * (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean()
            hidden = (model.net[0](inputs) - hidden_goals).square().sum() / hidden_goals.square().sum()
            loss = weights[0] * loss + weights[1] * kl + weights[2] * hidden
        (loss / accumulated).backward()
        if (i + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


def check_same(model, expected):
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert not torch.equal(model.net[0].weight, net().net[0].weight)


def check_let_go(trainer, model):
    assert "training_step" not in vars(trainer.strategy)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("made", "options", "fits", "expected"),
    [
        (("net", "loss"), {"module": "net", "pairs": ["0"]}, {}, {}),
        (("net", "dict"), {"module": "net", "pairs": ["0"]}, {}, {}),
        (("", "loss"), {"pairs": {"net.0": "0"}}, {}, {}),
        (
            ("net", "loss"),
            {"module": "net", "pairs": ["0"]},
            {"accumulate_grad_batches": 2},
            {"accumulated": 2},
        ),
        (("net", "loss"), {"module": "net", "pairs": ["0"], "end": 0.5}, {}, {"until": 4}),
        (
            ("net", "loss"),
            {"module": "net", "pairs": ["0"], "task_weight": 0.25, "logits_weight": 2.0, "hidden_weight": 0.0},
            {},
            {"weights": (0.25, 2.0, 0.0)},
        ),
    ],
    ids=["a part", "a dict", "the module", "accumulated", "the first half", "weights"],
)
def test_distillation_callback_trains_as_a_loop_by_hand(made, options, fits, expected):
    model, teacher = net(*made), other().net
    before = copy.deepcopy(teacher.state_dict())
    trainer = fit(model, DistillationCallback(teacher, temperature=2.0, **options), **fits)
    check_same(model, by_hand(copy.deepcopy(teacher), **expected))
    assert trainer.callback_metrics["distillation_loss"] > 0
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    check_let_go(trainer, model)


def test_distillation_callback_beside_pruning():
    model = net()
    teacher = copy.deepcopy(model.net)
    start = lambda model, optimizer, steps: pyprune.gmp(model, 0.5, optimizer, end=steps)  # noqa: E731
    trainer = fit(model, PruningCallback(start), DistillationCallback(teacher, module="net"))
    assert int((model.net[0].weight == 0).sum()) == 64
    assert not (teacher[0].weight == 0).any()
    check_let_go(trainer, model)


@pytest.mark.parametrize("end", [None, 0.5])
def test_a_recipe_with_a_teacher_trains_as_its_pruner_in_a_loop(end):
    text = RECIPE % ("module: net, pairs: ['0'], temperature: 2" + (f", end: {end}" if end else ""))
    recipe = Recipe.from_string(text)
    model, teacher = net(), other().net
    trainer = fit(model, PruningCallback(recipe, teacher=teacher))
    expected = net()
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)
    pruner = recipe.apply(expected, optimizer, 8, teacher=copy.deepcopy(teacher))
    for inputs, labels in DataLoader(batches(), batch_size=4):
        pruner.loss(nn.functional.cross_entropy(expected.net(inputs), labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    pruner.finish()
    check_same(model, expected)
    assert int((model.net[0].weight == 0).sum()) == 64
    check_let_go(trainer, model)
    check_let_go(trainer, expected)


def test_distillation_callback_refuses_what_it_cannot_do():
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="manual optimization"):
        fit(Manual(), DistillationCallback(other().net, module="net"))
    with pytest.raises(ValueError, match="'encoder', which is no module of the model"):
        fit(net(), DistillationCallback(other().net, module="encoder"))
    with pytest.raises(ValueError, match="the model was not called with gradients"):
        fit(net(), DistillationCallback(other()))  # steps call the part, not the module


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"teacher": "gpt2"}, TypeError, "teacher"),
        ({"module": None}, TypeError, "module"),
        ({"start": -1}, ValueError, "start"),
        ({"start": 2, "end": 1}, ValueError, "end"),
        ({"temperature": 0}, ValueError, "temperature"),
    ],
)
def test_distillation_callback_refuses_wrong_options(options, error, words):
    with pytest.raises(error, match=words):
        DistillationCallback(**{"teacher": nn.Linear(2, 2), **options})
