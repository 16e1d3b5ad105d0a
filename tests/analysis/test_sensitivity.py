import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import pyprune
from pyprune import (
    IgnoredScope,
    Method,
    SensitivityResult,
    granularity,
    importance,
    ops,
    pruning_statistic,
    scope,
    sensitivity,
)
from tests.conftest import masks_of
from tests.fault_injector import differences, look
from tests.selection.test_prune_methods import grouped_transformer

BY_TENSOR = Method(importance.magnitude(), scope=scope.tensor())
FILTERS = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())
PAIRS = Method(importance.magnitude(), scope=scope.n_of_m(keep=2, of=4))


def output_norm(inputs):
    """A score that every weight has a part in."""
    return lambda model: model(inputs).double().abs().sum()


def zeros_of(model):
    return {name: int((weight == 0).sum()) for name, weight in model.named_parameters() if weight.dim() > 1}


def test_sensitivity_prunes_one_target_at_a_time(case, unchanged):
    seen = []
    before = unchanged(case.model)
    result = sensitivity(case.model, lambda model: seen.append(zeros_of(model)) or 1.0, ratios=(0.5, 0.25))
    before.check()
    assert not any(seen[0].values())
    sizes = {name: target.weights for name, target in result.targets.items()}
    expected = [(name, ratio) for name in sizes for ratio in (0.25, 0.5)]
    assert len(seen) == 1 + len(expected)
    for zeros, (name, ratio) in zip(seen[1:], expected, strict=True):
        removed = int(ratio * sizes[name] + 0.5)
        assert {which: count for which, count in zeros.items() if count} == {name: removed}


def test_sensitivity_scores_are_those_of_prune(case):
    score = output_norm(case.inputs)
    result = sensitivity(case.model, score, ratios=(0.3, 0.8), higher_is_better=False)
    assert result.baseline == pytest.approx(score(case.model.eval()).item(), rel=1e-5)
    for name, target in result.targets.items():
        for ratio, found in target.scores.items():
            pyprune.prune(case.model, BY_TENSOR, ratio={name: ratio})
            assert found == pytest.approx(score(case.model).item(), rel=1e-5), (name, ratio)


def test_sensitivity_of_n_of_m_cuts_a_share_of_the_groups():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    seen = []
    sensitivity(model, lambda model: seen.append(zeros_of(model)) or 1.0, ratios=(0.25, 0.5), method=PAIRS)
    zeros = [(counts["0.weight"], counts["1.weight"]) for counts in seen]
    assert zeros == [(0, 0), (16, 0), (32, 0), (0, 8), (0, 16)]


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_sensitivity_leaves_the_model_when_eval_fn_fails(case, unchanged, error):
    case.model.train()
    torch.manual_seed(3)
    before = unchanged(case.model)
    calls = []

    def fail(model):
        calls.append(torch.rand(()))
        assert not model.training
        assert not torch.is_grad_enabled()
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer += 1
        model.train()
        model.new_attribute = 3
        del model.new_attribute
        if len(calls) == 4:
            raise error
        return 0.5

    with pytest.raises(error):
        sensitivity(case.model, fail)
    before.check()
    assert len(calls) == 4
    assert len(set(map(float, calls))) == 1  # every call sees the same random numbers


def test_sensitivity_restores_strange_values(device):
    linear = nn.Linear(4, 2).to(device)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-0.0, 0.0, 1e-42, -3.0], [1e38, -1e-42, 2.0, -0.0]]))
    before = linear.weight.detach().view(torch.int32).clone()
    sensitivity(linear, lambda model: 1.0, ratios=(0.9,))
    assert torch.equal(linear.weight.detach().view(torch.int32), before)


def test_sensitivity_of_a_masked_model_gives_the_masks_back(cnn, unchanged):
    model = pyprune.prune(
        cnn.model, FILTERS, ratio={"conv1": 0.5}, examples_inputs=cnn.inputs, zero_dead_channels=True
    )
    before = unchanged(model)
    seen = []

    def score(pruned):
        dropped = {target.name: int((~mask).sum()) for target, mask in masks_of(pruned).items()}
        seen.append({name: count for name, count in dropped.items() if count})
        return float(len(seen))

    result = sensitivity(model, score, ratios=(0.75,), method=FILTERS, examples_inputs=cnn.inputs)
    before.check()
    # conv1 has its mask, and the masks of bias and BatchNorm follow what it becomes.
    assert seen[0] == {"conv1.weight": 18, "conv1.bias": 2, "bn1.weight": 2, "bn1.bias": 2}
    assert seen[1] == {"conv1.weight": 27, "conv1.bias": 3, "bn1.weight": 3, "bn1.bias": 3}
    assert {name: count for name, count in seen[3].items() if name not in seen[0]} == {"fc.weight": 12, "fc.bias": 2}
    assert {name: target.units for name, target in result.targets.items()} == {
        "conv1.weight": 4,
        "conv2.weight": 6,
        "fc.weight": 3,
    }
    pyprune.strip(model)


def test_sensitivity_of_heads_prunes_a_layer_as_one(device):
    model, inputs = grouped_transformer(device)
    method = Method(importance.magnitude(), granularity.head(4, 2))
    seen = []
    result = sensitivity(model, lambda m: seen.append(zeros_of(m)) or float(m(inputs).sum()), method=method)
    layer, target = next(iter(result.targets.items()))
    assert len(result.targets) == 1
    assert target.units == 2
    assert sum(count > 0 for count in seen[-1].values()) == 4
    # One of two heads goes from 0.25 on, and the other never does.
    assert len(seen) == 3
    assert target.scores[0.3] == target.scores[0.9] != target.scores[0.2]
    ratios = pyprune.allocation_from_sensitivity(result, 0.5)
    assert ratios == {layer: 0.5}
    pyprune.prune(model, Method(importance.magnitude(), granularity.head(4, 2), scope.tensor()), ratio=ratios)


def test_sensitivity_of_tied_weights_counts_once(transformer):
    result = sensitivity(transformer.model, output_norm(transformer.inputs), ratios=(0.5,))
    assert "embed.weight" in result.targets
    assert "decoder.weight" not in result.targets


def test_sensitivity_by_rows_takes_as_many_of_each(device):
    linear = nn.Linear(8, 4).to(device)
    rows = []
    method = Method(importance.magnitude(), scope=scope.row())
    sensitivity(linear, lambda m: rows.append((m.weight == 0).sum(1).tolist()) or 1, ratios=(0.25,), method=method)
    assert rows == [[0] * 4, [2] * 4]


@pytest.mark.parametrize("mode", ["UNSTRUCTURED_MAGNITUDE_GLOBAL", Method(importance.wanda())])
def test_sensitivity_takes_modes_and_calibrations(cnn, mode):
    calibration = None
    if isinstance(mode, Method):
        calibration = pyprune.calibrate(cnn.model, [cnn.inputs], mode)
    result = sensitivity(
        cnn.model,
        output_norm(cnn.inputs),
        ratios=(0.5,),
        method=mode,
        calibration=calibration,
        ignored_scope=IgnoredScope(names=["fc"]),
    )
    assert list(result.targets) == ["conv1.weight", "conv2.weight"]


def test_sensitivity_stops_early(cnn):
    scores = iter([1.0, 0.9, 0.6, 0.95, 0.3, 1.1, 1.0, 0.9])
    result = sensitivity(cnn.model, lambda model: next(scores), ratios=(0.2, 0.5, 0.8), early_stop=0.3)
    assert result.scores == {
        "conv1.weight": {0.2: 0.9, 0.5: 0.6},
        "conv2.weight": {0.2: 0.95, 0.5: 0.3},
        "fc.weight": {0.2: 1.1, 0.5: 1.0, 0.8: 0.9},
    }


def test_sensitivity_measures_smaller_ratios_after_it_stopped(cnn, tmp_path):
    arguments = {
        "early_stop": 0.3,
        "save_to": tmp_path / "result.json",
        "ignored_scope": IgnoredScope(["fc", "conv2"]),
    }
    scores = iter([1.0, 0.5])
    sensitivity(cnn.model, lambda model: next(scores), ratios=(0.5, 0.8), **arguments)
    result = sensitivity(cnn.model, lambda model: 0.9, ratios=(0.2, 0.8), **arguments)
    assert result.scores == {"conv1.weight": {0.2: 0.9, 0.5: 0.5}}


def test_sensitivity_resumes_with_what_is_missing(cnn, tmp_path):
    path = tmp_path / "sensitivity.json"
    score = output_norm(cnn.inputs)
    whole = sensitivity(cnn.model, score, ratios=(0.3, 0.6))
    calls = []

    def interrupted(model):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score(model)

    with pytest.raises(KeyboardInterrupt):
        sensitivity(cnn.model, interrupted, ratios=(0.3, 0.6), save_to=path)
    assert SensitivityResult.from_json(path).scores == {
        "conv1.weight": whole.scores["conv1.weight"],
        "conv2.weight": {0.3: whole.scores["conv2.weight"][0.3]},
    }
    calls.clear()
    resumed = sensitivity(cnn.model, lambda model: calls.append(1) or score(model), ratios=(0.3, 0.6), save_to=path)
    assert resumed == whole == SensitivityResult.from_json(path)
    assert len(calls) == 3
    # More ratios add to it.
    calls.clear()
    more = sensitivity(cnn.model, lambda model: calls.append(1) or score(model), ratios=(0.3, 0.9), save_to=path)
    assert len(calls) == 3
    assert more.ratios == [0.3, 0.6, 0.9]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda model, arguments: model.conv1.bias.data.add_(1), "weights"),
        (lambda model, arguments: model.bn1.running_mean.add_(1), "weights"),
        (lambda model, arguments: arguments.update(method=FILTERS), "method"),
        (lambda model, arguments: arguments.update(ignored_scope=IgnoredScope(names=["fc"])), "targets"),
        (lambda model, arguments: arguments.update(higher_is_better=False), "higher_is_better"),
    ],
)
def test_sensitivity_refuses_the_file_of_another_analysis(cnn, tmp_path, change, what):
    path = tmp_path / "sensitivity.json"
    sensitivity(cnn.model, lambda model: 1.0, ratios=(0.5,), save_to=path)
    before = path.read_bytes()
    arguments = {}
    change(cnn.model, arguments)
    with pytest.raises(ValueError, match=f"analysis with another {what}; give another save_to"):
        sensitivity(cnn.model, lambda model: 1.0, ratios=(0.5,), save_to=path, **arguments)
    assert path.read_bytes() == before


def test_sensitivity_refuses_a_file_of_something_else(cnn, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"precious": 1}))
    with pytest.raises(ValueError, match=r"other.json: .*not a sensitivity result"):
        sensitivity(cnn.model, lambda model: 1.0, save_to=path)
    assert json.loads(path.read_text()) == {"precious": 1}


def train(model):
    torch.nn.init.zeros_(model.fc.bias)
    return 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eval_fn": 3}, TypeError, "eval_fn is 3; give a function"),
        ({"eval_fn": lambda model: None}, TypeError, "eval_fn returned None"),
        ({"eval_fn": lambda model: True}, TypeError, "eval_fn returned True"),
        ({"eval_fn": lambda model: torch.ones(2)}, TypeError, "eval_fn returned tensor"),
        ({"eval_fn": lambda model: float("nan")}, ValueError, "as it is is nan"),
        ({"eval_fn": train}, ValueError, r"eval_fn changed fc.bias; it is to measure"),
        ({"ratios": ()}, ValueError, "ratios is empty"),
        ({"ratios": (0.5, 1.0)}, ValueError, "one of ratios is 1.0"),
        ({"ratios": 0.5}, TypeError, "ratios is 0.5; give several"),
        ({"early_stop": -1}, ValueError, "early_stop is -1"),
        ({"early_stop": "never"}, TypeError, "early_stop is 'never'"),
        ({"save_to": "no/such/folder.json"}, ValueError, "whose folder does not exist"),
        ({"method": PAIRS}, ValueError, "keeping 2 of 4 removes at most 0.5"),
        ({"method": "UNSTRUCTURED_HARD_CONCRETE"}, ValueError, "trains gates by a loss"),
        ({"method": Method(importance.taylor())}, TypeError, "taylor needs statistics"),
        ({"method": Method(importance.magnitude(), granularity.block(64, 64))}, ValueError, "larger than conv1"),
        ({"ignored_scope": IgnoredScope(names=["nothing"])}, ValueError, "nothing"),
    ],
)
def test_sensitivity_says_what_is_wrong_and_changes_nothing(cnn, unchanged, arguments, error, message):
    if arguments.get("eval_fn") is train:
        torch.nn.init.zeros_(cnn.model.fc.bias)
    before = unchanged(cnn.model)
    with pytest.raises(error, match=message):
        sensitivity(cnn.model, **({"eval_fn": lambda model: 1.0} | arguments))
    before.check()


def test_sensitivity_finds_weights_that_are_not_finite_before_it_evaluates(cnn):
    cnn.model.fc.weight.data[0, 0] = torch.nan
    calls = []
    with pytest.raises(ValueError, match=r"NaN or infinite weights: 1 in fc.weight"):
        sensitivity(cnn.model, lambda model: calls.append(1) or 1.0)
    assert not calls


def test_sensitivity_and_allocation_prune_to_the_ratio(cnn):
    result = sensitivity(cnn.model, output_norm(cnn.inputs), higher_is_better=False)
    ratios = pyprune.allocation_from_sensitivity(result, 0.6)
    pyprune.prune(cnn.model, BY_TENSOR, ratio=ratios)
    pruned = pruning_statistic(cnn.model).pruned_tensors
    assert sum(one.pruned_units for one in pruned) == round(0.6 * sum(one.units for one in pruned))


def test_sensitivity_copies_no_more_than_a_target(cnn, monkeypatch):
    folded = []
    fold = ops.fold
    monkeypatch.setattr(ops, "fold", lambda weights, masks: (folded.append(len(weights)), fold(weights, masks)))
    monkeypatch.setattr("copy.deepcopy", lambda *args: pytest.fail("copied the model"))
    sensitivity(cnn.model, lambda model: 1.0, ratios=(0.5,))
    assert folded == [1, 1, 1]


def swap(model):
    model.fc = nn.Linear(6, 3)


def freeze(model):
    model.requires_grad_(False)


def hook(model):
    model.conv1.register_forward_hook(lambda module, given, result: result * 0.5)


def new_parameter(model):
    model.fc.weight = nn.Parameter(torch.ones(3, 6))


@pytest.mark.parametrize("change", [swap, freeze, hook, new_parameter])
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_sensitivity_gives_back_the_structure_that_eval_fn_changes(cnn, change, fails):
    before = look({"model": cnn.model})

    def eval_fn(model):
        change(model)
        if fails:
            raise RuntimeError("no")
        return float(model(cnn.inputs).sum())

    with pytest.raises(RuntimeError, match="no") if fails else nullcontext():
        sensitivity(cnn.model, eval_fn, ratios=(0.25, 0.5))
    assert not differences(before, look({"model": cnn.model}))
