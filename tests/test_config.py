import copy
import io
import json

import pytest
import torch
from torch import nn

import pyprune
from pyprune import get_config, load_from_config
from pyprune.targets import masks_of


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
    assert json.loads(json.dumps(saved["config"])) == saved["config"]
    assert load_from_config(fresh, saved["config"]) is fresh
    assert all(mask.all() for mask in masks_of(fresh).values())
    fresh.load_state_dict(saved["state_dict"])
    assert torch.equal(fresh.eval()(case.inputs), case.model.eval()(case.inputs))
    assert get_config(fresh) == get_config(case.model)


def test_get_config_names_masked_weights_only(transformer):
    assert get_config(transformer.model) == {"version": 1, "masks": []}
    prune(transformer.model, ignored_scope=pyprune.IgnoredScope(names=["layer", "cross"]))
    assert get_config(transformer.model) == {
        "version": 1,
        "masks": [{"names": ["embed.weight", "decoder.weight"], "shape": [11, 8]}],
    }


def test_load_from_config_masks_bare_parameters_without_a_trace():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.kernel

    config = get_config(prune(Bare(), examples_inputs=torch.randn(2, 4)))
    assert [target.name for target in masks_of(load_from_config(Bare(), config))] == ["kernel"]


def entry(names, shape):
    return {"version": 1, "masks": [{"names": ["fc.weight"], "shape": [3, 6]}, {"names": names, "shape": shape}]}


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ([], TypeError, "dict that get_config returned"),
        ({}, ValueError, "version None"),
        ({"version": 2, "masks": []}, ValueError, "version 2; this pyprune reads version 1"),
        ({"version": 1}, ValueError, "damaged"),
        ({"version": 1, "masks": [3]}, ValueError, "damaged"),
        (entry([["weight"]], [4, 1, 3, 3]), ValueError, "damaged"),
        (entry([3], [4, 1, 3, 3]), ValueError, "damaged"),
        ({"version": 1, "masks": [{"names": ["fc.weight"]}]}, ValueError, "damaged"),
        (entry([], []), ValueError, "does not have"),
        (entry(["conv.weight"], [4, 1, 3, 3]), ValueError, "nearest parameters: conv2.weight|conv1.weight"),
        (entry(["conv1.weight"], [4, 1, 5, 5]), ValueError, r"shape \[4, 1, 5, 5\] for conv1.weight"),
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
    with pytest.raises(ValueError, match=r"conv1\.weight carries a mask already"):
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
        load_from_config({}, {"version": 1, "masks": []})


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
