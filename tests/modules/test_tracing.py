import pytest
import torch
from torch import nn

import pyprune
from pyprune.modules.tracing import used_as_weights


def used(model, inputs):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in used_as_weights(model, inputs)}


def test_used_as_weights_sees_attention_with_bare_parameters():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inward = nn.Parameter(torch.randn(12, 4))
            self.outward = nn.Parameter(torch.randn(4, 4))
            self.inward_bias = nn.Parameter(torch.randn(12))
            self.bias_k = nn.Parameter(torch.randn(1, 1, 4))

        def forward(self, x):
            return nn.functional.multi_head_attention_forward(
                x, x, x, 4, 2, self.inward, self.inward_bias, self.bias_k, self.bias_k, False, 0.0,
                self.outward, None,
            )[0]  # fmt: skip

    assert used(Attention(), torch.randn(3, 2, 4)) == {"inward", "outward"}


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: nn.functional.linear(x.bfloat16(), w.bfloat16()),
        lambda x, w: nn.functional.linear(x.double(), w.to(torch.float64).t().detach().t()),
        lambda x, w: x @ w.t().contiguous(),
        lambda x, w: x @ w.clone(),
        lambda x, w: torch.ops.aten.linear.default(x, w),
        lambda x, w: torch.ops.aten.mm(x, w),
        lambda x, w: torch.ops.aten.convolution.default(
            x[None], w[..., None], None, [1], [0], [1], False, [0], 1
        ),
        lambda x, w: torch.ops.aten.embedding.default(w, torch.tensor([1])),
        lambda x, w: torch.linalg.matmul(x, w),
        lambda x, w: torch.linalg.multi_dot([x, w, x]),
        lambda x, w: torch.inner(x, w),
        lambda x, w: torch.dot(x[0], w[0]),
        lambda x, w: x.__rmatmul__(w),
        lambda x, w: torch.zeros(4, 4).addmm_(x, w),
    ],
)  # fmt: skip
def test_used_as_weights_sees_products_by_any_name(product):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return product(x, self.kernel)

    assert used(Bare(), torch.randn(4, 4)) == {"kernel"}


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x + w.clone() if w.type() else x,
        lambda x, w: x @ (x * w.bfloat16()),
        lambda x, w: nn.functional.linear(w.clone(), x),
        lambda x, w: nn.functional.scaled_dot_product_attention(x[None], w[None], w[None]),
    ],
)
def test_used_as_weights_leaves_other_uses_out(use):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return use(x, self.scale)

    assert used(Bare(), torch.randn(4, 4)) == set()


def test_used_as_weights_takes_the_weight_of_a_linear_not_its_input():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.randn(2, 4))
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(self.queries.expand(5, 2, 4)) + x

    assert used(Queries(), torch.zeros(1)) == {"layer.weight"}


def test_used_as_weights_gives_buffers_flags_and_random_state_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("positions", torch.arange(2).expand(3, 2))
            self.register_buffer("replaced", torch.zeros(()))

        def forward(self, x):
            assert not self.training
            assert not torch.is_grad_enabled()
            self.calls += 1
            self.replaced = self.replaced + 1
            return self.norm(self.linear(x + torch.rand(2)))

    model, inputs = Counting(), torch.randn(4, 2)
    state, buffer = torch.get_rng_state(), model.replaced
    assert used(model, inputs) == {"linear.weight"}
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.norm.num_batches_tracked == 0
    assert model.calls == 0
    assert model.replaced is buffer


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("cache", None)

    def forward(self, x):
        self.cache = x
        self.register_buffer("new", x.clone(), persistent=False)
        return self.linear(x)


def test_used_as_weights_takes_new_buffers_away(unchanged):
    model, inputs = Caching(), torch.randn(2, 4)
    before = unchanged(model)
    assert used(model, inputs) == {"linear.weight"}
    before.check()
    assert model.cache is None
    assert "new" not in model._buffers
    assert model._non_persistent_buffers_set == set()


def test_prune_takes_new_buffers_away_when_the_trace_fails(unchanged):
    model, inputs = Caching(), torch.randn(2, 5)
    before = unchanged(model)
    with pytest.raises(RuntimeError, match="shapes"):
        pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5, examples_inputs=inputs)
    before.check()
    assert list(model._buffers) == ["cache"]
    assert model.cache is None


def test_used_as_weights_copes_with_buffers_made_under_inference_mode():
    with torch.inference_mode():
        norm = nn.BatchNorm1d(4)
    assert used(nn.Sequential(nn.Linear(4, 4), norm), torch.randn(2, 4)) == {"0.weight"}
