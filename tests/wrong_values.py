"""Some seventy values, of which an argument takes a few, and sets of those that belong together."""

import math
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pyprune import IgnoredScope, Method, granularity, importance, schedules, scope


class Hostile:
    """Nothing can be asked of it."""

    def __repr__(self):
        raise ZeroDivisionError

    __eq__ = __bool__ = __len__ = __hash__ = __repr__


def endless():
    itself = []
    itself.append(itself)
    return itself


def fake():
    with FakeTensorMode():
        return torch.empty(4, 4)


# Made anew for each call: what was accepted by mistake may have been changed.
VALUES = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "np.True_": lambda: np.True_,
    "0": lambda: 0,
    "1": lambda: 1,
    "2": lambda: 2,
    "5": lambda: 5,
    "-1": lambda: -1,
    "2**63": lambda: 2**63,
    "2**70": lambda: 2**70,
    "10**400": lambda: 10**400,
    "-10**400": lambda: -(10**400),
    "10**5000": lambda: 10**5000,
    "np.int64(1)": lambda: np.int64(1),
    "0.0": lambda: 0.0,
    "0.25": lambda: 0.25,
    "np.float32(0.25)": lambda: np.float32(0.25),
    "1/4": lambda: Fraction(1, 4),
    "1.0": lambda: 1.0,
    "3.5": lambda: 3.5,
    "-0.25": lambda: -0.25,
    "5e-324": lambda: 5e-324,
    "1e308": lambda: 1e308,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "1j": lambda: 1j,
    "Decimal": lambda: Decimal("0.25"),
    "''": lambda: "",
    "no": lambda: "no",
    "'1'": lambda: "1",
    "weight": lambda: "weight",
    "a pattern without end": lambda: r"(\w+\.?)+!",
    "no pattern": lambda: "(",
    "NUL": lambda: "a\0b",
    "bytes": lambda: b"weight",
    "[]": lambda: [],
    "[1]": lambda: [1],
    "[0.25]": lambda: [0.25],
    "[None]": lambda: [None],
    "['0']": lambda: ["0"],
    "endless": endless,
    "()": lambda: (),
    "(1, 2)": lambda: (1, 2),
    "(4, 4)": lambda: (4, 4),
    "{}": lambda: {},
    "{'0': 0.25}": lambda: {"0": 0.25},
    "{'nowhere': 0.25}": lambda: {"nowhere": 0.25},
    "{'0': 2}": lambda: {"0": 2},
    "{0: 0.25}": lambda: {0: 0.25},
    "{0: 'x'}": lambda: {0: "x"},
    "{'(': 0.25}": lambda: {"(": 0.25},
    "{'a': ['0']}": lambda: {"a": ["0"]},
    "{'a': None}": lambda: {"a": None},
    "OrderedDict": lambda: OrderedDict(a=1),
    "set": lambda: {1},
    "range": lambda: range(3),
    "generator": lambda: (i for i in range(2)),
    "function": lambda: lambda *args: 0.25,
    "a type": lambda: int,
    "an object": object,
    "Hostile": Hostile,
    "an Exception": lambda: ValueError("x"),
    "a path": lambda: Path("nowhere") / "x",
    "np.zeros": lambda: np.zeros(3),
    "tensor(0.25)": lambda: torch.tensor(0.25),
    "ones": lambda: torch.ones(4, 4),
    "ints": lambda: torch.ones(4, 4, dtype=torch.int64),
    "bools": lambda: torch.ones(4, 4, dtype=torch.bool),
    "complex": lambda: torch.ones(4, 4, dtype=torch.complex64),
    "NaN tensor": lambda: torch.full((4, 4), math.nan),
    "meta": lambda: torch.empty(4, 4, device="meta"),
    "fake": fake,
    "sparse": lambda: torch.eye(4).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8),
    "nn.Linear": lambda: nn.Linear(4, 4),
    "torch.float32": lambda: torch.float32,
    "torch.int8": lambda: torch.int8,
    "a device": lambda: torch.device("cpu"),
    "a device that is none": lambda: "cuda:99999",
    "a Method": lambda: Method(importance.magnitude()),
    "an importance": importance.magnitude,
    "a granularity": granularity.element,
    "a scope": scope.tensor,
    "a schedule": lambda: schedules.cubic(0.5, end=4),
    "an IgnoredScope": lambda: IgnoredScope(names=["0"]),
}

FLAG = {"True", "False", "np.True_"}
OPTIONAL = {"None"}
SHARE = {"0", "0.0", "0.25", "np.float32(0.25)", "1/4", "5e-324"}  # in [0, 1)
POSITIVE = (SHARE | {"1", "2", "5", "np.int64(1)", "1.0", "3.5", "1e308", "2**63", "2**70"}) - {"0", "0.0"}
NOT_NEGATIVE = POSITIVE | {"0", "0.0"}
COUNT = {"1", "2", "5", "np.int64(1)"}
FROM_0 = COUNT | {"0"}
RATIOS = SHARE | {"{'0': 0.25}", "{}"}
TENSORS = {name for name in VALUES if name in ("tensor(0.25)", "ones", "ints", "bools", "complex", "NaN tensor")}
TENSORS |= {"meta", "fake", "sparse", "quantised"}
SEQUENCES = {"()", "(1, 2)", "(4, 4)"}
DICTS = {name for name in VALUES if name.startswith("{") or name == "OrderedDict"}
FUNCTIONS = {"function", "a type", "nn.Linear", "a schedule"}
TEXT = {"''", "no", "'1'", "weight", "a pattern without end", "no pattern", "NUL", "a device that is none"}
