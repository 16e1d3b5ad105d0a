import torch
from torch import nn

from pyprune.tracing import used_as_weights


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
