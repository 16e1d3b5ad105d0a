import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyprune
from pyprune import Method, Pruner, Recipe, importance, schedules
from tests.conftest import masks_of

pytest.importorskip("yaml")
lightning = pytest.importorskip("lightning.pytorch")

from pyprune.integrations.lightning import PruningCallback  # noqa: E402

# Lightning has advice for larger machines, and torch for Lightning.
pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = "stages: [prune: {final: 0.75, start: 1, end: 3, frequency: 0.5, scope: model, importance: %s}]"


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def loader():
    # All batches are the same: Lightning begins with the first one when it resumes in the middle of an epoch.
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(5, 8).repeat(8, 1), torch.randint(4, (5,)).repeat(8)), batch_size=5)


def net():
    torch.manual_seed(1)
    return Net()


def fit(model, callback, epochs, folder=None, checkpoint=None, **options):
    """Train for so many epochs of four steps of two batches."""
    saving = lightning.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*(callback if isinstance(callback, list) else [callback]), *([saving] if folder else [])],
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        **options,
    )
    trainer.fit(model, loader(), loader(), ckpt_path=checkpoint)
    return trainer


def weights(model):
    return [model.net[0].weight, model.net[2].weight]


def sparsity(tensors):
    return sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)


def test_a_recipe_prunes_and_leaves_a_plain_model(tmp_path):
    model = net()
    trainer = fit(model, PruningCallback(Recipe.from_string(TEXT % "magnitude")), 4, tmp_path)
    assert trainer.global_step == 16
    assert sparsity(weights(model)) == 0.75
    assert list(model.state_dict()) == list(net().state_dict())
    assert trainer.callback_metrics["pruning_sparsity"] == 0.75
    # Steps are those of the optimizer: at 4 of 16 the schedule begins, and at 12 it ends.
    found = {
        step: sparsity(weights(Net.load_from_checkpoint(tmp_path / f"step={step}.ckpt"))) for step in (5, 8, 11, 12)
    }
    assert found[5] == 0 < found[8] == found[8] < found[11] < found[12] == 0.75


@pytest.mark.parametrize("importance", ["magnitude", "snip"])
@pytest.mark.parametrize("step", [3, 9, 16])
def test_resume_gives_the_same_end(tmp_path, importance, step):
    recipe = Recipe.from_string(TEXT % importance)
    model = net()
    fit(model, PruningCallback(recipe), 5, tmp_path)
    again = net()
    fit(again, PruningCallback(recipe), 5, checkpoint=tmp_path / f"step={step}.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_keep_sparse_holds_the_zeros_of_a_pruned_model(tmp_path):
    model = pyprune.strip(pyprune.prune(net(), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5))
    zeros = [weight == 0 for weight in weights(model)]
    before = [weight.clone() for weight in weights(model)]
    fit(model, PruningCallback(pyprune.keep_sparse), 2, tmp_path)
    assert all(torch.equal(weight == 0, zero) for weight, zero in zip(weights(model), zeros, strict=True))
    assert not torch.equal(before[0], weights(model)[0])
    again = net()
    fit(again, PruningCallback(pyprune.keep_sparse), 2, checkpoint=tmp_path / "step=3.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_function_gives_the_pruner_and_masks_may_stay():
    seen = {}

    def start(model, optimizer, steps_per_epoch):
        seen.update(optimizer=type(optimizer), steps=steps_per_epoch)
        return Pruner(
            model, Method(importance.magnitude()), schedules.linear(0.5, end=2 * steps_per_epoch), optimizer
        )

    model = net()
    fit(model, PruningCallback(start, strip=False), 2)
    assert seen == {"optimizer": torch.optim.AdamW, "steps": 4}
    masks = masks_of(model)
    assert sum(int((~mask).sum()) for mask in masks.values()) == sum(mask.numel() for mask in masks.values()) // 2
    assert list(model.state_dict()) == list(net().state_dict())


@pytest.mark.parametrize("first", ["pruning", "average"])
@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averages_of_lightning_end_as_sparse_as_the_model(kind, first):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, kind):
        pytest.skip(f"this Lightning has no {kind}")
    options = {"decay": 0.9} if kind == "EMAWeightAveraging" else {"swa_lrs": 0.01, "swa_epoch_start": 2}
    both = [
        PruningCallback(lambda model, optimizer, steps: pyprune.gmp(model, 0.6, optimizer, end=2 * steps)),
        getattr(callbacks, kind)(**options),
    ]
    model = net()
    fit(model, both if first == "pruning" else both[::-1], 4)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == pytest.approx(0.6 * sum(weight.numel() for weight in weights), abs=2)


class TwoOptimizers(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), 1e-2) for layer in (self.net[0], self.net[2])]


def fit_two(callback):
    model = TwoOptimizers()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **options
    )
    trainer.fit(model, loader())
    return [sparsity([weight]) for weight in weights(model)]


def test_a_recipe_prunes_what_one_of_two_optimizers_trains():
    text = "stages: [prune: {final: 0.5, end: 2, importance: %s%s}]"
    assert fit_two(PruningCallback(Recipe.from_string(text % ("magnitude", "")))) == [0.5, 0.5]
    one = text % ("snip, frequency: 1", ", ignore: {names: [net.0]}")
    assert fit_two(PruningCallback(Recipe.from_string(one))) == [0, 0.5]
    with pytest.raises(ValueError, match="2 of 2 optimizers train the weights to prune"):
        fit_two(PruningCallback(Recipe.from_string(text % ("snip", ""))))


def test_a_second_training_begins_anew():
    callback = PruningCallback(Recipe.from_string("stages: [prune: {final: 0.5, start: 1, end: 2}]"))
    for _ in range(2):
        model = net()
        fit(model, callback, 1)
        assert sparsity(weights(model)) == 0


def test_training_on_after_the_end_keeps_the_zeros(tmp_path):
    recipe = Recipe.from_string(TEXT % "magnitude")
    model = net()
    callback = PruningCallback(recipe)
    trainer = fit(model, callback, 4, tmp_path / "all")
    zeros = [weight == 0 for weight in weights(model)]
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = net()
    fit(again, PruningCallback(recipe), 6, checkpoint=tmp_path / "end.ckpt")
    assert all(torch.equal(weight == 0, zero) for weight, zero in zip(weights(again), zeros, strict=True))
    assert not torch.equal(weights(again)[0], weights(model)[0])


def test_an_unknown_number_of_batches_is_an_error_unless_given():
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(8), torch.tensor(1)

    def fit_endless(callback):
        trainer = lightning.Trainer(
            max_steps=6, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        model = net()
        trainer.fit(model, DataLoader(Endless(), batch_size=4))
        return model

    recipe = Recipe.from_string("stages: [prune: {final: 0.5, end: 2}]")
    with pytest.raises(ValueError, match="give PruningCallback"):
        fit_endless(PruningCallback(recipe))
    assert sparsity(weights(fit_endless(PruningCallback(recipe, steps_per_epoch=3)))) == 0.5
