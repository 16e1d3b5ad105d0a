"""A layer with a mask is an ordinary layer with zeros: a table of layers, each asked what the dense one can do."""

import copy
import gc
import importlib
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, stack_module_state
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import pyprune
from pyprune import Method, Pruner, importance, schedules, scope
from pyprune.modules.holding import HELD
from pyprune.modules.masks import masks_in
from pyprune.modules.zeros import raw_values
from tests.conftest import attached, masks_of, skip_what_dense_cannot

LOCAL = Method(importance.magnitude(), scope=scope.tensor())


@pytest.fixture
def model(dense, inputs):
    return pyprune.prune(copy.deepcopy(dense), LOCAL, ratio=0.5, examples_inputs=inputs)


def kept(model):
    return {target.name: mask.clone() for target, mask in masks_of(model).items()}


def assert_zeros(model, masks):
    assert masks
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any(), name


def step(model, optimizer, inputs):
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


# ---- what it looks like ----


def test_names_order_classes_and_state_are_those_of_the_dense_model(dense, inputs):
    before = [(name, id(p)) for name, p in dense.named_parameters(remove_duplicate=False)]
    classes, keys = [type(module) for module in dense.modules()], list(dense.state_dict())
    buffers = list(dense.named_buffers())
    pyprune.prune(dense, LOCAL, ratio=0.5, examples_inputs=inputs)
    assert [(name, id(p)) for name, p in dense.named_parameters(remove_duplicate=False)] == before
    assert [type(module) for module in dense.modules()] == classes
    assert list(dense.state_dict()) == keys
    assert list(dense.named_buffers()) == buffers
    assert_zeros(dense, kept(dense))
    pyprune.strip(dense)
    assert not any("_pyprune_masks" in vars(module) for module in dense.modules())
    assert not any(module._forward_pre_hooks or module._state_dict_pre_hooks for module in dense.modules())


def test_a_mask_computes_what_zeros_in_the_dense_layer_compute(dense, model, inputs):
    with torch.no_grad():
        for name, mask in kept(model).items():
            dense.get_parameter(name)[~mask] = 0
    for training in (True, False):
        assert torch.equal(model.train(training)(inputs), dense.train(training)(inputs))
    for each in (model, dense):
        each.train()(inputs).square().mean().backward()
    for name, parameter in dense.named_parameters():
        expected = parameter.grad
        if name in kept(model):
            expected = torch.where(kept(model)[name], expected, 0)
        torch.testing.assert_close(model.get_parameter(name).grad, expected)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_hold_their_zeros_by_themselves(model, inputs, copied):
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(inputs), model(inputs))
    masks, before = kept(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1)
    for _ in range(3):
        step(twin, optimizer, inputs)
    assert_zeros(twin, masks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    pyprune.prune(twin, LOCAL, ratio=0.0, examples_inputs=inputs)
    assert all(int((p == 0).sum()) == 0 for n, p in twin.named_parameters() if n in masks)


# ---- zeros stay, and what is dropped can come back ----


def test_zeros_stay_under_an_optimizer_that_was_made_before(dense, inputs):
    optimizer = torch.optim.SGD(dense.parameters(), lr=1e-4, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        step(dense, optimizer, inputs)
    pyprune.prune(dense, LOCAL, ratio=0.5, examples_inputs=inputs)
    masks = kept(dense)
    raw = {target.name: raw_values(target.attachment) for target in masks_of(dense)}
    for _ in range(3):
        step(dense, optimizer, inputs)
        assert_zeros(dense, masks)
    pyprune.prune(dense, LOCAL, ratio=0.0, examples_inputs=inputs)
    for name, mask in masks.items():
        assert torch.equal(dense.get_parameter(name)[~mask], raw[name][~mask])


def test_zeros_come_back_after_whatever_writes(model, inputs):
    masks = kept(model)

    def own_optimizer():
        for parameter in model.parameters():
            parameter -= 0.1

    ways = {
        "init": lambda: [nn.init.ones_(parameter) for parameter in model.parameters()],
        "copy": lambda: [parameter.copy_(torch.ones_like(parameter)) for parameter in model.parameters()],
        "clip": lambda: [parameter.clamp_(min=0.5) for parameter in model.parameters()],
        "load": lambda: model.load_state_dict({n: torch.ones_like(t) for n, t in model.state_dict().items()}),
        "own optimizer": own_optimizer,
    }
    for way, write in ways.items():
        with torch.no_grad():
            write()
        model(inputs)
        assert_zeros(model, masks)
        for name, mask in masks.items():
            assert model.get_parameter(name)[mask].any(), (way, name)


def test_data_is_seen_at_the_next_step_and_in_the_state_dict(model, inputs):
    masks = kept(model)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    state = model.state_dict()
    assert all(not state[name][~mask].any() for name, mask in masks.items())
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    step(model, torch.optim.SGD(model.parameters(), lr=0.0), inputs)
    assert_zeros(model, masks)


def test_a_dense_checkpoint_comes_under_the_masks(dense, model, inputs):
    other = {name: torch.randn_like(tensor) for name, tensor in dense.state_dict().items()}
    if "embed.weight" in other:
        other["decode.weight"] = other["embed.weight"]
    masks = kept(model)
    model.load_state_dict(other)
    model(inputs)
    assert_zeros(model, masks)
    pyprune.prune(model, LOCAL, ratio=0.0, examples_inputs=inputs)
    for name, tensor in other.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_state_loaded_by_index_reaches_the_right_parameters(dense, model, inputs):
    optimizer = torch.optim.Adam(dense.parameters())
    step(dense, optimizer, inputs)
    loaded = torch.optim.Adam(model.parameters())
    loaded.load_state_dict(optimizer.state_dict())
    for parameter in model.parameters():
        assert loaded.state[parameter]["exp_avg"].shape == parameter.shape
    masks = kept(model)
    step(model, loaded, inputs)
    assert_zeros(model, masks)
    for name, mask in masks.items():
        assert not loaded.state[model.get_parameter(name)]["exp_avg"][~mask].any()


def test_a_training_resumes_bit_for_bit_from_plain_weights_and_config(dense, inputs):
    def run(model, optimizer, pruner, steps, seed):
        torch.manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(inputs) * torch.randn(())).square().mean().backward()
            optimizer.step()
            pruner.step()

    def start(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = schedules.multi_step({1: 0.6, 2: 0.3, 4: 0.5})
        return model, optimizer, Pruner(model, LOCAL, schedule, optimizer, examples_inputs=inputs)

    fresh = copy.deepcopy(dense)
    parts = start(dense)
    run(*parts, 2, 0)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    run(*parts, 3, 1)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_()
    again = start(fresh)
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    run(*again, 3, 1)
    for (name, one), (_, other) in zip(dense.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(one, other), name


# ---- averages that were made before ----


def test_averages_made_before_zip_the_same_parameters_and_end_sparse(dense, inputs):
    average, by_hand = AveragedModel(dense), copy.deepcopy(dense)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.001)
    pruner = Pruner(dense, LOCAL, schedules.one_shot(0.5, start=2), optimizer, examples_inputs=inputs)
    for _ in range(4):
        step(dense, optimizer, inputs)
        pruner.step()
        average.update_parameters(dense)
        with torch.no_grad():
            for one, other in zip(by_hand.parameters(), dense.parameters(), strict=True):
                one.lerp_(other, 0.1)
    masks = kept(dense)
    assert_zeros(average.module, masks)
    pyprune.reapply(dense, by_hand)
    assert_zeros(by_hand, masks)


def test_reapply_says_what_does_not_fit(unchanged):
    model, other = nn.Linear(3, 3), nn.Linear(3, 4)
    before = unchanged(other)
    with pytest.raises(ValueError, match="carries no masks; call this before"):
        pyprune.reapply(model, other)
    pyprune.prune(model, LOCAL, ratio=0.5)
    with pytest.raises(ValueError, match=r"weight \(3, 3\) \(there: \(4, 3\)\)"):
        pyprune.reapply(model, other)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        pyprune.reapply(model, None)
    before.check()


def test_reapply_renews_the_masks_of_a_copy():
    model = pyprune.prune(nn.Linear(8, 8), LOCAL, ratio=0.2)
    twin = copy.deepcopy(model)
    pyprune.prune(model, LOCAL, ratio=0.8)
    pyprune.reapply(model, twin)
    assert torch.equal(attached(twin).mask, attached(model).mask)
    assert_zeros(twin, kept(model))


# ---- what torch does with layers ----


@pytest.mark.filterwarnings("ignore")  # of torch, about itself
def test_a_masked_layer_compiles_once_and_masks_may_change(kind, dense, model, inputs):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    skip_what_dense_cannot(torch.compile(dense, backend="eager", fullgraph=True), inputs)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    for ratio in (0.3, 0.7, 0.5):
        step(compiled, optimizer, inputs)
        pyprune.prune(model, LOCAL, ratio=ratio, examples_inputs=inputs)
        masks = kept(model)
        step(compiled, optimizer, inputs)
        assert_zeros(model, masks)
    assert counter.frame_count == 1
    assert torch.equal(compiled(inputs), model(inputs))


@pytest.mark.filterwarnings("ignore")
def test_many_masked_layers_compiled_one_by_one_share_their_code():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(55))
    pyprune.prune(layers, LOCAL, ratio=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden = torch.randn(2, 4)
        for layer in layers:
            hidden = torch.compile(layer, backend=counter, fullgraph=True)(hidden).detach()
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore")
def test_a_masked_layer_is_exported(dense, model, inputs):
    try:
        torch.export.export(dense.eval(), (inputs,))
    except Exception as error:
        pytest.skip(f"the dense model cannot: {error}")
    exported = torch.export.export(model.eval(), (inputs,)).module()
    torch.testing.assert_close(exported(inputs), model(inputs), rtol=0, atol=0)


def test_functional_call_uses_what_it_is_given(model, inputs):
    masks = kept(model)
    other = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    functional_call(model, other, (inputs,))
    assert_zeros(model, masks)
    own = dict(model.named_parameters())
    assert torch.equal(functional_call(model, own, (inputs,)), model(inputs))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_ensemble_of_masked_models_is_stacked(kind, dense, inputs):
    models = [pyprune.prune(copy.deepcopy(dense), LOCAL, ratio=r, examples_inputs=inputs) for r in (0.3, 0.7)]
    skip_what_dense_cannot(lambda x: ensemble([copy.deepcopy(dense), dense], x), inputs)
    torch.testing.assert_close(ensemble(models, inputs), torch.stack([one(inputs) for one in models]))


def ensemble(models, inputs):
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta") if not masks_in(models[0]) else models[0]
    return torch.vmap(lambda p, b: functional_call(base, (p, b), (inputs,)), randomness="same")(parameters, buffers)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_see_the_same_zeros(model, inputs, reentrant):
    masks = kept(model)
    if not inputs.is_floating_point() and reentrant:
        pytest.skip("a reentrant checkpoint wants an input with a gradient")
    x = inputs.requires_grad_() if inputs.is_floating_point() else inputs
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert_zeros(model, masks)


def test_the_fast_path_of_a_transformer_encoder_stays_open(monkeypatch):
    seen = []
    fast = torch._transformer_encoder_layer_fwd

    def counted(*args):
        seen.append(1)
        return fast(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2)).eval()
    x = torch.randn(2, 3, 8)
    pyprune.prune(model, LOCAL, ratio=0.5)
    with torch.no_grad():
        model(x)
        assert len(seen) == 2
        model[1].layers[0].linear1.weight.fill_(1.0)
        model(x)
    assert int((model[1].layers[0].linear1.weight == 0).sum()) == 64


def test_quantisation_aware_training_finds_masked_layers():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 8, 1)).train()
    pyprune.prune(model, LOCAL, ratio=0.5)
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = quantization.prepare_qat(model)
        assert all(hasattr(prepared[i], "weight_fake_quant") for i in (0, 3))
        optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1, momentum=0.9)
        step(prepared, optimizer, torch.randn(4, 8))
    assert int((prepared[0].weight == 0).sum()) == 32


# ---- assigning parameters ----


def test_a_merge_through_data_takes_effect_on_what_is_kept():
    model = pyprune.prune(nn.Sequential(nn.Linear(4, 4)), LOCAL, ratio=0.5)
    mask, before, layer = attached(model[0]).mask.clone(), model[0].weight.detach().clone(), model[0]
    model[0] = nn.Identity()  # as PEFT wraps a layer, merges into it, and puts it back
    layer.weight.data += 1.0
    model[0] = layer
    assert torch.equal(layer.weight, torch.where(mask, before + 1.0, 0))


def test_an_assigned_parameter_is_the_new_raw_weight():
    model = pyprune.prune(nn.Linear(4, 4), LOCAL, ratio=0.5)
    mask = attached(model).mask.clone()
    new = nn.Parameter(torch.ones(4, 4))
    model.weight = new
    model(torch.ones(1, 4))
    assert model.weight is new
    assert torch.equal(new != 0, mask)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.ones(1, 4))
    assert torch.equal(new != 0, mask)
    pyprune.prune(model, LOCAL, ratio=0.0)
    assert new.all()


@pytest.mark.parametrize("new", [torch.ones(5, 4), torch.ones(4)])
def test_a_parameter_of_another_shape_is_refused_before_anything_is_changed(new, unchanged):
    model = pyprune.prune(nn.Linear(4, 4), LOCAL, ratio=0.5)
    before = unchanged(model)
    with pytest.raises(ValueError, match=r"has a mask for shape \(4, 4\).*call pyprune\.strip first"):
        model.weight = nn.Parameter(new)
    before.check()


def test_a_weight_that_is_gone_leaves_no_mask_after_strip():
    model = pyprune.prune(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LOCAL, ratio=0.5)
    model[0].weight = None
    pyprune.strip(model)
    assert not masks_in(model)


def test_weights_are_untied_and_tied_with_their_masks():
    embed, decode = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    decode.weight = embed.weight
    model = pyprune.prune(nn.Sequential(embed, decode), LOCAL, ratio=0.5)
    mask = attached(embed).mask.clone()
    decode.weight = nn.Parameter(torch.ones(6, 4))  # untied
    model(torch.tensor([1]))
    assert attached(decode) is not attached(embed)
    assert torch.equal(decode.weight != 0, mask)
    assert torch.equal(embed.weight != 0, mask)
    decode.weight = embed.weight
    assert attached(decode) is attached(embed)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.tensor([1]))
    assert torch.equal(embed.weight != 0, mask)


def test_rows_that_are_added_to_an_embedding_are_kept():
    model = pyprune.prune(nn.Embedding(6, 4), LOCAL, ratio=0.5)
    mask = attached(model).mask.clone()
    model.weight.data = torch.cat([model.weight.data, torch.ones(2, 4)])
    with pytest.warns(UserWarning, match=r"has become one of shape \(8, 4\): its new rows are kept"):
        model(torch.tensor([7]))
    assert torch.equal(model.weight[:6] != 0, mask)
    assert model.weight[6:].all()
    pyprune.prune(model, LOCAL, ratio=0.0)
    assert model.weight.all()
    model.weight.data = torch.ones(6, 5)
    with pytest.raises(ValueError, match="before weights are resized"):
        model(torch.tensor([1]))


def test_a_model_is_loaded_by_assignment(dense, inputs, kind):
    if kind == "tied":
        pytest.skip("torch unties weights that are assigned")
    model = pyprune.prune(copy.deepcopy(dense), LOCAL, ratio=0.5, examples_inputs=inputs)
    masks = kept(model)
    model.load_state_dict(dense.state_dict(), assign=True)
    model(inputs)
    assert_zeros(model, masks)
    pyprune.prune(model, LOCAL, ratio=0.0, examples_inputs=inputs)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_pruner_names_the_layer_that_was_replaced():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pruner = Pruner(model, LOCAL, schedules.linear(0.5, end=4))
    pruner.step()
    model[1] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"1\.weight belongs to a layer that is no longer in the model"):
        pruner.step()


# ---- memory ----


def test_memory_is_the_mask_and_what_was_dropped():
    model = pyprune.prune(nn.Linear(100, 100, bias=False), LOCAL, ratio=0.75)
    (mask,) = masks_in(model)
    assert mask.mask.nbytes == 10_000
    assert mask.parked.nbytes == 4 * 7_500
    pyprune.keep_sparse(model, None)
    (mask,) = masks_in(model)
    assert mask.parked is None
    held = len(HELD)
    pyprune.strip(model)
    assert len(HELD) == held - 1


def test_torch_has_no_hooks_of_ours_while_nothing_is_held():
    gc.collect()  # models of other tests
    if HELD:
        pytest.skip("something else is held")
    pyprune.strip(pyprune.prune(nn.Linear(4, 4), LOCAL, ratio=0.5))
    optimizers, modules = importlib.import_module("torch.optim.optimizer"), torch.nn.modules.module
    hooks = [
        optimizers._global_optimizer_pre_hooks,
        optimizers._global_optimizer_post_hooks,
        modules._global_parameter_registration_hooks,
        modules._global_module_registration_hooks,
    ]
    before = [len(one) for one in hooks]
    model = pyprune.prune(nn.Linear(4, 4), LOCAL, ratio=0.5)
    twin = copy.deepcopy(model)
    assert [len(one) for one in hooks] == [count + 1 for count in before]
    pyprune.strip(model)
    assert [len(one) for one in hooks] == [count + 1 for count in before]
    pyprune.strip(twin)
    assert [len(one) for one in hooks] == before


def test_nothing_is_held_of_models_that_are_gone():
    before = len(HELD)
    model = pyprune.prune(nn.Linear(4, 4), LOCAL, ratio=0.5)
    assert len(HELD) == before + 1
    del model
    assert len(HELD) == before
