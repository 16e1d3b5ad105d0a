import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyprune
from pyprune import IgnoredScope, Plan, prune, reconstruct, shrink
from pyprune.modules.masks import masks_in
from pyprune.structured import solve_by_gradients
from pyprune.structured.unfolding import matrix_of, samples

ELEMENTS = "UNSTRUCTURED_MAGNITUDE_LOCAL"

# A layer that reads channels, and what makes of (n, 6, ...) channels what it reads.
READERS = {
    "linear": (lambda: nn.Linear(6, 4), (30, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 4, bias=False), (30, 6)),
    "linear over positions": (lambda: nn.Linear(6, 4), (5, 7, 6)),
    "Conv1D of transformers": (lambda: Conv1D(4, 6), (5, 7, 6)),
    "1-d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (4, 6, 30)),
    "2-d": (lambda: nn.Conv2d(6, 4, 3, stride=2, dilation=2, padding=2, bias=False), (4, 6, 15, 16)),
    "reflect": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (4, 6, 9, 8)),
    "3-d": (lambda: nn.Conv3d(6, 4, 2), (4, 6, 4, 5, 6)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (4, 6, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1), (4, 6, 7, 6)),
}


def case(kind):
    """A layer, its inputs, and the same with weights of some inputs set to zero and held."""
    make, shape = READERS[kind]
    layer = make().double()
    return layer, [torch.randn(shape, dtype=torch.float64) + 0.3 for _ in range(3)]


def masked(layer, dropped):
    """A copy whose weights of some inputs of each group are masked."""
    copied = copy.deepcopy(layer)
    mask = torch.ones_like(layer.weight, dtype=torch.bool)
    inputs_first = isinstance(layer, (nn.ConvTranspose2d, Conv1D))
    mask.select(0 if inputs_first else 1, dropped).fill_(False)
    if getattr(layer, "groups", 1) > 1 and inputs_first:
        raise AssertionError
    given = pyprune.Method(pyprune.importance.given({"weight": mask.double()}))
    pruned = prune(copied, given, ratio=1 - mask.double().mean().item())
    assert torch.equal(masks_in(pruned)[0].mask, mask)
    return pruned


def least_squares(layer, dense, inputs, dropped):
    """The weight and bias of NumPy's least squares, without a ridge, of what is left of the windows."""
    weights, biases = [], []
    per_channel = layer.weight[0, 0].numel() if layer.weight.dim() > 2 else 1
    for g in range(getattr(layer, "groups", 1)):
        pairs = [pair for x in inputs for pair in samples(layer, x, dense(x).detach())]
        x = torch.cat([a[g] for a, _ in pairs]).numpy()
        y = torch.cat([b[g] for _, b in pairs]).numpy()
        gone = range(dropped * per_channel, (dropped + 1) * per_channel)
        x = np.delete(x, gone, 1)
        if layer.bias is not None:
            x = np.concatenate([x, np.ones((len(x), 1))], 1)
        solution = np.linalg.lstsq(x, y, rcond=None)[0]
        weight, bias = (solution, None) if layer.bias is None else (solution[:-1], solution[-1])
        weights.append(np.insert(weight, [dropped * per_channel] * per_channel, 0, 0))
        biases.append(bias)
    return torch.tensor(np.stack(weights)), biases


@pytest.mark.parametrize("memory", [2**30, 0], ids=["sums", "gradients"])
@pytest.mark.parametrize("kind", READERS)
def test_reconstruct_solves_layers_by_least_squares(kind, memory, monkeypatch):
    monkeypatch.setattr(solve_by_gradients, "_TOLERANCE", 1e-12)
    dense, inputs = case(kind)
    model = masked(dense, 1)
    inputs = inputs if memory else [torch.cat(inputs)]  # without memory one batch is held
    expected, biases = least_squares(dense, dense, inputs, 1)
    report = reconstruct(dense, model, inputs, damping=0, memory=memory)
    torch.testing.assert_close(matrix_of(model, model.weight).detach(), expected, rtol=1e-6, atol=1e-7)
    if model.bias is not None:
        torch.testing.assert_close(model.bias.detach(), torch.tensor(np.concatenate(biases)), rtol=1e-6, atol=1e-7)
    (solved,) = report.layers
    wanted, made = (torch.cat([m(x).detach().flatten() for x in inputs]) for m in (dense, model))
    assert solved.after == pytest.approx(((wanted - made).norm() / wanted.norm()).item())
    assert solved.after < solved.before
    assert solved.method.startswith("least squares" if memory else "conjugate gradients")
    groups = getattr(dense, "groups", 1)
    assert solved.samples * solved.outputs == wanted.numel()
    assert solved.inputs * solved.outputs == dense.weight.numel(), groups


class Net(nn.Module):
    """Convolutions with norms, a residual, and two layers that get the same input."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 6, 3, padding=1)
        self.left, self.right = nn.Linear(6, 10), nn.Linear(6, 10, bias=False)
        self.last = nn.Linear(10, 4)

    def forward(self, images):
        x = nn.functional.relu(self.norm1(self.conv1(images)), inplace=True)
        x = nn.functional.relu(self.conv2(x)) + x
        x = nn.functional.relu(self.conv3(x)).mean((2, 3))
        return self.last(self.left(x).sigmoid() * self.right(x))


def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm1.running_mean.uniform_(-0.5, 0.5)
        model.norm1.bias.uniform_(-0.3, 0.3)
    return model.eval()


def batches(count=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 6, 6, generator=generator).to(dtype) for _ in range(count)]


def shrunk(dense, groups=("conv3.weight", "left.weight")):
    """A smaller copy, and what shrink says; the last half of the units of some groups goes."""
    model = copy.deepcopy(dense)
    inputs = batches(1)[0].to(next(dense.parameters()).dtype)
    with torch.no_grad():
        for group in pyprune.coupled_groups(model, inputs):
            if group.name in groups:
                for member in group.members:
                    gone = torch.as_tensor(member.indices[len(group) // 2 :]).flatten()
                    member.tensor.data.index_fill_(member.dim, gone, 0)
    return model, shrink(model, inputs)


def distance(model, dense):
    with torch.no_grad():
        return sum(float((model(x) - dense(x)).norm()) for x in batches(8)[4:])


def test_reconstruct_repairs_a_shrunk_model():
    dense = net()
    model, result = shrunk(dense)
    before = distance(model, dense)
    plain = copy.deepcopy(model)
    report = reconstruct(dense, model, batches(), result)
    assert distance(model, dense) < 0.6 * before
    assert [one.name for one in report.layers] == ["left", "right", "last"]
    assert set(report.others) == {"conv1", "conv2", "conv3"}
    assert not report.skipped
    assert [tuple(p.shape) for p in model.parameters()] == [tuple(p.shape) for p in plain.parameters()]
    for name in ("conv1", "conv2", "conv3"):
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)
    text = str(report)
    assert "least squares" in text
    assert "conv1, conv2, conv3" in text
    assert "<pre" in report._repr_html_()


def test_reconstruct_takes_a_plan_in_every_form():
    dense = net()
    model, result = shrunk(dense)
    ends = []
    tensors = {name: {str(dim): kept for dim, kept in dims.items()} for name, dims in result.plan.tensors.items()}
    for plan in (result, result.plan, Plan.from_json(result.plan.to_json()), {"tensors": tensors}):
        one = copy.deepcopy(model)
        reconstruct(dense, one, batches(), plan)
        ends.append(torch.cat([p.detach().flatten() for p in one.parameters()]))
    assert all(torch.equal(end, ends[0]) for end in ends)


@pytest.mark.parametrize("how", ["shrunk", "masked"])
def test_reconstruct_does_the_same_to_a_masked_model(how):
    """Masks of coupled channels take as much from a layer as shrinking does."""
    dense = net().double()
    inputs = batches(dtype=torch.float64)
    model, result = shrunk(dense)
    whole = copy.deepcopy(dense)
    with torch.no_grad():
        for name, dims in result.plan.tensors.items():
            for dim, kept in dims.items():
                parameter = dict(whole.named_parameters())[name]
                gone = torch.tensor([i for i in range(parameter.shape[dim]) if i not in kept])
                parameter.index_fill_(dim, gone, 0)
    pyprune.keep_sparse(whole, None)
    zeros = {name: p == 0 for name, p in whole.named_parameters()}
    reconstruct(dense, whole, inputs)
    reconstruct(dense, model, inputs, result)
    for x in batches(8, torch.float64)[4:]:
        torch.testing.assert_close(whole(x), model(x), rtol=1e-6, atol=1e-8)
    for name, parameter in whole.named_parameters():
        if parameter.dim() > 1:
            assert torch.equal(parameter == 0, zeros[name]), name


def test_reconstruct_keeps_masks_and_what_they_dropped():
    dense = net()
    model = prune(copy.deepcopy(dense), ELEMENTS, ratio=0.6)
    masks = [mask.mask.clone() for mask in masks_in(model)]
    before = distance(model, dense)
    report = reconstruct(dense, model, batches())
    assert len(report.layers) == 6
    assert distance(model, dense) < 0.8 * before
    assert all(torch.equal(mask.mask, old) for mask, old in zip(masks_in(model), masks, strict=True))
    for name, module in model.named_modules():
        if name and hasattr(module, "weight") and module.weight.dim() > 1:
            mask = module._pyprune_masks["weight"].mask
            assert not module.weight[~mask].any()
    prune(model, ELEMENTS, ratio=0)  # what was dropped comes back
    for (name, parameter), (_, old) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        if parameter.dim() > 1:
            dropped = ~masks[[n for n, p in dense.named_parameters() if p.dim() > 1].index(name)]
            assert torch.equal(parameter[dropped], old[dropped]), name


def test_reconstruct_changes_nothing_where_nothing_was_pruned():
    dense = net()
    model = copy.deepcopy(dense)
    for layers in ("cut", "all"):
        report = reconstruct(dense, model, batches(), layers=layers)
        assert not report.layers
        assert len(report.others) == 6
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_reconstruct_recovers_weights_that_were_changed():
    dense = net().double()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for layer in (model.conv2, model.conv3):
            layer.weight.add_(0.1 * torch.randn_like(layer.weight))
            layer.bias.add_(0.1)
    report = reconstruct(dense, model, batches(8, torch.float64), layers="all", damping=1e-12)
    assert [one.name for one in report.layers][:2] == ["conv2", "conv3"]
    for name in ("conv2", "conv3"):
        for one, other in zip(
            model.get_submodule(name).parameters(), dense.get_submodule(name).parameters(), strict=True
        ):
            assert (one - other).abs().max() < 1e-8


def test_reconstruct_all_solves_what_comes_after_a_cut():
    dense = net()
    model, result = shrunk(dense, ["conv3.weight"])
    names = [one.name for one in reconstruct(dense, copy.deepcopy(model), batches(), result).layers]
    assert names == ["left", "right"]
    names = [one.name for one in reconstruct(dense, model, batches(), result, layers="all").layers]
    assert names == ["left", "right", "last"]


def test_reconstruct_sees_channels_that_went_without_masks_on_their_readers():
    dense = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    by_channel = pyprune.Method(
        pyprune.importance.magnitude(), granularity=pyprune.granularity.channel(), scope=pyprune.scope.tensor()
    )
    model = prune(copy.deepcopy(dense), by_channel, ratio=0.5, ignored_scope=IgnoredScope(names=["2"]))
    report = reconstruct(dense, model, [torch.randn(40, 5, dtype=torch.float64)])
    assert [one.name for one in report.layers] == ["2"]
    assert report.layers[0].after < report.layers[0].before


def test_reconstruct_layers_with_one_input_are_solved_in_one_pass(monkeypatch):
    dense = net()
    model, result = shrunk(dense, ["conv3.weight"])
    alone = copy.deepcopy(model)
    runs = []
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: (runs.append(self), forward(self, x))[1])
    reconstruct(dense, model, batches(2), result)
    assert len(runs) == 2 * 2 * 2  # two models, two batches, to look and to solve
    for name in ("left", "right"):
        others = [one for one in ("left", "right") if one != name]
        reconstruct(dense, alone, batches(2), result, ignored_scope=IgnoredScope(names=others))
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Twice(nn.Module):
    """A layer that is called twice, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.one, self.other = nn.Linear(6, 5), nn.Linear(6, 5)
        self.other.weight = self.one.weight

    def forward(self, x):
        x = self.first(self.first(x).tanh()).tanh()
        return self.one(x) + 2 * self.other(x.square())


@pytest.mark.parametrize("memory", [2**30, 1], ids=["sums", "gradients"])
def test_reconstruct_shared_weights_get_one_solution(memory, monkeypatch):
    monkeypatch.setattr(solve_by_gradients, "_TOLERANCE", 1e-12)
    dense = Twice().double()
    model = copy.deepcopy(dense)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[:, 2] = False
    prune(
        model,
        pyprune.Method(pyprune.importance.given({"one.weight": mask.double()})),
        ratio=1 / 6,
        ignored_scope=IgnoredScope(names=["first"]),
    )
    x = torch.randn(50, 6, dtype=torch.float64)
    report = reconstruct(dense, model, [x], damping=0, memory=memory)
    assert [one.name for one in report.layers] == ["one", "other"]
    assert model.one.weight is model.other.weight
    hidden = dense.first(dense.first(x).tanh()).tanh().detach().numpy()
    inputs = [np.delete(one, 2, 1) for one in (hidden, hidden**2)]
    wanted = [one @ dense.one.weight.detach().numpy().T for one in (hidden, hidden**2)]
    centred = [np.concatenate([one - one.mean(0) for one in pair]) for pair in (inputs, wanted)]
    expected = np.linalg.lstsq(*centred, rcond=None)[0]
    got = model.one.weight.detach().numpy()
    np.testing.assert_allclose(np.delete(got, 2, 1).T, expected, rtol=1e-6, atol=1e-7)
    assert not got[:, 2].any()
    for layer, a, b, bias in zip((model.one, model.other), inputs, wanted, (dense.one, dense.other), strict=True):
        offset = (b - a @ expected).mean(0) + bias.bias.detach().numpy()
        np.testing.assert_allclose(layer.bias.detach().numpy(), offset, rtol=1e-6, atol=1e-7)


def test_reconstruct_a_layer_that_is_called_twice_sees_both():
    dense = Twice().double()
    model = prune(copy.deepcopy(dense), ELEMENTS, ratio=0.4)
    report = reconstruct(dense, model, [torch.randn(50, 6, dtype=torch.float64)])
    assert next(one for one in report.layers if one.name == "first").samples == 100


@pytest.mark.parametrize("memory", [2**30, 10_000, 0])
def test_reconstruct_without_sums_is_as_good(memory, monkeypatch):
    monkeypatch.setattr(solve_by_gradients, "_TOLERANCE", 1e-10)
    monkeypatch.setattr(solve_by_gradients, "_ITERATIONS", 2000)
    dense = net().double()
    model = prune(copy.deepcopy(dense), ELEMENTS, ratio=0.5)
    one_batch = [torch.cat(batches(4, torch.float64))]
    expected = copy.deepcopy(model)
    reconstruct(dense, expected, one_batch)
    report = reconstruct(dense, model, one_batch, memory=memory)
    by_gradients = [one.name for one in report.layers if one.method.startswith("conjugate")]
    assert ("conv2" in by_gradients) == (memory < 2**30)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_reconstruct_without_sums_says_how_many_batches_fit():
    dense = net()
    model = prune(copy.deepcopy(dense), ELEMENTS, ratio=0.5)
    report = reconstruct(dense, model, batches(), memory=1)
    assert "1 of 4 batches" in str(report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reconstruct_half_types(dtype):
    dense = net()
    model, result = shrunk(dense)
    before = distance(model, dense)
    half, small = copy.deepcopy(dense).to(dtype), model.to(dtype)
    report = reconstruct(half, small, batches(dtype=dtype), result)
    assert all(p.dtype == dtype for p in small.parameters())
    assert all(one.after < one.before for one in report.layers)
    assert distance(small.float(), dense) < 0.7 * before


def test_reconstruct_leaves_flags_hooks_and_buffers():
    dense = net()
    model, result = shrunk(dense)
    for one in (dense, model):
        one.train()
        one.conv1.eval()
    model.conv2.weight.requires_grad_(False)
    called = []
    model.last.register_forward_hook(lambda *_: called.append(1))
    buffers = [[b.clone() for b in one.buffers()] for one in (dense, model)]
    weights = [p.clone() for p in dense.parameters()]
    flags = [[m.training for m in one.modules()] for one in (dense, model)]
    random = torch.get_rng_state()
    reconstruct(dense, model, batches(), result)
    assert flags == [[m.training for m in one.modules()] for one in (dense, model)]
    assert all(
        torch.equal(*pair)
        for old, one in zip(buffers, (dense, model), strict=True)
        for pair in zip(old, one.buffers(), strict=True)
    )
    assert all(torch.equal(*pair) for pair in zip(weights, dense.parameters(), strict=True))
    assert not any(m._forward_hooks for m in dense.modules())
    assert [name for name, m in model.named_modules() if m._forward_hooks] == ["last"]
    assert not model.conv2.weight.requires_grad
    assert torch.is_grad_enabled()
    assert torch.equal(random, torch.get_rng_state())


class Odd(nn.Module):
    """What cannot be solved, beside what can."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.recurrent = nn.GRU(6, 6, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.unused = nn.Linear(6, 6)
        self.custom = Doubled(6, 6)
        self.plain = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 9, bias=False)
        self.tied.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        x = self.recurrent(x + self.attention(x, x, x)[0])[0]
        return self.tied(self.plain(self.custom(self.normed(x)).relu()))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Forwarded(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_reconstruct_names_what_it_skips():
    dense = Odd()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in (model.plain.weight, model.custom.weight, model.unused.weight):
            parameter[:, 0] = 0
    pyprune.keep_sparse(model, None, ignored_scope=IgnoredScope(names=["attention", "recurrent", "normed", "table"]))
    tokens = [torch.randint(9, (8, 5)) for _ in range(3)]
    with pytest.warns(UserWarning, match="leaves some weights as they are") as caught:
        report = reconstruct(dense, model, tokens)
    assert [one.name for one in report.layers] == ["plain"]
    reasons = {
        "attention.in_proj_weight": "MultiheadAttention",
        "attention.out_proj.weight": "no batch goes through it",
        "recurrent.weight_ih_l0": "GRU",
        "normed.weight": "computed from others",
        "unused.weight": "no batch goes through it",
        "custom.weight": "something else than its layer",
        "tied.weight": "tied to table.weight",
    }
    for name, why in reasons.items():
        assert why in report.skipped[name], name
        assert name in str(report)
    (only,) = [one for one in caught if "reconstruct" in str(one.message)]
    assert "unused.weight" in str(only.message)
    names = ["attention", "recurrent", "normed", "unused", "custom", "table"]  # a tied weight has two names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not reconstruct(dense, model, tokens, ignored_scope=IgnoredScope(names=names)).skipped


def test_reconstruct_knows_layers_of_other_classes_by_what_they_do():
    dense = nn.Sequential(Forwarded(6, 8), nn.ReLU(), Forwarded(8, 3))
    model = prune(copy.deepcopy(dense), ELEMENTS, ratio=0.5)
    assert len(reconstruct(dense, model, [torch.randn(40, 6)]).layers) == 2


def test_reconstruct_warns_of_zeros_that_nothing_holds():
    dense = net()
    model = pyprune.strip(prune(copy.deepcopy(dense), ELEMENTS, ratio=0.5))
    with pytest.warns(UserWarning, match="keep_sparse"):
        reconstruct(dense, model, batches(), layers="all")


def test_reconstruct_skips_gates():
    dense = net()
    model = prune(copy.deepcopy(dense), ELEMENTS, ratio=0.5, ignored_scope=IgnoredScope(names=["last"]))
    pyprune.attach_gate(model.last, "weight", pyprune.HardConcreteGate((4, 10)))
    with pytest.warns(UserWarning, match="gate"):
        assert "gate" in reconstruct(dense, model, batches()).skipped["last.weight"]


def bad_input(value):
    images = batches()
    images[2][0, 0, 0, 0] = value
    return images


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reconstruct_refuses_inputs_that_are_not_finite(value, unchanged):
    dense = net()
    model, result = shrunk(dense)
    before = unchanged(model), unchanged(dense)
    with pytest.raises(ValueError, match=r"dense model conv1 gets NaN or infinite values on batch 2"):
        reconstruct(dense, model, bad_input(value), result)
    for one in before:
        one.check()


def test_reconstruct_a_failure_in_the_middle_leaves_the_model(unchanged, monkeypatch):
    dense = net()
    model, result = shrunk(dense)
    before = unchanged(model), unchanged(dense)
    write = pyprune.structured.paired_layers.Reader.write

    def fail(self, matrix, bias):
        if self.name == "last":
            raise KeyboardInterrupt
        write(self, matrix, bias)

    monkeypatch.setattr(pyprune.structured.paired_layers.Reader, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(dense, model, batches(), result)
    for one in before:
        one.check()
    assert not any(m._forward_hooks for one in (dense, model) for m in one.modules())


def test_reconstruct_refuses_weights_that_do_not_fit_their_type():
    dense = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).half()
    with torch.no_grad():
        dense[1].weight.copy_(torch.tensor([[6e4, 6e4, 0, 0], [1, 1, 1, 1]]))
        dense[0].weight.copy_(torch.tensor([[1e-3, 0, 0, 0], [1e-3, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))
        dense[0].bias.zero_()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model[1].weight[:, 1] = 0
    pyprune.keep_sparse(model, None, ignored_scope=IgnoredScope(names=["0"]))
    with pytest.raises(ValueError, match=r"the weights that 1 would need are not finite in torch.float16"):
        reconstruct(dense, model, [torch.randn(50, 4).half()], damping=0)


def wrong(dense, model, result):
    """Arguments that are refused, with what is said."""
    other = nn.Sequential(nn.Linear(3, 2))
    sharing = copy.copy(model)
    cut = {"tensors": {**result.plan.tensors, "conv3.weight": {0: [0, 1, 7]}}}
    return {
        "the same model": ((dense, dense, batches()), {}, ValueError, "the same"),
        "shared weights": ((sharing, model, batches(), result), {}, ValueError, "in the dense model, too"),
        "no module": ((dense, "model", batches()), {}, TypeError, "model"),
        "dense no module": ((None, model, batches()), {}, TypeError, "dense"),
        "no plan": ((dense, model, batches()), {}, ValueError, "conv3.weight has 3 outputs.*without a plan"),
        "plan of nothing": ((dense, model, batches(), 3), {}, TypeError, "plan is 3"),
        "damaged plan": ((dense, model, batches(), {"tensors": {"a": 3}}), {}, ValueError, "tensors of plan"),
        "positions that are not there": ((dense, model, batches(), cut), {}, ValueError, "does not have"),
        "another dense model": ((other, model, batches(), result), {}, ValueError, "no layer to solve"),
        "no batch": ((dense, model, [], result), {}, ValueError, "no batch"),
        "labels": ((dense, model, [[batches()[0], 1]], result), {}, ValueError, "labels"),
        "damping": ((dense, model, batches(), result), {"damping": -1}, ValueError, "damping"),
        "memory": ((dense, model, batches(), result), {"memory": 1.5}, TypeError, "memory"),
        "layers": ((dense, model, batches(), result), {"layers": "some"}, ValueError, "layers"),
        "num_batches": ((dense, model, batches(), result), {"num_batches": 0}, ValueError, "num_batches"),
        "scope": ((dense, model, batches(), result), {"ignored_scope": IgnoredScope(names=["x"])}, ValueError, "x"),
        "all ignored": (
            (dense, model, batches(), result),
            {"ignored_scope": IgnoredScope(types=["Net"])},
            ValueError,
            "no layer to solve",
        ),
        "wrong batch": ((dense, model, [torch.ones(2, 4, 6, 6)], result), {}, RuntimeError, "channels"),
    }


@pytest.mark.parametrize("kind", wrong(net(), *shrunk(net())))
def test_reconstruct_refuses(kind, unchanged):
    dense = net()
    model, result = shrunk(dense)
    arguments, options, error, message = wrong(dense, model, result)[kind]
    before = unchanged(model)
    with pytest.raises(error, match=message):
        reconstruct(*arguments, **options)
    before.check()


def test_reconstruct_transposed_and_grouped_layers_follow_a_plan():
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )
    x = [torch.randn(4, 3, 7, 7) for _ in range(4)]
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for group in pyprune.coupled_groups(model, x[0]):
            for member in group.members:
                gone = torch.as_tensor(member.indices[1::2]).flatten()
                member.tensor.data.index_fill_(member.dim, gone, 0)
    result = shrink(model, x[0])
    assert model[2].groups == 2
    assert model[4].weight.shape[:2] == (4, 3)
    report = reconstruct(dense, model, x, result)
    assert [one.name for one in report.layers] == ["4", "6"]
    assert all(one.after < one.before for one in report.layers)


def test_reconstruct_runs_the_model_within_a_wrapper():
    dense = net()
    model, result = shrunk(dense)
    expected = copy.deepcopy(model)
    reconstruct(dense, expected, batches(), result)
    reconstruct(nn.DataParallel(dense), nn.DataParallel(model), batches(), result)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("memory", [2**30, 60_000], ids=["sums", "gradients"])
def test_reconstruct_without_a_damping_minds_what_was_kept_back(memory):
    """With as many inputs as samples and noise in what is wanted, the least squares of the first are not the best."""
    dense = nn.Linear(60, 4, bias=False)
    nn.init.normal_(dense.weight)
    model = prune(copy.deepcopy(dense), ELEMENTS, ratio=0.2)
    mask = model._pyprune_masks["weight"].mask
    generator = torch.Generator().manual_seed(0)
    dense.register_forward_hook(lambda _, args, output: output + 8 * torch.randn(output.shape, generator=generator))
    inputs = [torch.randn(20, 60, generator=generator) for _ in range(4)]
    moved = {}
    for damping in (1e-4, None):
        repaired = copy.deepcopy(model)
        reconstruct(dense, repaired, inputs, damping=damping, memory=memory)
        moved[damping] = (repaired.weight - dense.weight).detach()[mask].norm()
    assert moved[None] < 0.7 * moved[1e-4]
