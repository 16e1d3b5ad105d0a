import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyprune
from pyprune import Method, calibrate, importance, scope


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def labelled(case, batches=3):
    torch.manual_seed(1)
    return [[torch.randn_like(case.inputs), torch.randint(3, (len(case.inputs),), device=case.inputs.device)]
            for _ in range(batches)]  # fmt: skip


def gradients(model, batches):
    """Return the gradient of each batch in evaluation mode, by name."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    found = []
    for batch in batches:
        model.zero_grad()
        loss_fn(model, batch).backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    return found


@pytest.mark.parametrize("rule", [importance.gradient(), importance.snip(), importance.taylor(), importance.fisher(),
                                  importance.snip_momentum(), importance.snip_momentum(0.5, 2.0)])  # fmt: skip
def test_calibrate_gathers_gradients(cnn, rule, unchanged):
    batches = labelled(cnn)
    cnn.model.conv1.weight.requires_grad_(False)
    cnn.model.fc.weight.grad = torch.ones_like(cnn.model.fc.weight)
    before = unchanged(cnn.model)
    calibration = calibrate(cnn.model, batches, rule, loss_fn=loss_fn)
    before.check()
    assert (cnn.model.fc.weight.grad == 1).all()
    assert cnn.model.conv1.weight.grad is None
    assert calibration.num_batches == 3
    assert list(calibration.tensors) == ["conv1.weight", "conv2.weight", "fc.weight"]
    each = gradients(cnn.model, batches)
    for name, statistic in calibration.tensors.items():
        g = torch.stack([one[name] for one in each])
        if rule.needs == "momentum":
            decay, scale = rule.options
            expected = torch.zeros_like(g[0])
            for one in g:
                expected = decay * expected + scale * (one * cnn.model.get_parameter(name)).abs()
        else:
            expected = g.mean(0) if rule.needs == "gradient" else g.square().mean(0)
        assert statistic.dtype == torch.float32
        assert not statistic.requires_grad
        torch.testing.assert_close(statistic, expected.detach())


def test_calibrate_sees_the_gradient_of_weights_that_masks_drop(cnn):
    batches = labelled(cnn)
    pyprune.prune(cnn.model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    plain = pyprune.strip(cnn.model, do_copy=True)
    masked = calibrate(cnn.model, batches, importance.gradient(), loss_fn=loss_fn)
    folded = calibrate(plain, batches, importance.gradient(), loss_fn=loss_fn)
    for name, tensor in folded.tensors.items():
        torch.testing.assert_close(masked.tensors[name], tensor)
    assert (masked.tensors["fc.weight"][cnn.model.fc.weight == 0] != 0).any()


def test_calibrate_adds_up_the_gradients_of_a_tied_weight(transformer):
    model, tokens = transformer.model, transformer.inputs

    def loss(model, tokens):
        return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    calibration = calibrate(model, [tokens], importance.gradient(), loss_fn=loss)
    model.eval()
    loss(model, tokens).backward()
    torch.testing.assert_close(calibration.tensors["embed.weight"], model.embed.weight.grad)


def test_calibrate_takes_the_norms_of_inputs(cnn, device):
    batches = [torch.randn(5, 1, 8, 8, device=device) for _ in range(3)]
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in cnn.model.named_modules()
        if name in ("conv1", "conv2", "fc")
    ]
    calibration = calibrate(cnn.model, batches, importance.wanda())
    for hook in hooks:
        hook.remove()
    x = {name: torch.cat(inputs) for name, inputs in seen.items()}
    norms = {
        "conv1.weight": x["conv1"].square().sum((0, 2, 3)).sqrt().reshape(1, 1, 1, 1),
        # Two groups of three outputs, which read two input channels each.
        "conv2.weight": x["conv2"]
        .square()
        .sum((0, 2, 3))
        .sqrt()
        .reshape(2, 2)
        .repeat_interleave(3, 0)[..., None, None],
        "fc.weight": x["fc"].square().sum(0).sqrt().reshape(1, 6),
    }
    for name, statistic in calibration.tensors.items():
        torch.testing.assert_close(statistic, norms[name])
    method = Method(importance.wanda(), scope=scope.row())
    pyprune.prune(cnn.model, method, ratio=0.5, calibration=calibration)
    assert (cnn.model.fc.weight != 0).sum(1).tolist() == [3, 3, 3]


@pytest.mark.parametrize(("kind", "states"), [(nn.LSTM, 2), (nn.GRU, 1), (nn.RNN, 1)])
@pytest.mark.parametrize("with_state", [False, True])
def test_calibrate_takes_the_norms_of_states(kind, states, with_state, device):
    torch.manual_seed(0)
    model = kind(5, 4, bidirectional=True, batch_first=True).to(device)
    x = torch.randn(3, 7, 5, device=device)
    first = torch.randn(2, 3, 4, device=device) if with_state else torch.zeros(2, 3, 4, device=device)
    inputs = (x, (first, first) if states == 2 else first) if with_state else (x,)
    calibration = calibrate(model, [inputs], importance.wanda())
    output = model(*inputs)[0]
    forward, backward = output[..., :4], output[..., 4:]
    expected = {
        "weight_ih_l0": x.square().sum((0, 1)),
        "weight_ih_l0_reverse": x.square().sum((0, 1)),
        "weight_hh_l0": forward[:, :-1].square().sum((0, 1)) + first[0].square().sum(0),
        "weight_hh_l0_reverse": backward[:, 1:].square().sum((0, 1)) + first[1].square().sum(0),
    }
    for name, squares in expected.items():
        torch.testing.assert_close(calibration.tensors[name], squares.detach().sqrt()[None], rtol=1e-4, atol=1e-5)


def test_calibrate_takes_the_norms_of_a_cell_and_of_packed_sequences():
    cell = nn.LSTMCell(5, 4)
    x, h, c = torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 4)
    calibration = calibrate(cell, [(x,), (x, (h, c))], importance.wanda())
    torch.testing.assert_close(calibration.tensors["weight_ih"], (2 * x.square().sum(0)).sqrt()[None])
    torch.testing.assert_close(calibration.tensors["weight_hh"], h.norm(dim=0)[None])
    lstm = nn.LSTM(5, 4)
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    calibration = calibrate(lstm, [(packed,)], pyprune.Method(importance.wanda()))
    torch.testing.assert_close(calibration.tensors["weight_ih_l0"], packed.data.norm(dim=0)[None])
    states = nn.utils.rnn.pad_packed_sequence(lstm(packed)[0])[0]
    before_last = torch.cat([states[:3, 0], states[:1, 1]])
    torch.testing.assert_close(calibration.tensors["weight_hh_l0"], before_last.norm(dim=0)[None].detach())


@pytest.mark.parametrize("activation", [torch.relu, F.hardswish])
def test_calibrate_looks_at_outputs(cnn, activation):
    batches = [torch.randn_like(cnn.inputs) for _ in range(2)]
    outputs = []
    hook = cnn.model.conv2.register_forward_hook(lambda m, args, out: outputs.append(activation(out)))
    zeros = calibrate(cnn.model, batches, importance.apoz(activation))
    mean = calibrate(cnn.model, batches, importance.mean_activation(activation), num_batches=2)
    hook.remove()
    seen = torch.cat(outputs[:2]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(zeros.tensors["conv2.weight"], (seen == 0).float().mean(1))
    torch.testing.assert_close(mean.tensors["conv2.weight"], seen.mean(1))


def test_momentum_decays_when_a_batch_does_not_use_a_weight():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    batches = [(0, torch.ones(1, 2)), (1, torch.ones(1, 2)), (1, torch.ones(1, 2))]
    calibration = calibrate(
        model, batches, importance.snip_momentum(), loss_fn=lambda model, batch: model[batch[0]](batch[1]).sum()
    )
    torch.testing.assert_close(calibration.tensors["0.weight"], 0.81 * model[0].weight.abs().detach())
    torch.testing.assert_close(calibration.tensors["1.weight"], 1.9 * model[1].weight.abs().detach())


def test_calibrate_uses_as_many_batches_as_it_is_told(cnn):
    calibration = calibrate(cnn.model, (cnn.inputs for _ in range(10)), importance.wanda(), num_batches=4)
    assert calibration.num_batches == 4
    dataset = pyprune.Dataset([(cnn.inputs, 0)], transform_func=lambda pair: pair[0])
    assert calibrate(cnn.model, dataset, importance.wanda()).num_batches == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"importance": importance.magnitude()}, ValueError, "needs no calibration"),
        ({"importance": importance.batch_norm_scale()}, ValueError, "give examples_inputs to prune"),
        ({"importance": "taylor"}, TypeError, "importance is a str"),
        ({"importance": importance.taylor()}, TypeError, "needs gradients, and loss_fn is None"),
        ({"importance": importance.wanda(), "loss_fn": loss_fn}, ValueError, "no loss_fn"),
        ({"importance": importance.wanda(), "dataset": []}, ValueError, "no batch"),
        ({"importance": importance.wanda(), "dataset": 3}, TypeError, "dataset is a int"),
        ({"importance": importance.wanda(), "num_batches": 0}, ValueError, "at least 1"),
        ({"importance": importance.wanda(), "num_batches": 1.5}, TypeError, "num_batches is 1.5"),
        (
            {"importance": importance.wanda(), "dataset": [torch.full((1, 1, 8, 8), torch.nan)]},
            ValueError,
            "infinite",
        ),
        ({"importance": importance.taylor(), "loss_fn": lambda m, b: m(b)}, ValueError, "a loss with one element"),
        ({"importance": importance.taylor(), "loss_fn": lambda m, b: 0.0}, ValueError, "a loss with one element"),
        ({"importance": importance.wanda(), "dataset": [[torch.ones(1), torch.ones(1)]]}, ValueError, "list of 2"),
    ],
)
def test_calibrate_refuses_bad_input_and_changes_nothing(cnn, unchanged, options, error, words):
    before = unchanged(cnn.model)
    with pytest.raises(error, match=words):
        calibrate(cnn.model, **{"dataset": [cnn.inputs], **options})
    before.check()


def test_calibrate_names_what_cannot_be_seen(cnn, unchanged):
    bilinear, unused = nn.Bilinear(3, 4, 5), nn.Linear(6, 3)
    cnn.model.unused = unused
    before = unchanged(cnn.model)
    with pytest.raises(ValueError, match=r"no batch went through unused\.weight; name it"):
        calibrate(cnn.model, [cnn.inputs], importance.wanda())
    before.check()
    with pytest.raises(ValueError, match="through weight cannot be seen: it multiplies two inputs at once"):
        calibrate(bilinear, [(torch.randn(2, 3), torch.randn(2, 4))], importance.wanda())
    with pytest.raises(ValueError, match=r"through weight_\w+ cannot be seen: its layer adds the outputs of two"):
        calibrate(nn.LSTM(3, 4), [torch.randn(2, 5, 3)], importance.apoz())


def test_calibrate_gives_all_back_when_the_model_fails(cnn, unchanged):
    wrong = torch.randn(2, 9, 8, 8)
    before = unchanged(cnn.model)
    for rule, options in ((importance.taylor(), {"loss_fn": loss_fn}), (importance.wanda(), {})):
        with pytest.raises(RuntimeError):
            calibrate(cnn.model, [wrong], rule, **options)
    before.check()
    assert not cnn.model.conv1._forward_hooks
