"""Which tensors of a checkpoint are pruned, told by their names and shapes alone."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from pyprune import ops
from pyprune.methods.layout import LINEAR, Layout
from pyprune.methods.patterns import matcher
from pyprune.sparse.checkpoint import Checkpoint

# What is left alone if nothing is said: what is looked up, what normalises, and what puts out the answer.
_LEFT_ALONE = {
    "embeddings": r"(^|.*[._])(\w*embed\w*|wte|wpe|shared|relative_attention_bias|position_ids)([._]|$)",
    "norms": r"(^|.*[._])(\w*norm\w*|ln_?\w{0,2}|bn\d*|gamma|beta)([._]|$)",
    "heads": r"(^|.*\.)(lm_head|\w+_head|embed_out|qa_outputs|classifier|score|predictions)([._]|$)"
    r"|^(\w+\.)?(head|heads|fc|output|cls)\.",
}


@dataclass(frozen=True)
class Found:
    """The tensors that are pruned, in the order of files and bytes; and why others are not, by reason."""

    names: list[str]
    left_alone: dict[str, list[str]]


def find_weights(
    checkpoint: Checkpoint, *, include: Sequence[str] = (), exclude: Sequence[str] = (), min_size: int = 0
) -> Found:
    """Find what is pruned: tensors of floating-point numbers with two dimensions or more.

    Args:
        checkpoint: where.
        include: regular expressions that match names from their beginning. Only such tensors are pruned, whatever
            they are called; without any, all but embeddings, norms and heads, as their names tell.
        exclude: the same, of what is left alone.
        min_size: tensors with fewer elements are left alone.

    Raises:
        ValueError: for a pattern that matches no tensor that could be pruned, or is none.
    """
    patterns = {pattern: matcher(pattern) for pattern in (*include, *exclude)}
    found = Found([], {})
    matched: set[str] = set()
    for name in checkpoint:
        if checkpoint.dtype(name) not in ops.WEIGHT_DTYPES or len(checkpoint.shape(name)) < 2:
            _leave(found, "vectors and integers", name)
            continue
        matching = [pattern for pattern, matches in patterns.items() if matches(name)]
        matched.update(matching)
        kind = None if include else next((kind for kind, rule in _LEFT_ALONE.items() if re.match(rule, name)), None)
        if any(pattern in exclude for pattern in matching):
            _leave(found, "excluded", name)
        elif include and not any(pattern in include for pattern in matching):
            _leave(found, "not included", name)
        elif kind is not None:
            _leave(found, kind, name)
        elif prod(checkpoint.shape(name)) < min_size:
            _leave(found, f"smaller than {min_size}", name)
        else:
            found.names.append(name)
    for pattern in patterns:
        if pattern not in matched:
            raise ValueError(
                f"{pattern!r} matches no weight of {checkpoint.path} from the beginning of its name; see "
                "`pyprune stats` for the names"
            )
    return found


def layout_of(name: str, shape: Sequence[int], inputs_first: Iterable[str] = ()) -> Layout:
    """Return what the dimensions of a weight count: outputs and inputs, as of linear layers and convolutions.

    Example:
        >>> layout_of("h.0.mlp.c_fc.weight", (768, 3072), ["h.*c_fc"]).outputs
        1
    """
    if any(matcher(pattern)(name) for pattern in inputs_first):
        return Layout(1, 0)
    if len(shape) == 3 and "expert" in name:
        return Layout(None, None, problem="it may hold experts, in one order or another")
    return LINEAR


def _leave(found: Found, why: str, name: str) -> None:
    found.left_alone.setdefault(why, []).append(name)
