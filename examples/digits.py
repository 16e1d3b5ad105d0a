"""Prune a small CNN on scikit-learn's handwritten digits: accuracy and sparsity of every stage, dense to stripped.

Run it with ``make demo``, or ``pip install "pyprune[examples]"`` and ``python examples/digits.py``: about 10 s.
"""

import copy
import tempfile
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyprune

RATIOS = (0.7, 0.9)
EPOCHS = 15
FINE_TUNING_EPOCHS = 5

console = Console()


class DigitsNet(nn.Module):
    """Three convolutions with BatchNorm and a linear classifier: 57 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *self._block(1, 32), *self._block(32, 64), nn.MaxPool2d(2), *self._block(64, 64), nn.AdaptiveAvgPool2d(1)
        )
        self.classifier = nn.Linear(64, 10)

    @staticmethod
    def _block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, 1, 8, 8] to logits [n, 10]."""
        return self.classifier(self.features(images).flatten(1))


def load_data() -> tuple[DataLoader, Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.3, stratify=labels, random_state=0
    )
    train_loader = DataLoader(TensorDataset(train_images, train_labels), batch_size=64, shuffle=True)
    return train_loader, test_images, test_labels


def train(model: nn.Module, loader: DataLoader, epochs: int, description: str) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in track(range(epochs), description, console=console):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


def main() -> None:
    start = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a model keeps more of them waiting for each other
    train_loader, test_images, test_labels = load_data()
    trained_on, tested_on = len(train_loader.dataset), len(test_labels)
    console.print(f"{trained_on} digits to train on, {tested_on} to test on (each is {1 / tested_on:.1%})\n")

    table = Table(title="Global magnitude pruning of a CNN", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("ratio", "stage", "test accuracy", "sparsity"):
        table.add_column(column, justify="left" if column == "stage" else "right")

    def report(ratio: str, stage: str, model: nn.Module) -> None:
        accuracy = (predict(model, test_images).argmax(1) == test_labels).double().mean().item()
        sparsity = pyprune.pruning_statistic(model).pruning_ratio
        table.add_row(ratio, stage, f"{accuracy:.1%}", f"{sparsity:.2%}")

    dense = DigitsNet()
    train(dense, train_loader, EPOCHS, "Training the dense model")
    report("", "dense", dense)

    for ratio in RATIOS:
        table.add_section()
        model = copy.deepcopy(dense)
        pyprune.prune(model, pyprune.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, ratio=ratio)
        report(str(ratio), "pruned", model)

        # The weights that are left give other activations: measure their mean and variance anew. No labels needed.
        calibration = pyprune.Dataset(train_loader, transform_func=lambda batch: batch[0])
        pyprune.batch_norm_adaptation(model, calibration, reset=True)
        report("", "BatchNorm adapted", model)

        # The masks stay on while the weights that are left train.
        train(model, train_loader, FINE_TUNING_EPOCHS, f"Fine-tuning at ratio {ratio}")
        report("", "fine-tuned", model)

    console.print(f"\nAt ratio {RATIOS[-1]}, by weight:")
    console.print(str(pyprune.pruning_statistic(model)), highlight=False)
    outputs = predict(model, test_images)

    with tempfile.TemporaryDirectory() as folder:
        # With masks on, to be trained further: the config has masks and what they dropped, the state_dict the rest.
        checkpoint = Path(folder) / "masked.pt"
        torch.save({"state_dict": model.state_dict(), "config": pyprune.get_config(model)}, checkpoint)
        saved = torch.load(checkpoint)
        restored = pyprune.load_from_config(DigitsNet(), saved["config"])
        restored.load_state_dict(saved["state_dict"])
        torch.testing.assert_close(predict(restored, test_images), outputs, rtol=0, atol=0)
        table.add_section()
        report(str(RATIOS[-1]), "saved with masks, reloaded", restored)

        # Stripped, to be used: a plain model that needs no pyprune, with zeros in its weights.
        statistic = pyprune.pruning_statistic(model)
        pyprune.strip(model)
        torch.save(model.state_dict(), Path(folder) / "stripped.pt")
        plain = DigitsNet()
        plain.load_state_dict(torch.load(Path(folder) / "stripped.pt"))
        torch.testing.assert_close(predict(plain, test_images), outputs, rtol=0, atol=0)
        assert pyprune.pruning_statistic(plain) == statistic  # now the zeros in the weights, not those of masks
        report("", "stripped, reloaded", plain)

    console.print(table)
    console.print("Both reloaded models equal the fine-tuned one, output by output, zero by zero.")
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
