"""Train sparse models in six ways, with the same budget of epochs each, and resume every one of them in the middle.

A CNN on handwritten digits (`digits.py`) ends with a tenth and with a twentieth of its weights. Gradual magnitude
pruning (GMP) and learned gates (RB) go from dense to sparse, AC/DC goes there and back, and RigL is sparse from the
start. Two methods need a trained model, and pay for it out of the same budget: movement pruning fine-tunes one, and
a lottery ticket is trained again and again from the same initial weights.

Each training leaves a checkpoint half way: the state_dicts of model, optimizer and pruner. For the first seed they
are loaded into new objects, which train on; the example fails if their end is not the same, bit for bit.

Run it with ``make train-sparse``, or ``pip install "pyprune[examples]"`` and ``python examples/train_sparse.py``:
about two minutes on two cores. It prints a table and draws the curves.
"""

import argparse
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from digits import EPOCHS, DigitsNet, console, load_data, predict
from digits_rb import gate_optimizer
from matplotlib.figure import Figure
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import pyprune
from pyprune import Method, importance, schedules, scope

RATIOS = (0.9, 0.95)
SEEDS = 3
# Sparse models of so few steps gain by a large one: RigL and lottery tickets most.
LEARNING_RATE = 4e-3
# Pretraining, or one of the trainings of a lottery ticket, is a third of the budget.
THIRDS = 3


@dataclass(frozen=True)
class Point:
    """The end of an epoch, in %."""

    accuracy: float
    sparsity: float


class Training:
    """A budget of epochs, spent in one or several stages, and the checkpoint that is taken half way.

    With a checkpoint given, the epochs up to it are left out, and what it holds is loaded into the objects of the
    stage in which it was taken. What stages before that one did to the model does not matter then: masks are in the
    state of the pruner, or where there is none, in the config.
    """

    def __init__(self, epochs: int, checkpoint: bytes | None = None) -> None:
        self.loader, self._test_images, self._test_labels = load_data()
        self.epochs, self.steps = epochs, epochs * len(self.loader)
        self.step = 0
        self.curve: list[Point] = []
        self.checkpoint = checkpoint
        self._ahead = None if checkpoint is None else torch.load(io.BytesIO(checkpoint))

    def thirds(self) -> list[int]:
        """Return the budget in three parts."""
        return [end - start for start, end in pairwise(self.epochs * i // THIRDS for i in range(THIRDS + 1))]

    def spend(
        self,
        epochs: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        pruner: pyprune.Pruner | None = None,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        """Train for a stage of some epochs, with a penalty added to the loss."""
        parts = {"model": model, "optimizer": optimizer} | ({} if pruner is None else {"pruner": pruner})
        for _ in range(epochs):
            if self._ahead is None:
                self._train_epoch(model, optimizer, pruner, penalty)
            else:
                self._skip_epoch(parts)
            if self.checkpoint is None and 2 * self.step >= self.steps:
                self.checkpoint = self._save(parts)

    def _train_epoch(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        pruner: pyprune.Pruner | None,
        penalty: Callable[[], Tensor] | None,
    ) -> None:
        model.train()
        for images, labels in self.loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            if penalty is not None:
                loss = loss + penalty()
            loss.backward()
            optimizer.step()
            self.step += 1
            if pruner is not None:
                pruner.step()
        self.curve.append(Point(self.accuracy(model), 100 * pyprune.pruning_statistic(model).pruning_ratio))

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the test set, in %."""
        right = predict(model, self._test_images).argmax(1) == self._test_labels
        return 100 * right.double().mean().item()

    def _save(self, parts: Mapping[str, Any]) -> bytes:
        state = {name: part.state_dict() for name, part in parts.items()}
        if "pruner" not in parts:
            state["config"] = pyprune.get_config(parts["model"])
        curve = [(point.accuracy, point.sparsity) for point in self.curve]
        # From the random numbers come the order of the batches ahead, and the noise of gates.
        state |= {"random": torch.get_rng_state(), "step": self.step, "curve": curve}
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def _skip_epoch(self, parts: Mapping[str, Any]) -> None:
        assert self._ahead is not None
        self.step += len(self.loader)
        if self.step == self._ahead["step"]:
            if self._ahead.get("config", {}).get("masks"):
                pyprune.load_from_config(pyprune.strip(parts["model"]), self._ahead["config"])
            for name, part in parts.items():
                part.load_state_dict(self._ahead[name])
            self.curve = [Point(*point) for point in self._ahead["curve"]]
            torch.set_rng_state(self._ahead["random"])
            self._ahead = None


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def train_dense(training: Training, model: nn.Module, ratio: float) -> None:
    training.spend(training.epochs, model, adamw(model))


def train_gmp(training: Training, model: nn.Module, ratio: float) -> None:
    optimizer = adamw(model)
    pruner = pyprune.gmp(
        model, ratio, optimizer, end=training.steps * 2 // 3, frequency=5, method=Method(importance.magnitude())
    )
    training.spend(training.epochs, model, optimizer, pruner)


def train_ac_dc(training: Training, model: nn.Module, ratio: float) -> None:
    optimizer = adamw(model)
    # Dense, sparse, dense, sparse, dense for an eighth of the budget each, and then sparse.
    pruner = pyprune.ac_dc(model, ratio, optimizer, end=training.steps * 3 // 4, frequency=training.steps // 8)
    training.spend(training.epochs, model, optimizer, pruner)


def train_movement(training: Training, model: nn.Module, ratio: float) -> None:
    pretraining = training.thirds()[0]
    training.spend(pretraining, model, adamw(model))

    epochs = training.epochs - pretraining
    steps = epochs * len(training.loader)
    optimizer = adamw(model)
    pruner = pyprune.MovementPruner(
        model,
        schedules.cubic(ratio, start=steps // 10, end=steps * 2 // 3),
        optimizer,
        # The paper's sum of g w. Adam divides by its size, so weights that hardly matter move as fast as others.
        score_optimizer=lambda scores: torch.optim.SGD(scores, lr=1.0),
        scope=scope.model(),
    )
    training.spend(epochs, model, optimizer, pruner)


def train_rigl(training: Training, model: nn.Module, ratio: float) -> None:
    optimizer = adamw(model)
    pruner = pyprune.RigLPruner(model, ratio, optimizer, end=training.steps * 3 // 4, frequency=10)
    training.spend(training.epochs, model, optimizer, pruner)


def train_lottery_ticket(training: Training, model: nn.Module, ratio: float) -> None:
    epochs = iter(training.thirds())

    def train(ticket: nn.Module) -> None:
        training.spend(next(epochs), ticket, adamw(ticket))

    pyprune.lottery_ticket(model, train, ratio, iterations=THIRDS - 1, progress=False)


def train_rb(training: Training, model: nn.Module, ratio: float) -> None:
    pyprune.prune(model, pyprune.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED)
    # Early, because gates follow the target slowly, and gradually, because else they would close all together.
    rb_loss = pyprune.RBLoss(model, target_ratio=0.0, p=0.1)
    target = schedules.cubic(ratio, end=training.steps * 3 // 10)

    def penalty() -> Tensor:
        rb_loss.target_ratio = target(training.step)
        return rb_loss()

    training.spend(training.epochs, model, gate_optimizer(model, LEARNING_RATE), penalty=penalty)


DENSE = "dense"
METHODS = {
    DENSE: train_dense,
    "GMP": train_gmp,
    "AC/DC": train_ac_dc,
    "movement": train_movement,
    "RigL": train_rigl,
    "lottery ticket": train_lottery_ticket,
    "RB gates": train_rb,
}


@dataclass(frozen=True)
class Outcome:
    """One training: its curve, and the test accuracies in % of the plain model that is left."""

    curve: list[Point]
    accuracy: float
    adapted: float
    seconds: float


def train_one(method: str, ratio: float, seed: int, epochs: int, check_resumption: bool) -> Outcome:
    start = time.perf_counter()
    training, model = train_from(seed, method, ratio, epochs)
    seconds = time.perf_counter() - start

    if check_resumption:
        resumed, other = train_from(seed, method, ratio, epochs, training.checkpoint)
        assert_same(model, other, f"{method} at {ratio}")
        assert resumed.curve == training.curve

    pyprune.strip(model)
    plain = DigitsNet()
    plain.load_state_dict(model.state_dict())
    accuracy = training.accuracy(plain)
    end = Point(accuracy, 100 * pyprune.pruning_statistic(plain).pruning_ratio)
    assert end == training.curve[-1]  # as it was with masks and gates
    # BatchNorm averaged over weights that moved, and over random gates: measure it anew. No labels needed.
    images, _ = training.loader.dataset.tensors
    pyprune.batch_norm_adaptation(plain, [images], reset=True)
    return Outcome(training.curve, accuracy, training.accuracy(plain), seconds)


def train_from(
    seed: int, method: str, ratio: float, epochs: int, checkpoint: bytes | None = None
) -> tuple[Training, nn.Module]:
    torch.manual_seed(seed)
    training, model = Training(epochs, checkpoint), DigitsNet()
    METHODS[method](training, model, ratio)
    return training, model


def assert_same(model: nn.Module, other: nn.Module, what: str) -> None:
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    different = [name for name, tensor in state.items() if not torch.equal(tensor, others[name])]
    assert not different, f"{what}: resumed from its checkpoint, it ends with another {', '.join(different)}"


# The outcomes of all seeds, by method and ratio.
Outcomes = dict[tuple[str, float], list[Outcome]]


def train_all(ratios: Sequence[float], seeds: int, epochs: int, workers: int) -> Outcomes:
    cases = [(DENSE, 0.0)] + [(method, ratio) for ratio in ratios for method in METHODS if method != DENSE]
    # Not forked, because torch may have threads. One thread each: so small a model keeps more waiting for each other.
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {
            (*case, seed): pool.submit(train_one, *case, seed, epochs, seed == 0)
            for seed in range(seeds)
            for case in cases
        }
        for future in track(as_completed(futures.values()), "Training", len(futures), console=console):
            future.result()
        return {case: [futures[(*case, seed)].result() for seed in range(seeds)] for case in cases}


def table_of(outcomes: Outcomes) -> Table:
    table = Table(title="Trained sparse, and stripped", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("ratio", "method", "test accuracy", "BatchNorm adapted", "sparsity", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    before = 0.0
    for (method, ratio), runs in outcomes.items():
        if ratio != before:
            table.add_section()
        table.add_row(
            str(ratio) if ratio != before else "",
            method,
            mean_and_deviation([run.accuracy for run in runs]),
            mean_and_deviation([run.adapted for run in runs]),
            f"{mean(run.curve[-1].sparsity for run in runs):.2f} %",
            f"{mean(run.seconds for run in runs):.1f}",
        )
        before = ratio
    return table


def mean_and_deviation(percentages: Sequence[float]) -> str:
    deviation = f" ± {stdev(percentages):.1f}" if len(percentages) > 1 else ""
    return f"{mean(percentages):.1f} %{deviation}"


# Okabe and Ito's colours, which everyone can tell apart, and markers for paper.
STYLES = {
    DENSE: {"color": "0.55", "linestyle": "--"},
    "GMP": {"color": "#0072B2", "marker": "o"},
    "AC/DC": {"color": "#D55E00", "marker": "s"},
    "movement": {"color": "#009E73", "marker": "D"},
    "RigL": {"color": "#CC79A7", "marker": "^"},
    "lottery ticket": {"color": "#E69F00", "marker": "v"},
    "RB gates": {"color": "black", "marker": "P"},
}


def nines(accuracy: Any) -> Any:
    """Return where an accuracy in % is drawn: from 90 to 99 it is as far as from 0 to 90."""
    return -np.log10(np.maximum(100.2 - accuracy, 1e-9))


def plot(outcomes: Outcomes, path: Path) -> None:
    ratios = list(dict.fromkeys(ratio for _, ratio in outcomes if ratio))
    figure = Figure(figsize=(1 + 6.5 * len(ratios), 8.5), layout="constrained")
    figure.suptitle(
        "A CNN on handwritten digits, trained sparse: mean over seeds at the end of each epoch, BatchNorm not adapted"
    )
    grid = figure.subplots(2, len(ratios), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2))
    for ratio, upper, lower in zip(ratios, *grid, strict=True):
        for (method, of), runs in outcomes.items():
            if of in (0.0, ratio):
                style = {"markersize": 5, "linewidth": 1.3, "label": method} | STYLES[method]
                epochs = range(1, len(runs[0].curve) + 1)
                points = list(zip(*(run.curve for run in runs), strict=True))
                upper.plot(epochs, [mean(point.accuracy for point in seeds) for seeds in points], **style)
                lower.plot(epochs, [mean(point.sparsity for point in seeds) for seeds in points], **style)
        upper.set_title(f"{ratio:.0%} of the weights removed", loc="left")
        lower.set(xlabel="epoch")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        upper.set_yscale("function", functions=(nines, lambda height: 100.2 - 10 ** (-height)))
        ticks = (10, 50, 80, 90, 95, 98, 99, 99.5, 100)
        upper.set(ylim=(0, 100.05), yticks=ticks, yticklabels=ticks)
        upper.minorticks_off()
    grid[0, 0].set_ylabel("test accuracy (%)")
    grid[1, 0].set_ylabel("sparsity (%)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="the budget of each training (%(default)s)")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, metavar="RATIO", help="default: 0.9 0.95")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many trainings to average (%(default)s)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("train_sparse.png"), help="the PNG to draw (%(default)s)")
    arguments = parser.parse_args()
    if arguments.epochs < THIRDS:
        parser.error(
            f"--epochs is {arguments.epochs}; the budget is cut into {THIRDS} parts, so give {THIRDS} or more"
        )

    start = time.perf_counter()
    outcomes = train_all(arguments.ratios, arguments.seeds, arguments.epochs, arguments.workers)
    console.print(table_of(outcomes))
    console.print(
        f"Each has {arguments.epochs} epochs in all. A third of them trains the dense model that movement pruning "
        "fine-tunes; a lottery ticket has a third for each of its three trainings. Resumed from a checkpoint, all "
        "methods ended with the same bits.",
        highlight=False,
    )
    plot(outcomes, arguments.plot)
    console.print(f"Curves: {arguments.plot}")
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
