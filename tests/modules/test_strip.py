import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pyprune
from pyprune import StripFormat, strip
from pyprune.modules.gates import HardConcreteGate, gates_of
from pyprune.modules.holding import Hold
from pyprune.modules.targets import attachments_of
from tests.conftest import attached, masks_of


def prune(model, ratio=0.6):
    return pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=ratio)


def gate(model, mode="UNSTRUCTURED_HARD_CONCRETE"):
    """Put gates on a model, closed, half open and open."""
    for found in gates_of(pyprune.prune(model, mode)):
        nn.init.normal_(found.logits, std=3)
    return model


MODES = ["UNSTRUCTURED_REGULARIZATION_BASED", "UNSTRUCTURED_HARD_CONCRETE"]


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
    linear.weight.data[0, 0] = torch.inf
    linear.weight.data[0, 1] = -0.0
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
        ({"expected_count": True}, ValueError, "for hard-concrete gates"),
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
    take_off, calls = Hold.take_off, []

    def fail(*args):
        calls.append(args)
        if len(calls) - 1 == failing_call or failing_call == "fold":
            raise RuntimeError("no room")
        take_off(*args)

    monkeypatch.setattr(*((pyprune.ops, "fold") if failing_call == "fold" else (Hold, "take_off")), fail)
    with pytest.raises(RuntimeError, match="no room"):
        strip(case.model)
    monkeypatch.undo()
    assert list(case.model.state_dict()) == list(before)
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(case.model(case.inputs), expected)
    strip(case.model)
    assert torch.equal(case.model(case.inputs), expected)


@pytest.mark.parametrize("mode", MODES)
def test_strip_of_gates_leaves_a_dense_model_with_the_same_outputs(case, mode):
    next(iter(case.model.parameters())).requires_grad_(False)
    dense = look(case.model)
    gate(case.model, mode)
    case.model.eval()
    with torch.no_grad():  # attention computes in other ways then, and not the same with a parameter and a tensor
        torch.testing.assert_close(strip(case.model, do_copy=True)(case.inputs), case.model(case.inputs))
    expected = case.model(case.inputs)
    values = {target.parameter: found.values() for target, found in attachments_of(case.model).items()}
    assert strip(case.model.train()) is case.model
    assert look(case.model) == dense
    assert torch.equal(case.model.eval()(case.inputs), expected)
    for weight, value in values.items():
        assert not weight[value == 0].any()
        assert weight[value > 0].all()


def test_strip_multiplies_hard_concrete_values_in():
    linear = gate(nn.Linear(4, 1, bias=False))
    weight = linear._parameters["weight"]
    weight.data = torch.tensor([[torch.inf, 2.0, 2.0, 2.0]])
    attached(linear).logits.data = torch.tensor([[-4.0, 0.0, 1.0, 4.0]])
    expected = [[0.0, 1.0, 2 * 0.77727, 2.0]]
    torch.testing.assert_close(strip(linear).weight.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("straight_through", [False, True])
def test_strip_with_the_expected_count_zeroes_as_many_gates_as_training(straight_through, device):
    linear = nn.Linear(30, 40).to(device)
    options = {"gate_shape": (20, 30), "straight_through": straight_through, "device": device}
    found = HardConcreteGate((40, 30), **options)
    nn.init.normal_(found.logits, mean=-1)
    found.logits.data[:5] = -1.5  # ties
    weight = linear.weight.detach().clone()
    pyprune.attach_gate(linear, "weight", found)
    logits = found.logits.detach().double().cpu()
    zeros = round(600 - torch.sigmoid(logits - 2 / 3 * math.log(0.1 / 1.1)).sum().item())
    soft = torch.sigmoid(0.8 * found.logits.detach() / (2 / 3)).cpu()
    order = torch.sort(soft.flatten(), stable=True).indices[:zeros]
    values = (torch.ones_like(soft) if straight_through else soft).flatten().index_fill(0, order, 0).view(20, 30)
    assert zeros > (found.values() == 0).sum()
    strip(linear, expected_count=True)
    torch.testing.assert_close(linear.weight.detach(), weight * values.repeat_interleave(2, 0).to(device))
    assert int((linear.weight == 0).sum()) == 2 * zeros


def test_strip_with_the_expected_count_leaves_masks_and_other_gates_their_meaning(cnn):
    for name, mode in zip(("conv1", "conv2"), MODES, strict=True):
        gate(cnn.model.get_submodule(name), mode)
    pyprune.prune(cnn.model.fc, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    expected = strip(cnn.model, do_copy=True)
    strip(cnn.model, expected_count=True)
    assert torch.equal(cnn.model.conv1.weight, expected.conv1.weight)
    assert torch.equal(cnn.model.fc.weight, expected.fc.weight)
    assert not torch.equal(cnn.model.conv2.weight, expected.conv2.weight)


@pytest.mark.parametrize("expected_count", [True, False])
def test_strip_names_gates_with_nan_logits_and_changes_nothing(cnn, expected_count, unchanged):
    gate(cnn.model)
    attached(cnn.model.conv2).logits.data[0, 0] = math.nan
    attached(cnn.model.fc).logits.data[0, 0] = math.inf
    before = unchanged(cnn.model)
    with pytest.raises(ValueError, match=r"gates of conv2\.weight have NaN logits"):
        strip(cnn.model, expected_count=expected_count)
    before.check()
    attached(cnn.model.conv2).logits.data[0, 0] = -math.inf
    assert strip(cnn.model, expected_count=expected_count) is cnn.model


@pytest.mark.parametrize("failing", ["take_off", "unshare_samples", "_gated"])
def test_strip_puts_gates_on_again_after_an_error(case, failing, monkeypatch):
    gate(case.model).eval()
    expected = case.model(case.inputs)
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}

    def fail(*args):
        raise RuntimeError("no room")

    monkeypatch.setattr(pyprune.StochasticGate if failing == "take_off" else pyprune.modules.strip, failing, fail)
    with pytest.raises(RuntimeError, match="no room"):
        strip(case.model)
    monkeypatch.undo()
    assert list(case.model.state_dict()) == list(before)
    assert torch.equal(case.model(case.inputs), expected)
    strip(case.model)
    assert torch.equal(case.model(case.inputs), expected)


class Adapted(nn.Module):
    """A layer with an adapter, as PEFT makes it."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)


def test_strip_says_that_adapters_would_fill_the_zeros():
    model = nn.Sequential(nn.Linear(4, 4), Adapted())
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    with pytest.warns(
        UserWarning, match=r"there are adapters on 1\.base_layer\.weight; merged from now on"
    ) as caught:
        pyprune.strip(model)
    assert [one.filename for one in caught] == [__file__]
    pyprune.keep_sparse(model, None)  # which holds the zeros, and so says nothing
    pyprune.strip(model[0])
