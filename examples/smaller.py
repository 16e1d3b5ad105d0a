"""Make three trained models smaller and faster, and repair them without labels: accuracy, size and time beside dense.

Of each model a share of all coupled units goes: channels of the digits CNN and of CREPE, a trained pitch tracker, and
hidden units or heads of all-MiniLM-L6-v2, a trained sentence encoder. `shrink` removes them, `reconstruct` solves the
layers that read them, and BatchNorm is measured anew: no labels, no training. The digits CNN is also pruned while it
trains, until half of its multiply-accumulates are left, shrunk, fine-tuned, saved, and built by another process.

Run it with ``make smaller`` (about half an hour on two cores; ``--only digits`` takes one minute). ``--plot PATH``
draws the picture of the documentation.
"""

import argparse
import ast
import copy
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pyprune
from pyprune import Method, granularity, importance, scope

console = Console(width=110)


@dataclass(frozen=True)
class Case:
    """A trained model, and how to judge it.

    Args:
        name: of the model, and of what goes.
        model: the dense model.
        batches: inputs without labels.
        judge: returns accuracy or cosine, at most 1.
        chosen: which of the coupled groups lose units.
        ratios: shares of units that go.
        by_least_squares: whether scores are those of `reconstruction_scores`, or magnitudes.
    """

    name: str
    model: nn.Module
    batches: Sequence[Any]
    judge: Callable[[nn.Module], float]
    chosen: Callable[[Any], bool] = lambda group: True
    ratios: Sequence[float] = (0.5, 0.7)
    by_least_squares: bool = True


@dataclass(frozen=True)
class Row:
    """What became of a model: scores as cut, repaired, adapted; parameters, bytes; MACs and ms of one input."""

    name: str
    ratio: float
    scores: tuple[float, ...]
    parameters: int
    macs: int
    bytes: int
    milliseconds: float


def magnitudes(group: Any) -> Tensor:
    """Return sums of squares of the units of a group, each weight relative to its mean."""
    total = torch.zeros(len(group))
    for member in group.members:
        if member.tensor.dim() > 1:
            entries = member.tensor.detach().square().movedim(member.dim, 0).flatten(1).sum(1)
            squares = entries[torch.as_tensor(member.indices)].sum(1)
            total += squares / squares.mean()
    return total


def coupled(model: nn.Module, case: Case) -> list[Any]:
    """Return the groups of a model that lose units."""
    return [group for group in pyprune.coupled_groups(model, case.batches[0]) if case.chosen(group)]


@torch.no_grad()
def remove(model: nn.Module, case: Case, scores: Sequence[Tensor], ratio: float) -> pyprune.Shrunk:
    """Remove a share of the units of each group, those with the lowest scores."""
    for group, worth in zip(coupled(model, case), scores, strict=True):
        gone = worth.argsort()[: int(ratio * len(group))]
        for member in group.members:
            member.tensor.index_fill_(member.dim, torch.as_tensor(member.indices)[gone].flatten(), 0)
    return pyprune.shrink(model, case.batches[0])


def inputs_in(batch: Any) -> int:
    """Return how many inputs a batch has."""
    return len(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch)


def milliseconds(models: Sequence[nn.Module], batch: Any) -> list[float]:
    """Return the median time of a pass of each model, measured in turns."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(7):
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                model(**batch) if isinstance(batch, dict) else model(batch)
                taken.append(1e3 * (time.perf_counter() - start))
    return [sorted(taken)[len(taken) // 2] for taken in times]


def make_smaller(case: Case) -> tuple[list[Row], list[tuple[nn.Module, pyprune.Shrunk]]]:
    """Cut, shrink, repair and adapt at each ratio; return a row for the dense model and for each, and the models."""
    models, results = [], []
    groups = coupled(case.model, case)
    if case.by_least_squares:
        scores = pyprune.reconstruction_scores(case.model, groups, case.batches)
    else:
        scores = [magnitudes(group) for group in groups]
    for ratio in case.ratios:
        model = copy.deepcopy(case.model)
        shrunk = remove(model, case, scores, ratio)
        quality = [case.judge(model)]
        repaired = pyprune.reconstruct(case.model, model, case.batches, shrunk)
        quality.append(case.judge(model))
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            pyprune.batch_norm_adaptation(model, case.batches, reset=True)
        quality.append(case.judge(model))
        console.print(f"\n{case.name}, {ratio:.0%} removed\n{repaired}", highlight=False)
        models.append(model)
        results.append((ratio, tuple(quality), shrunk))
    count = inputs_in(case.batches[0])
    times = [taken / count for taken in milliseconds([case.model, *models], case.batches[0])]
    shrunk = results[0][2]
    sizes = (shrunk.parameters[0], shrunk.macs[0] // count, shrunk.bytes[0])
    rows = [Row(case.name, 0.0, (case.judge(case.model),) * 3, *sizes, times[0])]
    for (ratio, quality, shrunk), taken in zip(results, times[1:], strict=True):
        sizes = (shrunk.parameters[1], shrunk.macs[1] // count, shrunk.bytes[1])
        rows.append(Row(case.name, ratio, quality, *sizes, taken))
    return rows, [(model, shrunk) for model, (_, _, shrunk) in zip(models, results, strict=True)]


# ---- the models ----


def digits() -> list[Row]:
    from digits import DigitsNet, load_data, predict, train

    torch.manual_seed(0)
    loader, test_images, test_labels = load_data()
    dense = DigitsNet()
    train(dense, loader, 15, "Training the digits CNN")

    def judge(model: nn.Module) -> float:
        return (predict(model, test_images).argmax(1) == test_labels).double().mean().item()

    images = loader.dataset.tensors[0]
    batches = images[:400].split(100)
    rows, _ = make_smaller(Case("digits CNN", dense.eval(), batches, judge))
    model = copy.deepcopy(dense)
    shrunk = prune_in_training(model, loader, images[:1])
    console.print(
        f"\nThe digits CNN, pruned in training to half of its multiply-accumulates: {judge(model):.1%}\n{shrunk}"
    )
    pyprune.reconstruct(dense, model, batches, shrunk)
    repaired = judge(model)
    train(model, loader, 2, "Fine-tuning")
    console.print(f"Repaired: {repaired:.1%}; fine-tuned for two epochs: {judge(model):.1%}")
    reload_elsewhere(model, shrunk.plan, test_images)
    return rows


def prune_in_training(model: nn.Module, loader: Any, example: Tensor) -> pyprune.Shrunk:
    """Train for six epochs, in which whole channels go until half of the multiply-accumulates are left; shrink."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    method = Method(importance.magnitude(p=2), granularity.coupled(ratio_of="macs"), scope.model())
    steps = len(loader)
    pruner = pyprune.gmp(model, 0.5, optimizer, start=0, end=4 * steps, method=method, examples_inputs=example)
    model.train()
    for _ in range(6):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            pruner.step()
    return pyprune.shrink(model, example, optimizer=optimizer)


RELOAD = """
import sys, torch, pyprune
from digits import DigitsNet
model = pyprune.rebuild(DigitsNet(), pyprune.Plan.load(sys.argv[1]))
model.load_state_dict(torch.load(sys.argv[2]))
images, outputs = torch.load(sys.argv[3])
with torch.no_grad():
    assert torch.equal(model.eval()(images), outputs)
"""


def reload_elsewhere(model: nn.Module, plan: pyprune.Plan, images: Tensor) -> None:
    """Save plan, weights and outputs, and let another process build the small model and compute the same."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("plan.json", "weights.pt", "outputs.pt")]
        plan.save(paths[0])
        torch.save(model.state_dict(), paths[1])
        with torch.no_grad():
            torch.save((images, model.eval()(images)), paths[2])
        subprocess.run([sys.executable, "-c", RELOAD, *map(str, paths)], check=True, cwd=Path(__file__).parent)
    console.print("Another process has built it by its plan, and its outputs are the same.")


def minilm() -> list[Row]:
    from minilm import load_model

    encoder = load_model()
    sentences = documentation_sentences()
    tokenize = encoder.tokenizer
    parts = [sentences[start : start + 20] for start in range(0, 360, 20)]
    batches = [dict(tokenize(part, padding=True, return_tensors="pt")) for part in parts]
    others, unlabelled = batches[:8], batches[8:]
    model = encoder[0].auto_model.eval()

    @torch.no_grad()
    def embed(model: nn.Module) -> Tensor:
        means = []
        for batch in others:
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            means.append((hidden * mask).sum(1) / mask.sum(1))
        return nn.functional.normalize(torch.cat(means), dim=1)

    dense = embed(model)

    def judge(model: nn.Module) -> float:
        return (embed(model) * dense).sum(1).mean().item()

    rows = []
    for name, chosen in (
        ("MiniLM MLP", lambda group: "intermediate" in group.name),
        ("MiniLM heads", lambda group: group.what == "heads"),
    ):
        rows += make_smaller(Case(name, model, unlabelled, judge, chosen, ratios=(0.3, 0.5)))[0]
    return rows


def documentation_sentences() -> list[str]:
    """Return sentences from the docstrings of Python's standard library, shuffled."""
    found: dict[str, None] = {}
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = " ".join((ast.get_docstring(node) or "").split())
                parts = re.split(r"(?<=[.!?]) ", text)
                found |= dict.fromkeys(part for part in parts if re.fullmatch(r"[A-Z][\w' ,]+.{20,120}", part))
    sentences = list(found)
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    return [sentences[index] for index in order]


def crepe() -> list[Row]:
    from pitch import accuracy, load_model, make_notes

    frames, pitch = make_notes(512, seed=1)
    unlabelled = make_notes(256, seed=2)[0].split(32)

    def judge(model: nn.Module) -> float:
        return accuracy(model, frames, pitch) / 100

    # The second convolution has 65,536 inputs: too many for the products that scores by least squares need.
    return make_smaller(Case("CREPE", load_model(), unlabelled, judge, by_least_squares=False))[0]


def show(rows: Sequence[Row]) -> None:
    title = "Smaller, repaired without labels or training"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("model", "removed", "cut", "repaired", "adapted", "k floats", "MMACs", "MB", "ms"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        scores = [f"{score:.3f}" for score in row.scores] if row.ratio else ["", "", f"{row.scores[0]:.3f}"]
        numbers = (row.parameters / 1e3, row.macs / 1e6, row.bytes / 1e6, row.milliseconds)
        sizes = [f"{number:,.{1 if number < 100 else 0}f}" for number in numbers]
        table.add_row(row.name, f"{row.ratio:.0%}" if row.ratio else "dense", *scores, *sizes)
    console.print(table)
    console.print("Digits, CREPE: accuracy, and notes heard within 50 cents. MiniLM: cosine to the dense embedding.")


def plot(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    ours, grey = "#0072B2", "#8A97A3"
    names = list(dict.fromkeys(row.name for row in rows))
    figure = Figure(figsize=(2.6 * len(names) + 0.6, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        some = [row for row in rows if row.name == name]
        left = [100 * row.macs / some[0].macs for row in some]
        axes.plot(left, [row.scores[-1] for row in some], "-o", color=ours, linewidth=2.2, label="repaired")
        axes.plot(left, [row.scores[0] for row in some], "--o", color=grey, linewidth=1.5, label="cut")
        axes.set(xlabel="MACs left, %", title=name, ylim=(0, 1.05))
        axes.invert_xaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.axes[0].set_ylabel("accuracy or cosine")
    figure.axes[0].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    cases = {"digits": digits, "minilm": minilm, "crepe": crepe}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(cases), default=list(cases), help="models (default: all)")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw quality against what is left here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # times are those of one
    rows = [row for name in arguments.only for row in cases[name]()]
    show(rows)
    if arguments.plot is not None:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
