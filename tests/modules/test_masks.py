import copy
import io

import pytest
import torch
from torch import nn

import pyprune
from pyprune.modules.attachments import Owner, dense_parameters
from pyprune.modules.masks import NewMask, attach_masks
from pyprune.modules.targets import find_targets
from pyprune.modules.zeros import raw_values
from tests.conftest import Case, attached, masks_of, skip_what_dense_cannot

LOCAL, GLOBAL = pyprune.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, pyprune.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL


def folded(model):
    """The oracle: a dense copy made before pruning, with zeros written into its weights by hand."""
    return {target.name: (target.parameter.detach() * mask) for target, mask in masks_of(model).items()}


def dense_twin(case, ratio=0.6):
    """Prune the model of the case; return a dense model with the same zeros."""
    twin = copy.deepcopy(case.model)
    pyprune.prune(case.model, GLOBAL, ratio=ratio)
    weights = folded(case.model)
    for target in find_targets(twin):
        target.parameter.data.copy_(weights[target.name])
    return twin


def mask(layer, kept):
    attach_masks(layer, [NewMask([Owner("weight", layer, "weight")], kept)])


def test_mask_zeroes_infinities_and_their_gradient():
    linear = nn.Linear(3, 1, bias=False)
    linear.weight.data = torch.tensor([[torch.inf, 2.0, torch.nan]])
    mask(linear, torch.tensor([[False, True, False]]))
    out = linear(torch.tensor([5.0, 3.0, 1.0]))
    assert out.tolist() == [6.0]
    (out * torch.inf).backward()
    assert linear.weight.grad.tolist() == [[0.0, torch.inf, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_mask_keeps_dtype_and_layout(dtype):
    conv = nn.Conv2d(3, 2, 4, dtype=dtype).to(memory_format=torch.channels_last)
    raw, strides = conv.weight.detach().clone(), conv.weight.stride()
    mask(conv, raw > 0)
    assert conv.weight.dtype == dtype
    assert conv.weight.stride() == strides
    assert torch.equal(conv.weight, raw.relu())
    assert torch.equal(raw_values(attached(conv)), raw)


def test_masks_zero_the_same_outputs_and_gradients_as_zeros_in_the_weights(case):
    twin = dense_twin(case)
    for training in (False, True):
        case.model.train(training)
        twin.train(training)
        torch.manual_seed(1)
        out = case.model(case.inputs)
        torch.manual_seed(1)
        expected = twin(case.inputs)
        torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    gradients = {target.name: target.parameter.grad for target in find_targets(twin)}
    for target, mask in masks_of(case.model).items():
        assert target.parameter.grad.count_nonzero() > 0, target.name
        torch.testing.assert_close(target.parameter.grad, gradients[target.name] * mask)


def test_masks_act_in_the_fast_path_of_attention(device, monkeypatch):
    """In evaluation without gradients torch hands weights to fused kernels, by other ways than forward()."""
    taken = {}

    def spy(name):
        original = getattr(torch, name)

        def call(*args):
            taken[name] = args
            return original(*args)

        monkeypatch.setattr(torch, name, call)

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).to(device)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).to(device)
    x = torch.randn(3, 7, 8, device=device)
    expected = []
    for model, inputs in ((layer, (x,)), (attention, (x, x, x))):
        twin = dense_twin(Case(model, inputs)).eval()
        with torch.no_grad():
            expected.append(twin(*inputs))
        model.eval()
    spy("_transformer_encoder_layer_fwd")
    spy("_native_multi_head_attention")
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected[0])
        torch.testing.assert_close(attention(x, x, x), expected[1])
    for model, name in ((layer, "_transformer_encoder_layer_fwd"), (attention, "_native_multi_head_attention")):
        for target, mask in masks_of(model).items():
            masked = target.parameter * mask
            assert any(isinstance(arg, torch.Tensor) and torch.equal(arg, masked) for arg in taken[name]), target.name


def test_masks_let_a_training_step_through(case):
    pyprune.prune(case.model, GLOBAL, ratio=0.6)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    before = case.model(case.inputs).detach()
    case.model(case.inputs).square().sum().backward()
    optimizer.step()
    for target, mask in masks_of(case.model).items():
        for owner in target.owners:
            assert not getattr(owner.module, owner.attribute)[~mask].any()
    assert not torch.allclose(case.model(case.inputs), before)


def test_masks_share_one_module_over_a_tied_weight_also_in_a_copy(transformer):
    model = copy.deepcopy(pyprune.prune(transformer.model, GLOBAL, ratio=0.6))
    assert model.embed.weight is model.decoder.weight
    assert attached(model.embed) is attached(model.decoder)
    assert attached(model.embed) is not attached(transformer.model.embed)
    target = next(target for target in find_targets(model) if target.name == "embed.weight")
    assert [owner.name for owner in target.owners] == ["embed.weight", "decoder.weight"]


def test_masks_survive_deepcopy_and_are_independent(case):
    pyprune.prune(case.model, GLOBAL, ratio=0.6)
    case.model.train()(case.inputs).sum().backward()  # leaves non-leaf tensors behind, if anything does
    case.model.eval()
    twin = copy.deepcopy(case.model)
    expected = case.model(case.inputs)
    torch.testing.assert_close(twin(case.inputs), expected)
    pyprune.prune(twin, GLOBAL, ratio=0.1)
    torch.testing.assert_close(case.model(case.inputs), expected)
    pyprune.strip(twin)
    torch.testing.assert_close(case.model(case.inputs), expected)
    assert masks_of(case.model)


def test_masks_on_a_copy_do_not_reach_the_original(recurrent):
    model = recurrent.model.eval()
    pyprune.prune(model, LOCAL, ratio=0.5, ignored_scope=pyprune.IgnoredScope(patterns=[r".*weight_hh"]))
    twin = copy.deepcopy(model)
    expected = model(recurrent.inputs)
    pyprune.prune(twin, LOCAL, ratio=0.9)
    torch.testing.assert_close(model(recurrent.inputs), expected)
    assert model.lstm.weight_hh_l0 is dict(dense_parameters_by_name(model))["lstm.weight_hh_l0"]


def dense_parameters_by_name(model):
    return [(owner.name, parameter) for owner, parameter in dense_parameters(model)]


def test_masks_survive_conversion(case):
    twin = dense_twin(case).eval().double()
    model = case.model.eval().double()
    inputs = case.inputs.double() if case.inputs.is_floating_point() else case.inputs
    torch.testing.assert_close(model(inputs), twin(inputs))
    model.float().to("cpu")
    torch.testing.assert_close(model(case.inputs.cpu()), twin.float().cpu()(case.inputs.cpu()))


def test_masks_stay_bool_when_everything_is_converted(cnn):
    twin = dense_twin(cnn).eval().double()
    cnn.model.eval().type(torch.float64)
    assert all(mask.dtype == torch.bool for mask in masks_of(cnn.model).values())
    torch.testing.assert_close(cnn.model(cnn.inputs.double()), twin(cnn.inputs.double()))


def test_masks_work_under_autocast(case):
    autocast = torch.autocast(case.inputs.device.type, dtype=torch.bfloat16)
    case.model.eval()
    skip_what_dense_cannot(case.model, case.inputs, under=autocast)
    twin = dense_twin(case)
    with autocast:
        torch.testing.assert_close(case.model(case.inputs), twin(case.inputs))


def test_masks_travel_in_a_pickled_state_dict(case):
    fresh = copy.deepcopy(case.model).eval()
    pyprune.prune(case.model, GLOBAL, ratio=0.6)
    file = io.BytesIO()
    torch.save(case.model.state_dict(), file)
    file.seek(0)
    pyprune.prune(fresh, LOCAL, ratio=0.1)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(fresh(case.inputs), case.model.eval()(case.inputs))


@pytest.mark.parametrize("case", ["cnn", "transformer"], indirect=True)
def test_masks_compile_without_breaks_or_recompilation(case):
    pyprune.prune(case.model, GLOBAL, ratio=0.6)
    case.model.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else None)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        case.model.train(training)
        compiled(case.inputs).sum().backward()
        with torch.compiler.set_stance("fail_on_recompile"):
            for ratio in (0.9, 0.2):
                pyprune.prune(case.model, GLOBAL, ratio=ratio)
                torch.testing.assert_close(compiled(case.inputs), case.model(case.inputs))


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it loads its compiler
def test_masks_compile_with_the_default_backend(device, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).to(device).eval()
    x = torch.randn(2, 1, 6, 6, device=device)
    pyprune.prune(model, GLOBAL, ratio=0.6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        with torch.compiler.set_stance("fail_on_recompile"):
            for ratio in (0.9, 0.2):
                pyprune.prune(model, GLOBAL, ratio=ratio)
                torch.testing.assert_close(compiled(x), model(x))


def test_masks_compile_on_a_recurrent_cell(device):
    cell, x = nn.LSTMCell(4, 3).to(device), torch.randn(2, 4, device=device)
    pyprune.prune(cell, GLOBAL, ratio=0.6)
    torch._dynamo.reset()
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), cell(x))
    compiled(x)[0].sum().backward()
    for target, mask in masks_of(cell).items():
        assert not target.parameter.grad[~mask].any()


def test_masks_work_under_distributed_data_parallel(cnn, tmp_path):
    twin = dense_twin(cnn)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(cnn.model.eval())
        out = parallel(cnn.inputs)
        torch.testing.assert_close(out, twin.eval()(cnn.inputs))
        out.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for target, mask in masks_of(cnn.model).items():
        assert not target.parameter.grad[~mask].any()


def test_masks_work_on_parameter_lists():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.row = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
            self.named = nn.ParameterDict({"last": torch.randn(4, 2)})

        def forward(self, x):
            for weight in self.row:
                x = x @ weight
            return x @ self.named["last"]

    model, x = Lists(), torch.randn(3, 4)
    pyprune.prune(model, LOCAL, ratio=0.5, examples_inputs=x)
    assert [int(w.count_nonzero()) for w in (*model.row, model.named["last"])] == [8, 8, 4]
    expected = model(x)
    pyprune.strip(model)
    torch.testing.assert_close(model(x), expected)
    assert [name for name, _ in model.named_parameters()] == ["row.0", "row.1", "named.last"]


def test_attach_updates_no_mask_when_one_cannot_be():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    owners = [[Owner(f"{i}.weight", linear, "weight")] for i, linear in enumerate(model)]
    eye = torch.eye(2, dtype=torch.bool)
    attach_masks(model, [NewMask(places, eye.clone()) for places in owners])
    with pytest.raises(ValueError, match=r"shape \(2, 2\) cannot take one of \(3,\)"):
        attach_masks(model, [NewMask(owners[0], ~eye), NewMask(owners[1], torch.ones(3, dtype=torch.bool))])
    assert torch.equal(owners[0][0].attachment.mask, eye)
    assert torch.equal(owners[1][0].attachment.mask, eye)
