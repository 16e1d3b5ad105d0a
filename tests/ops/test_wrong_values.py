"""Every operator, every argument, some sixty wrong values: a TypeError or ValueError that names the argument.

And nothing has changed. What an argument may well be is said by its kind.
"""

import decimal
import fractions
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pyprune import ops


def _weights() -> list[Tensor]:
    return [torch.randn(4, 6), torch.randn(8)]


def _masks() -> list[Tensor]:
    return [torch.rand(4, 6) < 0.5, torch.rand(8) < 0.5]


def _park() -> dict[str, Any]:
    weights, masks = _weights(), _masks()
    return {"weights": weights, "masks": masks, "parked": ops.park(weights, masks)}


def _unpack() -> dict[str, Any]:
    bits, values = ops.pack(_weights())
    return {"bits": bits, "values": values, "shapes": [(4, 6), (8,)], "out": _weights()}


def _gate() -> dict[str, Any]:
    return {"weight": torch.randn(4, 6), "logits": torch.randn(4, 1), "seed": torch.tensor(3), "stream": 1}


def _pack_sparse_bits() -> dict[str, Any]:
    [bits], [values] = ops.pack([torch.randn(4, 6)])
    return {"bits": bits, "values": values, "shape": (4, 6), "layout": "index", "dtype": torch.float32}


def _packed() -> ops.SparseWeight:
    return ops.pack_sparse(torch.randn(4, 6), "index")


_BLOCKS = [(2, 3), (4,)]

# Arguments that are right, made anew for each call.
OPERATORS: dict[str, Callable[[], dict[str, Any]]] = {
    "threshold": lambda: {
        "weights": _weights(), "removed": 5, "scales": torch.ones(2, dtype=torch.float64), "normalize": False,
        "masks": _masks(), "bases": _masks(),
    },
    "group_masks": lambda: {
        "weights": [torch.randn(4, 6), torch.randn(2, 8)], "sizes": 4, "kept": 2, "row_dims": 1,
        "factors": [torch.ones(6), None], "bases": [torch.rand(4, 6) < 0.5, None],
        "masks": [torch.rand(4, 6) < 0.5, torch.rand(2, 8) < 0.5],
    },
    "unit_scores": lambda: {"tensors": _weights(), "blocks": list(_BLOCKS), "p": 2.0, "reduction": "sum"},
    "expand": lambda: {
        "unit_masks": [torch.rand(2, 2) < 0.5, torch.rand(2) < 0.5], "blocks": list(_BLOCKS), "masks": _masks(),
    },
    "cut": lambda: {"weights": _weights(), "removed": 3, "scales": torch.ones(2, dtype=torch.float64)},
    "drop": lambda: {
        "weights": _weights(),
        "cut": ops.cut(_weights(), 3),
        "scales": torch.ones(2, dtype=torch.float64),
    },
    "fold": lambda: {"weights": _weights(), "masks": _masks()},
    "fold with blocks": lambda: {
        "weights": _weights(), "masks": [torch.rand(2, 2) < 0.5, torch.rand(2) < 0.5], "blocks": list(_BLOCKS),
    },
    "park": lambda: {"weights": _weights(), "masks": _masks()},
    "unpark": _park,
    "pack": lambda: {"tensors": _weights(), "masks": _masks(), "negative_zeros": False},
    "unpack": _unpack,
    "pack_sparse": lambda: {"weight": torch.randn(4, 6), "layout": "index", "dtype": torch.float32},
    "pack_sparse_bits": _pack_sparse_bits,
    "unpack_sparse": lambda: {"packed": _packed()},
    "check_sparse": lambda: {"packed": _packed()},
    "sparse_linear": lambda: {
        "input": torch.randn(3, 6), "packed": _packed(), "bias": torch.randn(4), "activation": "relu",
    },
    "probe": lambda: {"weights": _weights(), "masks": _masks(), "turn": 3},
    "sparsegpt_block": lambda: {
        "weight": torch.randn(4, 6), "sums": torch.randn(4, 6), "factor": torch.eye(6),
        "mask": torch.rand(4, 6) < 0.5, "keep": 2, "of": 4,
    },
    "mask_weight": lambda: {"weight": torch.randn(4, 6), "mask": torch.rand(4, 6) < 0.5, "dense_gradient": False},
    "norms": lambda: {"tensors": _weights()},
    "inverse_norms": lambda: {"tensors": _weights()},
    "count_zeros": lambda: {"tensors": _weights()},
    "unit_shape": lambda: {"shape": (4, 6), "block": (2, 3)},
    "check_bases": lambda: {"bases": _masks(), "weights": _weights()},
    "check_gate_shape": lambda: {"shape": (4, 6), "gate_shape": (4, 1)},
    "check_hard_concrete": lambda: {"beta": 0.5, "gamma": -0.1, "zeta": 1.1},
    "bernoulli_gate": lambda: {**_gate(), "out": torch.empty(4, 6)},
    "hard_concrete_gate": lambda: {
        **_gate(), "out": torch.empty(4, 6), "beta": 0.5, "gamma": -0.1, "zeta": 1.1, "straight_through": False,
    },
    "gate_noise": lambda: {"shape": (3, 4), "seed": torch.tensor(3), "stream": 0},
    "gate_penalty": lambda: {"logits": _weights(), "hard": False, "shift": 0.5},
}  # fmt: skip

# What may be given where: names of VALUES and CHANGES. Everything else is an error.
INTEGERS = {"zero", "one", "a numpy integer"}
SHAPES = {"of another shape", "of more dimensions"}
NUMBERS = {"one", "2**70", "a half", "a fraction", "a numpy integer", "a numpy float"}
RIGHT: dict[str, set[str]] = {
    "removed": INTEGERS, "sizes": {"one", "a numpy integer"}, "kept": INTEGERS, "row_dims": INTEGERS,
    "stream": {*INTEGERS, "minus one"}, "turn": {*INTEGERS, "None"}, "p": {*NUMBERS, "None"},
    "shift": {*NUMBERS, "zero", "minus one", "-(2**70)"}, "beta": NUMBERS, "gamma": {"minus one"}, "zeta": set(),
    "negative_zeros": {"False", "True"}, "shapes": set(),
    "keep": {"one", "a numpy integer"}, "of": set(),
    "normalize": {"False", "True"}, "hard": {"False", "True"}, "straight_through": {"False", "True"},
    "dense_gradient": {"False", "True"}, "reduction": set(), "shape": {"an empty list"}, "gate_shape": set(),
    "scales": {"None"}, "bases": {"None"}, "factors": {"None"}, "seed": {"None", "an integer tensor",
    "of more dimensions"}, "out": {"None"},
    "blocks": set(), "block": set(), "layout": set(), "activation": {"None"}, "dtype": {"None", "a dtype"},
}  # fmt: skip
MAY_BE_RIGHT = {
    # As long as the others fit: no weights with no masks, and so on.
    ("norms", "tensors"): {"an empty list", *SHAPES}, ("inverse_norms", "tensors"): {"an empty list", *SHAPES},
    ("count_zeros", "tensors"): {"an empty list", "of bool", *SHAPES}, ("threshold", "weights"): {"an empty list"},
    ("gate_penalty", "logits"): {"an empty list", *SHAPES},
    ("cut", "weights"): {"an empty list", "twice the same", *SHAPES}, ("drop", "weights"): SHAPES,
    ("threshold", "masks"): {"None"}, ("group_masks", "masks"): {"None"}, ("fold with blocks", "blocks"): {"None"},
    ("pack", "masks"): {"None"}, ("pack", "tensors"): {"of int64", "complex", "of bool", "a list of integer tensors"},
    ("unpack", "values"): {"of int64", "complex", "of bool"},
    ("pack_sparse", "weight"): {"a matrix"}, ("sparse_linear", "input"): {"of more dimensions"},
    ("sparse_linear", "bias"): {"None"},
    ("gate_noise", "seed"): {"an integer tensor", "on meta"},
    ("threshold", "normalize"): {"False"},  # True and scales, too
}  # fmt: skip


class Unwritable:
    def __repr__(self) -> str:
        raise OSError("no")


def _quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.randn(4, 6), 0.1, 0, torch.qint8)


def _fake() -> Tensor:
    with FakeTensorMode():
        return torch.empty(4, 6)


def _nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None, "True": lambda: True, "False": lambda: False, "a numpy bool in a list": lambda: [np.True_],
    "a string": lambda: "no", "an empty string": lambda: "", "bytes": lambda: b"12", "zero": lambda: 0,
    "one": lambda: 1,
    "minus one": lambda: -1, "2**70": lambda: 2**70, "-(2**70)": lambda: -(2**70), "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5000, "a half": lambda: 0.5, "nan": lambda: math.nan, "infinity": lambda: math.inf,
    "-infinity": lambda: -math.inf, "complex": lambda: 1j, "a fraction": lambda: fractions.Fraction(1, 2),
    "a decimal": lambda: decimal.Decimal("0.5"), "a numpy integer": lambda: np.int64(1),
    "a numpy float": lambda: np.float32(0.5), "a numpy array": lambda: np.ones((4, 6), dtype=np.float32),
    "an empty list": lambda: [], "a list of None": lambda: [None], "a list of numbers": lambda: [1.5, 2.5],
    "a list of bools": lambda: [True, True], "a list of nan": lambda: [math.nan] * 2,
    "a list of lists": lambda: [[1.0, 2.0], [3.0]], "a list of strings": lambda: ["a", "b"],
    "a list of huge numbers": lambda: [10**400, 2**70], "a list of minus one": lambda: [-1, -1],
    "a list of numpy arrays": lambda: [np.ones((4, 6), dtype=np.float32), np.ones(8, dtype=np.float32)],
    "a dict": lambda: {0: torch.randn(4, 6)}, "a set": lambda: {1}, "a generator": lambda: (one for one in (1, 2)),
    "an object": Unwritable, "a class": lambda: Tensor, "a function": lambda: len, "an ellipsis": lambda: ...,
    "a dtype": lambda: torch.float32, "a matrix": lambda: torch.randn(4, 7),
    "a bool matrix": lambda: torch.ones(2, 2) > 0,
    "an integer tensor": lambda: torch.tensor(1),
    "a list of integer tensors": lambda: [torch.ones(4, 6).int(), torch.ones(8).int()],
    "a module": lambda: torch.nn.Linear(2, 2), "an uninitialized parameter": torch.nn.UninitializedParameter,
}  # fmt: skip

# Of a tensor, or of the first of a list of tensors.
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "on meta": lambda one: one.to("meta"), "fake": lambda one: _fake(), "sparse": lambda one: one.float().to_sparse(),
    "quantized": lambda one: _quantized(), "nested": lambda one: _nested(), "of int64": lambda one: one.short(),
    "complex": lambda one: one + 0j, "of bool": lambda one: one > 0 if one.dtype != torch.bool else one.float(),
    "of another shape": lambda one: torch.ones(5, 5, 1).to(one.dtype), "None": lambda one: None,
    "of more dimensions": lambda one: one[None], "its list": lambda one: one.tolist(),
    "its array": lambda one: one.numpy(),
}  # fmt: skip
OF_LISTS: dict[str, Callable[[list[Any]], Any]] = {
    "one too few": lambda some: some[:1], "one too many": lambda some: [*some, some[0]],
    "twice the same": lambda some: [some[0], some[0]], "a tensor in place of the list": lambda some: some[0],
}  # fmt: skip
# Lists that may be one longer or shorter, or hold a tensor twice: nothing else has to fit, or nothing is written.
FREE_LENGTH = {
    ("norms", "tensors"),
    ("inverse_norms", "tensors"),
    ("count_zeros", "tensors"),
    ("gate_penalty", "logits"),
}


# What whoever calls has checked before.
TRUSTED = {("check_bases", "weights")}


def wrong_values(operator: str, argument: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    right = RIGHT.get(argument, set()) | MAY_BE_RIGHT.get((operator, argument), set())
    good = OPERATORS[operator]()[argument]
    if (operator, argument) in MAY_BE_RIGHT and argument == "normalize":
        right = MAY_BE_RIGHT[operator, argument]
    yield from ((name, value) for name, value in VALUES.items() if name not in right)
    some = good if isinstance(good, list) else [good]
    if not isinstance(some[0], Tensor):
        return
    for name, change in CHANGES.items():
        if name in right or (name == "None" and argument in ("bases", "factors")):
            continue

        def changed(change: Callable[[Tensor], Any] = change) -> Any:
            fresh = OPERATORS[operator]()[argument]
            return [change(fresh[0]), *fresh[1:]] if isinstance(fresh, list) else change(fresh)

        yield name, changed
    if isinstance(good, list) and (operator, argument) not in FREE_LENGTH:
        for name, change in OF_LISTS.items():
            if name not in right:
                yield name, lambda change=change: change(OPERATORS[operator]()[argument])


def tensors_in(value: object) -> list[Tensor]:
    found = value if isinstance(value, (list, tuple)) else [value]
    return [one for one in found if isinstance(one, Tensor) and type(one) is Tensor]


def bits(tensor: Tensor) -> object:
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return tensor.layout
    return (
        tensor.contiguous().view(-1).view(torch.uint8).tolist()
        if tensor.numel() and tensor.dim()
        else tensor.tolist()
    )


def check(operator: str, argument: str, name: str, value: Callable[[], Any]) -> str:
    """Return what is wrong with the answer to a wrong value, or nothing."""
    arguments = {**OPERATORS[operator](), argument: value()}
    tensors = [tensor for one in arguments.values() for tensor in tensors_in(one)]
    before = [bits(tensor) for tensor in tensors]
    call = getattr(ops, operator.removesuffix(" with blocks"))
    where = f"{operator}({argument}={name})"
    try:
        call(**arguments)
    except (TypeError, ValueError) as error:
        if argument.removesuffix("s") not in str(error):
            return f"{where} does not name it: {error}"
    except Exception as error:
        return f"{where}: {type(error).__name__}: {str(error)[:100]}"
    else:
        return f"{where} is accepted"
    return "" if before == [bits(tensor) for tensor in tensors] else f"{where} has changed a tensor"


@pytest.mark.parametrize("operator", OPERATORS)
def test_wrong_values_are_refused_by_name_before_anything_is_changed(operator):
    faults = []
    for argument in OPERATORS[operator]():
        if (operator, argument) in TRUSTED:
            continue
        faults += [check(operator, argument, name, value) for name, value in wrong_values(operator, argument)]
    faults = [fault for fault in faults if fault]
    assert not faults, f"{len(faults)}:\n" + "\n".join(faults)


def test_every_operator_is_in_the_table():
    known = {operator.removesuffix(" with blocks") for operator in OPERATORS}
    callables = {name: getattr(ops, name) for name in ops.__all__ if callable(getattr(ops, name))}
    assert known == {name for name, one in callables.items() if not isinstance(one, type)}
