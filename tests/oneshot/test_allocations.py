import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import pyprune
from pyprune import IgnoredScope, Method, allocations, importance, scope, solvers
from pyprune.oneshot.spectra import tail_exponent

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def encoder(layers=4, width=16, hidden=32):
    torch.manual_seed(0)
    parts = [nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True, dropout=0.0) for _ in range(layers)]
    return nn.Sequential(nn.Linear(8, width), nn.Sequential(*parts), nn.Linear(width, 3))


def block_of(name):
    return int(name.split(".")[1])


def means(model, ratios):
    """Return what each block loses."""
    sizes = {name: model.get_parameter(name).numel() for name in ratios}
    blocks = sorted({block_of(name) for name in ratios})
    return [
        sum(ratios[name] * sizes[name] for name in ratios if block_of(name) == block)
        / sum(sizes[name] for name in ratios if block_of(name) == block)
        for block in blocks
    ]


BATCHES = [torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def given(allocation, model):
    needs = allocation.needs == "input norm"
    return {"calibration": pyprune.calibrate(model, BATCHES, importance.wanda())} if needs else {}


KINDS = {
    "progression": allocations.progression(0.1),
    "steep progression": allocations.progression(-0.6),
    "owl": allocations.owl(m=2.0),
    "alpha": allocations.alpha_pruning(),
    "wide alpha": allocations.alpha_pruning(0.9),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.77, 0.95])
def test_prune_by_ratios_of_an_allocation_removes_the_ratio_exactly(kind, ratio):
    model, allocation = encoder(), KINDS[kind]
    ratios = allocations.ratios(model, allocation, ratio, **given(allocation, model))
    assert len(ratios) == 4 * 4
    pyprune.prune(model, Method(importance.magnitude(), scope=scope.tensor()), ratio=ratios)
    weights = [model.get_parameter(name) for name in ratios]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == math.floor(ratio * sum(weight.numel() for weight in weights) + 0.5)
    assert not (model[0].weight == 0).any()


def test_progression_rises_from_block_to_block():
    ratios = means(encoder(), allocations.ratios(encoder(), allocations.progression(0.1), 0.5))
    assert ratios == pytest.approx([0.35, 0.45, 0.55, 0.65], abs=1e-3)


def test_progression_meets_its_limits_and_the_others_make_up_for_it():
    model = encoder()
    ratios = means(model, allocations.ratios(model, allocations.progression(0.5), 0.5, max_ratio=0.8))
    assert ratios == pytest.approx([0.0, 0.4, 0.8, 0.8], abs=2e-3)


def test_owl_gives_the_golden_ratios():
    golden = GOLDEN["owl"]
    found = allocations.owl(spread=golden["lambda"]).shares(golden["outlier_percent"], golden["ratio"])
    assert found == pytest.approx(golden["ratios"])


def test_owl_counts_outliers_among_the_scores_of_a_block():
    model = encoder()
    with torch.no_grad():
        model[1][2].linear1.weight[:2, :3] *= 40
    allocation = allocations.owl(m=3.0, spread=0.1)
    calibration = pyprune.calibrate(model, BATCHES, importance.wanda())
    outliers = []
    for block in range(4):
        scores = torch.cat(
            [
                (model.get_parameter(name).detach().abs() * norm).flatten()
                for name, norm in calibration.tensors.items()
                if name.startswith(f"1.{block}.")
            ]
        )
        outliers.append(float((scores > 3 * scores.mean()).float().mean()))
    scaled = [(one - min(outliers)) / (max(outliers) - min(outliers)) * 0.2 for one in outliers]
    expected = [0.7 - (one - sum(scaled) / 4) for one in scaled]
    found = means(model, allocations.ratios(model, allocation, 0.7, calibration=calibration))
    assert found == pytest.approx(expected, abs=1e-3)


def test_alpha_pruning_maps_the_exponents_of_blocks():
    model = encoder()
    with torch.no_grad():
        model[1][1].linear1.weight += torch.outer(torch.linspace(0, 3, 32), torch.linspace(1, 2, 16))
    alphas = []
    for layer in model[1]:
        weights = [layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight]
        weights += [layer.linear1.weight, layer.linear2.weight]
        alphas.append(sum(tail_exponent(weight.detach()) for weight in weights) / 4)
    scaled = [0.8 + 0.4 * (one - min(alphas)) / (max(alphas) - min(alphas)) for one in alphas]
    expected = [0.5 * one / (sum(scaled) / 4) for one in scaled]
    found = means(model, allocations.ratios(model, allocations.alpha_pruning(0.2), 0.5))
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["owl", "alpha"])
def test_blocks_that_do_not_differ_lose_the_same(kind):
    model = encoder()
    for layer in model[1]:
        layer.load_state_dict(model[1][0].state_dict())
    norms = {name: torch.ones(1, p.shape[1]) for name, p in model.named_parameters() if p.dim() > 1}
    given = {"calibration": pyprune.Calibration("input norm", (), norms, 1)} if kind == "owl" else {}
    found = means(model, allocations.ratios(model, KINDS[kind], 0.6, **given))
    assert found == pytest.approx([0.6] * 4, abs=1e-3)


def test_alpha_pruning_of_a_block_whose_spectrum_is_flat_gives_it_the_middle():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    with torch.no_grad():
        model[1][0].weight.copy_(torch.eye(4))
    shares = allocations.alpha_pruning(0.5).shares([3.0, math.nan, 5.0], 0.5)
    assert shares == [0.5, 1.0, 1.5]
    assert len(allocations.ratios(model, allocations.alpha_pruning(), 0.5)) == 3


def test_ratios_are_of_named_blocks_and_outside_of_an_ignored_scope():
    model = encoder()
    some = allocations.ratios(model, allocations.progression(), 0.5, blocks=["1.0", "1.3"])
    assert {block_of(name) for name in some} == {0, 3}
    assert allocations.ratios(model, allocations.progression(), 0.5, blocks="1") == allocations.ratios(
        model, allocations.progression(), 0.5
    )
    ignored = IgnoredScope(patterns=[r".*linear1"])
    some = allocations.ratios(model, allocations.progression(), 0.5, ignored_scope=ignored)
    assert len(some) == 12


def test_ratios_count_a_tied_weight_once():
    model = encoder(2)
    model[1][1].linear1.weight = model[1][0].linear1.weight
    ratios = allocations.ratios(model, allocations.progression(0.2), 0.5)
    assert len(ratios) == 7
    assert ratios["1.0.linear1.weight"] < 0.5


@pytest.mark.filterwarnings("ignore:importance wanda leaves out")
def test_ratios_leave_out_embeddings_in_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.linear = nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, x):
            return x + self.linear(x + self.positions.weight[0])

    model = nn.Sequential(Block(), Block())
    calibration = pyprune.calibrate(model, [torch.randn(3, 4)], Method(importance.wanda()))
    ratios = allocations.ratios(model, allocations.owl(), 0.5, calibration=calibration)
    assert list(ratios) == ["0.linear.weight", "1.linear.weight"]


def test_ratios_leave_the_model_as_it_was():
    model = encoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    allocations.ratios(model, allocations.alpha_pruning(), 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


OWL, MODEL = allocations.owl(), encoder()
NORMS = pyprune.calibrate(MODEL, BATCHES, importance.wanda())
PART = pyprune.calibrate(MODEL, BATCHES, importance.wanda(), ignored_scope=IgnoredScope(names=["1.0"]))
MEANS = pyprune.Calibration("mean output", (), {}, 1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: allocations.progression("0.1"), TypeError, "beta is '0.1'"),
        (lambda: allocations.progression(math.inf), ValueError, "beta is inf"),
        (lambda: allocations.owl(m=0), ValueError, "m is 0; give a positive number"),
        (lambda: allocations.owl(spread=-0.1), ValueError, "spread is -0.1"),
        (lambda: allocations.alpha_pruning(1), ValueError, r"epsilon is 1; give a number in \(0, 1\)"),
        (lambda: allocations.ratios(MODEL, "owl", 0.5), TypeError, "give what a function of pyprune.allocations"),
        (lambda: allocations.ratios(MODEL, allocations.owl, 0.5), TypeError, "give what a function"),
        (lambda: allocations.ratios(MODEL, OWL, 1.0), ValueError, "ratio is 1.0"),
        (lambda: allocations.ratios(MODEL, OWL, 0.5), ValueError, "needs calibration=pyprune.calibrate"),
        (lambda: allocations.ratios(MODEL, OWL, 0.5, calibration=PART), ValueError, r"lacks 1\.0\.self_attn"),
        (lambda: allocations.ratios(MODEL, OWL, 0.5, calibration=MEANS), ValueError, "has mean output, and owl"),
        (lambda: allocations.ratios(MODEL, OWL, 0.5, calibration={}), TypeError, "calibration is {}"),
        (lambda: allocations.ratios(MODEL, OWL, 0.6, calibration=NORMS, max_ratio=0.5), ValueError, "at most 0.5"),
        (
            lambda: allocations.ratios(MODEL, allocations.progression(), 0.5, calibration=NORMS),
            ValueError,
            "takes no calibration",
        ),
        (lambda: allocations.ratios(MODEL, allocations.progression(), 0.5, blocks="2.x"), ValueError, "blocks has"),
        (
            lambda: allocations.ratios(
                MODEL, allocations.progression(), 0.5, ignored_scope=IgnoredScope(names=["1"])
            ),
            ValueError,
            "has no weight to prune",
        ),
    ],
)
def test_allocations_refuse_what_makes_no_sense(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("kind", ["owl", "alpha"])
def test_allocations_refuse_what_is_not_finite(kind):
    model = encoder()
    options = given(KINDS[kind], model)
    with torch.no_grad():
        model[1][1].linear1.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match=r"1\.1\.linear1\.weight.*NaN or infinite"):
        allocations.ratios(model, KINDS[kind], 0.5, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "ratio"),
    [
        (scope.tensor(), 0.6),
        (Method(importance.ria(), scope=scope.tensor()), 0.6),
        (Method(importance.wanda(), scope=scope.n_of_m(keep=2, of=4)), 0.25),
    ],
    ids=["solver", "ria", "n_of_m"],
)
def test_prune_one_shot_takes_an_allocation(kind, method, ratio):
    model = encoder()
    solver = solvers.sparsegpt() if isinstance(method, scope.Scope) else None
    expected = allocations.ratios(
        model, KINDS[kind], ratio, max_ratio=0.5 if ratio == 0.25 else 1.0, **given(KINDS[kind], model)
    )
    pyprune.prune_one_shot(model, BATCHES, method, ratio=ratio, solver=solver, allocation=KINDS[kind])
    removed = {name: int((model.get_parameter(name) == 0).sum()) for name in expected}
    sizes = {name: model.get_parameter(name).numel() for name in expected}
    if ratio == 0.25:  # a group of 2:4 loses two at once
        assert all(abs(removed[name] - expected[name] * sizes[name]) <= 1 + 1e-6 for name in expected)
    else:
        assert removed == {name: round(expected[name] * sizes[name]) for name in expected}
        assert sum(removed.values()) == math.floor(ratio * sum(sizes.values()) + 0.5)
