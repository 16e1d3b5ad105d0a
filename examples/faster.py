"""Turn zeros into time: pruned models with packed weights beside dense ones, in float32, bfloat16 and int8.

all-MiniLM-L6-v2, a trained sentence encoder, is pruned in one shot to 50 and 70 % and judged by the cosine between
its embeddings and those of the dense model. Decoders of the shapes of GPT-2 and Llama (two layers, random weights)
are there for their time alone: a prompt of 128 tokens, and one token. Every way is timed in turns with the dense
model. (The file is not called accelerate, because that is a package which transformers import.)

Run it with ``make accelerate`` (a few minutes), alone on the machine. ``--threads`` sets torch's threads, ``--plot``
draws a picture, ``--json`` keeps what was measured.
"""

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pyprune
from pyprune import scope, solvers

console = Console(width=120)


@dataclass(frozen=True)
class Case:
    """A dense model, what it is given, how it is pruned to a ratio, and how it is judged."""

    name: str
    model: nn.Module
    example: Any
    prune: Callable[[nn.Module, float], object]
    judge: Callable[[nn.Module], float] | None = None
    ratios: Sequence[float] = (0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Row:
    """One way of running a model, beside the dense one: gain, milliseconds, bytes of weights and of memory, score."""

    case: str
    way: str
    zeros: float
    gain: float
    milliseconds: float
    weights: int
    memory: int | None
    score: float | None


def magnitude(model: nn.Module, ratio: float) -> None:
    """Zero the smallest weights of each layer but the embeddings."""
    embeddings = pyprune.IgnoredScope(types=["Embedding"])
    pyprune.strip(pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=ratio, ignored_scope=embeddings))


def rivals(dense: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what users would take instead of zeros."""
    yield "bfloat16", copy.deepcopy(dense).bfloat16()
    if any(isinstance(module, nn.Linear) for module in dense.modules()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's plans for its quantisation
            yield "int8 dynamic", torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {nn.Linear})


def measure(case: Case, seconds: float) -> list[Row]:
    """Run a model in all ways."""
    rows: list[Row] = []

    def add(way: str, model: nn.Module, zeros: float = 0.0) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = pyprune.benchmark(model, case.example, dense=case.model, seconds=seconds, files=False)
        if not rows:
            before, score = result.dense, case.judge and case.judge(case.model)
            assert before is not None
            memory = (before.memory or 0, before.peak_memory)
            rows.append(Row(case.name, "dense float32", 0.0, 1.0, before.milliseconds, *memory, score))
        here = result.model
        sizes = (here.milliseconds, here.memory or 0, here.peak_memory)
        rows.append(Row(case.name, way, zeros, result.speedup or 0.0, *sizes, case.judge and case.judge(model)))

    for way, model in rivals(case.model):
        add(way, model)
    for ratio in case.ratios:
        model = copy.deepcopy(case.model)
        case.prune(model, ratio)
        for way, dtype in (("packed", None), ("packed, bfloat16 values", torch.bfloat16)):
            accelerated = copy.deepcopy(model)
            report = pyprune.accelerate(accelerated, case.example, dtype=dtype)
            console.print(f"{case.name}, {ratio:.0%} zeros, {way}: {str(report).splitlines()[-1]}", highlight=False)
            add(way, accelerated, ratio)
    return rows


# ---- the models ----


def minilm() -> Case:
    from minilm import SENTENCES, load_model
    from smaller import documentation_sentences

    encoder = load_model()
    model = encoder[0].auto_model.eval()
    texts = documentation_sentences()
    batches = [dict(encoder.tokenizer(texts[i : i + 8], padding=True, return_tensors="pt")) for i in range(0, 256, 8)]
    held_out = dict(encoder.tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))

    @torch.no_grad()
    def embed(model: nn.Module) -> Tensor:
        hidden, mask = model(**held_out).last_hidden_state.float(), held_out["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    dense = embed(model)

    def prune(model: nn.Module, ratio: float) -> None:
        pyprune.prune_one_shot(model, batches, scope.tensor(), ratio=ratio, solver=solvers.admm())
        pyprune.strip(model)

    example = {"input_ids": torch.randint(1000, 20_000, (1, 128), generator=torch.Generator().manual_seed(0))}
    judge = lambda model: (embed(model) * dense).sum(1).mean().item()  # noqa: E731
    return Case("all-MiniLM-L6-v2, 128 tokens", model, example, prune, judge, (0.5, 0.7))


def decoders() -> Iterator[Case]:
    from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    gpt = GPT2Model(GPT2Config(n_layer=2, vocab_size=1000, bos_token_id=0, eos_token_id=0)).eval()
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
    llama = LlamaModel(LlamaConfig(num_hidden_layers=2, vocab_size=1000, **sizes)).eval()
    tokens = torch.randint(1000, (1, 128))
    for name, model in (("GPT-2", gpt), ("Llama", llama)):
        yield Case(f"{name}, 128 tokens", model, {"input_ids": tokens, "use_cache": False}, magnitude)
        yield Case(f"{name}, 1 token", model, {"input_ids": tokens[:, :1], "use_cache": False}, magnitude)


CASES: dict[str, Callable[[], Iterator[Case]]] = {"minilm": lambda: iter([minilm()]), "decoders": decoders}


def show(rows: Sequence[Row]) -> Table:
    """Return a table of what was measured."""
    title = f"Packed weights beside dense ones, {torch.get_num_threads()} threads"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("", "zeros", "x dense", "ms", "MB of weights", "peak MB", "cosine"):
        table.add_column(column, justify="right" if column else "left")
    for i, row in enumerate(rows):
        if i == 0 or rows[i - 1].case != row.case:
            table.add_row(f"[bold]{row.case}", end_section=False)
        table.add_row(
            f"  {row.way}", f"{row.zeros:.0%}" if row.zeros else "", f"{row.gain:.2f}", f"{row.milliseconds:.2f}",
            f"{row.weights / 1e6:.1f}", "-" if row.memory is None else f"{row.memory / 1e6:.1f}",
            "" if row.score is None else f"{row.score:.3f}",
            end_section=i + 1 == len(rows) or rows[i + 1].case != row.case,
        )  # fmt: skip
    return table


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw how many times faster than dense each way is."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row.case for row in rows))
    figure = Figure(figsize=(3.2 * len(cases), 4), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        some = [row for row in rows if row.case == case]
        for place, row in enumerate(some):
            axes.barh(place, row.gain, color="#c0392b" if row.zeros else "#bbbbbb")
            axes.text(row.gain, place, f" {row.gain:.2f} x", va="center", fontsize=8)
        names = [f"{row.way}, {row.zeros:.0%}" if row.zeros else row.way for row in some]
        axes.set_yticks(range(len(some)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.3 * max(row.gain for row in some))
        axes.set_title(case, fontsize=10)
        axes.axvline(1, color="#888888", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--seconds", type=float, default=3.0, help="for which each way is timed beside dense")
    parser.add_argument("--threads", type=int, help="of torch; default what it chooses")
    parser.add_argument("--plot", type=Path, metavar="PATH")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [row for name in args.only or CASES for case in CASES[name]() for row in measure(case, args.seconds)]
    console.print(show(rows))
    if args.plot:
        plot(rows, args.plot)
    if args.json:
        content = {"threads": torch.get_num_threads(), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
