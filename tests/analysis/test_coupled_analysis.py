import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, allocation_from_sensitivity, coupled_groups, granularity, importance, schedules, scope

METHOD = Method(importance.magnitude(p=2), granularity.coupled(), scope.tensor())


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("round_to", [1, 8])
def test_model_costs_what_was_asked_for_once_it_is_shrunk(round_to, tmp_path):
    model, images = net(), torch.randn(4, 3, 8, 8)
    outputs = model(images).detach()
    groups = coupled_groups(model, images)

    def error(model):
        return nn.functional.mse_loss(model(images), outputs)

    result = pyprune.sensitivity(
        model, error, method=METHOD, examples_inputs=images, higher_is_better=False, save_to=tmp_path / "scores.json"
    )
    assert result.targets.keys() == {group.name for group in groups}
    again = pyprune.SensitivityResult.from_json(tmp_path / "scores.json")
    ratios = allocation_from_sensitivity(again, target_macs=0.5, groups=groups, round_to=round_to, rule="equal")
    trained = []

    def finetune(model):
        trained.append(sum(one.pruned_ratio > 0 for one in pyprune.pruning_statistic(model).pruned_tensors))

    pyprune.iterative_prune(
        model, schedules.in_turn(ratios), METHOD, finetune, error, examples_inputs=images, higher_is_better=False
    )
    assert len(trained) == 2
    assert trained[0] < trained[1]
    masked = model(images)
    shrunk = pyprune.shrink(model, images)
    assert shrunk.macs[0] == groups.macs()
    assert 0.3 * groups.macs() < shrunk.macs[1] <= 0.5 * groups.macs()
    assert model[0].out_channels % round_to == model[3].out_channels % round_to == 0
    torch.testing.assert_close(model(images), masked)
