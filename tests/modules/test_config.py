import copy
import io
import json
import math

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, get_config, granularity, importance, load_from_config, schedules, scope
from pyprune.modules.gates import gates_of
from tests.conftest import masks_of, skip_what_dense_cannot


def prune(model, ratio=0.6, **options):
    return pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=ratio, **options)


def test_load_from_config_rebuilds_a_saved_model(case):
    fresh = copy.deepcopy(case.model)
    prune(case.model).eval()
    case.model.train()(case.inputs).square().sum().backward()
    torch.optim.SGD(case.model.parameters(), lr=0.1).step()
    file = io.BytesIO()
    torch.save({"state_dict": case.model.state_dict(), "config": get_config(case.model)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert load_from_config(fresh, saved["config"]) is fresh
    fresh.load_state_dict(saved["state_dict"])
    assert torch.equal(fresh.eval()(case.inputs), case.model.eval()(case.inputs))
    assert_same_config(get_config(fresh), get_config(case.model))
    prune(fresh, 0.0)
    prune(case.model, 0.0)
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def assert_same_config(one, other):
    for mine, others in zip(one["masks"], other["masks"], strict=True):
        assert mine.keys() == others.keys()
        for key, value in mine.items():
            same = torch.equal(value, others[key]) if isinstance(value, torch.Tensor) else value == others[key]
            assert same, key
    assert one["gates"] == other["gates"]


def test_get_config_names_masked_weights_only(transformer):
    assert get_config(transformer.model) == {"version": 2, "masks": [], "gates": []}
    prune(transformer.model, ignored_scope=pyprune.IgnoredScope(names=["layer", "cross"]))
    (entry,) = get_config(transformer.model)["masks"]
    assert entry["names"] == ["embed.weight", "decoder.weight"]
    assert entry["shape"] == [11, 8]
    assert len(entry["bits"]) == 11
    assert int((transformer.model.embed.weight == 0).sum()) == len(entry["parked"])


def test_load_from_config_masks_bare_parameters_without_a_trace():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.kernel

    config = get_config(prune(Bare(), examples_inputs=torch.randn(2, 4)))
    assert [target.name for target in masks_of(load_from_config(Bare(), config))] == ["kernel"]


def mask_entry(names, shape):
    size = math.prod(shape) if isinstance(shape, list) else 0
    bits = torch.full((-(-size // 8),), 255, dtype=torch.uint8)
    return {"names": names, "shape": shape, "bits": bits, "parked": torch.zeros(0)}


def entry(names, shape, **values):
    return {"version": 2, "masks": [mask_entry(["fc.weight"], [3, 6]), mask_entry(names, shape) | values]}


def gate_entry(**values):
    gate = {"names": ["fc.weight"], "shape": [3, 6], "kind": "StochasticGate", "options": {"dtype": "float32"}}
    return {"version": 2, "masks": [], "gates": [gate | values]}


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ([], TypeError, "dict that get_config returned"),
        ({}, ValueError, "version None"),
        ({"version": 3, "masks": []}, ValueError, "version 3; this pyprune reads version 2"),
        ({"version": 1, "masks": []}, ValueError, r"pyprune\.upgrade_checkpoint\(state_dict, config\)"),
        ({"version": 2}, ValueError, "damaged"),
        ({"version": 2, "masks": [3]}, ValueError, "damaged"),
        (entry(["conv1.weight"], [4, 1, 3, 3], bits=None), ValueError, "damaged: .*conv1.weight has bits"),
        (entry(["conv1.weight"], [4, 1, 3, 3], bits=torch.zeros(4, dtype=torch.uint8)), ValueError, "has 4 bytes"),
        (
            entry(["conv1.weight"], [4, 1, 3, 3], parked=torch.zeros(3)),
            ValueError,
            "not as many parked values",
        ),
        (entry([["weight"]], [4, 1, 3, 3]), ValueError, "damaged"),
        (entry([3], [4, 1, 3, 3]), ValueError, "damaged"),
        ({"version": 2, "masks": [{"names": ["fc.weight"]}]}, ValueError, "damaged"),
        (entry([], []), ValueError, r"masks\[1\] has the names \[\]"),
        (entry(["conv.weight"], [4, 1, 3, 3]), ValueError, "nearest parameters: conv2.weight|conv1.weight"),
        (entry(["conv1.weight"], [4, 1, 5, 5]), ValueError, r"shape \[4, 1, 5, 5\] for conv1.weight"),
        (gate_entry(kind="Gate"), ValueError, "the gate of fc.weight: its kind is 'Gate'; this pyprune knows Stoch"),
        (gate_entry(kind=None), ValueError, "its kind is None; this pyprune knows StochasticGate, HardConcreteGate"),
        (gate_entry(kind=[]), ValueError, r"gate of fc.weight: its kind is \[\]"),
        (gate_entry(options={}), ValueError, "must name a dtype, float32 or weight"),
        (gate_entry(options=None), ValueError, "must name a dtype"),
        (gate_entry(options={"dtype": "int7"}), ValueError, "must name a dtype"),
        (gate_entry(options={"dtype": "float32", "gate_shape": [5, 5]}), ValueError, "damaged: the gate"),
        (gate_entry(options={"dtype": "float32", "droprate": 3}), ValueError, "damaged: the gate"),
        (entry(["conv1.weight", "conv2.weight"], [4, 1, 3, 3]), ValueError, "tie the weights"),
    ],
)
def test_load_from_config_says_what_does_not_fit_and_changes_nothing(cnn, config, error, text, unchanged):
    before = unchanged(cnn.model)
    with pytest.raises(error, match=text):
        load_from_config(cnn.model, config)
    before.check()


def test_load_from_config_wants_a_dense_model(cnn, unchanged):
    config = get_config(prune(cnn.model))
    before = unchanged(cnn.model)
    with pytest.raises(ValueError, match=r"conv1\.weight carries a mask or gate already"):
        load_from_config(cnn.model, config)
    before.check()


def test_load_from_config_wants_the_same_ties(transformer):
    config = get_config(prune(transformer.model))
    untied = type(transformer.model)()
    untied.decoder.weight = nn.Parameter(untied.decoder.weight.detach().clone())
    with pytest.raises(ValueError, match="tie the weights as they were"):
        load_from_config(untied, config)


def test_config_functions_want_a_module():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        get_config({})
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        load_from_config({}, {"version": 2, "masks": []})


def test_load_from_config_takes_a_model_on_the_meta_device(case):
    prune(case.model).eval()
    with torch.device("meta"):
        fresh = type(case.model)()
    load_from_config(fresh, get_config(case.model))
    fresh.load_state_dict(case.model.state_dict(), assign=True)
    assert torch.equal(fresh.eval()(case.inputs), case.model(case.inputs))
    pyprune.strip(fresh)
    assert torch.equal(fresh(case.inputs), case.model(case.inputs))


def test_load_from_config_under_inference_mode_leaves_masks_to_train_with(cnn):
    config = get_config(prune(copy.deepcopy(cnn.model)))
    with torch.inference_mode():
        load_from_config(cnn.model, config)
    cnn.model(cnn.inputs).sum().backward()
    prune(cnn.model, 0.3)


@pytest.mark.parametrize("mode", ["UNSTRUCTURED_REGULARIZATION_BASED", "UNSTRUCTURED_HARD_CONCRETE"])
@pytest.mark.parametrize("device_of_fresh", [None, "meta"])
def test_load_from_config_rebuilds_a_saved_model_with_gates(case, mode, device_of_fresh):
    with torch.device(device_of_fresh or case.inputs.device):
        fresh = type(case.model)()
    pyprune.prune(case.model, mode, same_on_all_ranks=True)
    for gate in gates_of(case.model):
        torch.nn.init.normal_(gate.logits)
    file = io.BytesIO()
    torch.save({"state_dict": case.model.state_dict(), "config": get_config(case.model)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(saved["config"])) == saved["config"]
    load_from_config(fresh, saved["config"])
    fresh.load_state_dict(saved["state_dict"], assign=device_of_fresh is not None)
    assert torch.equal(fresh.eval()(case.inputs), case.model.eval()(case.inputs))
    if device_of_fresh is None:  # assign=True unties tied weights
        assert get_config(fresh) == get_config(case.model)
    fresh.train()
    case.model.train()
    torch.manual_seed(1)
    expected = case.model(case.inputs)
    torch.manual_seed(1)
    assert torch.equal(fresh(case.inputs), expected)


def test_load_from_config_rebuilds_gates_put_on_by_hand():
    def build():
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    model = prune(build(), ratio=0.5, ignored_scope=pyprune.IgnoredScope(names=["0"]))
    gate = pyprune.HardConcreteGate(
        (4, 4), gate_shape=(2, 1), beta=0.5, gamma=-0.2, zeta=1.2, straight_through=True, dtype=torch.float64
    )
    pyprune.attach_gate(model[0].double(), "weight", gate)
    config = get_config(model)
    (rebuilt,) = gates_of(load_from_config(build().double(), config))
    assert type(rebuilt) is pyprune.HardConcreteGate
    assert rebuilt.options() == gate.options()
    del config["gates"]
    assert not gates_of(load_from_config(build(), config))


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float64, torch.float32])
@pytest.mark.parametrize("fresh", [torch.bfloat16, torch.float64, torch.float32])
def test_load_from_config_makes_logits_for_a_fresh_model_of_another_dtype(cnn, saved, fresh):
    rebuilt = copy.deepcopy(cnn.model).to(fresh)
    skip_what_dense_cannot(rebuilt, cnn.inputs.to(fresh))
    pyprune.prune(cnn.model, "UNSTRUCTURED_HARD_CONCRETE").to(saved)
    load_from_config(rebuilt, json.loads(json.dumps(get_config(cnn.model))))
    rebuilt.load_state_dict(cnn.model.state_dict())
    assert rebuilt(cnn.inputs.to(fresh)).dtype == fresh
    assert {gate.logits.dtype for gate in gates_of(rebuilt)} <= {torch.float32, fresh}


def test_load_from_config_leaves_the_model_as_it_was_when_passes_fail(cnn, unchanged, monkeypatch):
    config = get_config(pyprune.prune(copy.deepcopy(cnn.model), "UNSTRUCTURED_HARD_CONCRETE"))
    before = unchanged(cnn.model)
    monkeypatch.setattr("pyprune.modules.forward_pass.class_with_gates", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_from_config(cnn.model, config)
    before.check()


def test_get_config_describes_no_gate_of_another_class():
    class Own(pyprune.StochasticGate):
        pass

    linear = torch.nn.Linear(2, 2)
    pyprune.attach_gate(linear, "weight", Own((2, 2)))
    with pytest.raises(TypeError, match="weight carries a Own"):
        get_config(linear)


def test_biases_of_a_loaded_model_stay_in_step_with_a_pruner():
    filters = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())
    model = pyprune.prune(nn.Linear(6, 8), filters, ratio=0.25, zero_dead_channels=True)
    fresh = pyprune.load_from_config(nn.Linear(6, 8), pyprune.get_config(model))
    fresh.load_state_dict(model.state_dict())
    pruner = pyprune.Pruner(fresh, filters, schedules.multi_step({1: 0.5}))
    assert pruner.step()
    dead = (fresh.weight == 0).all(1)
    assert int(dead.sum()) == 4
    assert torch.equal(fresh.bias == 0, dead)


def test_upgrade_checkpoint_brings_one_of_version_0_1_0_up_to_date(transformer):
    raw = copy.deepcopy(transformer.model.state_dict())
    prune(transformer.model)
    config = get_config(transformer.model)
    names = {name for one in config["masks"] for name in one["names"]}
    old, masks = {}, masks_of(transformer.model)
    for name, tensor in raw.items():
        prefix, _, attribute = name.rpartition(".")
        path = f"{prefix}.parametrizations.{attribute}."
        owner = next((target for target in masks if target.is_among({name})), None)
        if owner is None:
            old[name] = tensor
        else:
            old |= {path + "original": tensor, path + "0.mask": masks[owner]}
    old_config = {
        "version": 1,
        "masks": [{"names": m["names"], "shape": m["shape"]} for m in config["masks"]],
        "gates": [],
    }
    assert names
    state_dict, upgraded = pyprune.upgrade_checkpoint(old, old_config)
    fresh = load_from_config(type(transformer.model)().to(transformer.inputs.device), upgraded)
    fresh.load_state_dict(state_dict)
    for name, tensor in transformer.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    prune(fresh, 0.0)
    for name, tensor in raw.items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="do not belong together"):
        pyprune.upgrade_checkpoint(raw, old_config)
    with pytest.raises(ValueError, match="only version 1"):
        pyprune.upgrade_checkpoint(raw, config)
    with pytest.raises(TypeError, match="both dicts"):
        pyprune.upgrade_checkpoint(raw, [])


WRONG = (True, -1, 2.5, 2**70, "no", [], [1.5], {}, {"a": 1}, math.nan, b"x", torch.zeros(3), lambda: 0)
# Of each field what is right besides what get_config wrote.
RIGHT = {
    "parked": (None,),
    "unit": (None,),
    "parks": (True,),
    "same_on_all_ranks": (True,),
    "straight_through": (True,),
    "beta": (2.5, 2**70),
    "zeta": (2.5, 2**70),
    "gamma": (-1,),
    "gate_shape": (None,),
}


def bytes_of(values, **kind):
    return torch.tensor(values, dtype=torch.uint8, **kind)


def dead_filters(model):
    filters = Method(importance.magnitude(p=2), granularity.channel("out"), scope.tensor())
    return pyprune.prune(model, filters, ratio=0.5, zero_dead_channels=True)


def damages(config):
    """Yield a config with each field of each of its entries missing, and wrong in each way."""
    yield from ({**config, key: value} for key in config for value in WRONG if key == "version" or value != [])
    for kind in ("masks", "gates"):
        for i, one in enumerate(config[kind]):
            for path in [(key,) for key in one] + [("options", key) for key in one.get("options", ())]:
                for value in (*WRONG, None):
                    if any(type(value) is type(right) and value == right for right in RIGHT.get(path[-1], ())):
                        continue
                    entries = list(config[kind])
                    entries[i] = copy.copy(one)
                    entries[i][path[0]] = {**one["options"], path[1]: value} if path[1:] else value
                    yield {**config, kind: entries}


@pytest.mark.parametrize(
    "put_on",
    [
        prune,
        dead_filters,
        lambda model: pyprune.prune(model, "UNSTRUCTURED_REGULARIZATION_BASED"),
        lambda model: pyprune.prune(model, "UNSTRUCTURED_HARD_CONCRETE"),
    ],
)
def test_load_from_config_refuses_every_damage_and_changes_nothing(put_on, unchanged):
    config = get_config(put_on(nn.Linear(6, 4)))
    fresh = nn.Linear(6, 4)
    before = unchanged(fresh)
    seen = 0
    for damage in damages(config):
        with pytest.raises((TypeError, ValueError), match="config"):
            load_from_config(fresh, damage)
        seen += 1
    before.check()
    assert seen > 60
    load_from_config(fresh, config)


def test_load_from_config_refuses_what_contradicts_itself(unchanged):
    masks, gates = (
        get_config(put_on(nn.Linear(6, 4)))[kind]
        for put_on, kind in (
            (dead_filters, "masks"),
            (lambda model: pyprune.prune(model, "UNSTRUCTURED_HARD_CONCRETE"), "gates"),
        )
    )
    weight, bias = masks
    parked = weight["parked"]
    cases = {
        "more than once": [
            {"masks": masks * 2},
            {"masks": masks, "gates": gates},
            {"masks": [], "gates": gates * 2},
            {"masks": [weight, {**weight, "names": ["_orig_mod.weight"]}]},
        ],
        "is not that of the dead channels": [{"masks": [weight, {**bias, "bits": ~bias["bits"] & 0xF0}]}],
        "follows": [
            {"masks": [bias]},
            {"masks": [weight, {**bias, "follows": "bias"}]},
            {"masks": [weight, {**bias, "groups": 5}]},
        ],
        "bytes of bits": [{"masks": [{**weight, "bits": torch.cat([weight["bits"]] * 2)}]}],
        "no tensor of bytes": [
            {"masks": [{**weight, "bits": bits}]}
            for bits in (weight["bits"].float(), weight["bits"].to("meta"), weight["bits"].to_sparse())
        ],
        "NaN or infinite": [{"masks": [{**weight, "parked": parked * bad}]} for bad in (math.nan, math.inf)],
        "no tensor of weights": [
            {"masks": [{**weight, "parked": bad}]} for bad in (parked.int(), parked.to("meta"), parked.to_sparse())
        ],
        "not as many": [{"masks": [{**weight, "parked": parked[1:]}]}],
    }
    fresh = nn.Linear(6, 4)
    before = unchanged(fresh)
    for text, configs in cases.items():
        for config in configs:
            with pytest.raises(ValueError, match=text):
                load_from_config(fresh, {"version": 2, **config})
    before.check()


@pytest.mark.parametrize("mode", ["UNSTRUCTURED_MAGNITUDE_LOCAL", "UNSTRUCTURED_HARD_CONCRETE"])
@pytest.mark.parametrize("child", ["module", "my_forward_module", "my_orig_mod"])
def test_configs_fit_a_model_with_a_part_that_is_called_as_a_wrapper_is(child, mode):
    def build():
        model = nn.Module()
        model.add_module(child, nn.Linear(8, 8))
        model.weight, model.myweight = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        model.forward = lambda x: getattr(model, child)(x) @ model.weight @ model.myweight
        return model

    options = {"ratio": 0.5} if "MAGNITUDE" in mode else {}
    saved = pyprune.prune(build(), mode, ignored_scope=pyprune.IgnoredScope(names=["weight", "myweight"]), **options)
    fresh = load_from_config(build(), get_config(saved))
    fresh.load_state_dict(saved.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(fresh.eval()(x), saved.eval()(x))
    config = get_config(saved)
    (entry,) = (*config["masks"], *config["gates"])
    entry["names"] = [f"module._orig_mod.{child}.weight"]  # as it was saved wrapped
    again = get_config(load_from_config(build(), config))
    assert [one["names"] for one in (*again["masks"], *again["gates"])] == [[f"{child}.weight"]]


@pytest.mark.parametrize("mode", ["UNSTRUCTURED_MAGNITUDE_LOCAL", "UNSTRUCTURED_HARD_CONCRETE"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_configs_fit_the_plain_model_and_the_wrapped_one(wrap, mode):
    def build():
        return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 4)))

    options = {"ratio": 0.5} if "MAGNITUDE" in mode else {}
    plain = pyprune.prune(build(), mode, **options)
    config = get_config(plain)
    names = [entry["names"] for entry in (*config["masks"], *config["gates"])]
    assert names == [["0.weight"], ["1.0.weight"]]
    inside = build()
    inside[1] = wrap(inside[1])
    for wrapped in (wrap(build()), nn.DataParallel(wrap(build())), inside):
        load_from_config(wrapped, config)
        again = get_config(wrapped)
        assert [entry["names"] for entry in (*again["masks"], *again["gates"])] == names
        load_from_config(build(), again)
