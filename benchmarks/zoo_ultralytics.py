"""Shrink YOLOs, train, save, load, fuse and export them, and compare: `make zoo-ultralytics`.

Weights are shaken, so that nothing is zero by itself, and half of the units of each group of coupled channels is
zeroed at random. No data is downloaded: models come from their YAML, and images are drawn.
"""

import argparse
import logging
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
os.environ["YOLO_OFFLINE"] = "1"

import cv2
import numpy as np
import torch
import ultralytics
from drawn_images import draw
from torch import nn
from torch.utils._pytree import tree_leaves
from ultralytics import YOLO

import pyprune
from pyprune.integrations.ultralytics import shrink, trainer_of
from pyprune.integrations.ultralytics_shrunk import traceable

MODELS = [
    *("yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov8n-seg", "yolov9t", "yolov10n", "yolo11n", "yolo12n"),
    *("yolo11n-pose", "yolo11n-obb", "yolo11n-cls", "yolo26n", "yolo26n-seg", "yolo26n-pose"),
]
TASKS = {"seg": "segment", "pose": "pose", "obb": "obb", "cls": "classify"}
SIZE = 96


@dataclass(frozen=True)
class Result:
    """What became of one model; differences are relative to the largest value, but for boxes, which are in pixels."""

    name: str
    parameters: tuple[int, int]
    macs: tuple[int, int]
    held: int
    difference: float
    fused: float
    outputs: float
    boxes: int
    pixels: float

    @property
    def is_right(self) -> bool:
        return self.difference < 1e-5 and self.fused < 1e-4 and self.outputs < 1e-4 and self.pixels < 1e-2


def task_of(name: str) -> str:
    return TASKS.get(name.rpartition("-")[2], "detect")


def shake(model: nn.Module, seed: int = 0) -> None:
    """Move all weights a little, so that none is zero and nothing is the same twice."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dfl" not in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))


def images_in(folder: Path) -> torch.Tensor:
    files = sorted(folder.rglob("*.png"))
    return torch.stack([torch.from_numpy(cv2.imread(str(one))) for one in files]).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def settle_statistics(model: nn.Module, images: torch.Tensor) -> None:
    """Give BatchNorm the statistics of images, so that what is computed differs from place to place."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = {module: module.momentum for module in norms}
    for module in norms:
        module.momentum = 1.0
    model.train()(images)
    model.eval()
    for module, usual in momentum.items():
        module.momentum = usual


def zero_half(model: nn.Module, inputs: torch.Tensor, seed: int = 0) -> None:
    """Zero half of the units of each group, at random, in all parameters that have them."""
    random = np.random.default_rng(seed)
    parameters = {id(one) for one in model.parameters()}
    with traceable(model):
        groups = pyprune.coupled_groups(model, inputs)
    with torch.no_grad():
        for group in groups:
            gone = random.permutation(len(group))[: len(group) // 2]
            for member in group.members:
                if id(member.tensor) in parameters:
                    positions = torch.from_numpy(np.unique(member.indices[gone]))
                    member.tensor.index_fill_(member.dim, positions, 0)


@torch.no_grad()
def outputs(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    return [one.clone() for one in tree_leaves(model.eval()(images)) if isinstance(one, torch.Tensor)]


def difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest value of each tensor."""
    assert [one.shape for one in found] == [one.shape for one in wanted]
    largest = [float(one.abs().max().clamp(min=1e-12)) for one in wanted]
    return max(float((a - b).abs().max()) / most for a, b, most in zip(found, wanted, largest, strict=True))


def boxes_of(yolo: YOLO, image: str, task: str) -> np.ndarray:
    """Return what is found in an image, one row each: corners, score, class; for a classifier, its scores."""
    found = yolo.predict(image, imgsz=SIZE, conf=1e-9, verbose=False)[0]
    rows = found.probs.data[None] if task == "classify" else (found.obb if task == "obb" else found.boxes).data
    return rows.numpy()


def farthest(found: np.ndarray, wanted: np.ndarray, task: str) -> tuple[int, float]:
    """Compare boxes; return how many, and how far one is from the nearest one of the others, at most.

    Those with the best scores, down to the widest gap between two: what is below may be another one for a rounding.
    """
    if task != "classify":
        scores = np.sort(wanted[:, -2])[::-1][:100]
        gaps = scores[4:-1] / scores[5:]
        least = np.sqrt(np.prod(scores[4 + gaps.argmax() :][:2]))
        found, wanted = (boxes[boxes[:, -2] > least] for boxes in (found, wanted))
    if found.shape != wanted.shape or not len(found):
        return len(wanted), float("inf")
    distances = np.abs(found[:, None] - wanted[None]).max(-1)
    return len(wanted), float(max(distances.min(0).max(), distances.min(1).max()))


def exported_outputs(yolo: YOLO, images: torch.Tensor, file: str) -> float:
    """Return the difference between what onnxruntime and the fused model compute from one image."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    model = YOLO(yolo.ckpt_path).model.fuse(verbose=False).eval()
    for module in model.modules():
        if isinstance(module, ultralytics.nn.modules.Detect):
            module.export = True
    with torch.no_grad():
        wanted = [one for one in tree_leaves(model(images[:1])) if isinstance(one, torch.Tensor)]
    found = [torch.from_numpy(one) for one in session.run(None, {session.get_inputs()[0].name: images[:1].numpy()})]
    return difference(found, wanted[: len(found)])


def run(name: str, folder: Path) -> Result:
    """Shrink a model, train it, and follow it through file, fusion and export."""
    task = task_of(name)
    data = draw(folder / "images", task, classes=80)
    torch.manual_seed(0)
    yolo = YOLO(f"{name}.yaml", task=task)
    model = yolo.model.eval()
    shake(model)
    zero_half(model, torch.rand(1, 3, SIZE, SIZE))
    images = images_in(folder / "images")
    settle_statistics(model, images)
    wide = nn.functional.interpolate(images[:2], (64, 160), mode="bilinear")
    before = outputs(model, wide)
    shrunk = shrink(yolo, images[:1])
    after = outputs(model, wide)
    # Feature maps have fewer channels; they are no predictions.
    pairs = [(a, b) for a, b in zip(after, before, strict=True) if a.shape == b.shape]
    assert len(pairs) >= len(before) - 6
    moved = difference(*map(list, zip(*pairs, strict=True)))

    yolo.train(
        trainer=trainer_of(yolo),
        data=data,
        epochs=1,
        imgsz=SIZE,
        batch=8,
        device="cpu",
        plots=False,
        verbose=False,
        project=str(folder),
        name="run",
        **({"auto_augment": None} if task == "classify" else {}),
    )
    again = YOLO(folder / "run/weights/best.pt")
    sizes = sum(one.numel() for one in again.model.parameters())
    assert sizes == shrunk.parameters[1] or task == "classify", (sizes, shrunk.parameters)
    unfused = outputs(again.model, images[:2])
    fused = outputs(YOLO(again.ckpt_path).model.fuse(verbose=False), images[:2])
    image = str(next((folder / "images").rglob("*.png")))
    exported = again.export(format="onnx", imgsz=SIZE, verbose=False)
    return Result(
        name,
        shrunk.parameters,
        shrunk.macs,
        len(shrunk.held),
        moved,
        difference(fused[:1], unfused[:1]),
        exported_outputs(again, images, exported),
        *farthest(boxes_of(YOLO(exported, task=task), image, task), boxes_of(again, image, task), task),
    )


def table(results: list[Result | tuple[str, str]]) -> str:
    """Write the results as a table of Markdown."""
    lines = [
        "| model | parameters | left | MACs left | held | shrunk | fused | onnxruntime | boxes | farthest box |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        if isinstance(one, tuple):
            lines.append(f"| {one[0]} | {one[1]} | | | | | | | | |")
            continue
        counts = [
            f"{one.parameters[0]:,}",
            *(f"{after / before:.2f}" for before, after in (one.parameters, one.macs)),
        ]
        gaps = [f"{gap:.0e}" for gap in (one.difference, one.fused, one.outputs)]
        found = "scores" if task_of(one.name) == "classify" else str(one.boxes)
        lines.append(f"| {' | '.join([one.name, *counts, str(one.held), *gaps, found, f'{one.pixels:.0e} px'])} |")
    return "\n".join(lines)


PAGE = """# YOLOs that were shrunk

<!-- Written by benchmarks/zoo_ultralytics.py (make zoo-ultralytics). -->

Models of Ultralytics {version} with shaken random weights, of which half of the units of each group of coupled
channels were zeroed at random. `pyprune.integrations.ultralytics.shrink` removed them; the small model was trained
for an epoch on drawn images, saved, loaded again, fused, and exported to ONNX. {right} of {total} models came through
all of it.

{table}

- *shrunk*: the largest difference between the predictions of the masked and the shrunk model, on images of another
  shape than the traced one, relative to the largest value. *fused*: of the trained model after `fuse()`.
  *onnxruntime*: of its exported file and the fused model.
- *held*: kinds of groups that could not be removed.
- *farthest box*: `predict` by onnxruntime and by torch on a drawn image; how far a box, its score or its class is
  from the nearest one of the other's.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--page", type=Path, help="write the table to this page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    results: list[Result | tuple[str, str]] = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            try:
                results.append(run(name, Path(folder)))
            except Exception as error:  # a line of the table
                results.append((name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"))
        print(table(results[-1:]).splitlines()[-1], flush=True)
    right = sum(isinstance(one, Result) and one.is_right for one in results)
    print(f"{right} of {len(results)}")
    if options.page is not None:
        page = PAGE.format(version=ultralytics.__version__, right=right, total=len(results), table=table(results))
        options.page.write_text(page)


if __name__ == "__main__":
    main()
