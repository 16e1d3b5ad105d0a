"""Needs ultralytics and torchvision, which `make test` does not install: `make ultralytics` does, and runs this."""

import os
import pickle
import tempfile

import pytest
import torch

import pyprune
from pyprune import Method, Pruner, Recipe, importance, schedules

pytest.importorskip("yaml")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
os.environ["YOLO_OFFLINE"] = "1"
ultralytics = pytest.importorskip("ultralytics")

import zoo_ultralytics as zoo  # noqa: E402
from drawn_images import draw  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from ultralytics import YOLO  # noqa: E402
from ultralytics.models.yolo.detect import DetectionTrainer  # noqa: E402

from pyprune.integrations.ultralytics import add_pruning, shrink, trainer_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
RECIPE = "stages: [prune: {final: 0.6, end: 2, frequency: 0.5, scope: model, max_ratio: 0.9}]"


class Interrupted(Exception):
    pass


def interrupt(trainer):
    raise Interrupted


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("images"), "detect")


def options(data, folder, name="run", **others):
    """Options for six batches in an epoch, each of which is a step of the optimizer unless ``nbs`` is more."""
    return {
        "data": data,
        "epochs": 4,
        "imgsz": 64,
        "batch": 4,
        "nbs": 4,
        "device": "cpu",
        "plots": False,
        "verbose": False,
        "project": str(folder),
        "name": name,
        **others,
    }


def sparsity(model):
    weights = [one for name, one in model.named_parameters() if one.dim() > 1 and "dfl" not in name]
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


def zeros(model):
    return {name: one == 0 for name, one in model.named_parameters() if one.dim() > 1}


def same_zeros(model, other):
    other = zeros(other)
    return all(torch.equal(zero, other[name]) for name, zero in zeros(model).items())


def watched(yolo, stop_after=None):
    """Look at each epoch: its sparsity; what is validated, and what is saved, must have the same zeros."""
    found = {}

    def ended(trainer):
        assert same_zeros(trainer.model, trainer.ema.ema)
        found[trainer.epoch] = sparsity(trainer.model)

    def saved(trainer):
        checkpoint = torch.load(trainer.last, weights_only=False)
        assert same_zeros(trainer.model, checkpoint["ema"])
        assert b"pyprune" not in pickle.dumps(checkpoint)
        if trainer.epoch == stop_after:
            raise Interrupted

    yolo.add_callback("on_train_epoch_end", ended)
    yolo.add_callback("on_model_save", saved)
    return found


def measured(rule):
    def start(model, optimizer, steps):
        return Pruner(model, Method(rule()), schedules.cubic(0.6, end=2 * steps), optimizer)

    return start


@pytest.mark.parametrize(
    ("prune", "others"),
    [
        (Recipe.from_string(RECIPE), {}),
        (Recipe.from_string(RECIPE), {"nbs": 64, "close_mosaic": 2}),  # one step of the optimizer in all
        (Recipe.from_string(RECIPE), {"amp": True, "freeze": 3, "optimizer": "MuSGD"}),
        (measured(importance.magnitude), {"nbs": 8, "optimizer": "SGD"}),
        (measured(importance.taylor), {"nbs": 8}),
    ],
)
def test_add_pruning_prunes_what_is_trained_validated_and_saved(data, tmp_path, prune, others):
    yolo = YOLO("yolov8n.yaml")
    add_pruning(yolo, prune)
    found = watched(yolo)
    yolo.train(**options(data, tmp_path, **others))
    assert 0 < found[0] < found[1] == pytest.approx(0.6, abs=1e-4)
    assert found[3] == pytest.approx(0.6, abs=1e-4)
    for name in ("last.pt", "best.pt"):
        file = tmp_path / "run/weights" / name
        checkpoint = torch.load(file, weights_only=False)
        assert b"pyprune" not in file.read_bytes()
        assert not [one for one in vars(checkpoint["model"]) if "prun" in one]
    assert sparsity(checkpoint["model"]) == pytest.approx(0.6, abs=1e-4)
    integral = yolo.model.model[-1].dfl.conv.weight
    assert integral.flatten().tolist() == list(range(16))
    assert "pruning_sparsity" in (tmp_path / "run/results.csv").read_text()
    assert len(yolo.predict(torch.rand(1, 3, 64, 64), verbose=False)) == 1


@pytest.mark.parametrize("prune", [Recipe.from_string(RECIPE), measured(importance.taylor)])
def test_add_pruning_goes_on_after_an_interruption(data, tmp_path, prune):
    yolo = YOLO("yolov8n.yaml")
    add_pruning(yolo, prune)
    before = watched(yolo, stop_after=0)
    with pytest.raises(Interrupted):
        yolo.train(**options(data, tmp_path))
    again = YOLO(tmp_path / "run/weights/last.pt")
    add_pruning(again, prune)
    saved = torch.load(tmp_path / "run/weights/last.pt", weights_only=False)["ema"]
    seen = []
    again.add_callback(
        "on_train_start", lambda trainer: seen.append((trainer.start_epoch, same_zeros(trainer.model, saved)))
    )
    after = watched(again)
    again.train(resume=True, batch=8)  # other batches do not change what an epoch is
    assert seen == [(1, True)]
    assert 0 < before[0] < after[1]
    assert list(after) == [1, 2, 3]
    assert after[1] == after[3] == pytest.approx(0.6, abs=1e-4)


def test_add_pruning_goes_back_with_a_trainer_that_diverged(data, tmp_path):
    yolo = YOLO("yolov8n.yaml")
    add_pruning(yolo, measured(importance.taylor))
    starts = []

    def poison(trainer):
        if trainer.epoch == 1 and starts.count(1) == 1:
            next(trainer.model.parameters()).data.fill_(float("nan"))

    yolo.add_callback("on_train_epoch_start", lambda trainer: starts.append(trainer.epoch))
    yolo.add_callback("on_train_batch_start", poison)
    found = {}
    yolo.add_callback("on_fit_epoch_end", lambda trainer: found.update({trainer.epoch: sparsity(trainer.model)}))
    watched(yolo)
    yolo.callbacks["on_train_epoch_end"].pop()  # nothing was given to the average before the epoch is done again
    yolo.train(**options(data, tmp_path))
    assert starts == [0, 1, 1, 2, 3]
    assert found[1] == pytest.approx(0.6, abs=1e-4)


def test_add_pruning_holds_the_zeros_of_a_pruned_model(data, tmp_path):
    yolo = YOLO("yolov8n.yaml")
    add_pruning(yolo, Recipe.from_string(RECIPE))
    yolo.train(**options(data, tmp_path, epochs=2))
    pruned = YOLO(tmp_path / "run/weights/best.pt")
    zero = zeros(pruned.model)
    before = next(pruned.model.parameters()).clone()
    add_pruning(pruned, pyprune.keep_sparse)
    watched(pruned, stop_after=0)
    with pytest.raises(Interrupted):
        pruned.train(**options(data, tmp_path, "more", epochs=2))
    again = YOLO(tmp_path / "more/weights/last.pt")
    add_pruning(again, pyprune.keep_sparse)
    watched(again)
    again.train(resume=True)
    found = zeros(again.model)
    assert all((found[name] >= one).all() for name, one in zero.items())
    assert sparsity(again.model) == pytest.approx(0.6, abs=1e-4)
    assert not torch.equal(before, next(again.model.parameters()))


def test_add_pruning_shows_a_function_what_can_go(data, tmp_path):
    found = []

    def start(model, optimizer, steps):
        found.extend(group.name for group in pyprune.coupled_groups(model, torch.rand(1, 3, 64, 64)))
        return pyprune.gmp(model, 0.5, optimizer, end=steps, examples_inputs=torch.rand(1, 3, 64, 64))

    yolo = YOLO("yolov8n.yaml")
    add_pruning(yolo, start)
    yolo.train(**options(data, tmp_path, epochs=1))
    assert "model.15.cv2.conv.weight" in found  # a feature map that the model returns
    assert not [hook for module in yolo.trainer.model.modules() for hook in module._forward_hooks.values()]
    assert sparsity(yolo.model) == pytest.approx(0.5, abs=1e-3)


def test_add_pruning_to_a_trainer(data, tmp_path):
    trainer = DetectionTrainer(overrides={"model": "yolov8n.yaml", **options(data, tmp_path, epochs=2)})
    add_pruning(trainer, Recipe.from_string(RECIPE))
    found = watched(trainer)
    trainer.train()
    assert found[1] == pytest.approx(0.6, abs=1e-4)
    assert not [name for module in trainer.model.modules() for name in vars(module) if "pyprune" in name]


def test_add_pruning_refuses_what_it_cannot_do(data, tmp_path):
    yolo = YOLO("yolov8n.yaml")
    with pytest.raises(TypeError, match="give a YOLO, or a trainer"):
        add_pruning(yolo.model, pyprune.keep_sparse)
    with pytest.raises(TypeError, match="prune is a int"):
        add_pruning(yolo, 3)
    yolo.add_callback("on_model_save", interrupt)
    with pytest.raises(Interrupted):
        yolo.train(**options(data, tmp_path))
    again = YOLO(tmp_path / "run/weights/last.pt")
    add_pruning(again, Recipe.from_string(RECIPE))
    with pytest.raises(ValueError, match="there is a pruning already"):
        add_pruning(again, Recipe.from_string(RECIPE))
    with pytest.raises(ValueError, match=r"goes on at epoch 2, but .*last\.pt was saved without a pruning"):
        again.train(resume=True)


def half_zero(name, size=96):
    """Return a YOLO with half of the units of each group zeroed, and its predictions for two images."""
    torch.manual_seed(0)
    yolo = YOLO(f"{name}.yaml", task=zoo.task_of(name))
    model = yolo.model.eval()
    zoo.shake(model)
    zoo.zero_half(model, torch.rand(1, 3, size, size))
    images = torch.rand(2, 3, 64, 128)
    return yolo, images, predictions(model, images)


def count(model):
    """Count parameters, but those of a classifier's last layer, which is another one for other data."""
    return sum(one.numel() for name, one in model.named_parameters() if "linear" not in name)


def predictions(model, images):
    with torch.no_grad():
        return [one for one in tree_leaves(model.eval()(images)[0]) if isinstance(one, torch.Tensor)]


@pytest.mark.parametrize(
    "name", ["yolov5n", "yolov8n-seg", "yolov9t", "yolov10n", "yolo11n-pose", "yolo12n", "yolo26n", "yolo26n-seg"]
)
def test_shrink_leaves_a_small_model_that_predicts_the_same_and_trains(name):
    yolo, images, before = half_zero(name)
    model = yolo.model
    shrunk = shrink(yolo)
    assert not shrunk.held
    assert shrunk.parameters[1] < 0.29 * shrunk.parameters[0]
    assert shrunk.parameters[1] == sum(one.numel() for one in model.parameters())
    for found, wanted in zip(predictions(model, images), before, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)
    raw = tree_leaves(model.train()(images))
    sum(one.square().mean() for one in raw if isinstance(one, torch.Tensor)).backward()
    fresh = YOLO(f"{name}.yaml", task=yolo.task).model
    pyprune.rebuild(fresh, shrunk.plan).load_state_dict(model.state_dict())
    for found, wanted in zip(predictions(fresh, images), predictions(model, images), strict=True):
        assert torch.equal(found, wanted)
    for one, other in zip(fresh.modules(), model.modules(), strict=True):
        sizes = [{key: value for key, value in vars(each).items() if type(value) is int} for each in (one, other)]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["yolov8n", "yolov9t", "yolov10n"])
def test_shrink_follows_the_sizes_that_other_ways_read(name):
    yolo, images, before = half_zero(name)
    shrink(yolo)
    model = yolo.model
    split = [module for module in model.modules() if hasattr(module, "forward_split")]
    assert split
    for module in split:
        module.forward = module.forward_split
    for found, wanted in zip(predictions(model, images), before, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)
    # What is traced is what would be built with the small sizes.
    for module in model.modules():
        if hasattr(module, "np"):
            assert module.np == sum(one.numel() for one in module.parameters())


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n-cls", "yolo11n-obb"])
def test_trainer_of_trains_the_small_model_which_loads_fuses_and_resumes(tmp_path, name):
    data = draw(tmp_path / "images", zoo.task_of(name), classes=80)
    yolo, images, _ = half_zero(name)
    shrink(yolo)
    size = count(yolo.model)
    with pytest.raises(KeyError, match="this model was shrunk"):
        yolo.train(**options(data, tmp_path, "dense", epochs=1))
    yolo.save(tmp_path / "small.pt")
    with pytest.raises(KeyError, match="this model was shrunk"):
        YOLO(tmp_path / "small.pt").train(**options(data, tmp_path, "dense", epochs=1))
    if name == "yolov8n":
        yolo.add_callback("on_model_save", interrupt)
        with pytest.raises(Interrupted):
            yolo.train(trainer=trainer_of(yolo), **options(data, tmp_path, epochs=2))
        yolo = YOLO(tmp_path / "run/weights/last.pt")
        yolo.train(trainer=trainer_of(yolo), resume=True)
    else:
        yolo.train(trainer=trainer_of(yolo), **options(data, tmp_path, epochs=1))
    again = YOLO(tmp_path / "run/weights/best.pt")
    assert count(again.model) == size
    before = predictions(again.model, images)
    fused = YOLO(tmp_path / "run/weights/best.pt").model.fuse(verbose=False)
    for one, other in zip(predictions(fused, images), before, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()), rtol=1e-4)
    assert again.val(data=data, imgsz=64, device="cpu", plots=False, verbose=False) is not None


def test_a_shrunk_model_is_pruned_further_and_exported_with_the_same_boxes(tmp_path):
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "images"
    data = draw(folder, "detect", classes=80)
    yolo, _, _ = half_zero("yolov8n")
    zoo.settle_statistics(yolo.model, zoo.images_in(folder))
    shrink(yolo)
    add_pruning(yolo, Recipe.from_string(RECIPE))
    yolo.train(trainer=trainer_of(yolo), **options(data, tmp_path, epochs=3))
    assert sparsity(yolo.model) == pytest.approx(0.6, abs=1e-3)
    yolo = YOLO(tmp_path / "run/weights/best.pt")
    image = str(next(folder.rglob("*.png")))
    exported = YOLO(yolo.export(format="onnx", imgsz=96, verbose=False), task="detect")
    boxes = [zoo.boxes_of(one, image, "detect") for one in (exported, yolo)]
    count, distance = zoo.farthest(*boxes, "detect")
    assert count >= 5
    assert distance < 1e-2


def test_coupled_channels_are_pruned_while_a_model_trains_and_then_go(data, tmp_path):
    recipe = "stages: [prune: {final: 0.5, end: 1, frequency: 0.5, scope: tensor, granularity: coupled}]"
    yolo = YOLO("yolov8n.yaml")
    add_pruning(yolo, Recipe.from_string(recipe))
    watched(yolo)
    yolo.train(**options(data, tmp_path, epochs=2))
    yolo = YOLO(tmp_path / "run/weights/best.pt")
    images = torch.rand(2, 3, 64, 64)
    before = predictions(yolo.model, images)
    shrunk = shrink(yolo)
    assert not shrunk.held
    assert shrunk.parameters[1] < 0.27 * shrunk.parameters[0]
    for found, wanted in zip(predictions(yolo.model, images), before, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)


def test_shrink_and_trainer_of_refuse_what_they_cannot_do(data, tmp_path):
    yolo = YOLO("yolov8n.yaml")
    for wrong in (3, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="give a YOLO"):
            shrink(wrong)
    with pytest.raises(TypeError, match="give a YOLO"):
        trainer_of(yolo.model)
    with pytest.raises(TypeError, match="imgsz"):
        shrink(yolo, imgsz=1.5)
    with pytest.raises(ValueError, match="made for 80 classes, and the data has 2"):
        yolo.train(trainer=trainer_of(yolo), **options(data, tmp_path))
    pyprune.prune(yolo.model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    with pytest.raises(ValueError, match="the model has masks"):
        yolo.train(trainer=trainer_of(yolo), **options(data, tmp_path))
    yolo.fuse()
    for refused in (shrink, trainer_of):
        with pytest.raises(ValueError, match="the model is fused"):
            refused(yolo)
