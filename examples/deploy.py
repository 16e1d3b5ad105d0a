"""Run pruned models in other runtimes: are the outputs right, how large are files, how long does a pass take?

A ResNet-18 and all-MiniLM-L6-v2, a trained sentence encoder, each dense, with 50 and 80 % of its weights zero
(masked, stripped), and made smaller (half of the channels, or of the hidden units and heads, shrunk), go through
torch.export, AOTInductor, ONNX and onnxruntime (also with the zeros left out of the file), OpenVINO and ExecuTorch
with XNNPACK. What is not installed or fails has a row, too, and says why. Nothing is trained: sizes and times do not
ask for what the weights are.

Run it with ``make deploy`` (a quarter of an hour on two cores); ``--json PATH`` writes what was measured.
"""

import argparse
import contextlib
import copy
import gzip
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pyprune
from pyprune import Method, granularity, importance, scope

Run = Callable[[], Tensor]
console = Console(width=110)


@dataclass(frozen=True)
class Row:
    """One model in one runtime.

    Args:
        model: its name.
        runtime: its name.
        variant: dense, 50 % or 80 % of its weights zero, or shrunk.
        difference: largest difference to the eager model, as a part of its largest output.
        megabytes: of all files.
        gzipped: the same, compressed by gzip.
        milliseconds: of a pass, one thread, the lower quartile.
        beside_dense: that time as a part of the dense model's in the same runtime, where that runs.
        failed: why there are no numbers.
    """

    model: str
    runtime: str
    variant: str
    difference: float = 0.0
    megabytes: float = 0.0
    gzipped: float = 0.0
    milliseconds: float = 0.0
    beside_dense: float | None = None
    failed: str = ""


# ---- the runtimes: each writes its files into a folder, loads them again, and returns what runs them ----


def eager(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Run:
    torch.save(model.state_dict(), folder / "model.pt")
    return lambda: model(*inputs)


def torch_export(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Run:
    torch.export.save(torch.export.export(model, inputs), folder / "model.pt2")
    program = torch.export.load(folder / "model.pt2").module()
    return lambda: program(*inputs)


def aot_inductor(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Run:
    program = torch.export.export(model, inputs)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    return lambda: package(*inputs)


def onnx_file(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Path:
    path = folder / "model.onnx"
    torch.onnx.export(model, inputs, path, dynamo=True, external_data=False, verbose=False)
    return path


def onnx_session(path: Path, inputs: tuple[Tensor, ...]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    feed = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def onnxruntime(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Run:
    return onnx_session(onnx_file(model, inputs, folder), inputs)


def onnxruntime_sparse(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Run:
    leave_out_zeros(onnx_file(model, inputs, folder))
    return onnx_session(folder / "model.onnx", inputs)


def leave_out_zeros(path: Path) -> None:
    """Turn each initializer that becomes smaller by it into a sparse one: an index of 8 bytes for each kept value."""
    import numpy
    import onnx

    graph = (model := onnx.load(path)).graph
    dense = {one.name: (one, onnx.numpy_helper.to_array(one)) for one in graph.initializer}
    for name, (initializer, values) in dense.items():
        (places,) = values.reshape(-1).nonzero()
        if len(places) * (8 + values.itemsize) < values.nbytes:
            kept = onnx.numpy_helper.from_array(values.reshape(-1)[places], name)
            indices = onnx.numpy_helper.from_array(places.astype(numpy.int64), f"{name}_indices")
            graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(kept, indices, values.shape))
            graph.initializer.remove(initializer)
    onnx.save(model, path)


def openvino(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Run:
    import openvino

    converted = openvino.convert_model(torch.export.export(model, inputs))
    openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", settings)
    arrays = [one.numpy() for one in inputs]
    return lambda: torch.from_numpy(compiled(arrays)[0])


def executorch(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Run:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.export(model, inputs)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    (folder / "model.pte").write_bytes(lowered.buffer)
    method = Runtime.get().load_program(folder / "model.pte").load_method("forward")
    return lambda: method.execute(inputs)[0]


RUNTIMES = {
    "eager": eager,
    "torch.export": torch_export,
    "AOTInductor": aot_inductor,
    "onnxruntime": onnxruntime,
    "onnxruntime, sparse": onnxruntime_sparse,
    "OpenVINO": openvino,
    "ExecuTorch, XNNPACK": executorch,
}


# ---- the models, each with inputs ----


class Residual(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, inputs, height, width] to [n, outputs, height / stride, width / stride]."""
        hidden = self.bn2(self.conv2(self.bn1(self.conv1(images)).relu()))
        return (hidden + self.shortcut(images)).relu()


def resnet(widths: tuple[int, ...] = (64, 128, 256, 512), size: int = 128) -> tuple[nn.Module, tuple[Tensor, ...]]:
    stem = [nn.Conv2d(3, widths[0], 7, 2, padding=3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    blocks: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, padding=1)]
    for before, width in zip((widths[0], *widths), widths, strict=False):
        blocks += [Residual(before, width, 1 if width == widths[0] else 2), Residual(width, width, 1)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 100))
    images = torch.randn(8, 3, size, size)
    pyprune.batch_norm_adaptation(model, [images], reset=True)
    return model.eval(), (images[:1].clone(),)


class Encoder(nn.Module):
    """A sentence encoder that takes and returns tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Map tokens [n, length] to hidden states [n, length, width]."""
        return self.model(input_ids=tokens, attention_mask=attention_mask).last_hidden_state


def minilm() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from minilm import SENTENCES, load_model

    encoder = load_model()
    batch = encoder.tokenizer(" ".join(SENTENCES), truncation=True, max_length=64, return_tensors="pt")
    return Encoder(encoder[0].auto_model).eval(), (batch["input_ids"], batch["attention_mask"])


MODELS = {"resnet": ("ResNet-18", resnet), "minilm": ("MiniLM", minilm)}
# Embeddings are looked up, not multiplied by, and the last hidden state does not go through the pooler.
ENCODER = pyprune.IgnoredScope(types=["Embedding"], patterns=[r".*\bpooler\b"], validate=False)


def sparse(model: nn.Module, ratio: float) -> nn.Module:
    model = copy.deepcopy(model)
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=ratio, ignored_scope=ENCODER)
    return pyprune.strip(model)


def smaller(model: nn.Module, inputs: tuple[Tensor, ...], ratio: float) -> nn.Module:
    model = copy.deepcopy(model)
    method = Method(importance.magnitude(p=2), granularity.coupled(), scope.tensor())
    pyprune.prune(model, method, ratio=ratio, examples_inputs=inputs, ignored_scope=ENCODER)
    pyprune.shrink(model, inputs)
    return pyprune.strip(model)


def variants_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, nn.Module]:
    return {
        "dense": model,
        "50 % zeros": sparse(model, 0.5),
        "80 % zeros": sparse(model, 0.8),
        "shrunk": smaller(model, inputs, 0.5),
    }


# ---- measuring ----


def in_turns(runs: list[Run], seconds: float) -> list[float]:
    """Return the lower quartile of the milliseconds of each, measured in turns for so many seconds."""
    times: list[list[float]] = [[] for _ in runs]
    until = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < until:
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - start))
    return [sorted(taken)[len(taken) // 4] for taken in times]


def reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


@torch.inference_mode(False)
@torch.no_grad()
def rows_of(
    name: str, runtime: str, variants: dict[str, nn.Module], inputs: tuple[Tensor, ...], seconds: float
) -> list[Row]:
    """Export all variants to a runtime, compare and time them; a variant that fails says why."""
    rows, runs = {}, {}
    for variant, model in variants.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                runs[variant] = RUNTIMES[runtime](model, inputs, Path(folder))
                want = model(*inputs)
                difference = ((runs[variant]() - want).abs().max() / want.abs().max()).item()
            except Exception as error:  # whatever a runtime refuses with belongs into the table
                runs.pop(variant, None)
                rows[variant] = Row(name, runtime, variant, failed=reason(error))
                continue
            files = [path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        sizes = (sum(map(len, files)) / 1e6, sum(len(gzip.compress(file, 6)) for file in files) / 1e6)
        rows[variant] = Row(name, runtime, variant, difference, *sizes)
    times = dict(zip(runs, in_turns(list(runs.values()), seconds) if runs else [], strict=True))
    for variant, taken in times.items():
        beside = taken / times["dense"] if "dense" in times else None
        rows[variant] = replace(rows[variant], milliseconds=taken, beside_dense=beside)
    return list(rows.values())


def versions() -> dict[str, str]:
    there = {}
    for name in ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "executorch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            there[name] = metadata.version(name)
    return there


def show(rows: list[Row]) -> None:
    table = Table(title="Pruned models in other runtimes, one thread", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("model", "runtime", "", "difference", "MB", "MB gzipped", "ms", "beside dense"):
        table.add_column(column, justify="left" if column in ("model", "runtime", "") else "right")
    for row in rows:
        numbers = [f"{row.difference:.0e}", f"{row.megabytes:.1f}", f"{row.gzipped:.1f}"]
        numbers += [f"{row.milliseconds:.2f}", f"{row.beside_dense:.2f} x" if row.beside_dense else ""]
        table.add_row(row.model, row.runtime, row.variant, *(["failed"] if row.failed else numbers))
    console.print(table)
    for row in rows:
        if row.failed:
            console.print(f"{row.model}, {row.runtime}, {row.variant}: {row.failed}", highlight=False, markup=False)
    console.print("difference: the largest to the eager model of the same row, as a part of its largest output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS), help="models (default: all)")
    parser.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=20, help="time to measure each runtime for (default: 20)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was measured here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # exporters deprecate much of their own
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for key in arguments.only:
        name, build = MODELS[key]
        model, inputs = build()
        variants = variants_of(model, inputs)
        for runtime in arguments.runtimes:
            console.print(f"{name}: {runtime} ...", style="dim")
            rows += rows_of(name, runtime, variants, inputs, arguments.seconds)
    show(rows)
    if arguments.json is not None:
        measured = {"machine": platform.platform(), "versions": versions(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
