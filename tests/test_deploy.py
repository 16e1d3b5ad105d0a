"""What docs/deploy.md says: what is exported of a pruned model computes what the model does."""

import copy
import io

import pytest
import torch

import pyprune
from pyprune import Method, granularity, importance, scope
from tests.conftest import build

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters deprecate much of their own
LOCAL = "UNSTRUCTURED_MAGNITUDE_LOCAL"
COUPLED = Method(importance.magnitude(), granularity.coupled(), scope.model())


def masked(model, inputs, folder):
    return pyprune.prune(model, LOCAL, ratio=0.5)


def stripped(model, inputs, folder):
    return pyprune.strip(masked(model, inputs, folder))


def masked_units(model, inputs, folder):
    return pyprune.prune(model, COUPLED, ratio=0.4, examples_inputs=inputs)


def shrunk(model, inputs, folder):
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pyprune.shrink(masked_units(model, inputs, folder), inputs)
    assert sum(parameter.numel() for parameter in model.parameters()) < parameters
    return model


def loaded(model, inputs, folder):
    pyprune.save_sparse(stripped(copy.deepcopy(model), inputs, folder), folder / "small.safetensors")
    pyprune.load_sparse(folder / "small.safetensors", model)
    return model


def unpickled(model, inputs, folder):
    file = io.BytesIO()
    torch.save(masked(model, inputs, folder), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def trained_on(model, inputs, folder):
    optimizer = torch.optim.Adam(masked(model, inputs, folder).parameters(), lr=1e-2)
    model(inputs).float().square().sum().backward()
    optimizer.step()
    return model


def gates_stripped(model, inputs, folder):
    pyprune.prune(model, "UNSTRUCTURED_HARD_CONCRETE")
    with torch.no_grad():
        for logits in pyprune.gate_parameters(model):
            logits.normal_(std=4)
    return pyprune.strip(model)


STATES = [masked, stripped, masked_units, shrunk, loaded, unpickled, trained_on, gates_stripped]
in_runtimes = pytest.mark.parametrize("model", [stripped, shrunk], ids=lambda state: state.__name__, indirect=True)
# ExecuTorch takes a minute to lower the LSTMs.
not_recurrent = pytest.mark.parametrize("case", ["cnn", "transformer"], indirect=True)


@pytest.fixture(params=["cnn", "transformer", "recurrent"])
def case(request):
    return build(request.param, torch.device("cpu"))


@pytest.fixture(params=STATES, ids=lambda state: state.__name__)
def model(request, case, tmp_path):
    if request.param is loaded:
        pytest.importorskip("safetensors")
    model = request.param(case.model, case.inputs, tmp_path).eval()
    assert request.param is shrunk or any((parameter == 0).any() for parameter in model.parameters())
    return model


@torch.no_grad()
def outputs(model, inputs):
    return model(inputs)


def test_torch_export_is_equal_and_plain(model, case, tmp_path):
    before = outputs(model, case.inputs)
    torch.export.save(torch.export.export(model, (case.inputs,)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(outputs(program.module(), case.inputs), before, rtol=1e-5, atol=1e-5)
    assert program.state_dict.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(program.state_dict[name], tensor), name
    assert not program.constants  # no masks, no values that were parked
    assert not any("pyprune" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(outputs(model, case.inputs), before)


@in_runtimes
def test_onnxruntime_is_equal(model, case, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    torch.onnx.export(model, (case.inputs,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (got,) = session.run(None, {given.name: case.inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), outputs(model, case.inputs), rtol=1e-4, atol=1e-5)


@in_runtimes
def test_openvino_is_equal(model, case):
    openvino = pytest.importorskip("openvino", reason="pip install openvino")
    converted = openvino.convert_model(torch.export.export(model, (case.inputs,)))
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = torch.from_numpy(compiled([case.inputs.numpy()])[0])
    torch.testing.assert_close(got, outputs(model, case.inputs), rtol=1e-4, atol=1e-5)


@in_runtimes
@not_recurrent
def test_executorch_is_equal(model, case, tmp_path):
    partitioner = pytest.importorskip(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner", reason="pip install executorch"
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.export(model, (case.inputs,))
    lowered = to_edge_transform_and_lower(program, partitioner=[partitioner.XnnpackPartitioner()]).to_executorch()
    (tmp_path / "model.pte").write_bytes(lowered.buffer)
    method = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    (got,) = method.execute((case.inputs,))
    torch.testing.assert_close(got, outputs(model, case.inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["UNSTRUCTURED_REGULARIZATION_BASED", "UNSTRUCTURED_HARD_CONCRETE"])
def test_gates_are_exported_as_an_operator_of_ours(mode, case, tmp_path):
    model = pyprune.prune(case.model, mode).eval()
    program = torch.export.export(model, (case.inputs,))
    torch.testing.assert_close(outputs(program.module(), case.inputs), outputs(model, case.inputs))
    assert any("pyprune.gate" in str(node.target) for node in program.graph.nodes)
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"pyprune\.gate"):
        torch.onnx.export(model, (case.inputs,), tmp_path / "model.onnx", dynamo=True, verbose=False)


@pytest.mark.parametrize("how", ["masked", "compressed", "shrunk"])
def test_models_of_transformers_are_exported(how, tmp_path):
    transformers = pytest.importorskip("transformers")
    from pyprune.integrations.transformers import from_pretrained, save_compressed, save_pretrained

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    tokens = torch.randint(5, 60, (2, 9))
    model = transformers.BertForMaskedLM(config).eval()
    if how == "shrunk":
        shrunk(model, {"input_ids": tokens}, tmp_path)
        save_pretrained(model, tmp_path / "model")
        model = from_pretrained(transformers.BertForMaskedLM, tmp_path / "model").eval()
    else:
        masked(model, tokens, tmp_path)
    if how == "compressed":
        save_compressed(model, tmp_path / "model")
        model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "model").eval()
    torch.export.save(torch.export.export(model, (tokens,)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    want = outputs(model, tokens).logits
    torch.testing.assert_close(outputs(program, tokens).logits, want, rtol=1e-5, atol=1e-5)
