"""What docs/quantise.md says: quantisers of others keep the zeros of a pruned model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import pyprune


def pruned():
    """Return a pruned model, and the names of its weights with where these are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).eval()
    with torch.no_grad():
        model[0].weight += 0.02  # a grid that is not symmetric has its zero off the middle
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    pyprune.strip(model)
    return model, {name: model.get_parameter(name).detach() == 0 for name in ("0.weight", "2.weight")}


def torchao_configs():
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    def int4(mapping):
        return quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=PerGroup(128), mapping_type=mapping
        )

    return {
        "int8": quantization.Int8WeightOnlyConfig(),
        "int8, activations too": quantization.Int8DynamicActivationInt8WeightConfig(),
        "int4": int4(MappingType.SYMMETRIC),
        "int4, asymmetric": int4(MappingType.ASYMMETRIC),
    }


@pytest.mark.parametrize("name", ["int8", "int8, activations too", "int4", "int4, asymmetric"])
@pytest.mark.filterwarnings("ignore")
def test_torchao_keeps_every_zero(name):
    config = torchao_configs()[name]
    from torchao.quantization import quantize_

    model, zeros = pruned()
    dense = copy.deepcopy(model)
    quantize_(model, config)
    for weight, zero in zeros.items():
        values = model.get_parameter(weight).dequantize()
        assert not values[zero].any()
        assert values[~zero].any()
        assert not torch.equal(values, dense.get_parameter(weight))


@pytest.mark.filterwarnings("ignore")
def test_pt2e_keeps_every_zero():
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="pip install torchao")
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86

    model, zeros = pruned()
    inputs = torch.randn(4, 128)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(torch.export.export(model, (inputs,)).module(), quantizer)
    prepared(inputs)
    state = pt2e.convert_pt2e(prepared).state_dict()
    for i, zero in enumerate(zeros.values()):
        values = state[f"_frozen_param{i}"].int() - state[f"_zero_point_{i}"][:, None]
        assert not values[zero].any()
        assert values[~zero].any()


@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_keeps_every_zero(kind, per_channel, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    quantization = pytest.importorskip("onnxruntime.quantization", reason="pip install onnxruntime onnx")
    import onnx

    model, zeros = pruned()
    torch.onnx.export(model, (torch.randn(1, 128),), tmp_path / "model.onnx", dynamo=True, verbose=False)
    quantization.quantize_dynamic(
        tmp_path / "model.onnx",
        tmp_path / "small.onnx",
        weight_type=quantization.QuantType[kind],
        per_channel=per_channel,
    )
    stored = {
        one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "small.onnx").graph.initializer
    }
    for name, zero in zeros.items():
        (values,) = (array for one, array in stored.items() if one.startswith(name) and one.endswith("_quantized"))
        (points,) = (array for one, array in stored.items() if one.startswith(name) and one.endswith("_zero_point"))
        differences = (values.astype(np.int32) - points.astype(np.int32)).T
        assert not differences[zero.numpy()].any()
        assert differences[~zero.numpy()].any()
        if kind == "QUInt8" and not per_channel and name == "0.weight":
            assert values.T[zero.numpy()].all()  # a zero is not stored as 0
