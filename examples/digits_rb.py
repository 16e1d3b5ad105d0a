"""Learn what to prune: a CNN on handwritten digits, with magnitude masks, Bernoulli gates and hard-concrete gates.

Run it with ``make demo-rb``, or ``pip install "pyprune[examples]"`` and ``python examples/digits_rb.py``: about 30 s.
It prints every epoch, draws the curves, and fails if a method misses its target.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from digits import EPOCHS, DigitsNet, console, load_data, predict, train
from matplotlib.figure import Figure
from rich import box
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

import pyprune

STEPS = {0: 0.3, 5: 0.5, 10: 0.7}
TARGET, TOLERANCE = 0.7, 0.02
WARMUP_EPOCHS = 10

# One dict of named numbers per epoch: a row of the table, and a point of each curve.
History = list[dict[str, float]]


def train_epoch(
    model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, gate_loss: nn.Module | None = None
) -> tuple[float, float]:
    """Train for one epoch; return the means of the task's loss and of that of the gates."""
    model.train()
    task_total = gate_total = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        task = nn.functional.cross_entropy(model(images), labels)
        gate = torch.zeros(()) if gate_loss is None else gate_loss()
        (task + gate).backward()
        optimizer.step()
        if isinstance(gate_loss, pyprune.LagrangianLoss):
            gate_loss.step()  # its multipliers climb the loss that the optimizer descends
        task_total += task.item()
        gate_total += gate.item()
    return task_total / len(loader), gate_total / len(loader)


def gate_optimizer(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    # At a keep probability of 0.99 a logit starts at 4.6 (Bernoulli) or 3.0 (hard concrete), and evaluation closes
    # the gate below 0 or -2.4. Adam moves it by about the learning rate per step, and there are 300 steps: at the
    # 1e-3 of the weights no gate would get there. Short memories (betas) keep gates from swinging past the target:
    # their gradients grow and fade by orders of magnitude on the way, and Adam would long divide by the largest.
    # Weight decay would pull every gate to a probability of 1/2.
    gates = {"params": pyprune.gate_parameters(model), "lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": pyprune.weight_parameters(model)}, gates], lr=lr)
    pyprune.check_optimizer(model, optimizer)
    return optimizer


def train_magnitude(model: nn.Module, loader: DataLoader, accuracy: Callable[[nn.Module], float]) -> History:
    mode = pyprune.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
    pyprune.prune(model, mode, ratio=STEPS[0])
    scheduler = pyprune.MultiStepMagnitudePruningScheduler(model, mode=mode, steps=STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in track(range(EPOCHS), "Magnitude", console=console):
        scheduler.step()
        task, _ = train_epoch(model, loader, optimizer)
        history.append(
            {
                "target": scheduler.current_ratio,
                "sparsity": pyprune.pruning_statistic(model).pruning_ratio,
                "task loss": task,
                "test accuracy": accuracy(model),
            }
        )
    pyprune.strip(model)
    return history


def train_rb(model: nn.Module, loader: DataLoader, accuracy: Callable[[nn.Module], float]) -> History:
    pyprune.prune(model, pyprune.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED)
    # At the default p = 0.05 this loss drowns that of the task, and all gates close together, worth keeping or not.
    rb_loss = pyprune.RBLoss(model, target_ratio=STEPS[0], p=0.3)
    scheduler = pyprune.MultiStepRBPruningScheduler(rb_loss, steps=STEPS)
    optimizer = gate_optimizer(model)
    history = []
    for _ in track(range(EPOCHS), "RB", console=console):
        scheduler.step()
        task, penalty = train_epoch(model, loader, optimizer, rb_loss)
        history.append(
            {
                "target": rb_loss.target_ratio,
                "sparsity": scheduler.current_ratio,
                "task loss": task,
                "RB loss": penalty,
                "test accuracy": accuracy(model),
            }
        )
    pyprune.strip(model)
    return history


def train_hard_concrete(model: nn.Module, loader: DataLoader, accuracy: Callable[[nn.Module], float]) -> History:
    pyprune.prune(model, pyprune.PruneMode.UNSTRUCTURED_HARD_CONCRETE)
    # The multipliers start at 0 and have 300 steps in all to find their strength: three times their default rate.
    lagrangian = pyprune.LagrangianLoss(
        model, target_ratio=TARGET, warmup_steps=WARMUP_EPOCHS * len(loader), learning_rate=0.3
    )
    optimizer = gate_optimizer(model)
    history = []
    for _ in track(range(EPOCHS), "Hard concrete", console=console):
        task, penalty = train_epoch(model, loader, optimizer, lagrangian)
        history.append(
            {
                "target": lagrangian.current_target,
                "expected": lagrangian.current_ratio,  # of the random gates of training
                "sparsity": pyprune.pruning_statistic(model).pruning_ratio,  # of the gates in evaluation
                "task loss": task,
                "gate loss": penalty,
                "test accuracy": accuracy(model),
            }
        )
    # As many zeros as the random gates of training are expected to have, instead of those of evaluation.
    pyprune.strip(model, expected_count=True)
    return history


def epoch_table(method: str, history: History) -> Table:
    table = Table(title=f"{method}, epoch by epoch", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("epoch", *history[0]):
        table.add_column(name, justify="right")
    for epoch, row in enumerate(history):
        if epoch in STEPS:
            table.add_section()
        # Adding 0 makes 0.0 of -0.0.
        numbers = (f"{round(value, 4) + 0:.4f}" if "loss" in name else f"{value:.1%}" for name, value in row.items())
        table.add_row(str(epoch), *numbers)
    return table


def plot(histories: dict[str, History], dense_accuracy: float, path: Path) -> None:
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    figure.suptitle(f"A CNN on handwritten digits, pruned to {TARGET:.0%} while it trains", fontsize=14)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.axhline(100 * dense_accuracy, color="0.5", linestyle="--", linewidth=1)

    # The targets are broad, pale lines for the curves to follow.
    steps = [100 * row["target"] for row in histories["RB"]]
    warmup = [0.0] + [100 * row["target"] for row in histories["hard concrete"]]
    lower.stairs(steps, range(EPOCHS + 1), baseline=None, color="0.85", linewidth=7, label="target of magnitude, RB")
    lower.plot(warmup, color="#C0E7DB", linewidth=7, label="target of hard concrete")

    # Okabe and Ito's colours, which everyone can tell apart, and markers for paper. A point is the end of an epoch.
    styles = zip(("#0072B2", "#D55E00", "#009E73"), "osD", strict=True)
    for (method, history), (color, marker) in zip(histories.items(), styles, strict=True):
        style = {"color": color, "marker": marker, "markersize": 5, "label": method}
        upper.plot([100 * dense_accuracy] + [100 * row["test accuracy"] for row in history], **style)
        # Magnitude masks are set at once, at the start of an epoch.
        drawstyle = "steps-pre" if method == "magnitude" else "default"
        lower.plot([0.0] + [100 * row["sparsity"] for row in history], **style, drawstyle=drawstyle)
    expected = [100 * row["expected"] for row in histories["hard concrete"]]
    lower.plot(range(1, EPOCHS + 1), expected, color="#009E73", linestyle=":", label="hard concrete, expected")

    upper.set_title(f"Accuracy on the test set (dashed: the dense model, {dense_accuracy:.1%})", loc="left")
    upper.set_ylabel("accuracy (%)")
    lower.set_title("Weights removed", loc="left")
    lower.set(xlabel="training after pruning began (epochs)", ylabel="sparsity (%)", xticks=[*STEPS, EPOCHS])
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*lower.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, default=Path("digits_rb.png"), help="the PNG to draw (%(default)s)")
    path = parser.parse_args().plot

    start = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a model keeps more of them waiting for each other
    train_loader, test_images, test_labels = load_data()

    def accuracy(model: nn.Module) -> float:
        return (predict(model, test_images).argmax(1) == test_labels).double().mean().item()

    dense = DigitsNet()
    train(dense, train_loader, EPOCHS, "Dense")
    summary = Table(title="Stripped models", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("method", "sparsity", "test accuracy", "BatchNorm adapted"):
        summary.add_column(column, justify="left" if column == "method" else "right")
    calibration = pyprune.Dataset(train_loader, transform_func=lambda batch: batch[0])

    def report(method: str, model: nn.Module) -> float:
        sparsity = pyprune.pruning_statistic(model).pruning_ratio
        # BatchNorm averaged over random gates, and these are fixed: measure its statistics anew. No labels needed.
        adapted = pyprune.batch_norm_adaptation(copy.deepcopy(model), calibration, reset=True)
        summary.add_row(method, f"{sparsity:.2%}", f"{accuracy(model):.1%}", f"{accuracy(adapted):.1%}")
        return sparsity

    report("dense", dense)
    methods = {"magnitude": train_magnitude, "RB": train_rb, "hard concrete": train_hard_concrete}
    histories: dict[str, History] = {}
    missed = []
    for method, train_pruned in methods.items():
        torch.manual_seed(0)
        model = copy.deepcopy(dense)
        histories[method] = train_pruned(model, train_loader, accuracy)
        console.print(epoch_table(method, histories[method]))
        sparsity = report(method, model)
        if abs(sparsity - TARGET) > TOLERANCE:
            missed.append(f"{method}: {sparsity:.2%}")

    console.print(summary)
    plot(histories, accuracy(dense), path)
    console.print(f"One of {len(test_labels)} test digits is {1 / len(test_labels):.1%}. Curves: {path}")
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")
    if missed:
        raise SystemExit(f"The target was {TARGET:.0%}, within {TOLERANCE:.0%}; missed by {', '.join(missed)}")


if __name__ == "__main__":
    main()
