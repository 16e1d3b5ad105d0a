"""Every method on whole models: a CNN, a transformer with grouped heads, and recurrent layers."""

import copy

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, granularity, importance, scope
from pyprune.selection import choose_masks
from tests.conftest import build, masks_of
from tests.selection.test_attention import Grouped


def grouped_transformer(device):
    model = nn.Sequential(
        nn.Embedding(13, 10), Grouped(), nn.LayerNorm(10), nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 3)
    )
    return model.to(device), torch.randint(13, (4, 6), device=device)


def recurrent(device):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(5, 8, batch_first=True, bidirectional=True), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    return Tagger().to(device), torch.randn(4, 6, 5, device=device)


def convolutional(device):
    case = build("cnn", device)
    return case.model, case.inputs


MODELS = {"convolutional": convolutional, "grouped transformer": grouped_transformer, "recurrent": recurrent}
RULES = {
    "magnitude": importance.magnitude(),
    "magnitude l2": importance.magnitude(normalize="l2"),
    "magnitude mean": importance.magnitude(normalize="mean"),
    "magnitude gaussian": importance.magnitude(normalize="gaussian"),
    "magnitude lamp": importance.magnitude(normalize="lamp"),
    "squares": importance.magnitude(p=2, normalize="l2"),
    "random": importance.random(seed=5),
    "gradient": importance.gradient(),
    "snip": importance.snip(),
    "snip_momentum": importance.snip_momentum(),
    "taylor": importance.taylor(normalize="mean"),
    "fisher": importance.fisher(damp=1e-3),
    "wanda": importance.wanda(),
    "ria": importance.ria(),
    "custom": importance.custom(torch.sin),
    "geometric_median": importance.geometric_median(),
    "batch_norm_scale": importance.batch_norm_scale(),
    "apoz": importance.apoz(),
    "mean_activation": importance.mean_activation(),
}
CUTS = {
    "element": granularity.element(),
    "block": granularity.block(2, 1),
    "out": granularity.channel("out"),
    "in": granularity.channel("in"),
    "kernel": granularity.kernel(),
}
SCOPES = {
    "model": scope.model(),
    "tensor": scope.tensor(),
    "row": scope.row(),
    "1:4": scope.n_of_m(keep=1, of=4),
    "group": scope.group({"all": [r".*"]}),
}


def loss_fn(model, inputs):
    return model(inputs).square().mean()


def ignored_for(kind, rule, cut):
    """Name the weights that an importance cannot see, or that a granularity cannot cut."""
    names = []
    if kind == "grouped transformer" and rule.needs in ("input norm", "zero outputs", "mean output"):
        names.append("0")  # an embedding has no activations to see
    if kind == "recurrent" and rule.needs in ("zero outputs", "mean output"):
        names.append("lstm")
    if cut.name == "kernel":
        names.append("fc")
    return pyprune.IgnoredScope(names=names)


def combinations():
    for kind in MODELS:
        for rule_name, rule in RULES.items():
            for cut_name, cut in CUTS.items():
                for scope_name, among in SCOPES.items():
                    try:
                        method = Method(rule, cut, among)
                    except ValueError:
                        continue  # tests/methods/test_granularity.py is about these
                    channels_only = rule.needs == "norm scale"
                    if (cut.name == "kernel" or channels_only) and kind != "convolutional":
                        continue
                    yield pytest.param(kind, method, id=f"{kind}-{rule_name}-{cut_name}-{scope_name}")


@pytest.mark.parametrize(("kind", "method"), list(combinations()))
@pytest.mark.filterwarnings("ignore:this reaches 89% of the weights of ConvNet")  # a layer without a BatchNorm
def test_every_method_prunes_every_kind_of_model(kind, method, device):
    model, inputs = MODELS[kind](device)
    rule = method.importance
    ignored = ignored_for(kind, rule, method.granularity)
    calibration = None
    if rule.needs not in ("none", "norm scale"):
        loss = loss_fn if rule.needs in ("gradient", "squared gradient", "momentum") else None
        calibration = pyprune.calibrate(model, [inputs], rule, loss_fn=loss, ignored_scope=ignored)
    ratio = None if method.scope.name == "n_of_m" else 0.5
    pyprune.prune(model, method, ratio=ratio, ignored_scope=ignored, calibration=calibration, examples_inputs=inputs)
    statistic = pyprune.pruning_statistic(model)
    units = [(tensor.units, tensor.pruned_units) for tensor in statistic.pruned_tensors]
    if method.scope.name in ("model", "group"):
        assert sum(gone for _, gone in units) == int(0.5 * sum(count for count, _ in units) + 0.5)
    elif method.scope.name == "tensor":
        assert all(gone == min(int(0.5 * count + 0.5), count - 1) for count, gone in units)
    else:
        assert sum(gone for _, gone in units) > 0
    output = model.eval()(inputs)
    assert output.isfinite().all()
    torch.testing.assert_close(pyprune.strip(model).eval()(inputs), output)


def heads_on_the_transformer(rule, device):
    model, inputs = grouped_transformer(device)
    method = Method(rule, granularity.head(4, 2), scope.tensor())
    ignored = pyprune.IgnoredScope(names=["0"])
    calibration = None
    if rule.needs != "none":
        loss = None if rule.needs == "input norm" else loss_fn
        calibration = pyprune.calibrate(model, [inputs], rule, loss_fn=loss, ignored_scope=ignored)
    return pyprune.prune(model, method, ratio=0.5, ignored_scope=ignored, calibration=calibration)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.scores_of == "elements"] + ["random"])
def test_every_importance_of_elements_prunes_heads(name, device):
    model = heads_on_the_transformer(RULES[name], device)
    masks = {target.name: mask for target, mask in masks_of(model).items()}
    assert set(masks) == {f"1.{name}_proj.weight" for name in "qkvo"}
    assert masks["1.k_proj.weight"].all(1).sum() == 3
    assert torch.equal(masks["1.k_proj.weight"].any(1), masks["1.v_proj.weight"].any(1))


def test_given_scores_are_of_elements_or_units(cnn):
    model = cnn.model
    elements = {
        name: torch.rand_like(model.get_parameter(name)) for name in ("conv1.weight", "conv2.weight", "fc.weight")
    }
    method = Method(importance.given(elements), granularity.channel("out"), scope.tensor())
    by_elements = copy.deepcopy(model)
    pyprune.prune(by_elements, method, ratio=0.5)
    units = {name: score.flatten(1).sum(1).reshape(-1, *[1] * (score.dim() - 1)) for name, score in elements.items()}
    pyprune.prune(model, Method(importance.given(units), granularity.channel("out"), scope.tensor()), ratio=0.5)
    assert [mask.tolist() for mask in masks_of(model).values()] == [
        mask.tolist() for mask in masks_of(by_elements).values()
    ]


def test_ratios_by_name_and_erk(cnn):
    pyprune.prune(
        cnn.model, Method(importance.magnitude(), scope=scope.tensor()), ratio={"conv1": 0.25, "fc.weight": 0.5}
    )
    ratios = [tensor.pruned_ratio for tensor in pyprune.pruning_statistic(cnn.model).pruned_tensors]
    assert ratios == [0.25, 0.0, 0.5]
    pyprune.prune(cnn.model, Method(importance.magnitude(), scope=scope.tensor()), ratio=0.5, allocation="erk")
    statistic = pyprune.pruning_statistic(cnn.model)
    assert statistic.pruning_ratio == pytest.approx(0.5, abs=0.02)
    ratios = [tensor.pruned_ratio for tensor in statistic.pruned_tensors]
    assert min(ratios) < 0.5 < max(ratios)


def test_caps_hold_in_a_model(cnn):
    method = Method(importance.magnitude(p=2, normalize="l2"), granularity.channel("out"))
    pyprune.prune(cnn.model, method, ratio=0.5, max_ratio={".*conv.*": 0.5}, min_ratio={"fc": 0.6})
    statistic = pyprune.pruning_statistic(cnn.model).pruned_tensors
    assert sum(tensor.pruned_units for tensor in statistic) == 7  # of 4 + 6 + 3
    assert statistic[0].pruned_units <= 2
    assert statistic[1].pruned_units <= 3
    assert statistic[2].pruned_units >= 2


def test_pruning_again_from_the_remaining(cnn):
    method = Method(importance.magnitude(), scope=scope.tensor())
    for _ in range(2):
        pyprune.prune(cnn.model, method, ratio=0.5, from_remaining=True)
    assert [int(mask.sum()) for mask in masks_of(cnn.model).values()] == [9, 27, 4]  # of 36, 108 and 18
    pyprune.prune(cnn.model, method, ratio=0.5)
    assert [int(mask.sum()) for mask in masks_of(cnn.model).values()] == [18, 54, 9]


def test_units_are_saved_with_the_masks(cnn, device):
    pyprune.prune(cnn.model, Method(importance.magnitude(), granularity.channel("out"), scope.tensor()), ratio=0.5)
    config = pyprune.get_config(cnn.model)
    fresh = pyprune.load_from_config(type(cnn.model)().to(device), config)
    fresh.load_state_dict(cnn.model.state_dict())
    assert pyprune.pruning_statistic(fresh) == pyprune.pruning_statistic(cnn.model)
    config["masks"][0]["unit"] = [0, 1]
    with pytest.raises(ValueError, match=r"units of \[0, 1\]"):
        pyprune.load_from_config(type(cnn.model)().to(device), config)


ELEMENTS, FILTERS = (
    Method(importance.magnitude()),
    Method(importance.magnitude(), granularity.channel(), scope.tensor()),
)
PAIRS = Method(importance.magnitude(), scope=scope.n_of_m(keep=2, of=4))


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        (PAIRS, {"ratio": 0.6}, ValueError, "keeping 2 of 4 removes at most 0.5"),
        (PAIRS, {"ratio": {"fc": 0.9}}, ValueError, "keeping 2 of 4 removes at most 0.5"),
        (PAIRS, {"ratio": 0.4, "max_ratio": 0.5}, ValueError, "none compete"),
        (PAIRS, {"ratio": 0.4, "allocation": "erk"}, ValueError, r"use scope\.tensor"),
        (
            Method(importance.magnitude(), scope=scope.n_of_m(keep=2, of=4, among="model")),
            {"ratio": {"fc": 0.2}},
            ValueError,
            'among="tensor"',
        ),
        (ELEMENTS, {}, TypeError, "ratio is None"),
        (ELEMENTS, {"ratio": {"fc": 0.5}}, ValueError, r"use scope\.tensor"),
        (FILTERS, {"ratio": {"fd": 0.5}}, ValueError, "'fd' matches no weight"),
        (FILTERS, {"ratio": {"fc": 1.5}}, ValueError, r"in \[0, 1\)"),
        (FILTERS, {"ratio": 0.5, "allocation": "erdos"}, ValueError, '"uniform", "erk" and "er"'),
        (ELEMENTS, {"ratio": 0.5, "allocation": "erk"}, ValueError, r"use scope\.tensor"),
        (FILTERS, {"ratio": 0.5, "max_ratio": 0.6}, ValueError, "none compete"),
        (ELEMENTS, {"ratio": 0.5, "max_ratio": 2}, ValueError, "from 0 to 1"),
        (ELEMENTS, {"ratio": 0.5, "max_ratio": 0.4}, ValueError, "units are to go"),
        (ELEMENTS, {"ratio": 0.5, "min_ratio": {"conv": 0.4}}, ValueError, "'conv' matches no weight"),
        (ELEMENTS, {"ratio": 0.5, "calibration": 3}, ValueError, "takes no calibration"),
        (Method(importance.taylor()), {"ratio": 0.5}, TypeError, r"calibration=pyprune\.calibrate"),
        (
            Method(importance.given({"fc.weight": torch.ones(3, 6)})),
            {"ratio": 0.5},
            ValueError,
            "no tensor for conv1",
        ),
        (Method(importance.batch_norm_scale(), granularity.channel()), {"ratio": 0.5}, ValueError, "examples_inputs"),
        (Method(importance.magnitude(), granularity.block(5, 1)), {"ratio": 0.5}, ValueError, "larger than conv1"),
        (Method(importance.magnitude(), granularity.head(2)), {"ratio": 0.5}, ValueError, "no attention layer"),
        (
            Method(importance.magnitude(), scope=scope.group({"a": ["fd"]})),
            {"ratio": 0.5},
            ValueError,
            "'a' matches no",
        ),
        (
            Method(importance.magnitude(), scope=scope.group({"a": ["fc"], "b": [".*"]})),
            {"ratio": 0.5},
            ValueError,
            "in the groups a and b",
        ),
        (
            Method(importance.magnitude(), scope=scope.columns(8)),
            {"ratio": 0.5},
            ValueError,
            r"scope is columns.*scope\.tensor",
        ),
        (Method(lambda weight: weight[:1]), {"ratio": 0.5}, ValueError, "one score for each element"),
        (Method(lambda weight: weight / 0), {"ratio": 0.5}, ValueError, "NaN or infinite scores by <lambda>"),
    ],
)
def test_prune_refuses_what_does_not_fit_and_changes_nothing(cnn, unchanged, method, options, error, words):
    before = unchanged(cnn.model)
    with pytest.raises(error, match=words):
        pyprune.prune(cnn.model, method, **options)
    before.check()


def test_prune_wants_the_statistics_of_its_importance(cnn):
    wanda = pyprune.calibrate(cnn.model, [cnn.inputs], importance.wanda())
    with pytest.raises(ValueError, match="calibration has input norm, and importance taylor needs squared gradient"):
        pyprune.prune(cnn.model, Method(importance.taylor()), ratio=0.5, calibration=wanda)
    part = pyprune.IgnoredScope(names=["fc"])
    wanda = pyprune.calibrate(cnn.model, [cnn.inputs], importance.wanda(), ignored_scope=part)
    with pytest.raises(ValueError, match=r"calibration lacks fc\.weight"):
        pyprune.prune(cnn.model, Method(importance.wanda()), ratio=0.5, calibration=wanda)


def test_a_compiled_model_is_not_compiled_again_for_another_method(cnn):
    pyprune.prune(cnn.model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    compilations = 0

    def backend(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    compiled = torch.compile(cnn.model.eval(), backend=backend, fullgraph=True)
    compiled(cnn.inputs)
    for method, ratio in ((FILTERS, 0.5), (PAIRS, None), (Method(importance.random()), 0.3)):
        pyprune.prune(cnn.model, method, ratio=ratio)
        torch.testing.assert_close(compiled(cnn.inputs), cnn.model(cnn.inputs))
    assert compilations == 1


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("among", ["model", "tensor", "row", "1:4"])
@pytest.mark.parametrize("cut", ["element", "out", "in"])
def test_methods_take_weights_without_elements_and_vectors(among, cut):
    if cut == "out" and among in ("row", "1:4"):
        return

    class Vectors(nn.Module):
        def __init__(self):
            super().__init__()
            self.vector, self.empty = nn.Parameter(torch.randn(6)), nn.Linear(0, 3)

        def forward(self, x):
            return x @ self.vector

    model = Vectors()
    ratio = None if among == "1:4" else 0.5
    pyprune.prune(
        model, Method(importance.magnitude(), CUTS[cut], SCOPES[among]), ratio=ratio, examples_inputs=torch.ones(6)
    )
    assert pyprune.pruning_statistic(model).pruned_tensors[0].pruned_units == (4 if ratio is None else 3)


@pytest.mark.parametrize("normalize", ["none", "l2", "mean", "gaussian", "lamp"])
@pytest.mark.parametrize("cut", ["element", "out"])
def test_weights_that_are_not_finite_are_named(cnn, unchanged, normalize, cut):
    cnn.model.conv2.weight.data[1, 0, 0, 0] = torch.nan
    before = unchanged(cnn.model)
    with pytest.raises(ValueError, match=r"NaN or infinite weights: \d+ in conv2\.weight"):
        pyprune.prune(cnn.model, Method(importance.magnitude(normalize=normalize), CUTS[cut]), ratio=0.5)
    before.check()


def test_coarser_units_among_the_remaining_bring_nothing_back():
    linear = nn.Linear(8, 8, bias=False)
    pyprune.prune(linear, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    before = linear.weight != 0
    with torch.no_grad():
        left = linear.weight.abs().sum(1)
    pyprune.prune(linear, FILTERS, ratio=0.25, from_remaining=True)
    assert not ((linear.weight != 0) & ~before).any()
    # What is gone already does not count for its channel.
    assert torch.equal((linear.weight == 0).all(1).nonzero().flatten(), left.argsort()[:2].sort().values)


def test_every_name_of_a_tied_weight_will_do():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
            self.head.weight = self.embed.weight

    local = Method(importance.magnitude(), scope=scope.tensor())
    for rule in ("head", "embed.weight", r"he.*"):
        model = pyprune.prune(Tied(), local, ratio={rule: 0.5})
        assert (model.head.weight == 0).sum() == 18
    model = pyprune.prune(Tied(), ELEMENTS, ratio=0.25, max_ratio={"head.weight": 0.25})
    assert (model.head.weight == 0).sum() <= 9
    groups = Method(importance.magnitude(), scope=scope.group({"a": ["head"], "b": ["fc"]}))
    model = pyprune.prune(Tied(), groups, ratio={"a": 0.5, "b": 0.25})
    assert [int((w == 0).sum()) for w in (model.head.weight, model.fc.weight)] == [18, 4]
    model = Tied()
    scores = {"head.weight": torch.rand(9, 4), "fc.weight": torch.rand(4, 4)}
    pyprune.prune(model, Method(importance.given(scores)), ratio=0.5)
    assert (model.embed.weight != 0).any()


def test_rules_within_groups_must_match(cnn):
    groups = scope.group({"a": ["conv1"], "b": ["fc", "typo"]})
    with pytest.raises(ValueError, match="'typo' of group 'b' matches no weight"):
        pyprune.prune(cnn.model, Method(importance.magnitude(), scope=groups), ratio=0.5)
    groups = scope.group({"a": ["conv1"], "b": ["fc"]})
    with pytest.raises(ValueError, match="'typo' matches no weight"):
        pyprune.prune(cnn.model, Method(importance.magnitude(), scope=groups), ratio=0.5, max_ratio={"typo": 0.1})
    pyprune.prune(
        cnn.model, Method(importance.magnitude(), scope=groups), ratio=0.5, max_ratio={"fc": 0.6, "conv1": 1.0}
    )


@pytest.mark.parametrize("options", [{"ratio": {"0": 0.5, "1": 0.3}}, {"ratio": 0.5, "allocation": "erk"}])
def test_ratios_are_about_all_weights_on_whatever_devices(monkeypatch, options):
    def layers():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10))

    local = Method(importance.magnitude(), scope=scope.tensor())
    expected = pyprune.pruning_statistic(pyprune.prune(layers(), local, **options))
    monkeypatch.setattr(choose_masks, "_by_device", lambda method, unit_groups: [[one] for one in unit_groups])
    assert pyprune.pruning_statistic(pyprune.prune(layers(), local, **options)) == expected


@pytest.mark.parametrize("rule", [importance.apoz(), importance.mean_activation(), importance.batch_norm_scale()])
def test_channels_of_a_grouped_transposed_convolution(rule):
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6))
    inputs = torch.randn(2, 4, 5, 5)
    calibration = None if rule.needs == "norm scale" else pyprune.calibrate(model, [inputs], rule)
    method = Method(rule, granularity.channel("out"), scope.tensor())
    pyprune.prune(model, method, ratio=0.34, calibration=calibration, examples_inputs=inputs)
    assert pyprune.pruning_statistic(model).pruned_tensors[0].pruned_units == 2  # of six, whatever their groups


def test_a_weight_tied_to_a_transposed_convolution_has_channels_of_two_kinds():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ConvTranspose2d(8, 2, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"through 0\.weight cannot be seen: it is used in both directions"):
        pyprune.calibrate(model, [torch.randn(1, 2, 6, 6)], importance.wanda())


@pytest.mark.parametrize("name", ["given", "geometric_median", "random", "wanda"])
def test_a_function_may_have_the_name_of_an_importance(cnn, name):
    def function(weight):
        return weight.abs()

    function.__name__ = name
    by_magnitude = pyprune.prune(copy.deepcopy(cnn.model), ELEMENTS, ratio=0.5)
    pyprune.prune(cnn.model, Method(function), ratio=0.5)
    expected = [mask.tolist() for mask in masks_of(by_magnitude).values()]
    assert [mask.tolist() for mask in masks_of(cnn.model).values()] == expected
