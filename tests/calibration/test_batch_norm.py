import copy
import io
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyprune
from pyprune import Dataset, batch_norm_adaptation


def batches(model, count=3):
    device = next(model.parameters()).device
    return [torch.randn(8, 1, 8, 8, device=device) + 1 for _ in range(count)]


def test_batch_norm_adaptation_moves_the_statistics_by_the_momentum():
    norm, data = nn.BatchNorm1d(2, momentum=0.3), [torch.randn(5, 2) * 3 + 7 for _ in range(4)]
    mean, var = torch.zeros(2), torch.ones(2)
    for batch in data:
        mean = 0.7 * mean + 0.3 * batch.mean(0)
        var = 0.7 * var + 0.3 * batch.var(0)
    assert batch_norm_adaptation(norm, data) is norm
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.num_batches_tracked == 4


def test_batch_norm_adaptation_with_reset_averages_over_the_batches():
    norm, data = nn.BatchNorm1d(2, momentum=0.3), [torch.randn(5, 2) * 3 + 7 for _ in range(4)]
    norm.running_mean.fill_(100)
    batch_norm_adaptation(norm, data, reset=True)
    torch.testing.assert_close(norm.running_mean, torch.stack([batch.mean(0) for batch in data]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([batch.var(0) for batch in data]).mean(0))
    assert norm.momentum == 0.3
    assert norm.num_batches_tracked == 4


@pytest.mark.parametrize("reset", [False, True])
def test_batch_norm_adaptation_changes_running_statistics_only(cnn, reset):
    cnn.model.bn1.eval()
    cnn.model.dropout.train()
    pyprune.prune(cnn.model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.5)
    before = {name: tensor.clone() for name, tensor in cnn.model.state_dict().items()}
    flags = [module.training for module in cnn.model.modules()]
    batch_norm_adaptation(cnn.model, batches(cnn.model), reset=reset)
    changed = {name for name, tensor in cnn.model.state_dict().items() if not torch.equal(tensor, before[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{norm}.{name}" for norm in ("bn1", "bn2") for name in statistics}
    assert [module.training for module in cnn.model.modules()] == flags
    assert all(parameter.grad is None for parameter in cnn.model.parameters())


def test_batch_norm_adaptation_handles_layers_without_momentum_or_statistics():
    model = nn.Sequential(
        nn.BatchNorm1d(2, momentum=None), nn.BatchNorm1d(2, track_running_stats=False), nn.SyncBatchNorm(2)
    )
    data = [torch.randn(5, 2) for _ in range(3)]
    batch_norm_adaptation(model, data)
    torch.testing.assert_close(model[0].running_mean, torch.stack([batch.mean(0) for batch in data]).mean(0))
    assert model[0].momentum is None
    assert model[1].running_mean is None
    assert model[2].num_batches_tracked == 3


@pytest.mark.parametrize(("num_iterations", "expected"), [(None, 4), (1, 1), (3, 3), (9, 4)])
def test_batch_norm_adaptation_reads_no_more_than_num_iterations(cnn, num_iterations, expected):
    read = []
    batch_norm_adaptation(
        cnn.model, (read.append(batch) or batch for batch in batches(cnn.model, 4)), num_iterations=num_iterations
    )
    assert len(read) == expected
    assert cnn.model.bn1.num_batches_tracked == expected


def test_batch_norm_adaptation_takes_loaders_with_a_transform(cnn):
    images = torch.randn(20, 1, 8, 8, device=cnn.inputs.device)
    loader = DataLoader(TensorDataset(images, torch.zeros(20)), batch_size=8)
    batch_norm_adaptation(cnn.model, Dataset(loader, lambda batch: batch[0]))
    assert cnn.model.bn1.num_batches_tracked == 3
    batch_norm_adaptation(cnn.model, Dataset(loader, lambda batch: {"images": batch[0]}))
    batch_norm_adaptation(cnn.model, Dataset(loader, lambda batch: (batch[0],)))
    assert cnn.model.bn1.num_batches_tracked == 9


def labelled():
    return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.zeros(8)), batch_size=4)


class Broken:
    def __iter__(self):
        yield torch.randn(8, 1, 8, 8)
        raise OSError("disk full")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"calibration_dataset": labelled()}, ValueError, r"list of 2.*transform_func=lambda batch: batch\[0\]"),
        ({"calibration_dataset": []}, ValueError, "gave no batch"),
        ({"calibration_dataset": 3}, TypeError, "DataLoader or another iterable"),
        ({"calibration_dataset": Broken()}, OSError, "disk full"),
        ({"calibration_dataset": [torch.zeros(2, 3)]}, RuntimeError, "input"),
        ({"calibration_dataset": Dataset([1], lambda item: item / 0)}, ZeroDivisionError, "zero"),
        ({"num_iterations": 0}, ValueError, "at least 1"),
        ({"num_iterations": -1}, ValueError, "at least 1"),
        ({"num_iterations": 1.5}, TypeError, "number of batches"),
        ({"num_iterations": True}, TypeError, "number of batches"),
        ({"model": nn.Linear(1, 1)}, ValueError, "Linear has no BatchNorm"),
        ({"model": nn.BatchNorm1d(1, track_running_stats=False)}, ValueError, "no BatchNorm with running"),
        ({"model": nn.InstanceNorm1d(1, track_running_stats=True)}, ValueError, "no BatchNorm"),
        ({"model": 3}, TypeError, "torch.nn.Module"),
    ],
)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_batch_norm_adaptation_leaves_the_model_alone_on_an_error(cnn, arguments, error, text, reset):
    cnn.model.bn1.eval()
    cnn.model.bn2.momentum = 0.25
    before = {name: tensor.clone() for name, tensor in cnn.model.state_dict().items()}
    flags = [module.training for module in cnn.model.modules()]
    arguments = {"model": cnn.model, "calibration_dataset": batches(cnn.model), "reset": reset} | arguments
    with pytest.raises(error, match=text):
        batch_norm_adaptation(arguments.pop("model"), arguments.pop("calibration_dataset"), **arguments)
    for name, tensor in cnn.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [module.training for module in cnn.model.modules()] == flags
    assert cnn.model.bn2.momentum == 0.25


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_batch_norm_adaptation_shows_progress_of_several_batches_on_a_terminal(cnn, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for stream, count, shows in ((io.StringIO(), 3, False), (Terminal(), 3, True), (Terminal(), 1, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        batch_norm_adaptation(cnn.model, batches(cnn.model, count))
        assert ("BatchNorm adaptation" in stream.getvalue()) is shows


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_batch_norm_adaptation_gives_the_cursor_back_after_an_error(cnn, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    try:
        batch_norm_adaptation(cnn.model, Broken())
    except OSError:
        assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l") >= 0
    else:
        pytest.fail("the loader raises")


def test_dataset_gives_data_as_is_and_transformed():
    dataset = Dataset(range(5), lambda item: item * 10)
    assert list(dataset.get_data()) == [0, 1, 2, 3, 4]
    assert list(dataset.get_data(indices=[3, 1])) == [1, 3]
    assert list(dataset.get_data(indices=[])) == []
    assert list(dataset.get_inference_data()) == [0, 10, 20, 30, 40]
    assert list(dataset.get_inference_data([0, 4])) == [0, 40]
    assert list(Dataset(("a", "b")).get_inference_data()) == ["a", "b"]


def test_dataset_reads_no_further_than_the_last_index():
    endless = iter(int, 1)
    assert list(Dataset(endless).get_data([2, 0])) == [0, 0]


def test_dataset_knows_length_and_batch_size():
    loader = DataLoader(TensorDataset(torch.zeros(10)), batch_size=4)
    assert (Dataset(loader).get_length(), Dataset(loader).get_batch_size()) == (3, 4)
    assert (Dataset(iter([])).get_length(), Dataset([]).get_batch_size()) == (None, None)


def test_dataset_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match="DataLoader"):
        Dataset(3)
    with pytest.raises(TypeError, match="function"):
        Dataset([], "drop labels")


def test_batch_norm_adaptation_takes_a_plain_loader_without_labels(cnn):
    loader = DataLoader(TensorDataset(cnn.inputs), batch_size=4)
    expected = batch_norm_adaptation(copy.deepcopy(cnn.model), list(cnn.inputs.split(4)), reset=True)
    batch_norm_adaptation(cnn.model, loader, reset=True)
    assert torch.equal(cnn.model.bn1.running_mean, expected.bn1.running_mean)


class MapStyle(torch.utils.data.Dataset):
    """Gives an item for any index, so that Python's own iteration would never end."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.full((4, 2), float(index))


def test_dataset_reads_a_map_style_dataset_by_its_length():
    assert [int(item[0, 0]) for item in Dataset(MapStyle()).get_data()] == [0, 1, 2]
    assert [int(item[0, 0]) for item in Dataset(MapStyle()).get_data([2, 0])] == [0, 2]
    norm = batch_norm_adaptation(nn.BatchNorm1d(2), MapStyle(), reset=True)
    assert norm.running_mean.tolist() == [1, 1]
    endless = type("Endless", (), {"__getitem__": MapStyle.__getitem__})()
    with pytest.raises(TypeError, match="__getitem__ and __len__"):
        Dataset(endless)


def test_batch_norm_adaptation_gives_the_model_what_the_transform_returns():
    class Stacking(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, rows):
            assert isinstance(rows, list)
            return self.norm(torch.stack([*rows, *rows]))

    model = Stacking()
    batch_norm_adaptation(model, Dataset([[torch.ones(2)], [torch.ones(2)] * 2], lambda rows: rows))
    assert model.norm.num_batches_tracked == 2


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_batch_norm_adaptation_refuses_statistics_that_it_cannot_write():
    with pytest.raises(ValueError, match="running_mean is lazy"):
        batch_norm_adaptation(nn.LazyBatchNorm1d(affine=False), [torch.ones(2, 2)])
    with torch.inference_mode():
        norm = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match=r"under torch\.inference_mode"):
        batch_norm_adaptation(norm, [torch.ones(2, 2)])


class Experts(nn.Module):
    """Each input says which branch takes it."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.BatchNorm1d(2, momentum=0.0 if i == 1 else 0.1) for i in range(3)])

    def forward(self, x, index):
        return self.experts[index](x)


@pytest.mark.parametrize("reset", [False, True])
def test_batch_norm_adaptation_names_layers_that_no_batch_reached_and_leaves_their_statistics(reset):
    model = Experts()
    for index in range(3):
        model(torch.randn(8, 2) + 5, index)
    before = copy.deepcopy(model.experts[2].state_dict())
    with pytest.warns(UserWarning, match=r"no batch reached experts\.2: ") as caught:
        batch_norm_adaptation(model, [(torch.randn(8, 2), 0), (torch.randn(8, 2), 1)], reset=reset)
    assert [one.filename for one in caught] == [__file__]
    for name, value in model.experts[2].state_dict().items():
        assert torch.equal(value, before[name])
    assert model.experts[2].momentum == 0.1
    assert model.experts[0].num_batches_tracked == (1 if reset else 2)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_batch_norm_adaptation_refuses_batches_that_are_not_finite(cnn, value, reset):
    model, data = cnn.model, batches(cnn.model)
    data[1][3, 0, 2, 2] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"after batch 1 the BatchNorm statistics of .* are NaN or infinite"):
        batch_norm_adaptation(model, data, reset=reset)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
