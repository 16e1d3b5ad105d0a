"""The model kinds that every function must cope with, and how to tell that a model did not change."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.modules.attachments import Owner
from pyprune.modules.masks import Mask
from pyprune.modules.targets import Target, attachments_of
from tests.devices import DEVICES

# gpu.sh runs the tests where these are not beside them.
ROOT = Path(__file__).parent.parent
collect_ignore = [f"test_{name}.py" for name in ("benchmarks", "examples") if not (ROOT / name).is_dir()]
collect_ignore += [] if (ROOT / "CONTRIBUTING.md").is_file() else ["test_site.py"]  # it looks for what pages refer to


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(images)).relu()
        hidden = self.bn2(self.conv2(hidden)).relu().mean((2, 3))
        return self.fc(self.dropout(hidden))


class Transformer(nn.Module):
    """Two kinds of attention, and embeddings tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.cross = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True)
        self.decoder = nn.Linear(8, 11)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layer(self.embed(tokens))
        hidden = hidden + self.cross(hidden, hidden[..., :5], hidden[..., :6])[0]
        return self.decoder(hidden)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 4, batch_first=True)
        self.cell = nn.LSTMCell(4, 3)

    def forward(self, series: Tensor) -> Tensor:
        hidden = self.gru(self.lstm(series)[0])[0]
        return self.cell(hidden[:, -1], self.cell(hidden[:, 0]))[0]


@dataclass
class Case:
    model: nn.Module
    inputs: Tensor


_CASES: dict[str, tuple[type[nn.Module], Callable[[], Tensor]]] = {
    "cnn": (ConvNet, lambda: torch.randn(8, 1, 8, 8)),
    "transformer": (Transformer, lambda: torch.randint(11, (3, 7))),
    "recurrent": (Recurrent, lambda: torch.randn(3, 7, 5)),
}


def pytest_configure(config: pytest.Config) -> None:
    # True of masked RNNs on a GPU: masked weights are new tensors at every call.
    config.addinivalue_line("filterwarnings", "ignore:RNN module weights are not part of single contiguous chunk")


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # On a GPU, one model run twice must give one result.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        assert ops.CUDA_KERNELS_LOADED, "there is a GPU, or REQUIRE_CUDA=1, but the CUDA kernels are not loaded"
    return torch.device(request.param)


def build(kind: str, device: torch.device) -> Case:
    model, inputs = _CASES[kind]
    return Case(model().to(device), inputs().to(device))


def skip_what_dense_cannot(
    model: nn.Module, inputs: Tensor, under: AbstractContextManager[object] | None = None
) -> None:
    """Skip the test if torch cannot train a copy of the dense model, in this dtype and under this context.

    nn.LSTM on a CPU without AVX-512, for one, raises under autocast to bfloat16, pruned or not.
    """
    dense = copy.deepcopy(model)
    with torch.random.fork_rng():
        try:
            with under or nullcontext():
                dense(inputs).float().square().sum().backward()
        except RuntimeError as error:
            pytest.skip(f"the dense model cannot do it here: {error}")


@pytest.fixture(params=list(_CASES))
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    return build(request.param, device)


@pytest.fixture
def cnn(device: torch.device) -> Case:
    return build("cnn", device)


@pytest.fixture
def transformer(device: torch.device) -> Case:
    return build("transformer", device)


@pytest.fixture
def recurrent(device: torch.device) -> Case:
    return build("recurrent", device)


def masks_of(model: nn.Module) -> dict[Target, Tensor]:
    return {target: found.mask for target, found in attachments_of(model).items() if isinstance(found, Mask)}


def attached(module: nn.Module, attribute: str = "weight") -> Any:
    """Return the mask or gate on a parameter."""
    return Owner(attribute, module, attribute).attachment


class Unchanged:
    """Takes down all there is to see of a model, and asserts later that it is still so."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = self._look()

    def _look(self) -> dict[str, object]:
        return {
            "classes": [(name, type(module)) for name, module in self.model.named_modules()],
            "parameters": [(name, id(p), p.requires_grad) for name, p in self.model.named_parameters()],
            "flags": [module.training for module in self.model.modules()],
            "attributes": [sorted(vars(module)) for module in self.model.modules()],
            "state": {name: tensor.clone() for name, tensor in self.model.state_dict().items()},
            "rng": torch.get_rng_state(),
        }

    def check(self) -> None:
        now = self._look()
        for key in ("classes", "parameters", "flags", "attributes"):
            assert now[key] == self.seen[key], key
        assert list(now["state"]) == list(self.seen["state"])
        for name, tensor in self.seen["state"].items():
            torch.testing.assert_close(now["state"][name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
        assert torch.equal(now["rng"], self.seen["rng"])


@pytest.fixture
def unchanged() -> type[Unchanged]:
    return Unchanged
