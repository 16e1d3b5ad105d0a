"""Which weights the layers of torch and of other libraries have, and what the dimensions of these count.

Layers of other libraries are known by what they look like, without importing the library: transformers' `Conv1D` and
experts, and whatever has a ``weight`` that fits its numbers of inputs and outputs (torch_geometric, torchvision).
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from pyprune.methods.layout import LINEAR, Layout

_TABLE = Layout(is_table=True)
# Where a layer of another library says how many inputs and outputs it has.
_COUNTS = (("in_features", "out_features"), ("in_channels", "out_channels"), ("input_size", "output_size"))
_EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def weight_layouts(module: nn.Module) -> Mapping[str, Layout]:
    """Return the weights that a layer of this type has, and what their dimensions count.

    Those of layers of torch may turn out not to be parameters.

    Example:
        >>> weight_layouts(nn.ConvTranspose2d(8, 4, 3, groups=2))
        {'weight': Layout(outputs=1, inputs=0, groups=2, problem='', is_table=False)}
    """
    layouts: dict[str, Layout] = {}
    if isinstance(module, nn.modules.conv._ConvNd):
        dims = (1, 0) if isinstance(module, nn.modules.conv._ConvTransposeNd) else (0, 1)
        layouts = {"weight": Layout(*dims, module.groups)}
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        layouts = {"weight": _TABLE}
    elif isinstance(module, nn.Linear) or is_quantised(module):
        layouts = {"weight": LINEAR}
    elif isinstance(module, nn.Bilinear):
        layouts = {"weight": Layout(0, None, problem="it multiplies two inputs at once")}
    elif isinstance(module, nn.MultiheadAttention):
        layouts = dict.fromkeys(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), LINEAR)
    elif isinstance(module, nn.RNNBase):
        layouts = dict.fromkeys((n for n in module._flat_weights_names if n.startswith("weight_")), LINEAR)
    elif isinstance(module, nn.RNNCellBase):
        layouts = dict.fromkeys(("weight_ih", "weight_hh"), LINEAR)
    else:
        return _of_other_libraries(module)
    return {name: one for name, one in layouts.items() if module._parameters.get(name, "computed") is not None}


def holds_constants(module: nn.Module) -> bool:
    """Whether the weights in a module are constants and not learned: Ultralytics' integral over the bins of a box.

    Example:
        >>> DFL = type("DFL", (nn.Module,), {})
        >>> integral = DFL()
        >>> integral.conv = nn.Conv2d(16, 1, 1, bias=False).requires_grad_(False)
        >>> holds_constants(integral), holds_constants(integral.conv)
        (True, False)
    """
    return type(module).__name__ == "DFL" and not any(one.requires_grad for one in module.parameters())


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer is one of torch's own whose weights are quantised."""
    home = type(module).__module__
    if not home.startswith("torch.ao.nn.") or ".quantized" not in home:
        return False
    # Others in there, stubs and activations, are found in float models too.
    return hasattr(module, "weight") or hasattr(module, "get_weight")


def bias_of(attribute: str) -> str:
    """Name the bias of a weight, as torch and transformers do.

    Example:
        >>> [bias_of(name) for name in ("weight", "in_proj_weight", "down_proj")]
        ['bias', 'in_proj_bias', 'down_proj_bias']
    """
    # MultiheadAttention has one for the three.
    if attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return "in_proj_bias"
    return attribute.replace("weight", "bias") if "weight" in attribute else f"{attribute}_bias"


def _of_other_libraries(module: nn.Module) -> dict[str, Layout]:
    if not module._parameters:
        return {}
    there = {name: p for name, p in module._parameters.items() if p is not None and not is_lazy(p)}
    parameters = {name: p for name, p in there.items() if p.dim() >= 2}
    weight = parameters.get("weight")
    if weight is None:
        return _of_experts(module, {name: parameters[name] for name in _EXPERTS if name in parameters})
    classes = parametrize.type_before_parametrizations(module).__mro__
    if any(cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in classes):
        return {"weight": Layout(1, 0)}
    if any(cls.__module__ == "torch_geometric.nn.dense.linear" and cls.__name__ == "Linear" for cls in classes):
        return {"weight": LINEAR}
    for counts in _COUNTS:
        inputs, outputs = (getattr(module, name, None) for name in counts)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return _by_counts(weight, inputs, outputs, getattr(module, "groups", 1))
    return {}


def _by_counts(weight: Tensor, inputs: int, outputs: int, groups: object) -> dict[str, Layout]:
    """Say which dimensions have as many entries as a layer has inputs and outputs; it may be none, or not certain."""
    shape = tuple(weight.shape)
    fitting = []
    if isinstance(groups, int) and groups > 0 and shape[:2] == (outputs, inputs // groups):
        fitting.append(Layout(0, 1, groups))
    if shape == (inputs, outputs):
        fitting.append(Layout(1, 0))
    if len(shape) == 3 and shape[1:] == (outputs, inputs):
        fitting.append(Layout(1, 2, shape[0]))
    if len(shape) == 3 and shape[1:] == (inputs, outputs):
        fitting.append(Layout(2, 1, shape[0]))
    return {"weight": _only(fitting)} if fitting else {}


def _of_experts(module: nn.Module, weights: dict[str, nn.Parameter]) -> dict[str, Layout]:
    """Say what the dimensions of experts count: those of transformers say whether they have inputs first."""
    down = weights.get("down_proj")
    if down is None or len(weights) < 2 or any(w.dim() != 3 or len(w) != len(down) for w in weights.values()):
        return {}
    experts, first, second = down.shape
    plain, transposed = Layout(1, 2, experts), Layout(2, 1, experts)
    says = getattr(module, "is_transposed", None)
    if isinstance(says, bool):
        return dict.fromkeys(weights, transposed if says else plain)
    # What goes down came up: (out, in) of the one fits (in, out) of the other, or twice of it where a gate is beside.
    up = [tuple(weight.shape[1:]) for name, weight in weights.items() if name != "down_proj"]
    fitting = [plain] if all(i == first and o in (second, 2 * second) for o, i in up) else []
    fitting += [transposed] if all(i == second and o in (first, 2 * first) for i, o in up) else []
    return dict.fromkeys(weights, _only(fitting)) if fitting else {}


def _only(fitting: list[Layout]) -> Layout:
    if len(set(fitting)) == 1:
        return fitting[0]
    return Layout(None, None, problem="both orders fit its sizes; give examples_inputs, to see how it is used")
