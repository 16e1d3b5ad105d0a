import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pyprune
from pyprune import StripFormat, masks, strip
from pyprune.targets import masks_of


def prune(model, ratio=0.6):
    return pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=ratio)


def look(model):
    """Everything but values."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad, p.stride()) for n, p in model.named_parameters()],
        "all names": [name for name, _ in model.named_parameters(remove_duplicate=False)],
        "keys": list(model.state_dict()),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "slots": [list(module._parameters) for module in model.modules()],
    }


def test_strip_leaves_a_dense_model_with_the_same_outputs(case):
    next(iter(case.model.parameters())).requires_grad_(False)
    dense = look(case.model)
    prune(case.model)
    assert look(case.model) != dense
    case.model.eval()
    expected = case.model(case.inputs)
    masks = masks_of(case.model)
    assert strip(case.model) is case.model
    assert look(case.model) == dense
    assert torch.equal(case.model(case.inputs), expected)
    for target, mask in masks.items():
        assert not target.parameter[~mask].any()
        assert target.parameter[mask].all()


def test_strip_gives_rnn_weights_back_to_their_flat_list(recurrent):
    prune(recurrent.model)
    strip(recurrent.model)
    lstm = recurrent.model.lstm
    for name, weight in zip(lstm._flat_weights_names, lstm._flat_weights, strict=True):
        assert weight is getattr(lstm, name)


def test_strip_leaves_the_optimizer_its_parameters(case):
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    prune(case.model)
    strip(case.model)
    before = {name: parameter.detach().clone() for name, parameter in case.model.named_parameters()}
    case.model.train()(case.inputs).square().sum().backward()
    optimizer.step()
    moved = [name for name, p in case.model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > len(before) / 2


@pytest.mark.parametrize("case", ["cnn", "transformer"], indirect=True)
def test_strip_leaves_a_model_that_exports(case):
    strip(prune(case.model)).eval()
    program = torch.export.export(case.model, (case.inputs,))
    torch.testing.assert_close(program.module()(case.inputs), case.model(case.inputs))


def test_strip_writes_zeros_over_infinities_and_minus_zero():
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pyprune.prune(linear, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    linear.parametrizations.weight.original.data[0, 0] = torch.inf
    linear.parametrizations.weight.original.data[0, 1] = -0.0
    assert strip(linear).weight.tolist() == [[0.0, 0.0, 3.0, 4.0]]
    assert not linear.weight.signbit().any()


def test_strip_with_do_copy_leaves_the_model_alone(case, unchanged):
    prune(case.model)
    case.model.eval()
    expected = case.model(case.inputs)
    before = unchanged(case.model)
    stripped = strip(case.model, do_copy=True)
    before.check()
    assert stripped is not case.model
    assert not masks_of(stripped)
    assert torch.equal(stripped(case.inputs), expected)
    assert torch.equal(case.model(case.inputs), expected)
    prune(case.model, 0.9)
    assert torch.equal(stripped(case.inputs), expected)


def test_strip_of_a_tied_copy_keeps_the_tie(transformer):
    stripped = strip(prune(transformer.model), do_copy=True)
    assert stripped.embed.weight is stripped.decoder.weight


def test_strip_without_masks_returns_the_model(case, unchanged):
    before = unchanged(case.model)
    assert strip(case.model) is case.model
    before.check()


def test_strip_then_prune_again(case):
    strip(prune(case.model, 0.6))
    prune(case.model, 0.3)
    twin = copy.deepcopy(case.model)
    strip(twin)
    torch.testing.assert_close(twin.eval()(case.inputs), case.model.eval()(case.inputs))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"strip_format": StripFormat.NATIVE}, ValueError, "no quantizers"),
        ({"strip_format": "native"}, ValueError, "no quantizers"),
        ({"strip_format": "dequantize"}, ValueError, "allowed is StripFormat.IN_PLACE"),
        ({"strip_format": None}, ValueError, "allowed is StripFormat.IN_PLACE"),
        ({"model": 3}, TypeError, r"torch\.nn\.Module"),
    ],
)
def test_strip_refuses_wrong_arguments(cnn, arguments, error, text, unchanged):
    prune(cnn.model)
    before = unchanged(cnn.model)
    arguments = {"model": cnn.model} | arguments
    with pytest.raises(error, match=text):
        strip(arguments.pop("model"), **arguments)
    before.check()


def test_strip_accepts_the_name_of_the_format(cnn):
    assert not masks_of(strip(prune(cnn.model), strip_format="in_place"))


def test_strip_refuses_a_parametrization_over_a_mask(cnn, unchanged):
    prune(cnn.model)
    parametrize.register_parametrization(cnn.model.fc, "weight", nn.Identity())
    before = unchanged(cnn.model)
    with pytest.raises(ValueError, match=r"fc.weight got another parametrization \(Identity\)"):
        strip(cnn.model)
    before.check()


@pytest.mark.parametrize("failing_call", [0, 1, 2, "fold"])
def test_strip_puts_masks_on_again_after_an_error(case, failing_call, monkeypatch):
    prune(case.model).eval()
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    expected = case.model(case.inputs)
    unregister, calls = masks._unregister, []

    def fail(*args):
        calls.append(args)
        if len(calls) - 1 == failing_call or failing_call == "fold":
            raise RuntimeError("no room")
        unregister(*args)

    monkeypatch.setattr(*((pyprune.ops, "fold") if failing_call == "fold" else (masks, "_unregister")), fail)
    with pytest.raises(RuntimeError, match="no room"):
        strip(case.model)
    assert list(case.model.state_dict()) == list(before)
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(case.model(case.inputs), expected)
    monkeypatch.undo()
    strip(case.model)
    assert torch.equal(case.model(case.inputs), expected)
