"""A layer with gates is in all else a layer like before: a table of layers, each asked what the dense one can do."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import pyprune
from pyprune.modules.gates import gates_of
from tests.conftest import skip_what_dense_cannot
from tests.modules.layers import LAYERS, Tied
from tests.modules.test_forward_pass import BERNOULLI


def gated(model, inputs, mode=BERNOULLI):
    """Put gates on a model, half of which are open."""
    pyprune.prune(model, mode, examples_inputs=inputs)
    for gate in gates_of(model):
        nn.init.normal_(gate.logits)
    return model


@pytest.fixture
def model(dense, inputs):
    return gated(copy.deepcopy(dense), inputs)


def by_hand(dense, model):
    """Return a dense copy with the weights that the gates make in evaluation."""
    twin = copy.deepcopy(dense)
    gates = {name.removesuffix("_mask"): gate for name, gate in model.named_modules(remove_duplicate=False)}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            raw = model.get_parameter(name)
            gate = gates.get(name)
            parameter.copy_(gate.deterministic(raw) if isinstance(gate, pyprune.StochasticGate) else raw)
    return twin.eval()


def train_on(model, inputs):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(inputs).square().sum().backward()
    optimizer.step()
    for gate in gates_of(model):
        assert gate.logits.grad.any()
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_names_order_and_identity_of_parameters_are_those_of_the_dense_model(dense, inputs):
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    keys, modules = list(dense.state_dict()), dict(dense.named_modules())
    model = gated(dense, inputs)
    found = dict(model.named_parameters(remove_duplicate=False))
    assert [name for name in found if not name.endswith("_mask.logits")] == list(parameters)
    for name, parameter in parameters.items():
        assert found[name] is parameter
        assert model.get_parameter(name) is parameter
    assert [key for key in model.state_dict() if not key.endswith("_mask.logits")] == keys
    logits = [name for name in found if name.endswith("_mask.logits")]
    assert logits
    assert {name.removesuffix("_mask.logits") for name in logits} <= set(parameters)
    for name, module in modules.items():
        assert isinstance(model.get_submodule(name), type(module).__mro__[0])
        assert type(module).__name__ == repr(module).split("(")[0]


def test_the_output_is_that_of_gated_weights(dense, inputs, model):
    torch.testing.assert_close(model.eval()(inputs), by_hand(dense, model)(inputs))
    with torch.no_grad():  # attention computes in other ways then
        torch.testing.assert_close(model(inputs), by_hand(dense, model)(inputs))


def test_strip_leaves_the_classes_and_attributes_of_the_dense_model(dense, inputs, kind):
    model = gated(copy.deepcopy(dense), inputs)
    expected = by_hand(dense, model)
    pyprune.strip(model)
    for one, other in zip(model.modules(), dense.modules(), strict=True):
        assert type(one) is type(other)
        assert list(vars(one)) == list(vars(other)) or set(vars(one)) == set(vars(other))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    torch.testing.assert_close(model.eval()(inputs), expected(inputs))


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_gated_and_train_for_themselves(model, inputs, copied):
    state = torch.get_rng_state()
    twin = copied(model)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(twin.modules(), model.modules(), strict=True):
        assert type(one) is type(other)
    assert torch.equal(twin.eval()(inputs), model.eval()(inputs))
    model.train(), twin.train()
    torch.manual_seed(1)
    expected = model(inputs)
    torch.manual_seed(1)
    assert torch.equal(twin(inputs), expected)
    samplers = {gate.sampler for gate in gates_of(twin)}
    assert len(samplers) == 1
    assert samplers.isdisjoint({gate.sampler for gate in gates_of(model)})
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train_on(twin, inputs)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    pyprune.strip(twin)
    assert not gates_of(twin)
    assert gates_of(model)


def dense_can(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        pytest.skip(f"the dense model cannot do it: {error!r:.80}")


def compile_(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def test_models_compile_as_a_whole(dense, inputs, model):
    dense_can(lambda: compile_(dense)(inputs))
    compiled = compile_(model)
    torch.manual_seed(1)
    expected = model(inputs)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(inputs), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(inputs).sum().backward()


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # of torch's recurrent layers
def test_models_export(dense, inputs, model):
    dense_can(lambda: torch.export.export(dense.eval(), (inputs,)))
    program = torch.export.export(model.eval(), (inputs,))
    torch.testing.assert_close(program.module()(inputs), model(inputs))


def test_functional_call_takes_the_raw_weights(dense, inputs, model):
    model.eval()
    halved = {name: parameter.detach() / 2 for name, parameter in dense.named_parameters()}
    with torch.no_grad():
        expected = functional_call(by_hand(dense, model), {
            name: by_hand(dense, model).get_parameter(name) / 2 for name in halved
        }, (inputs,))  # fmt: skip
        torch.testing.assert_close(functional_call(model, halved, (inputs,)), expected)
    with pytest.raises(RuntimeError, match="no_such"):
        functional_call(model, {"no_such": torch.ones(1)}, (inputs,), strict=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_stacked_models_run_under_vmap(dense, inputs, model):
    def run(models):
        parameters, buffers = stack_module_state(models)
        skeleton = copy.deepcopy(models[0])
        with torch.no_grad():
            return torch.vmap(lambda p, b: functional_call(skeleton, (p, b), (inputs,)))(parameters, buffers)

    dense_can(lambda: run([dense.eval(), copy.deepcopy(dense)]))
    models = [model.eval(), copy.deepcopy(model)]
    for gate in gates_of(models[1]):
        nn.init.normal_(gate.logits)
    torch.testing.assert_close(run(models), torch.stack([one(inputs) for one in models]))


def test_models_train_under_autocast(dense, inputs, model):
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    skip_what_dense_cannot(dense, inputs, under=autocast)
    with autocast:
        model(inputs).float().square().sum().backward()
    for gate in gates_of(model):
        assert gate.logits.grad.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_models_train_as_others(inputs, model, use_reentrant):
    inputs = inputs.requires_grad_() if inputs.is_floating_point() else inputs

    def train(call):
        torch.manual_seed(1)
        model.zero_grad()
        call(inputs).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    if use_reentrant and not inputs.is_floating_point():
        pytest.skip("reentrant checkpoints want an input with a gradient")
    expected = train(model)
    found = train(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    if not use_reentrant:  # a reentrant one around a whole model draws anew, see ARCHITECTURE.md
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def gated_places(model):
    """Yield the modules with gates of their own, and the attributes that are gated."""
    for module in model.modules():
        for name in list(module._parameters):
            if f"{name}_mask" in module._modules:
                yield module, name


def test_assigning_a_parameter_sets_the_raw_weight(model, inputs):
    state = torch.get_rng_state()
    for module, name in gated_places(model):
        new = nn.Parameter(torch.randn_like(module._parameters[name]))
        setattr(module, name, new)
        assert module._parameters[name] is new
        torch.testing.assert_close(module.eval() and getattr(module, name), module._modules[f"{name}_mask"](new))
        module.train()
        torch.set_rng_state(state)
        setattr(module, name, new)
        assert torch.equal(torch.get_rng_state(), state)  # no sample is drawn for it
    model(inputs)
    pyprune.strip(model)


def test_what_cannot_be_assigned_changes_nothing(model, unchanged):
    model.eval()  # torch's parametrize reads the weight before it takes it away
    for module, name in list(gated_places(model)):
        before = unchanged(model)
        raw = module._parameters[name]
        for wrong, error in [
            (nn.Parameter(torch.ones(2, 2, 2, 2, 2, 2)), ValueError),
            (nn.Parameter(torch.ones(raw.shape, dtype=torch.int8), requires_grad=False), ValueError),
            (None, ValueError),
            *([] if isinstance(module, nn.ParameterList) else [(torch.ones(raw.shape), TypeError)]),
        ]:
            with pytest.raises(error):
                setattr(module, name, wrong)
        with pytest.raises(ValueError, match=r"carries a gate.*pyprune\.strip first"):
            delattr(module, name)
        with pytest.raises(ValueError, match=r"pyprune\.strip first"):
            parametrize.register_parametrization(module, name, nn.Identity())
        before.check()
        assert module._parameters[name] is raw


def test_transformers_tie_and_say_what_cannot_be_resized(unchanged):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 20, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    tokens = {"input_ids": torch.randint(20, (2, 5))}
    pyprune.prune(model, BERNOULLI, examples_inputs=tokens)
    model.tie_weights()
    assert model.lm_head._parameters["weight"] is model.transformer.wte._parameters["weight"]
    model(**tokens).logits.sum().backward()
    before = unchanged(model.eval())
    refused = pytest.raises(ValueError, match=r"Embedding has a gate on its weight, so num_embeddings cannot change")
    with refused, torch.random.fork_rng():
        model.resize_token_embeddings(30, mean_resizing=False)
    before.check()


def test_load_state_dict_takes_a_dense_checkpoint_and_that_of_an_earlier_layout(dense, inputs, model):
    assert set(model.load_state_dict(dense.state_dict(), strict=False).missing_keys) == {
        name for name in model.state_dict() if name.endswith("_mask.logits")
    }
    earlier = {}
    for name, value in model.state_dict().items():
        path, _, last = name.rpartition(".")
        if name.endswith("_mask.logits"):
            path, _, last = name.removesuffix("_mask.logits").rpartition(".")
            name = f"{path}.parametrizations.{last}.0.logits".removeprefix(".")
        elif f"{name}_mask.logits" in model.state_dict():
            name = f"{path}.parametrizations.{last}.original".removeprefix(".")
        earlier[name] = value
    fresh = gated(copy.deepcopy(dense), inputs)
    fresh.load_state_dict(earlier)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_attach_gate_puts_a_gate_on_by_hand(dense, inputs):
    for module in list(dense.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dim() > 1:
                pyprune.attach_gate(module, name, pyprune.StochasticGate(parameter.shape, keep_probability=0.5))
                with pytest.raises(ValueError, match=f"{name} carries a StochasticGate already"):
                    pyprune.attach_gate(module, name, pyprune.StochasticGate(parameter.shape))
    if isinstance(dense, Tied):
        with pytest.raises(ValueError, match="one weight with several masks or gates"):
            pyprune.strip(dense)
        return
    train_on(dense, inputs)
    assert not torch.equal(dense(inputs), dense(inputs))
    with pyprune.one_gate_sample(dense):
        assert torch.equal(dense(inputs), dense(inputs))
    assert len(pyprune.get_config(dense)["gates"]) == len(gates_of(dense))
    assert len(pyprune.pruning_statistic(dense).pruned_tensors) == len(gates_of(dense))
    assert pyprune.RBLoss(dense, 0.5).current_ratio >= 0
    copy.deepcopy(dense), through_pickle(dense)
    pyprune.strip(dense)
    assert not gates_of(dense)
    assert not any("pyprune" in base.__module__ for module in dense.modules() for base in type(module).__mro__)


def test_a_layer_with_a_gate_by_hand_draws_once_per_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(50, 50))

        def forward(self):
            return self.weight, self.weight

    layer = pyprune.attach_gate(Twice(), "weight", pyprune.StochasticGate((50, 50), keep_probability=0.5))
    one, other = layer()
    assert torch.equal(one, other)
    assert not torch.equal(layer()[0], one)
    assert not torch.equal(layer.weight, layer.weight)
    whole = pyprune.prune(nn.ModuleDict({"layer": layer, "other": nn.Linear(2, 2)}), BERNOULLI)
    assert len(gates_of(whole)) == 2
    with pyprune.one_gate_sample(whole):
        assert torch.equal(layer()[0], layer()[0])
    assert not torch.equal(layer()[0], layer()[0])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3, "weight", pyprune.StochasticGate((2, 2))), TypeError, "module is of type int"),
        ((nn.Linear(2, 2), "weight", nn.Identity()), TypeError, "gate is of type Identity"),
        ((nn.Linear(2, 2), "wait", pyprune.StochasticGate((2, 2))), ValueError, "no parameter 'wait'.*weight, bias"),
        ((nn.Linear(2, 2), 3, pyprune.StochasticGate((2, 2))), ValueError, "no parameter 3"),
        ((nn.Linear(2, 3), "weight", pyprune.StochasticGate((2, 2))), ValueError, r"shape \(2, 2\), and weight is"),
    ],
)
def test_attach_gate_refuses_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        pyprune.attach_gate(*arguments)


def test_attach_gate_says_what_is_in_the_way(unchanged):
    class Computes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("weight_g", nn.Parameter(torch.ones(2, 2)))
            self.weight_g_mask = None

    class Own(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 2))
            self.scale = nn.Parameter(torch.ones(2, 2))

    class Property(nn.Module):
        scale = property(lambda self: 2 * self._parameters["scale"])

        def __init__(self):
            super().__init__()
            self._parameters["scale"] = nn.Parameter(torch.ones(2, 2))

    for module, name, text in [
        (Computes(), "weight_g", "another weight_g_mask"),
        (Own(), "scale", "one of its parts"),
        (Property(), "scale", "its class computes"),
        (parametrizations.weight_norm(nn.Linear(2, 2)), "weight", "has no parameter 'weight'"),
    ]:
        before = unchanged(module)
        with pytest.raises(ValueError, match=text):
            pyprune.attach_gate(module, name, pyprune.StochasticGate((2, 2)))
        before.check()


def test_a_gate_put_on_by_parametrize_is_named():
    model = nn.Sequential(nn.Linear(2, 2))
    parametrize.register_parametrization(model[0], "weight", pyprune.StochasticGate((2, 2)))
    for call in (pyprune.strip, pyprune.get_config):
        with pytest.raises(ValueError, match=r"^0\.weight carries a StochasticGate by torch.*attach_gate"):
            call(model)


def test_an_error_in_a_gate_is_not_taken_for_a_missing_attribute():
    class Broken(pyprune.StochasticGate):
        def forward(self, weight):
            return weight.no_such_thing

    linear = pyprune.attach_gate(nn.Linear(2, 2), "weight", Broken((2, 2)))
    with pytest.raises(RuntimeError, match=r"the gate on weight failed: .*no_such_thing"):
        linear(torch.ones(1, 2))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_attention_computes_with_gated_weights():
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    x, padded = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    model = gated(copy.deepcopy(dense), x).eval()
    twin = by_hand(dense, model)
    with torch.no_grad():
        for mask in (None, padded):
            torch.testing.assert_close(
                model(x, src_key_padding_mask=mask), twin(x, src_key_padding_mask=mask), rtol=1e-4, atol=1e-5
            )
    attention = gated(nn.MultiheadAttention(8, 2, batch_first=True), (x, x, x))
    torch.manual_seed(0)
    one = attention(x, x, x)[0]
    assert not torch.equal(attention(x, x, x)[0], one)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("mode", [BERNOULLI, "UNSTRUCTURED_HARD_CONCRETE"])
def test_many_gated_layers_compiled_one_by_one_share_their_code(how, nested, mode):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x).relu()

    model = pyprune.prune(nn.ModuleList([Block() if nested else nn.Linear(4, 4) for _ in range(55)]), mode)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter, x = CompileCounterWithBackend("aot_eager"), torch.randn(2, 4)
    for layer in model:
        if how == "in place":
            layer.compile(backend=counter, fullgraph=True)
            layer(x).sum().backward()
        else:
            torch.compile(layer, backend=counter, fullgraph=True)(x).sum().backward()
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["recompile_limit"]
    assert not torch._dynamo.utils.counters["unimplemented"]


def test_models_alike_have_the_same_classes_and_registries_do_not_see_them():
    registry = []

    class Registered(nn.Linear):
        def __init_subclass__(cls, **kwargs):
            registry.append(cls)

    one, other = (pyprune.prune(nn.Sequential(Registered(2, 2), nn.Linear(2, 2)), BERNOULLI) for _ in range(2))
    assert type(one) is type(other)
    assert type(one[0]) is type(other[0])
    assert registry == []
    assert isinstance(one[0], Registered)


@pytest.mark.filterwarnings("ignore")  # torch.ao warns of itself
def test_quantisation_says_that_strip_comes_first():
    quantization = pytest.importorskip("torch.ao.quantization")
    model = pyprune.prune(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), BERNOULLI)
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    with pytest.raises(ValueError, match=r"Linear has gates, and cannot be quantised; call pyprune\.strip first"):
        quantization.prepare_qat(model.train())


def _run_in_process(rank, model, inputs, path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model(inputs).square().sum().backward()
    torch.save([parameter.grad for parameter in model.parameters()], f"{path}/{rank}.pt")


def test_gated_models_go_to_other_processes(tmp_path):
    model = nn.ModuleDict({name: LAYERS[name][0]() for name in ("Linear", "LSTM", "tied")})
    for name, one in model.items():
        gated(one, LAYERS[name][1]())
    one, inputs = model["LSTM"], LAYERS["LSTM"][1]()
    torch.multiprocessing.spawn(_run_in_process, args=(one, inputs, tmp_path), nprocs=1)
    torch.manual_seed(0)
    one(inputs).square().sum().backward()
    for found, parameter in zip(torch.load(tmp_path / "0.pt"), one.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_replicas_of_data_parallel_have_tensors_for_parameters():
    linear = pyprune.attach_gate(nn.Linear(3, 3), "weight", pyprune.StochasticGate((3, 3))).eval()
    replica = linear._replicate_for_data_parallel()
    replica._modules["weight_mask"] = linear.weight_mask
    replica.weight, replica.bias = torch.ones(3, 3), torch.zeros(3)
    assert torch.equal(replica(torch.eye(3)), torch.ones(3, 3))
    assert torch.equal(linear.weight, linear._parameters["weight"])
