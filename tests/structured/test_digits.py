"""What least squares brings back of a trained network of which most channels went, whatever chose them."""

import copy

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, granularity, importance, scope

SEEDS = (0, 1, 2)
RATIOS = (0.5, 0.7)
LEAST = (0.985, 0.975)
IMPORTANCES = {
    "L1": importance.magnitude(p=1),
    "L2": importance.magnitude(p=2),
    "Taylor": importance.taylor(),
    "geometric median": importance.geometric_median(),
    "random": importance.random(),
}


def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    selection = pytest.importorskip("sklearn.model_selection")
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    return selection.train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=0)


def block(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def trained(images, labels, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(15):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, images, labels):
    return float((model(images).argmax(1) == labels).double().mean())


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.slow
def test_reconstruct_brings_digits_back_without_labels_whatever_chose_the_channels():
    train, test, train_labels, test_labels = digits()
    batches = train[:400].split(100)
    found = {(name, ratio): [] for name in IMPORTANCES for ratio in RATIOS}
    for seed in SEEDS:
        dense = trained(train, train_labels, seed)
        for name, rule in IMPORTANCES.items():
            known = None
            if name == "Taylor":
                labelled = list(zip(batches, train_labels[:400].split(100), strict=True))
                known = pyprune.calibrate(dense, labelled, rule, loss_fn=loss)
            method = Method(rule, granularity.coupled(), scope.tensor())
            for ratio in RATIOS:
                model = copy.deepcopy(dense)
                pyprune.prune(model, method, ratio=ratio, calibration=known, examples_inputs=train[:2])
                shrunk = pyprune.shrink(model, train[:2])
                pyprune.reconstruct(dense, model, batches, shrunk)
                found[name, ratio].append(accuracy(model, test, test_labels))
    means = {key: sum(values) / len(values) for key, values in found.items()}
    for ratio, least in zip(RATIOS, LEAST, strict=True):
        assert min(mean for (_, one), mean in means.items() if one == ratio) >= least, means
