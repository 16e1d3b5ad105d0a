import re

import numpy as np
import pytest
import torch
from torch import nn

from pyprune.checks import shown
from pyprune.modules.evaluation import check_initialized, evaluating, forward, score_of


def test_forward_spreads_mappings_and_tuples():
    class Two(nn.Module):
        def forward(self, x, y=0):
            return (x, y)

    assert forward(Two(), (1, 2)) == (1, 2)
    assert forward(Two(), {"x": 1, "y": 2}) == (1, 2)
    assert forward(Two(), 1) == (1, 0)
    assert forward(Two(), [1, 2]) == ([1, 2], 0)


@pytest.mark.parametrize("inputs", [np.array([0.1, 0.2]), (np.ones(2),), {"input": [0.1, 0.2]}, "text", 3, None])
@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm1d(2)])
def test_forward_says_what_inputs_without_tensors_are(model, inputs):
    with pytest.raises(TypeError, match=rf"^a batch is {re.escape(shown(inputs))}, without a tensor in it"):
        forward(model, inputs, "a batch")


def test_forward_leaves_other_errors_as_they_are():
    class Wrong(nn.Module):
        def forward(self, x):
            return x.nothing

    with pytest.raises(AttributeError, match="nothing"):
        forward(Wrong(), torch.ones(1))


def test_evaluating_gives_every_flag_back_whatever_happens():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(), nn.BatchNorm1d(1))
    model[1].eval()

    def fail():
        with evaluating(model, training=[model[2]]):
            assert [module.training for module in model.modules()] == [False, False, False, True]
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()


def test_evaluating_does_not_call_train_of_the_model():
    class Merging(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("train() has side effects here")

    with evaluating(Merging(1, 1)):
        pass


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_check_initialized_sees_lazy_parameters_and_buffers():
    check_initialized(nn.BatchNorm1d(3))
    for layer, name in ((nn.LazyLinear(3), "0.weight"), (nn.LazyBatchNorm1d(affine=False), "0.running_mean")):
        with pytest.raises(ValueError, match=f"{name} is lazy"):
            check_initialized(nn.Sequential(layer))


def test_score_of_runs_in_evaluation_and_gives_all_back(unchanged):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = unchanged(model)

    def score(model):
        assert not model[1].training
        model.train()
        model(torch.randn(8, 2))
        return torch.tensor([model[1].running_mean.sum()])

    first = score_of(model, score)
    before.check()
    assert first == score_of(model, score) != 0  # the same random numbers


def test_score_of_refuses_training():
    model = nn.Linear(2, 2)

    def train(model):
        with torch.enable_grad():
            model(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD([model.bias], lr=0.1).step()
        return 1.0

    with pytest.raises(ValueError, match="eval_fn changed bias; it is to measure"):
        score_of(model, train)
