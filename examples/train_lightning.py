"""Prune a small CNN in a Lightning Trainer, by a recipe, and stop and go on in the middle.

Run it with ``make lightning``, or ``pip install "pyprune[examples,lightning]"`` and
``python examples/train_lightning.py``: about 15 s.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from digits import DigitsNet, load_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyprune
from pyprune.integrations.lightning import PruningCallback

RECIPE = pyprune.Recipe.from_file(Path(__file__).parent / "recipe.yaml")


class DigitsModule(pl.LightningModule):
    """Nothing here knows of pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DigitsNet()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Log the share of digits that are recognised."""
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


class PrintEpochs(pl.Callback):
    """Print accuracy and sparsity of every epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print a line."""
        seen = trainer.callback_metrics
        sparsity, accuracy = seen["pruning_sparsity"], seen["accuracy"]
        print(f"epoch {trainer.current_epoch + 1:2}   sparsity {sparsity:6.2%}   accuracy {accuracy:6.2%}")


def fit(model: DigitsModule, folder: Path, share: float, checkpoint: Path | None = None) -> None:
    train_loader, images, labels = load_data()
    # Not shuffled, so that going on in the middle can be compared.
    ordered = DataLoader(train_loader.dataset, batch_size=64)
    saving = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=RECIPE.num_epochs,
        callbacks=[PruningCallback(RECIPE), PrintEpochs(), saving],
        accelerator="cpu",
        accumulate_grad_batches=2,
        limit_train_batches=share,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, ordered, DataLoader(TensorDataset(images, labels), batch_size=1024), ckpt_path=checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the digits, to see that it runs")
    share = 0.2 if parser.parse_args().quick else 1.0
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)  # so small a model keeps more of them waiting for each other
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        model = DigitsModule()
        fit(model, folder / "whole", share)
        print(pyprune.pruning_statistic(model))

        print("\nThe same, from the checkpoint after epoch 6:")
        again = DigitsModule()
        fit(again, folder / "resumed", share, folder / "whole" / "epoch=5.ckpt")
        for one, other in zip(model.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        print("It ends with the same weights, bit for bit.")

        loaded = DigitsModule.load_from_checkpoint(folder / "whole" / "epoch=7.ckpt")
        sparsity = pyprune.pruning_statistic(loaded).pruning_ratio
        print(f"The checkpoint after epoch 8 is that of a plain model, {sparsity:.0%} of whose weights are zero.")


if __name__ == "__main__":
    main()
