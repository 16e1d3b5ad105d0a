"""Find out which layers of a CNN bear pruning, and share a ratio out among them accordingly.

On handwritten digits: each layer is pruned by itself to several ratios, and the loss on images kept back is drawn
(`sensitivity`). From that come ratios by layer that remove 90 % and 95 % of the weights in all
(`allocation_from_sensitivity`). They are compared with the same ratio for all layers, with ERK and with one
threshold for all weights: test accuracy once BatchNorm has adapted, and after the same short fine-tuning, as means
over CNNs from several seeds.

Run it with ``make sensitivity``, or ``pip install "pyprune[examples]"`` and ``python examples/sensitivity.py``: about
a minute.
"""

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from digits import EPOCHS, DigitsNet, console, load_data, predict, train
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyprune
from pyprune import Method, importance, scope

MEASURED = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
TARGETS = (0.9, 0.95)
SEEDS = (0, 1, 2)
FINE_TUNING_EPOCHS = 2
KEPT_BACK = 300

BY_TENSOR = Method(importance.magnitude(), scope=scope.tensor())
AMONG_ALL = Method(importance.magnitude())


@dataclass(frozen=True)
class Trained:
    """A trained CNN and images: those it was trained on, others kept back to measure it, and those to test it."""

    model: nn.Module
    loader: DataLoader
    kept_back: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss on the images kept back. It tells small differences that accuracy does not."""
        self.adapt(model)
        images, labels = self.kept_back
        return nn.functional.cross_entropy(predict(model, images), labels)

    def accuracy(self, model: nn.Module) -> float:
        """Return the test accuracy in %."""
        self.adapt(model)
        images, labels = self.test
        return 100 * (predict(model, images).argmax(1) == labels).double().mean().item()

    def adapt(self, model: nn.Module) -> None:
        """Measure the BatchNorm statistics that fit the weights."""
        pyprune.batch_norm_adaptation(model, [self.loader.dataset.tensors[0]], reset=True)


def train_cnn(seed: int, epochs: int) -> Trained:
    torch.manual_seed(seed)
    loader, *test = load_data()
    images, labels = loader.dataset.tensors
    train_data = TensorDataset(images[KEPT_BACK:], labels[KEPT_BACK:])
    loader = DataLoader(train_data, batch_size=64, shuffle=True)
    model = DigitsNet()
    train(model, loader, epochs, f"Training CNN {seed}")
    return Trained(model, loader, (images[:KEPT_BACK], labels[:KEPT_BACK]), tuple(test))


def allocations(result: pyprune.SensitivityResult, ratio: float) -> dict[str, Mapping[str, Any]]:
    """Return how `prune` is to be called for each way to share the ratio out."""
    least, equal = (
        pyprune.allocation_from_sensitivity(result, ratio, rule=rule, max_ratio=max(MEASURED))
        for rule in ("least", "equal")
    )
    return {
        "the same for all": {"mode": BY_TENSOR, "ratio": ratio},
        "ERK": {"mode": BY_TENSOR, "ratio": ratio, "allocation": "erk"},
        "one threshold": {"mode": AMONG_ALL, "ratio": ratio},
        "sensitivity, least": {"mode": BY_TENSOR, "ratio": least},
        "sensitivity, equal": {"mode": BY_TENSOR, "ratio": equal},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, default=Path("sensitivity.png"), help="the PNG to draw (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one CNN, hardly trained, at one ratio: does it run?")
    arguments = parser.parse_args()

    start = time.perf_counter()
    torch.set_num_threads(1)  # so small a model keeps more of them waiting for each other
    console.width = max(console.width, 100)  # the tables are wide
    measured, targets, seeds, epochs = MEASURED, TARGETS, SEEDS, EPOCHS
    if arguments.quick:
        measured, targets, seeds, epochs = MEASURED[-3:], TARGETS[:1], SEEDS[:1], 1

    dense = []
    pruned, tuned = defaultdict(list), defaultdict(list)
    by_layer = {}
    for seed in seeds:
        cnn = train_cnn(seed, epochs)
        dense.append(cnn.accuracy(copy.deepcopy(cnn.model)))
        result = pyprune.sensitivity(cnn.model, cnn.loss, ratios=measured, method=BY_TENSOR, higher_is_better=False)
        if seed == seeds[0]:
            result.plot(arguments.plot)
            console.print(f"\nLoss on {KEPT_BACK} images kept back:\n\n{result}", highlight=False, soft_wrap=True)
        ways = [(ratio, name, how) for ratio in targets for name, how in allocations(result, ratio).items()]
        for ratio, name, how in ways:
            model = pyprune.prune(copy.deepcopy(cnn.model), **how)
            layers = pyprune.pruning_statistic(model).pruned_tensors
            by_layer.setdefault((ratio, name), "  ".join(f"{layer.pruned_ratio:4.0%}" for layer in layers))
            pruned[ratio, name].append(cnn.accuracy(model))
            torch.manual_seed(seed)
            train(model, cnn.loader, min(epochs, FINE_TUNING_EPOCHS), f"Fine-tuning at {ratio}, {name}")
            tuned[ratio, name].append(cnn.accuracy(model))

    title = f"Test accuracy in %, mean over {len(seeds)} seeds; {mean(dense):.1f} dense"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("ratio", "shared out", "pruned", "fine-tuned", "by layer (first seed)"):
        table.add_column(column, justify="left" if column == "shared out" else "right")
    for ratio, name in by_layer:
        if name == "the same for all":
            table.add_section()
        accuracies = (f"{mean(of[ratio, name]):.1f}" for of in (pruned, tuned))
        table.add_row(str(ratio), name, *accuracies, by_layer[ratio, name])
    console.print(table)
    console.print(f"Heat map and curves of the first CNN: {arguments.plot}")
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
