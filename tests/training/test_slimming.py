import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, granularity, importance, schedules, slimming_loss
from tests.training.test_pruner import backward, small


def test_slimming_loss_is_the_weighted_sum_of_all_scales(cnn):
    with torch.no_grad():
        cnn.model.bn1.weight.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5]))
        cnn.model.bn2.weight.fill_(0.25)
    loss = slimming_loss(cnn.model, 0.1)
    torch.testing.assert_close(loss, torch.tensor(0.1 * (3.5 + 1.5), device=loss.device))
    loss.backward()
    # Of zero the derivative is zero, so a scale that got there may stay.
    torch.testing.assert_close(cnn.model.bn1.weight.grad.cpu(), torch.tensor([0.1, -0.1, 0.0, 0.1]))
    assert (cnn.model.bn2.weight.grad == 0.1).all()
    assert cnn.model.bn1.bias.grad is None
    assert cnn.model.conv1.weight.grad is None


def test_a_norm_that_is_shared_counts_once():
    norm = nn.BatchNorm1d(4)
    assert slimming_loss(nn.Sequential(norm, norm, nn.Linear(4, 4)), 1.0).item() == 4.0


def test_half_precision_is_summed_in_float32():
    norm = nn.BatchNorm1d(5000).to(torch.bfloat16)
    assert slimming_loss(norm, 1.0).item() == 5000


def test_scales_under_a_mask_stay_small_too():
    model = small()
    method = Method(importance.magnitude(), granularity.channel("out"))
    inputs = torch.randn(1, 2, 4, 4)
    pyprune.prune(model, method, ratio=0.5, zero_dead_channels=True, examples_inputs=inputs)
    assert slimming_loss(model, 1.0).item() == 8.0


def test_trained_so_the_channels_with_the_smallest_scales_go():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = Method(importance.batch_norm_scale(), granularity.channel("out"))
    schedule = schedules.one_shot(0.5, start=30)
    ignored = pyprune.IgnoredScope(names=["hidden", "head"])
    inputs = torch.randn(1, 2, 4, 4)
    pruner = pyprune.Pruner(model, method, schedule, optimizer, ignored_scope=ignored, examples_inputs=inputs)
    before = slimming_loss(model, 1.0).item()
    for step in range(30):
        optimizer.zero_grad()
        backward(model, step)
        slimming_loss(model, 0.2).backward()
        optimizer.step()
        pruner.step()
    scales = model.norm.weight.detach().abs()
    assert scales.sum() < before - 1
    alive = (model.conv.weight != 0).flatten(1).any(1)
    assert int(alive.sum()) == 4
    assert scales[alive].min() >= scales[~alive].max()


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "0.1", True, None])
def test_wrong_weights_are_refused(weight):
    with pytest.raises((TypeError, ValueError), match=r"weight is .*; give a number, 0 or more"):
        slimming_loss(small(), weight)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm1d(3, affine=False), nn.LayerNorm(3)])
def test_a_model_without_scales_is_refused(model):
    with pytest.raises(ValueError, match="has no BatchNorm with a scale"):
        slimming_loss(model)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        slimming_loss([model])
