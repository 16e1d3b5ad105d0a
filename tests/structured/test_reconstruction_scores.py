import copy

import pytest
import torch
from torch import nn

from pyprune import coupled_groups, reconstruct, reconstruction_scores, shrink


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    ).double()


X = [torch.randn(64, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for _ in range(3)]


def repaired_error(dense, scores, group_name, ratio):
    """How far a model is from the dense one once the lowest units of a group are gone, and it was repaired."""
    model = copy.deepcopy(dense)
    group = next(one for one in coupled_groups(model, X[0]) if one.name == group_name)
    gone = scores.argsort()[: int(ratio * len(group))]
    with torch.no_grad():
        for member in group.members:
            member.tensor.data.index_fill_(member.dim, torch.as_tensor(member.indices)[gone].flatten(), 0)
    report = reconstruct(dense, model, X, shrink(model, X[0]), damping=1e-6)
    return report.layers[0].after


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "5.weight"])
def test_reconstruction_scores_keep_what_cannot_be_repaired(name):
    dense = net()
    groups = coupled_groups(dense, X[0])
    (scores,) = reconstruction_scores(dense, [one for one in groups if one.name == name], X)
    ours = repaired_error(dense, scores, name, 0.5)
    others = [repaired_error(dense, torch.rand(len(scores)), name, 0.5) for _ in range(6)]
    assert ours < min(others)
    assert repaired_error(dense, -scores, name, 0.5) > ours


def test_reconstruction_scores_are_the_share_that_is_lost():
    dense = net()
    group = next(one for one in coupled_groups(dense, X[0]) if one.name == "5.weight")
    (scores,) = reconstruction_scores(dense, [group], X, damping=1e-9)
    assert scores.max() == pytest.approx(1, abs=1e-6)  # all is gone
    lowest = scores.argsort()[:4]
    error = repaired_error(dense, scores, "5.weight", 0.25)
    with torch.no_grad():
        made = torch.cat([dense(x) for x in X])
    share = error**2 * float(made.square().sum() / (made - made.mean(0)).square().sum())
    assert scores[lowest].max() == pytest.approx(share, rel=1e-3)


def test_reconstruction_scores_leave_the_model(unchanged):
    dense = net().train()
    before = unchanged(dense)
    reconstruction_scores(dense, coupled_groups(dense, X[0]), X)
    before.check()
    assert not any(module._forward_hooks for module in dense.modules())


def test_reconstruction_scores_of_attention_and_of_layers_with_inputs_first():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=4, vocab_size=30, n_positions=16)
    model = transformers.GPT2Model(config).eval()
    tokens = torch.randint(30, (4, 10))
    groups = list(coupled_groups(model, {"input_ids": tokens, "use_cache": False}))
    scores = reconstruction_scores(model, groups, [{"input_ids": tokens, "use_cache": False}])
    assert [len(one) for one in scores] == [len(group) for group in groups]
    assert {group.what for group in groups} == {"channels", "heads"}


@pytest.mark.parametrize(
    ("groups", "options", "error", "message"),
    [
        ([3], {}, TypeError, "int in it"),
        (None, {}, TypeError, "groups is None"),
        ("all", {"damping": -1}, ValueError, "damping"),
        ("all", {"memory": 100}, ValueError, "2 has 72 inputs"),
        ("all", {"batches": []}, ValueError, "no batch"),
        ("all", {"batches": [X[0] * float("nan")]}, ValueError, "2 gets or makes NaN"),
    ],
)
def test_reconstruction_scores_refuse(groups, options, error, message):
    dense = net()
    found = coupled_groups(dense, X[0]) if groups == "all" else groups
    options = {"batches": X, **options}
    with pytest.raises(error, match=message):
        reconstruction_scores(dense, found, options.pop("batches"), **options)


def test_reconstruction_scores_need_a_reader():
    dense = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 1))
    groups = coupled_groups(dense, torch.ones(1, 2, 6, 6))
    with pytest.raises(ValueError, match="no layer that can be seen reads"):
        reconstruction_scores(nn.Linear(2, 2), groups, [torch.ones(2, 2)])
