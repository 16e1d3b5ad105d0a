import copy
import math

import pytest
import torch
from torch import nn

import pyprune
from pyprune.runtime.sparse_attention import SparseMultiheadAttention
from tests.runtime.sparse_models import sparse

N, L, E, HEADS = 3, 7, 32, 4
X = torch.linspace(-2, 2, N * L * E).sin().reshape(N, L, E)
PADDING = torch.arange(L).expand(N, L) > torch.tensor([[6], [4], [2]])
CAUSAL = torch.ones(L, L).triu(1).bool()


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, **options)

    def forward(self, x, **options):
        return self.attention(x, x, x, **options)


def pair(**options):
    """Return an accelerated model, and the dense one."""
    model = sparse(SelfAttention(**options))
    dense = copy.deepcopy(model)
    report = pyprune.accelerate(model, X if options.get("batch_first") else X.transpose(0, 1).contiguous())
    assert report.replaced == ["attention.in_proj_weight", "attention.out_proj"]
    assert isinstance(model.attention, SparseMultiheadAttention)
    return model, dense


CALLS = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding in numbers": {"key_padding_mask": PADDING * -3.0, "need_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "need_weights": False},
    "both in numbers": {
        "attn_mask": CAUSAL * -1e4,
        "key_padding_mask": torch.zeros(N, L).masked_fill(PADDING, -math.inf),
    },
    "a mask for each head": {"attn_mask": torch.linspace(-1, 1, N * HEADS * L * L).reshape(N * HEADS, L, L)},
}  # fmt: skip


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_attention_is_that_of_the_dense_module(times, options, batch_first, bias):
    model, dense = pair(batch_first=batch_first, bias=bias)
    x = X if batch_first else X.transpose(0, 1)
    (output, weights), (expected, expected_weights) = model(x, **options), dense(x, **options)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, expected_weights)


@torch.no_grad()
def test_attention_takes_one_sequence_and_other_keys(times):
    model, dense = pair(batch_first=True)
    for one, other in zip(model(X[0]), dense(X[0]), strict=True):
        torch.testing.assert_close(one, other)
    # By dense weights that are made anew.
    for one, other in zip(model.attention(X, -X, X.sin()), dense.attention(X, -X, X.sin()), strict=True):
        torch.testing.assert_close(one, other)
    # What a hint without a mask means is torch's to say.
    torch.testing.assert_close(model(X, is_causal=True)[0], dense(X, is_causal=True)[0])


@torch.no_grad()
def test_attention_goes_back_and_is_copied(times):
    model, dense = pair(batch_first=True)
    other = pyprune.load_accelerated(copy.deepcopy(dense), model.state_dict())
    torch.testing.assert_close(copy.deepcopy(other)(X), model(X))
    pyprune.densify(model)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
    assert type(model.attention) is nn.MultiheadAttention


class CrossAttention(SelfAttention):
    def forward(self, x):
        return self.attention(x, x.flip(1), x.flip(1))[0]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (CrossAttention(batch_first=True), "it attends to something else than its own input"),
        (SelfAttention(batch_first=True, add_zero_attn=True), "it attends to something else than its own input"),
        (SelfAttention(batch_first=True, kdim=E, vdim=E + 0, add_bias_kv=True), "or has keys of its own"),
    ],
)
def test_attention_that_stays_dense_says_why(times, model, reason):
    report = pyprune.accelerate(sparse(model), X)
    rows = {layer.name: layer for layer in report.layers}
    assert not report.replaced
    assert reason in rows["attention.in_proj_weight"].reason
    assert "the projections before it stay dense" in rows["attention.out_proj"].reason


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it loads its compiler
@torch.no_grad()
def test_attention_is_compiled_and_exported(times, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model, dense = pair(batch_first=True)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, dynamic=True)(X), dense(X))
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    torch.testing.assert_close(program.module()(X[:2]), dense(X[:2]))
