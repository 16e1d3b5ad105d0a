import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import l1_unstructured

import pyprune
from pyprune import IgnoredScope
from pyprune.modules.targets import all_parameters, find_targets, layer_weights

LOCAL = pyprune.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL


def names(model, *args):
    return [target.name for target in find_targets(model, *args)]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 3), ["weight"]),
        (nn.Conv1d(2, 3, 1), ["weight"]),
        (nn.Conv2d(2, 3, 1), ["weight"]),
        (nn.Conv3d(2, 3, 1), ["weight"]),
        (nn.ConvTranspose1d(2, 3, 1), ["weight"]),
        (nn.ConvTranspose2d(2, 3, 1), ["weight"]),
        (nn.ConvTranspose3d(2, 3, 1), ["weight"]),
        (nn.Embedding(2, 3), ["weight"]),
        (nn.EmbeddingBag(2, 3), ["weight"]),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (
            nn.LSTM(2, 3, bidirectional=True, proj_size=1),
            [f"weight_{kind}_l0{end}" for end in ("", "_reverse") for kind in ("ih", "hh", "hr")],
        ),
        (nn.GRU(2, 3, num_layers=2), [f"weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh")]),
        (nn.RNN(2, 3, bias=False), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.RNNCell(2, 3), ["weight_ih", "weight_hh"]),
        (nn.LSTMCell(2, 3), ["weight_ih", "weight_hh"]),
        (nn.GRUCell(2, 3), ["weight_ih", "weight_hh"]),
        (nn.LayerNorm(3), []),
        (nn.BatchNorm2d(3), []),
        (nn.PReLU(), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_find_targets_knows_the_weights_of_layers(layer, expected):
    subclass = type("Mine", (type(layer),), {})
    for model in (layer, nn.Sequential(layer)):
        prefix = "0." if model is not layer else ""
        if expected:
            assert names(model) == [prefix + name for name in expected]
        else:
            with pytest.raises(ValueError, match="no weight to prune"):
                find_targets(model)
    layer.__class__ = subclass
    if expected:
        assert names(layer) == expected


def test_find_targets_gives_parameters_and_owners(transformer):
    model = transformer.model
    targets = {target.name: target for target in find_targets(model)}
    assert targets["embed.weight"].parameter is model.embed.weight
    assert [(owner.module, owner.attribute) for owner in targets["embed.weight"].owners] == [
        (model.embed, "weight"),
        (model.decoder, "weight"),
    ]
    assert targets["layer.self_attn.in_proj_weight"].owners[0].module is model.layer.self_attn
    assert not any("norm" in name or "bias" in name for name in targets)


def test_find_targets_are_the_same_with_masks_on(case):
    dense = find_targets(case.model)
    pyprune.prune(case.model, LOCAL, ratio=0.5)
    masked = find_targets(case.model)
    assert [target.name for target in masked] == [target.name for target in dense]
    for before, after in zip(dense, masked, strict=True):
        assert after.parameter is before.parameter
        assert [owner.name for owner in after.owners] == [owner.name for owner in before.owners]
        assert before.attachment is after.attachment is not None


def test_find_targets_names_a_tied_weight_by_the_dense_order_also_with_masks_on():
    class Parent(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.child = nn.Linear(3, 3)
            self.child.weight = self.weight

    model = Parent()
    assert names(model) == ["weight"]
    assert names(pyprune.prune(model, LOCAL, ratio=0.5)) == ["weight"]


def test_find_targets_leaves_out_what_is_ignored(transformer):
    everything = names(transformer.model)
    rules = IgnoredScope(names=["layer.linear1"], patterns=[r"cross\.[qk]"], types=["Embedding"])
    gone = {"layer.linear1.weight", "cross.q_proj_weight", "cross.k_proj_weight", "embed.weight"}
    assert names(transformer.model, rules) == [name for name in everything if name not in gone]


def test_find_targets_ignores_a_tied_weight_by_any_of_its_names(transformer):
    for scope in (IgnoredScope(names=["decoder"]), IgnoredScope(names=["embed.weight"])):
        assert "embed.weight" not in names(transformer.model, scope)


def test_find_targets_ignores_by_type_with_masks_on(cnn):
    pyprune.prune(cnn.model, LOCAL, ratio=0.5)
    assert names(cnn.model, IgnoredScope(types=["Conv2d"])) == ["fc.weight"]


class Bare(nn.Module):
    """Bare parameters used as weights in many ways, and some that are not weights."""

    def __init__(self):
        super().__init__()
        for name in ("linear", "matmul", "left", "einsum", "mm", "table", "addmm", "scale", "bias", "unused"):
            setattr(self, name, nn.Parameter(torch.randn(4, 4)))
        self.kernel = nn.Parameter(torch.randn(4, 4, 1))
        self.constant = nn.Parameter(torch.randn(4, 4))
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout()

    def forward(self, x, index):
        x = nn.functional.linear(x, self.linear.t())
        x = x @ self.matmul.view(16).view(4, 4)
        x = self.left.transpose(0, 1) @ x
        x = torch.einsum("ij,jk->ik", x, self.einsum)
        x = x.mm(self.mm)
        x = nn.functional.conv1d(x[None], self.kernel)[0]
        x = torch.addmm(self.bias, x, self.addmm)
        x = x + nn.functional.embedding(index, self.table)
        x = self.layer(self.constant) + self.scale * x
        return self.dropout(self.norm(x))


def test_find_targets_traces_bare_parameters(unchanged):
    model = Bare()
    inputs = (torch.randn(4, 4), torch.tensor([0, 1, 2, 3]))
    dense = unchanged(model)
    expected = ["linear", "matmul", "left", "einsum", "mm", "table", "addmm", "kernel", "layer.weight"]
    assert names(model) == ["layer.weight"]
    assert names(model, None, inputs) == expected
    assert names(model, None, {"x": inputs[0], "index": inputs[1]}) == expected
    assert names(model, IgnoredScope(names=["einsum"]), inputs) == [n for n in expected if n != "einsum"]
    dense.check()


def test_find_targets_keeps_the_model_when_the_trace_fails(cnn, unchanged):
    cnn.model.train()
    dense = unchanged(cnn.model)
    with pytest.raises(RuntimeError):
        find_targets(cnn.model, None, torch.zeros(2, 3, 8, 8))
    dense.check()


def quantised():
    # torch says that its own quantisation moves elsewhere.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = torch.ao.nn.quantized.Linear(3, 3)
    return nn.Sequential(linear, nn.Linear(3, 3))


def weight_normed():
    return nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3)))


def torch_pruned():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    l1_unstructured(model[1], "weight", 0.5)
    return model


def with_weight(weight):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(weight, requires_grad=False)
    return model


def made_under_inference_mode():
    with torch.inference_mode():
        linear = nn.Linear(3, 3)
    return nn.Sequential(nn.Linear(3, 3), linear)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)), ValueError, "1.weight is lazy"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta")), ValueError, "meta device"),
        (quantised, TypeError, "0.weight is quantised"),
        (weight_normed, ValueError, r"1.weight has another parametrization \(_WeightNorm\)"),
        (torch_pruned, ValueError, "1.weight is not a parameter"),
        (lambda: with_weight(torch.ones(3, 3, dtype=torch.int8)), TypeError, "1.weight has dtype torch.int8"),
        (lambda: with_weight(torch.ones(3, 3, dtype=torch.complex64)), TypeError, "torch.complex64"),
        (lambda: with_weight(torch.ones(3, 3).to_sparse()), TypeError, "layout torch.sparse_coo"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3, sparse=True)), ValueError, "1.weight has sparse"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.EmbeddingBag(3, 3, sparse=True)), ValueError, "sparse=False"),
        (lambda: with_weight(torch.ones(3, 1).expand(3, 3)), ValueError, "1.weight has elements that share memory"),
        (made_under_inference_mode, ValueError, "1.weight was made under torch.inference_mode"),
        (lambda: nn.BatchNorm1d(3), ValueError, "BatchNorm1d has no weight to prune"),
        (lambda: nn.Sequential(), ValueError, "no weight to prune"),
        (lambda: "model", TypeError, "give a torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_find_targets_says_what_cannot_be_pruned(make, error, text):
    model = make()
    with pytest.raises(error, match=text):
        find_targets(model)
    if text[0] in "01":  # and that name can be ignored
        name = text.split(".", 1)[0] + ".weight"
        assert len(find_targets(model, IgnoredScope(names=[name]))) == 1


def test_find_targets_refuses_sharded_weights(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        linear = nn.Linear(4, 4)
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, mesh))
        with pytest.raises(ValueError, match="is sharded"):
            find_targets(linear)
    finally:
        torch.distributed.destroy_process_group()


def test_find_targets_refuses_two_parameters_in_one_memory():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data[2:6])
    text = r"0\.weight and 1\.weight are different parameters that share memory"
    for ignored in ([], ["0"], ["1"]):
        with pytest.raises(ValueError, match=text):
            find_targets(model, IgnoredScope(names=ignored))
    assert names(model, IgnoredScope(names=["0", "1"])) == ["2.weight"]


def test_find_targets_takes_neighbours_in_one_memory():
    # So do the weights of an RNN lie on a GPU, and the parts of a projection that was split.
    flat = torch.randn(4, 8)
    model = nn.ModuleList([nn.Linear(2, 4, bias=False) for _ in range(4)])
    for layer, part in zip(model, flat.split(2, dim=1), strict=True):
        layer.weight = nn.Parameter(part)
    assert len(find_targets(model)) == 4
    for layer, part in zip(model, flat.view(4, 4, 2), strict=True):
        layer.weight = nn.Parameter(part)
    assert len(find_targets(model)) == 4


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_find_targets_does_not_trace_a_lazy_model():
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"1\.weight is lazy"):
        find_targets(model, None, torch.randn(2, 3))
    assert isinstance(model[1], nn.LazyBatchNorm1d)
    assert names(model) == ["0.weight"]
    model[1] = nn.LazyBatchNorm1d(affine=False)
    with pytest.raises(ValueError, match=r"1\.running_mean is lazy"):
        find_targets(model, None, torch.randn(2, 3))


def test_find_targets_refuses_a_parametrization_over_a_mask():
    linear = pyprune.prune(nn.Linear(3, 3), LOCAL, ratio=0.5)
    parametrize.register_parametrization(linear, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"another parametrization \(Identity\)"):
        find_targets(linear)


def test_all_parameters_lists_every_parameter_once(case):
    expected = [name for name, _ in case.model.named_parameters()]
    assert [target.name for target in all_parameters(case.model)] == expected
    pyprune.prune(case.model, LOCAL, ratio=0.5)
    assert [target.name for target in all_parameters(case.model)] == expected


def test_layer_weights_lists_places_not_parameters(transformer):
    places = [owner.name for owner in layer_weights(transformer.model)]
    assert "embed.weight" in places
    assert "decoder.weight" in places


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("part", [nn.ReLU(), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))])
@pytest.mark.parametrize("mode", [LOCAL, pyprune.PruneMode.UNSTRUCTURED_HARD_CONCRETE])
def test_a_part_that_torch_jit_compiled_is_left_or_refused_by_name(part, mode):
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(part))
    options = {"examples_inputs": torch.randn(2, 4)} | ({"ratio": 0.5} if mode is LOCAL else {})
    if any(parameter.dim() == 2 for parameter in part.parameters()):
        with pytest.raises(ValueError, match=r"1(\.0)?\.weight is in a part that torch.jit compiled"):
            pyprune.prune(model, mode, **options)
        options["ignored_scope"] = IgnoredScope(names=["1"])
    pyprune.prune(model, mode, **options)
    pyprune.load_from_config(nn.Sequential(nn.Linear(4, 4), torch.jit.script(part)), pyprune.get_config(model))
    assert [one.tensor_name for one in pyprune.pruning_statistic(model).pruned_tensors] == ["0.weight"]
    pyprune.strip(model)


class InGroups(nn.Sequential):
    """A model whose parameters() are what its optimizer takes."""

    def parameters(self, recurse=True):
        return [{"params": list(super().parameters(recurse)), "lr": 0.1}]


@pytest.mark.parametrize("mode", [LOCAL, pyprune.PruneMode.UNSTRUCTURED_HARD_CONCRETE])
def test_a_model_that_returns_its_parameters_in_groups_is_pruned(mode):
    model, x = InGroups(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(2, 4)
    pyprune.prune(model, mode, examples_inputs=x, **({"ratio": 0.5} if mode is LOCAL else {}))
    pyprune.load_from_config(InGroups(nn.Linear(4, 4), nn.BatchNorm1d(4)), pyprune.get_config(model))
    assert len(pyprune.weight_parameters(model)) == 4
    if mode is not LOCAL:
        pyprune.LagrangianLoss(model, 0.5)()
    pyprune.batch_norm_adaptation(pyprune.strip(model), [x])


class DFL(nn.Module):
    """As in Ultralytics: the expected value over the bins of a box."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(16.0).view(1, 16, 1, 1)

    def forward(self, x):
        return self.conv(x.softmax(1))


@pytest.mark.parametrize("ignored", [None, IgnoredScope(types=["Linear"], validate=False)])
@pytest.mark.parametrize("has_inputs", [False, True])
def test_find_targets_leaves_constants_alone(ignored, has_inputs):
    model = nn.Sequential(nn.Conv2d(3, 16, 1), DFL())
    inputs = torch.rand(1, 3, 4, 4) if has_inputs else None
    assert [target.name for target in find_targets(model, ignored, inputs)] == ["0.weight"]
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5, ignored_scope=ignored, examples_inputs=inputs)
    assert model[1].conv.weight.flatten().tolist() == list(range(16))
    model[1].requires_grad_(True)  # one that is trained is a weight, whatever it is called
    assert len(find_targets(nn.Sequential(nn.Conv2d(3, 16, 1), model[1]), ignored, inputs)) == 2
