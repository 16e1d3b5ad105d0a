import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import pyprune
from pyprune import scope, solvers
from pyprune.modules.masks import masks_in
from tests.oneshot.test_block_fisher import fisher_of, joint

SOLVERS = {"block Fisher": solvers.block_fisher(block=7), "M-FAC": solvers.m_fac()}


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(16, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 3),
    ).to(dtype)


def batches(count=12, dtype=torch.float32):
    torch.manual_seed(1)
    return [(torch.randn(2, 1, 4, 4, dtype=dtype), torch.randint(3, (2,))) for _ in range(count)]


def gradients_of(model, data):
    """Each weight's gradient of each batch, a row each."""
    model = copy.deepcopy(model).eval()
    rows = {name: [] for name, one in model.named_parameters() if one.dim() > 1}
    for batch in data:
        model.zero_grad()
        loss_fn(model, batch).backward()
        for name, row in rows.items():
            row.append(model.get_parameter(name).grad.flatten().clone())
    return {name: torch.stack(row) for name, row in rows.items()}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("competing", "ratio"),
    [
        (None, 0.5),
        (scope.tensor(), 0.7),
        (scope.row(), 0.5),
        (scope.n_of_m(keep=2, of=4), None),
        (scope.n_of_m(keep=2, of=4), 0.25),
    ],
)
def test_prune_with_gradients_masks_by_scores_and_solves_jointly(name, competing, ratio):
    dense, data, solver = small(torch.float64), batches(dtype=torch.float64), SOLVERS[name]
    memory = 2**32 if ratio == 0.5 else 12 * 16 * 8 * 8  # of all weights, or of one after the other
    model = copy.deepcopy(dense)
    places = dict(model.named_parameters())
    assert (
        pyprune.prune_with_gradients(model, data, loss_fn, solver, ratio=ratio, scope=competing, memory=memory)
        is model
    )
    assert {name: id(one) for name, one in places.items()} == {n: id(one) for n, one in model.named_parameters()}
    rows = gradients_of(dense, data)
    scores = {key: solver.scores(dense.get_parameter(key).detach(), row, None)[0] for key, row in rows.items()}
    method = pyprune.Method(pyprune.importance.given(scores), scope=competing or scope.model())
    expected = pyprune.prune(copy.deepcopy(dense), method, ratio=ratio)
    for key, row in rows.items():
        weight, was = model.get_parameter(key).detach(), dense.get_parameter(key).detach()
        mask = expected.get_parameter(key) != 0
        assert torch.equal(weight != 0, mask)
        fisher = fisher_of(row, 7 if name == "block Fisher" else weight.numel(), 0.01)
        torch.testing.assert_close(weight, joint(was, fisher, mask), rtol=1e-6, atol=1e-9)
    for key, one in dense.named_parameters():
        if one.dim() == 1:
            assert torch.equal(one, model.get_parameter(key))
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(dense.buffers(), model.buffers(), strict=True))


@pytest.mark.parametrize("name", SOLVERS)
def test_prune_with_gradients_loses_less_of_a_trained_loss_than_its_mask_alone(name):
    torch.manual_seed(0)
    inputs = torch.randn(96, 12) @ torch.randn(12, 12)
    labels = (inputs @ torch.randn(12, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    data = [(one[None], label[None]) for one, label in zip(inputs, labels, strict=True)]
    before = copy.deepcopy(model)
    pyprune.prune_with_gradients(model, data, loss_fn, SOLVERS[name], ratio=0.5)
    masked = copy.deepcopy(before)
    for plain, one in zip(masked.parameters(), model.parameters(), strict=True):
        plain.data.mul_(one != 0)
    ours, alone = (cross_entropy(one(inputs), labels).item() for one in (model, masked))
    assert ours < alone


def test_prune_with_gradients_again_keeps_masks_and_strip_leaves_a_plain_model():
    model, data = small(), batches()
    pyprune.prune_with_gradients(model, data, loss_fn, SOLVERS["block Fisher"], ratio=0.3, scope=scope.tensor())
    first = {name: one.detach() == 0 for name, one in model.named_parameters() if one.dim() > 1}
    pyprune.prune_with_gradients(model, data, loss_fn, SOLVERS["M-FAC"], ratio=0.6, scope=scope.tensor())
    assert len(masks_in(model)) == 3
    for name, zeros in first.items():
        weight = model.get_parameter(name)
        assert not weight[zeros].any()
        assert int((weight == 0).sum()) == int(0.6 * weight.numel() + 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    loss_fn(model, data[0]).backward()
    optimizer.step()
    assert int((model[4].weight == 0).sum()) == int(0.6 * 128 + 0.5)
    pyprune.strip(model)
    assert not masks_in(model)


def test_prune_with_gradients_leaves_raw_values_under_its_masks():
    model = small()
    dense = copy.deepcopy(model)
    pyprune.prune_with_gradients(model, batches(), loss_fn, SOLVERS["M-FAC"], ratio=0.5, scope=scope.tensor())
    dropped = model[4].weight == 0
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0)
    assert torch.equal(model[4].weight[dropped], dense[4].weight[dropped])


def test_prune_with_gradients_at_ratio_0_changes_no_bit():
    model = small()
    before = copy.deepcopy(model.state_dict())
    pyprune.prune_with_gradients(model, batches(), loss_fn, SOLVERS["block Fisher"], ratio=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_prune_with_gradients_names_weights_that_the_loss_does_not_reach():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    model.requires_grad_(False)
    data = [torch.randn(1, 4) for _ in range(6)]
    with pytest.warns(UserWarning, match=r"no gradient at idle.weight: they are pruned by magnitude"):
        pyprune.prune_with_gradients(
            model, data, lambda model, batch: model["used"](batch).square().sum(), SOLVERS["M-FAC"], ratio=0.25
        )
    assert int((model["idle"].weight == 0).sum()) == 8
    assert not any(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": 3}, TypeError, "model is"),
        ({"loss_fn": None}, TypeError, "loss_fn"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, ValueError, "loss_fn returned"),
        (
            {"loss_fn": lambda model, batch: loss_fn(model, batch) * float("nan")},
            ValueError,
            "0.weight: gradients has",
        ),
        ({"solver": solvers.admm()}, TypeError, "solver is"),
        ({"ratio": 1.0}, ValueError, "ratio is 1.0"),
        ({"ratio": None}, TypeError, "ratio is None"),
        ({"scope": "tensor"}, TypeError, "scope is"),
        ({"memory": 100}, ValueError, "gradients of 0.weight by 12 batches are 1728 bytes, and memory is 100"),
        ({"memory": -1}, ValueError, "memory is"),
        ({"num_batches": 0}, ValueError, "num_batches is"),
        ({"dataset": []}, ValueError, "dataset"),
        ({"ignored_scope": pyprune.IgnoredScope(names=["nowhere"])}, ValueError, "nowhere"),
    ],
)
def test_prune_with_gradients_refuses_and_leaves_the_model(change, error, said):
    model = small()
    before, kept = copy.deepcopy(model.state_dict()), list(vars(model[4]))
    arguments = {
        "model": model,
        "dataset": batches(),
        "loss_fn": loss_fn,
        "solver": SOLVERS["M-FAC"],
        "ratio": 0.5,
    } | change
    with pytest.raises(error, match=said):
        pyprune.prune_with_gradients(**arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(vars(model[4])) == kept
    assert not masks_in(model)
    assert model.training
