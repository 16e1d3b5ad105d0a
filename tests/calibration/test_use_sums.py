"""Statistics of activations, seen where weights are used, against what is computed by hand at that place."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyprune
from pyprune import Method, calibrate, importance, scope
from tests.modules.test_layers import Experts

WANDA = importance.wanda()


class Past(nn.Module):
    """Uses its layers past their own calls, as swin, EVA and BEiT do."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.bias = nn.Linear(4, 12, bias=False), nn.Linear(12, 3), nn.Parameter(torch.randn(12))
        self.pointwise, self.tied = nn.Conv1d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        x = F.conv1d(x.mT, self.pointwise.weight).mT
        x = x + self.tied(self.tied(x))
        return self.out(F.linear(x, self.qkv.weight, torch.cat([self.bias[:8], self.bias[8:]])))


def test_what_goes_past_the_calls_of_layers_is_seen():
    torch.manual_seed(0)
    model, batches = Past(), [torch.randn(2, 5, 4), torch.randn(3, 7, 4)]
    calibration = calibrate(model, batches, WANDA)
    squares = {}

    def add(name, x):
        squares[name] = squares.get(name, 0) + x.detach().flatten(0, -2).square().sum(0)

    for x in batches:
        add("pointwise.weight", x)
        y = F.conv1d(x.mT, model.pointwise.weight).mT
        add("tied.weight", y)
        add("tied.weight", model.tied(y))
        y = y + model.tied(model.tied(y))
        add("qkv.weight", y)
        add("out.weight", F.linear(y, model.qkv.weight, model.bias))
    assert set(calibration.tensors) == set(squares)
    for name, expected in squares.items():
        torch.testing.assert_close(calibration.tensors[name].flatten(), expected.sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [importance.apoz(), importance.mean_activation(F.gelu)])
def test_outputs_are_seen_with_their_bias(rule):
    torch.manual_seed(0)
    model, x = Past(), torch.randn(3, 5, 4)
    model.tied = nn.Identity()
    tensors = calibrate(model, [x, x[:2]], rule).tensors
    y = F.conv1d(torch.cat([x, x[:2]]).mT, model.pointwise.weight).mT * 2
    made = F.linear(y, model.qkv.weight, model.bias)
    activation = rule.options[0]
    for name, outputs in {"qkv.weight": made, "out.weight": model.out(made), "pointwise.weight": y / 2}.items():
        after = activation(outputs).flatten(0, -2)
        expected = (after == 0).float().mean(0) if rule.needs == "zero outputs" else after.mean(0)
        torch.testing.assert_close(tensors[name], expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_attention_is_seen_inside(mask, training):
    """All of a TransformerEncoder, which is one operator in evaluation."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).train(training)
    x = torch.randn(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = mask
    tensors = calibrate(model, [{"src": x, "src_key_padding_mask": padding}], WANDA).tensors
    first = model.layers[0]
    real = ~padding.flatten()
    expected = x.flatten(0, 1)[real].norm(dim=0)[None]
    torch.testing.assert_close(tensors["layers.0.self_attn.in_proj_weight"], expected)
    seen = {}
    first.linear1.register_forward_hook(lambda m, args, out: seen.update(linear1=args[0]))
    first.linear2.register_forward_hook(lambda m, args, out: seen.update(linear2=args[0]))
    model.train()(x, src_key_padding_mask=padding)
    for name, given in seen.items():
        expected = given.detach().flatten(0, 1)[real].norm(dim=0)[None]
        torch.testing.assert_close(tensors[f"layers.0.{name}.weight"], expected)
    identity = nn.MultiheadAttention(8, 2, batch_first=True)
    identity.load_state_dict(first.self_attn.state_dict())
    with torch.no_grad():
        identity.out_proj.weight.copy_(torch.eye(8))
        identity.out_proj.bias.zero_()
        heads = identity(x, x, x, key_padding_mask=padding)[0]  # what goes into the output projection
    torch.testing.assert_close(
        tensors["layers.0.self_attn.out_proj.weight"],
        heads.flatten(0, 1)[real].norm(dim=0)[None],
        rtol=1e-4,
        atol=1e-5,
    )


def test_parts_of_a_weight_may_have_inputs_of_their_own():
    attention = nn.MultiheadAttention(4, 2)
    query, memory = torch.randn(5, 2, 4), torch.randn(7, 2, 4)
    tensors = calibrate(attention, [(query, memory, memory)], WANDA).tensors
    norms = [x.flatten(0, 1).norm(dim=0) for x in (query, memory, memory)]
    expected = torch.stack(norms).repeat_interleave(4, 0)
    torch.testing.assert_close(tensors["in_proj_weight"], expected)
    method = Method(WANDA, scope=scope.row())
    scores = (attention.in_proj_weight.abs() * expected).detach()
    pyprune.prune(attention, method, ratio=0.5, calibration=calibrate(attention, [(query, memory, memory)], method))
    kept = attention.in_proj_weight != 0
    assert torch.equal(kept, scores >= scores.sort(1).values[:, 2:3])


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_have_norms_of_what_each_got(transposed):
    torch.manual_seed(0)
    model, batches = Experts(transposed), [(torch.randn(7, 4), torch.tensor([0, 0, 2, 0, 1, 2, 2])),
                                           (torch.randn(2, 4), torch.tensor([0, 0]))]  # fmt: skip
    tensors = calibrate(model, batches, WANDA).tensors
    x, ids = (torch.cat(parts) for parts in zip(*batches, strict=True))
    up = model.gate_up_proj if transposed else model.gate_up_proj.mT
    inner = torch.stack([row @ up[i] for row, i in zip(x, ids, strict=True)])[:, :6].detach()
    for name, given in (("gate_up_proj", x), ("down_proj", inner)):
        norms = torch.stack([given[ids == expert].norm(dim=0) for expert in range(3)])
        torch.testing.assert_close(tensors[name], norms[..., None] if transposed else norms[:, None])
    with pytest.warns(UserWarning, match=r"no input reached some experts \(2 of gate_up_proj, 2 of down_proj\)"):
        calibrate(model, batches[1:], WANDA)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers_of_any_depth_are_seen(device):
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 4, num_layers=2, bidirectional=True, proj_size=3, batch_first=True).to(device)
    x = torch.randn(2, 6, 5, device=device)
    tensors = calibrate(lstm, [x], WANDA).tensors
    assert set(tensors) == {name for name, _ in lstm.named_parameters() if name.startswith("weight")}
    first = nn.LSTM(5, 4, bidirectional=True, proj_size=3, batch_first=True).to(device)
    first.load_state_dict({key: value for key, value in lstm.state_dict().items() if "_l0" in key})
    states = first(x)[0].detach()
    expected = {
        "weight_ih_l0": x.flatten(0, 1).norm(dim=0),
        "weight_ih_l1": states.flatten(0, 1).norm(dim=0),
        "weight_hh_l0": states[:, :-1, :3].flatten(0, 1).norm(dim=0),
        "weight_hh_l0_reverse": states[:, 1:, 3:].flatten(0, 1).norm(dim=0),
    }
    for name, norms in expected.items():
        torch.testing.assert_close(tensors[name], norms[None], rtol=1e-4, atol=1e-5)
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()


class Tagger(nn.Module):
    def __init__(self, head="linear"):
        super().__init__()
        self.words, self.places, self.fc = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 4)
        self.head = head

    def forward(self, ids):
        x = self.fc(self.words(ids) + self.places.weight[: ids.shape[1]])
        return x @ self.words.weight.T if self.head == "tied" else x


@pytest.mark.parametrize("rule", [WANDA, importance.apoz()])
def test_embeddings_are_left_out_with_one_warning(rule):
    ids = torch.tensor([[1, 2, 3]])
    cut = pyprune.granularity.channel("out") if rule is not WANDA else pyprune.granularity.element()
    method = Method(rule, cut, scope.tensor())
    model = Tagger()
    with pytest.warns(UserWarning, match="leaves out") as caught:
        calibration = calibrate(model, [ids], method)
    assert [str(one.message).split(":")[0] for one in caught] == [
        f"importance {rule.name} leaves out words.weight, places.weight"
    ]
    assert set(calibration.tensors) == {"fc.weight"}
    pyprune.prune(model, method, ratio=0.5, calibration=calibration)
    assert [t.tensor_name for t in pyprune.pruning_statistic(model).pruned_tensors] == ["fc.weight"]
    with pytest.raises(ValueError, match="in all weights rows are only looked up"):
        calibrate(nn.Sequential(nn.Embedding(9, 4)), [ids], method)


def test_an_embedding_that_is_the_head_too_has_inputs():
    ids = torch.tensor([[1, 2, 3]])
    model = Tagger("tied")
    method = Method(WANDA, scope=scope.row())
    with pytest.warns(UserWarning, match=r"leaves out places\.weight: rows"):
        calibration = calibrate(model, [ids], method)
    x = model.fc(model.words(ids) + model.places.weight[:3])
    torch.testing.assert_close(calibration.tensors["words.weight"], x[0].norm(dim=0)[None].detach())
    pyprune.prune(model, method, ratio=0.5, calibration=calibration)
    assert (model.words.weight == 0).sum(1).tolist() == [2] * 9


def test_a_pruner_leaves_embeddings_out_with_a_warning():
    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"wanda leaves out words\.weight, places\.weight"):
        pruner = pyprune.Pruner(
            model, Method(WANDA, scope=scope.row()), pyprune.schedules.one_shot(0.5, start=1), optimizer=optimizer
        )
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    optimizer.step()
    pruner.step()
    assert [t.tensor_name for t in pyprune.pruning_statistic(model).pruned_tensors] == ["fc.weight"]


def test_a_use_against_the_layer_asks_for_examples():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return x @ self.layer.weight

    model, x = Backwards(), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"layer\.weight cannot be seen: .*another dimension.*examples_inputs"):
        calibrate(model, [x], WANDA)
    calibration = calibrate(model, [x], WANDA, examples_inputs=x)
    torch.testing.assert_close(calibration.tensors["layer.weight"], x.norm(dim=0)[:, None])


def test_gated_and_compiled_models_are_seen_as_they_are():
    x = torch.randn(5, 4)
    gated = pyprune.prune(nn.Sequential(nn.Linear(4, 3)), "UNSTRUCTURED_REGULARIZATION_BASED")
    for model in (gated, torch.compile(nn.Sequential(nn.Linear(4, 3)), backend="eager")):
        (tensor,) = calibrate(model, [x], WANDA).tensors.values()
        torch.testing.assert_close(tensor, x.norm(dim=0)[None])


def test_a_weight_whose_entries_are_moved_is_refused():
    class Flipped(nn.Linear):
        def forward(self, x):
            return F.linear(x.flip(1), self.weight.flip(1))

    with pytest.raises(ValueError, match="through weight cannot be seen: its entries are moved before it is used"):
        calibrate(Flipped(4, 4), [torch.randn(5, 4)], WANDA)
