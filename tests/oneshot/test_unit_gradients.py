"""Gradients of masks against masks that are put into a model by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyprune import Method, granularity, importance, scope
from pyprune.calibration.padding import Padding
from pyprune.oneshot.unit_gradients import drawn_losses, kept_positions, unit_gradients, values_of
from pyprune.selection.coupled import find_coupled

COUPLED = Method(importance.magnitude(p=2), granularity.coupled(), scope.model())


class Masked(nn.Module):
    """An attention layer with grouped queries and an MLP, with masks on heads and neurons that autograd sees."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 16), nn.Linear(6, 8), nn.Linear(6, 8)
        self.o, self.up, self.down = nn.Linear(16, 6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.masks = None

    def forward(self, x):
        q, k, v = (one(x).unflatten(-1, (-1, 4)).transpose(1, 2) for one in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v)
        if self.masks is not None:
            y = y * self.masks[0].repeat_interleave(2)[None, :, None, None]
        x = x + self.o(y.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.up(x))
        return x + self.down(hidden if self.masks is None else hidden * self.masks[1])


def loss_of(model, batch):
    return (model(batch) - 1).square().mean()


@pytest.mark.parametrize("frozen", [False, True])
def test_unit_gradients_are_those_of_masks(frozen):
    torch.manual_seed(0)
    model = Masked().double().requires_grad_(not frozen)
    batches = [torch.randn(3, 5, 6).double() for _ in range(3)]
    groups = find_coupled(model, COUPLED, None, batches[0]).chosen
    found = unit_gradients(model, groups, batches, lambda model, batch: [loss_of(model, batch)])
    assert {one.name: (one.group.what, len(one)) for one in groups} == {
        "q.weight": ("heads", 2),
        "up.weight": ("channels", 10),
    }
    model.masks = [torch.ones(2, dtype=torch.double), torch.ones(10, dtype=torch.double)]
    for mask in model.masks:
        mask.requires_grad_(True)
    for index, batch in enumerate(batches):
        expected = torch.autograd.grad(loss_of(model, batch), model.masks)
        for one, own in zip(groups, found, strict=True):
            torch.testing.assert_close(own[index], expected[one.group.what == "channels"])
    assert all(weight.requires_grad is not frozen and weight.grad is None for weight in model.parameters())


def test_unit_gradients_of_channels_read_by_several_weights():
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3), nn.Linear(5, 2)

        def forward(self, x, mask=1):
            y = self.a(x).relu() * mask
            return self.b(y).mean((2, 3)) + self.c(y.mean((2, 3)))

    model, x = Two().double(), torch.randn(4, 3, 8, 8).double()
    groups = find_coupled(model, COUPLED, None, x).chosen
    (found,) = unit_gradients(model, groups, [x], lambda model, batch: [loss_of(model, batch)])
    mask = torch.ones(5, 1, 1, dtype=torch.double, requires_grad=True)
    (expected,) = torch.autograd.grad((model(x, mask) - 1).square().mean(), mask)
    torch.testing.assert_close(found[0], expected.flatten())


@pytest.mark.parametrize("likelihood", ["normal", "categorical"])
def test_drawn_losses_are_in_the_mean_the_fisher_information_of_the_output(likelihood):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(2, 3).double()
    groups = find_coupled(model, COUPLED, None, x).chosen
    (found,) = unit_gradients(model, groups, [x], drawn_losses(likelihood, 4000))
    hidden = model[:2](x)
    jacobian = model[2].weight[None] * hidden[:, None]  # (inputs, outputs, units): of the output by the masks
    if likelihood == "categorical":
        p = model(x).softmax(-1)
        metric = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    else:
        metric = torch.eye(3).double()[None].expand(2, 3, 3)
    expected = torch.einsum("nou,nop,npu->u", jacobian, metric, jacobian)
    torch.testing.assert_close(found.square().mean(0), expected, rtol=0.1, atol=1e-3)


def test_drawn_losses_leave_padding_out():
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, inputs, attention_mask=None):
            return self.b(self.a(inputs).relu())

    model, x = Tokens(), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    groups = find_coupled(model, COUPLED, None, x).chosen
    rows = []
    for values in (0.0, 100.0):
        padded = torch.where(mask[..., None] == 1, x, values)
        torch.manual_seed(1)
        rows += unit_gradients(model, groups, [{"inputs": padded, "attention_mask": mask}], drawn_losses(None, 3))
    torch.testing.assert_close(*rows)
    padding = Padding(model)
    padding.begin({"inputs": x[:1], "attention_mask": mask[:1]})
    assert kept_positions(padding, x) is None
    assert torch.equal(kept_positions(padding, x[:1]), mask[:1].bool())


def test_values_of_prefers_logits_and_skips_what_has_no_gradient():
    logits, hidden = torch.ones(2, 3, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    assert values_of({"hidden": hidden, "logits": logits}) is logits
    assert values_of((torch.ones(3), None, hidden)) is hidden
    with pytest.raises(ValueError, match="no tensor has a gradient; give a loss_fn"):
        values_of(torch.ones(3))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, x: model(x), "must be a loss with one element"),
        (lambda model, x: torch.ones(1), "must be a loss with one element and a gradient"),
        (lambda model, x: model(x).sum() * torch.nan, "the loss of batch 0 of data is nan"),
    ],
)
def test_unit_gradients_refuses_what_is_no_loss(loss, message):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), torch.ones(2, 3)
    groups = find_coupled(model, COUPLED, None, x).chosen
    with pytest.raises(ValueError, match=message):
        unit_gradients(model, groups, [x], lambda model, batch: [loss(model, batch)])
