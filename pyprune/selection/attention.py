"""Where the heads of a model are: which weights project queries, keys and values, and which the output."""

from collections import Counter
from collections.abc import Mapping, Sequence

from pyprune.methods.granularity import Heads
from pyprune.modules.targets import Target

# Query, key, value and output projection: from the module that holds the first; "../" starts at its parent.
_SEPARATE = (
    ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
    ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"),
    ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
    ("q_lin.weight", "k_lin.weight", "v_lin.weight", "out_lin.weight"),
    ("query.weight", "key.weight", "value.weight", "../output.dense.weight"),
    ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"),
    ("wq.weight", "wk.weight", "wv.weight", "wo.weight"),
    ("q.weight", "k.weight", "v.weight", "o.weight"),
)
# Three projections in one weight, and that of the output.
_STACKED = (("in_proj_weight", "out_proj.weight"), ("qkv.weight", "proj.weight"), ("c_attn.weight", "c_proj.weight"))

# Of each weight of an attention layer: the size of the part that one head has, and how many projections are stacked.
Parts = list[tuple[Target, tuple[int, ...], int]]


def find_attention(targets: Sequence[Target], heads: Heads) -> dict[str, Parts]:
    """Return the attention layers by name, with those parts of their weights that a unit of heads has.

    Raises:
        ValueError: if there is none, or the numbers of heads do not fit the weights.
    """
    by_name = {owner.name: target for target in targets for owner in target.owners}
    known_names = (*_SEPARATE, *_STACKED) if heads.names is None else (_parameters(heads.names),)
    found: dict[str, Parts] = {}
    of_layer: list[list[Target]] = []
    for names in known_names:
        for first in by_name:
            if first == names[0] or first.endswith("." + names[0]):
                layer = first[: -len(names[0])].rstrip(".")
                members = [by_name.get(_resolve(layer, name)) for name in names]
                chosen = [member for member in members if member is not None]
                # A layer may be reached by several names, and be known by the first.
                if len(chosen) == len(names) and not any(chosen == known for known in of_layer):
                    of_layer.append(chosen)
                    found[layer] = _split_stacked(chosen, heads) if len(names) == 2 else _split(chosen, heads)
    counts = Counter(target.name for chosen in of_layer for target in chosen)
    shared = [name for name, count in counts.items() if count > 1]
    if shared:
        raise ValueError(f"{', '.join(shared)} is part of several attention layers; name it in ignored_scope")
    if not found:
        raise ValueError(
            "no attention layer is known by the names of its weights; give granularity.head(..., names=(query, key, "
            "value, output)) with the names of the four projections (the first three the same, if stacked in one "
            "weight), and do not ignore one of them"
        )
    return found


def _parameters(names: Sequence[str]) -> tuple[str, ...]:
    query, key, value, output = (name if name.endswith("weight") else f"{name}.weight" for name in names)
    return (query, output) if query == key == value else (query, key, value, output)


def _resolve(layer: str, name: str) -> str:
    while name.startswith("../"):
        layer, name = layer.rpartition(".")[0], name.removeprefix("../")
    return f"{layer}.{name}" if layer else name


def _check_matrices(projections: Sequence[Target]) -> None:
    for projection in projections:
        if projection.parameter.dim() != 2:
            raise ValueError(
                f"{projection.name} has {projection.parameter.dim()} dimensions, and heads are cut from linear "
                "layers; name it in ignored_scope"
            )
        if not projection.layout.is_clear:
            raise ValueError(
                f"which dimension of {projection.name} counts outputs cannot be told: {projection.layout.problem}. "
                "Name it in ignored_scope"
            )


def _sizes(projection: Target) -> tuple[int, int]:
    """Return how many outputs and inputs a projection has."""
    shape, layout = projection.parameter.shape, projection.layout
    return (shape[0], shape[1]) if layout.outputs == 0 else (shape[1], shape[0])


def _block(projection: Target, outputs: int, inputs: int) -> tuple[int, int]:
    return (outputs, inputs) if projection.layout.outputs == 0 else (inputs, outputs)


def _split(projections: Sequence[Target], heads: Heads) -> Parts:
    _check_matrices(projections)
    query, key, value, output = projections
    outputs = [_sizes(projection)[0] for projection in (query, key, value)]
    units = heads.num_kv_heads
    if outputs[0] % heads.num_heads:
        raise ValueError(f"{query.name} has {outputs[0]} outputs, which {heads.num_heads} heads do not divide")
    size = outputs[0] // heads.num_heads
    if outputs[1] != units * size or outputs[2] % units:
        raise ValueError(
            f"{key.name} and {value.name} have {outputs[1]} and {outputs[2]} outputs, but {units} key and value "
            f"heads of size {size} were asked for; give num_heads and num_kv_heads of the model"
        )
    parts: Parts = [
        (projection, _block(projection, count // units, _sizes(projection)[1]), 1)
        for projection, count in zip((query, key, value), outputs, strict=True)
    ]
    return [*parts, _output_part(output, heads.num_heads * (outputs[2] // units), units)]


def _split_stacked(projections: Sequence[Target], heads: Heads) -> Parts:
    _check_matrices(projections)
    stacked, output = projections
    outputs, inputs = _sizes(stacked)
    if heads.num_heads != heads.num_kv_heads or outputs % (3 * heads.num_heads):
        raise ValueError(
            f"{stacked.name} stacks three projections of {outputs // 3} outputs; {heads.num_heads} query heads and "
            f"{heads.num_kv_heads} key and value heads do not fit it"
        )
    part = (stacked, _block(stacked, outputs // (3 * heads.num_heads), inputs), 3)
    return [part, _output_part(output, outputs // 3, heads.num_heads)]


def _output_part(output: Target, inputs: int, units: int) -> tuple[Target, tuple[int, ...], int]:
    outputs, own = _sizes(output)
    if own != inputs:
        raise ValueError(f"{output.name} has {own} inputs, and the heads before it {inputs} outputs")
    return output, _block(output, outputs, own // units), 1


def names_of(found: Mapping[str, Parts]) -> list[str]:
    """Return the names of all weights that heads have a part in."""
    return [target.name for parts in found.values() for target, _, _ in parts]
