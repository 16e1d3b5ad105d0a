"""Models of Ultralytics that are smaller than their YAML says: `shrink` makes them, and `trainer_of` trains them.

- A model returns its feature maps beside its predictions. They are for the loss, which takes nothing but their sizes,
  so their channels go like others. Some heads have layers that only training goes through.
- Some sizes are read only on ways that no example takes: the exporter has `C2f` split by its number of channels.
- A trainer builds its model anew from the YAML, and loads what fits. That would be the dense model again, so the YAML
  of a shrunk one says what to do instead, and `trainer_of` makes a trainer that takes the model itself.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from ultralytics.nn import modules as library
from ultralytics.nn.modules import block, conv

from pyprune.checks import check_count, shown
from pyprune.modules.averages import masks_by_name
from pyprune.structured.plan import Plan
from pyprune.structured.remembered import plan_of, remember
from pyprune.structured.shrink import shrink as shrink_model
from pyprune.structured.shrunk import Shrunk

_NO_YAML = (
    "this model was shrunk and is smaller than its YAML: give yolo.train a "
    "trainer=pyprune.integrations.ultralytics.trainer_of(yolo)"
)
# Of what makes two halves, or one whole, in ``cv1``, the size that is in ``c``.
_HALVES = (block.C2, block.C2f, block.C2fAttn, block.C2PSA, block.PSA, block.RepNCSPELAN4)
_WHOLES = (block.ADown, block.SPPELAN)


def shrink(
    yolo: Any,
    examples: Any = None,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    round_to: int = 1,
    constants: Literal["exact", "drop"] = "exact",
    verify: float = 1e-4,
    imgsz: int = 128,
) -> Shrunk:
    """Remove what is dead from a model of Ultralytics, in place, as `pyprune.shrink` does it.

    Sizes that only the exporter reads are right, too. The small model predicts, validates, fuses, exports and is
    saved as ever: ``yolo.save("small.pt")``, ``YOLO("small.pt")``. To train it: `trainer_of`.

    Args:
        yolo: a ``YOLO``, or a model of Ultralytics, not fused.
        examples: images (batch, channels, height, width), of which one is drawn if None; see `pyprune.shrink`.
        optimizer, round_to, constants, verify: as in `pyprune.shrink`.
        imgsz: height and width of the image that is drawn, a multiple of the model's stride. What is removed does not
            depend on it.

    Returns:
        What `pyprune.shrink` returns. With its plan, `pyprune.rebuild` makes the model of the same YAML as small.

    Raises:
        TypeError, ValueError: as `pyprune.shrink`; and for a model that is none of Ultralytics, or is fused. The
            model is then as it was.

    Example:
        >>> yolo = YOLO("best.pt")  # doctest: +SKIP
        >>> pyprune.prune(yolo.model, ...)  # doctest: +SKIP
        >>> print(shrink(yolo))  # doctest: +SKIP
        >>> yolo.train(trainer=trainer_of(yolo), data="coco8.yaml", epochs=8)  # doctest: +SKIP
        >>> yolo.export(format="onnx")  # doctest: +SKIP
    """
    model = _model_of(yolo)
    if examples is None:
        check_count("imgsz", imgsz, least=32)
        examples = drawn_image(model, imgsz)
    with traceable(model):
        found = shrink_model(
            model, examples, optimizer=optimizer, round_to=round_to, constants=constants, verify=verify
        )
    changes = []
    for name, attribute, value in _sizes(model):
        module = model.get_submodule(name)
        if (old := getattr(module, attribute)) != value:
            setattr(module, attribute, value)
            changes.append([name, attribute, value, old])
    remember(model, Plan(attributes=changes))
    found = replace(found, plan=plan_of(model) or found.plan)
    if found.removed:
        model.yaml = {**model.yaml, "backbone": [[-1, 1, _NO_YAML, []]]}  # type: ignore[dict-item, assignment]
    if yolo is not model:
        yolo.predictor = None  # it has a copy of the model
        yolo.ckpt = yolo.ckpt or {"model": model}  # or a trainer would not ask for the YAML of the model
    return found


def trainer_of(yolo: Any) -> type[Any]:
    """Return a trainer for the task of a ``YOLO`` that takes the model as it is, and not as its YAML says.

    It trains a copy. Checkpoints have the small model, and load in any ``YOLO``; ``resume=True`` wants this trainer,
    of a ``YOLO`` with the checkpoint.

    Args:
        yolo: whose model is to be trained, with the classes of the data.

    Raises:
        TypeError, ValueError: if it has no model of Ultralytics, or one that is fused; and by the trainer, if the
            data has other classes or keypoints than the model.

    Example:
        >>> yolo.train(trainer=trainer_of(yolo), data="coco8.yaml", epochs=8)  # doctest: +SKIP
    """
    tasks = getattr(yolo, "task_map", None)
    if not isinstance(tasks, dict):
        raise TypeError(f"yolo is {shown(yolo)}; give a YOLO of Ultralytics")
    kept = _model_of(yolo)
    base = tasks[yolo.task]["trainer"]

    class Trainer(base):  # type: ignore[misc, valid-type]
        """A trainer that keeps the model that it is given."""

        def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
            """Return a copy of the model: that of the checkpoint, if it resumes from one."""
            model = copy.deepcopy(kept if weights is None else weights)
            if masks_by_name(model):
                raise ValueError(
                    "the model has masks, which its checkpoints would be full of. Let go of them by pyprune.strip, "
                    "and let pyprune.integrations.ultralytics.add_pruning(yolo, pyprune.keep_sparse) hold its zeros"
                )
            _check_fits(model, self.data)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".dfl" not in name)  # as its trainers do
            return model

    Trainer.__name__ = Trainer.__qualname__ = base.__name__
    return Trainer


def drawn_image(model: Any, size: int = 128) -> torch.Tensor:
    """Return an image as a model takes it, (1, channels, size, size)."""
    # Smooth, as images are: what a network makes of noise may be anything.
    drawn = torch.rand(1, model.yaml.get("channels", 3), 8, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(drawn, (size, size), mode="bilinear").to(next(model.parameters()))


@contextmanager
def traceable(model: Any) -> Iterator[None]:
    """Within it, a model returns what `shrink` looks at: what its last layer computes in evaluation and in training.

    Without feature maps; and of a layer that chooses the best boxes, what it chooses from: a rounding may change the
    order of equals.
    """
    head = model.model[-1]
    trained: list[Any] = []

    def train(head: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Norms go on as in evaluation. Lists are copied, because some heads write into them.
        ways = [one for one in head.modules() if not isinstance(one, nn.modules.batchnorm._BatchNorm)]
        modes = [one.training for one in ways]
        for one in ways:
            one.training = True
        trained[:] = [head.forward(*(list(one) if isinstance(one, list) else one for one in inputs))]
        for one, mode in zip(ways, modes, strict=True):
            one.training = mode

    def join(head: nn.Module, inputs: object, output: Any) -> Any:
        is_chosen = type(output) is tuple and head.end2end
        return _without_features([output[1:] if is_chosen else output, *trained])

    hooks = []
    if isinstance(head, library.Detect):
        hooks = [head.register_forward_pre_hook(train), head.register_forward_hook(join)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without_features(output: Any) -> Any:
    if isinstance(output, dict):
        return {name: _without_features(one) for name, one in output.items() if name != "feats"}
    if type(output) in (tuple, list):
        return type(output)(map(_without_features, output))
    return output


def _model_of(yolo: Any) -> nn.Module:
    model = yolo if isinstance(yolo, nn.Module) and not hasattr(yolo, "task_map") else getattr(yolo, "model", None)
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "yaml", None), dict):
        raise TypeError(f"yolo is {shown(yolo)}; give a YOLO, or its model, as torch has it (no exported one)")
    if model.is_fused():  # type: ignore[operator]
        raise ValueError("the model is fused, for inference only; shrink and train it before yolo.fuse()")
    return model


def _sizes(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Yield sizes that modules of the library have in attributes, as they are to be."""
    for name, module in model.named_modules():
        if isinstance(module, _HALVES):
            yield name, "c", module.cv1.conv.out_channels // 2
        elif isinstance(module, _WHOLES):
            yield name, "c", module.cv1.conv.out_channels
        elif isinstance(module, block.C3x):
            yield name, "c_", module.cv1.conv.out_channels
        elif isinstance(module, conv.RepConv):
            yield name, "c1", module.conv1.conv.in_channels
            yield name, "c2", module.conv1.conv.out_channels
            yield name, "g", module.conv1.conv.groups
        elif isinstance(module, block.RepVGGDW):
            yield name, "dim", module.conv.conv.out_channels
        if hasattr(module, "np"):  # what ``info`` shows
            yield name, "np", sum(parameter.numel() for parameter in module.parameters())


def _check_fits(model: nn.Module, data: Any) -> None:
    """Raise if a model has other classes or keypoints than the data."""
    head = model.model[-1]  # type: ignore[index]
    if isinstance(head, library.Classify):
        return  # the trainer gives it another last layer
    for what, has, wanted in (
        ("classes", getattr(head, "nc", None), data.get("nc")),
        ("keypoints", getattr(head, "kpt_shape", None), data.get("kpt_shape")),
    ):
        if has is not None and wanted is not None and has != wanted and list(_as_list(has)) != list(_as_list(wanted)):
            raise ValueError(
                f"the model is made for {shown(has)} {what}, and the data has {shown(wanted)}. Train the dense model "
                "on this data first, then shrink it"
            )


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]
