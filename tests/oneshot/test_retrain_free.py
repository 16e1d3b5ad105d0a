"""Retrain-free pruning of real architectures: budgets, what shrink makes of it, tuning, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import pyprune
from pyprune import IgnoredScope
from tests.conftest import Unchanged

IDS = [{"input_ids": torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(i))} for i in range(8)]
IMAGES = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
ROWS = [torch.randn(16, 6, generator=torch.Generator().manual_seed(i)) for i in range(8)]


def of_transformers(model, config, **options):
    def make():
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()

    return make


SMALL = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
VIT = {"image_size": 8, "patch_size": 4, **{k: v for k, v in SMALL.items() if k != "vocab_size"}}
MODELS = {
    "BERT": (of_transformers("BertModel", "BertConfig", **SMALL), IDS, {"heads", "channels"}),
    "GPT-2": (
        of_transformers("GPT2LMHeadModel", "GPT2Config", vocab_size=99, n_embd=16, n_layer=2, n_head=4),
        IDS,
        {"heads", "channels"},
    ),
    "Llama": (
        of_transformers("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **SMALL),
        IDS,
        {"heads", "channels"},
    ),
    "ViT": (of_transformers("ViTForImageClassification", "ViTConfig", **VIT), IMAGES, {"heads", "channels"}),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2),
        [image.flatten(2)[:, :, :16] for image in IMAGES],
        {"channels"},
    ),
    "CNN": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        ),
        IMAGES,
        {"channels"},
    ),
    "grouped convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()
        ),
        IMAGES,
        {"channels"},
    ),
}


def random(make):
    """Return a model none of whose parameters is small or zero, as if it had been trained."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def output(model, batch):
    found = model(**batch) if isinstance(batch, dict) else model(batch)
    return found if isinstance(found, torch.Tensor) else found[0]


def outputs(model, batches):
    with torch.no_grad():
        return torch.cat([output(model.eval(), batch).flatten(1) for batch in batches])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tune", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_prune_retrain_free_meets_a_budget_that_shrink_makes_real(name, tune):
    make, batches, kinds = MODELS[name]
    model = random(make)
    dense = copy.deepcopy(model)
    result = pyprune.prune_retrain_free(model, batches, target_macs=0.7, draws=2, tune=tune)
    assert {one.what for one in result.groups} == kinds
    assert result.macs_before == pyprune.coupled_groups(dense, batches[0]).macs()
    assert result.macs_after <= 0.7 * result.macs_before
    assert all(0 < one.kept <= one.units for one in result.groups)
    assert any(one.kept < one.units for one in result.groups)
    masked = outputs(model, batches)
    shrunk = pyprune.shrink(model, batches[0])
    assert not shrunk.held
    assert pyprune.coupled_groups(model, batches[0]).macs() == result.macs_after
    left = pyprune.pruning_statistic(model, examples_inputs=batches[0]).macs
    assert left <= 0.71 * pyprune.pruning_statistic(dense, examples_inputs=batches[0]).macs
    torch.testing.assert_close(outputs(model, batches), masked, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_prune_retrain_free_tuning_brings_outputs_nearer(name):
    make, batches, _ = MODELS[name]
    dense = random(make)
    errors, results = [], []
    for tune in (False, True):
        model = copy.deepcopy(dense)
        torch.manual_seed(0)
        results.append(pyprune.prune_retrain_free(model, batches, target_macs=0.7, draws=2, tune=tune))
        errors.append(float((outputs(model, batches[-2:]) - outputs(dense, batches[-2:])).norm()))
    assert results[0].groups == results[1].groups
    assert results[1].tuned
    assert not results[0].tuned
    assert errors[1] < errors[0]
    # With a bias, what is before has the mean in it, too.
    assert all(one.after <= one.before * (1 + 1e-6) for one in results[1].tuned)
    assert all(-10 <= one.least <= one.most <= 10 for one in results[1].tuned)
    assert "Tuned" in str(results[1])


def test_prune_retrain_free_scales_are_least_squares_over_the_layers_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)).double()
    batches = [row.double() for row in ROWS]
    dense = copy.deepcopy(model)
    result = pyprune.prune_retrain_free(model, batches, target_macs=0.5)
    kept = (model[0].weight != 0).any(1)
    dense.requires_grad_(False)
    hidden, wanted = dense[:2](torch.cat(batches)), dense(torch.cat(batches))
    weight = dense[2].weight.T
    gives = (hidden[:, :, None] * weight[None])[:, kept]  # (samples, units, outputs)
    spread = wanted.std(0, unbiased=False)
    a = ((gives - gives.mean(0)) / spread).movedim(1, 2).flatten(0, 1)
    b = ((wanted - wanted.mean(0)) / spread).flatten()
    ridge = 0.01 * a.square().sum(0).mean()
    scales = 1 + torch.linalg.solve(a.T @ a + ridge * torch.eye(a.shape[1]), a.T @ (b - a.sum(1)))
    torch.testing.assert_close(model[2].weight.T[kept], weight[kept] * scales[:, None])
    torch.testing.assert_close(model(torch.cat(batches)).mean(0), wanted.mean(0))
    (one,) = result.tuned
    missing = (a @ scales - b).square().mean().sqrt().detach()
    assert one.after == pytest.approx(float(missing))
    assert (one.least, one.most) == pytest.approx((float(scales.min()), float(scales.max())))
    assert one.bias


def test_prune_retrain_free_rejects_scales_that_are_too_large():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 1)).double()
    with torch.no_grad():  # the second unit is the first one, a hundred times
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[1].weight.copy_(torch.tensor([[100.0, 1.0]]))

    # The gradients of the units say the opposite of what they give.
    def loss_fn(model, batch):
        hidden = model[0](batch)
        told = 0 * model(batch).sum()
        return told + (1e-3 * model[1].weight[0, 0] * hidden[:, 0] + model[1].weight[0, 1] * hidden[:, 1]).sum()

    with pytest.warns(UserWarning, match=r"not tuned: 1\.weight \(a scale would be beyond 10\)"):
        result = pyprune.prune_retrain_free(
            model, [row.double() for row in ROWS], target_macs=0.5, loss_fn=loss_fn, examples_inputs=ROWS[0].double()
        )
    assert not result.tuned
    assert model[1].weight.tolist() == [[0.0, 1.0]]


def test_prune_retrain_free_keeps_no_layer_whose_tuning_makes_the_model_worse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    dense = copy.deepcopy(model)
    calls = []

    def loss_fn(model, batch):  # whatever is done, it becomes worse
        calls.append(1)
        return model(batch).square().mean() + 1e6 * len(calls)

    with pytest.warns(UserWarning, match=r"not tuned: 2\.weight \(the model would be worse\)"):
        result = pyprune.prune_retrain_free(model, ROWS, target_macs=0.5, loss_fn=loss_fn, examples_inputs=ROWS[0])
    assert not result.tuned
    kept = model[2].weight != 0
    assert torch.equal(model[2].weight[kept], dense[2].weight[kept])
    assert torch.equal(model[2].bias, dense[2].bias)


def test_prune_retrain_free_by_labels_keeps_what_the_loss_needs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[2].weight[:, 4:] = torch.tensor([[0.0], [3.0]])  # large, but for the output that has no labels
        model[2].weight[1, :4] = 0

    def loss_fn(model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square().mean()

    batches = [(row, torch.ones(len(row))) for row in ROWS]
    with pytest.raises(ValueError, match="examples_inputs is None; give inputs of the model"):
        pyprune.prune_retrain_free(model, batches, target_macs=0.5, loss_fn=loss_fn)
    result = pyprune.prune_retrain_free(
        model, batches, target_macs=0.5, loss_fn=loss_fn, examples_inputs=ROWS[0], tune=False
    )
    assert (model[0].weight != 0).any(1).tolist() == [True] * 4 + [False] * 4
    assert result.ratios == {"0.weight": 0.5}
    assert result.groups[0].importance == 1


def test_prune_retrain_free_is_the_same_for_a_seed_and_gives_random_numbers_back():
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5)).train()
        pyprune.prune_retrain_free(model, ROWS, target_macs=0.5)
        found.append((model.state_dict(), torch.rand(1)))
        assert model.training
        assert model[2].training
    torch.testing.assert_close(found[0], found[1])


def test_prune_retrain_free_holds_its_zeros_in_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    pyprune.prune_retrain_free(model, ROWS, target_macs=0.5)
    zeros = [parameter == 0 for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for row in ROWS:
        optimizer.zero_grad()
        (model(row) - 1).square().mean().backward()
        optimizer.step()
    assert [bool(zero.any()) for zero in zeros] == [True, True, True, False]
    assert all(bool((parameter[zero] == 0).all()) for parameter, zero in zip(model.parameters(), zeros, strict=True))


def test_prune_retrain_free_with_all_macs_left_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    before = copy.deepcopy(model.state_dict())
    result = pyprune.prune_retrain_free(model, ROWS, target_macs=1)
    assert result.macs_after == result.macs_before
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_prune_retrain_free_leaves_layers_that_need_too_much_memory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    with pytest.warns(
        UserWarning, match=r"not tuned: 4\.weight \(its sums take 18,432 bytes, and memory is 10,000\)"
    ):
        result = pyprune.prune_retrain_free(model, ROWS, target_macs=0.5, memory=10_000)
    assert [one.name for one in result.tuned] == ["2.weight"]


def test_prune_retrain_free_looks_at_layers_in_as_many_rounds_as_memory_asks_for():
    found = []
    for memory in (20_000, 2**30):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
        pyprune.prune_retrain_free(model, ROWS, target_macs=0.5, memory=memory)
        found.append(model.state_dict())
    torch.testing.assert_close(*found)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))


def tied():
    model = net()
    model.append(nn.Linear(5, 12))
    model.append(nn.Linear(12, 5))
    model[4].weight = model[2].weight
    return model


def with_nan():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    return model


def masked():
    return pyprune.prune(net(), "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)


def gated():
    return pyprune.prune(net(), "UNSTRUCTURED_HARD_CONCRETE")


def normal_of_one(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (net, {"target_macs": 0.001}, "target_macs is 0.001, but with one unit of each group 0.08"),
        (net, {"target_macs": 0}, "target_macs is 0"),
        (net, {"target_macs": 1.5}, "target_macs is 1.5"),
        (masked, {}, "carry masks or gates already; pyprune.strip takes them off"),
        (gated, {}, "carry masks or gates already"),
        (with_nan, {}, "NaN"),
        (net, {"data": [torch.full((2, 6), torch.inf)]}, "NaN or infinite"),
        (net, {"loss_fn": normal_of_one, "likelihood": "normal"}, "give one of them"),
        (net, {"likelihood": "poisson"}, "likelihood is 'poisson'"),
        (net, {"draws": 0}, "draws is 0"),
        (net, {"loss_fn": lambda model, batch: model[2].weight.sum() * 0}, "no unit has a gradient"),
        (lambda: nn.Linear(6, 5), {}, "no coupled units to prune"),
        (net, {"ignored_scope": IgnoredScope(types=["Linear"])}, "no coupled units to prune"),
        (net, {"data": []}, "gave no batch"),
    ],
)
def test_prune_retrain_free_refuses_and_leaves_the_model(make, options, message):
    model = make()
    unchanged = Unchanged(model)
    with pytest.raises(ValueError, match=message):
        pyprune.prune_retrain_free(model, **{"data": ROWS, "target_macs": 0.5, "examples_inputs": ROWS[0], **options})
    unchanged.check()


def test_prune_retrain_free_says_which_layers_share_a_weight():
    model = tied()
    with pytest.warns(UserWarning, match="several layers share it"):
        pyprune.prune_retrain_free(model, ROWS, target_macs=0.6)
