import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, granularity, importance, scope


class Grouped(nn.Module):
    """Attention whose query heads share key and value heads, under the names of Llama."""

    def __init__(self, heads=4, shared=2, size=3, width=10):
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, size
        self.q_proj = nn.Linear(width, heads * size)
        self.k_proj = nn.Linear(width, shared * size)
        self.v_proj = nn.Linear(width, shared * size)
        self.o_proj = nn.Linear(heads * size, width, bias=False)

    def forward(self, x):
        def split(projected, count):
            return projected.unflatten(-1, (count, self.size)).transpose(-2, -3)

        query = split(self.q_proj(x), self.heads)
        key, value = (
            split(projection(x), self.shared).repeat_interleave(self.heads // self.shared, dim=-3)
            for projection in (self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.o_proj(mixed.transpose(-2, -3).flatten(-2))


def heads_method(*numbers, among=None, **options):
    return Method(importance.magnitude(p=2), granularity.head(*numbers, **options), among or scope.model())


def test_heads_of_a_group_go_together_by_the_sum_of_their_weights():
    model = nn.Sequential(Grouped(), nn.ReLU(), Grouped())
    with torch.no_grad():
        model[2].v_proj.weight[3:] *= 1e-3
        model[2].k_proj.weight[3:] *= 1e-3
        model[2].q_proj.weight[6:] *= 1e-3
        model[2].o_proj.weight[:, 6:] *= 1e-3
    pyprune.prune(model, heads_method(4, 2), ratio=0.25)
    assert not (model[0].q_proj.weight == 0).any()
    assert torch.equal((model[2].q_proj.weight == 0).all(1), torch.arange(12) >= 6)
    for name in ("k_proj", "v_proj"):
        assert torch.equal((getattr(model[2], name).weight == 0).all(1), torch.arange(6) >= 3)
    assert torch.equal((model[2].o_proj.weight == 0).all(0), torch.arange(12) >= 6)
    statistic = pyprune.pruning_statistic(model)
    assert [(t.units, t.pruned_units) for t in statistic.pruned_tensors] == [(2, 0)] * 4 + [(2, 1)] * 4


def test_masked_heads_give_what_attention_without_them_gives():
    model, x = Grouped(), torch.randn(2, 5, 10)
    with torch.no_grad():
        for weight in (model.q_proj.weight[:6], model.k_proj.weight[:3], model.v_proj.weight[:3]):
            weight *= 0.1
    small = Grouped(heads=2, shared=1)
    with torch.no_grad():
        for name, rows in (("q_proj", slice(6, 12)), ("k_proj", slice(3, 6)), ("v_proj", slice(3, 6))):
            getattr(small, name).weight.copy_(getattr(model, name).weight[rows])
            getattr(small, name).bias.copy_(getattr(model, name).bias[rows])
        small.o_proj.weight.copy_(model.o_proj.weight[:, 6:])
    pyprune.prune(model, heads_method(4, 2), ratio=0.5)
    torch.testing.assert_close(model(x), small(x))


def test_heads_of_multihead_attention_take_their_parts_of_stacked_projections(transformer):
    model = transformer.model
    scope_ = pyprune.IgnoredScope(names=["cross"])
    pyprune.prune(model, heads_method(2), ratio=0.5, ignored_scope=scope_)
    weight = model.layer.self_attn.in_proj_weight
    dead = (weight == 0).all(1).unflatten(0, (3, 2, 4)).all(2)
    assert dead.sum(1).tolist() == [1, 1, 1]
    assert (dead == dead[0]).all()
    columns = (model.layer.self_attn.out_proj.weight == 0).all(0).unflatten(0, (2, 4)).all(1)
    assert torch.equal(columns, dead[0])
    assert not (model.decoder.weight == 0).any()


def test_heads_are_found_by_names_that_the_user_gives():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.ask, self.show, self.say = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = Own(), nn.Linear(4, 4)

    model = Outer()
    with pytest.raises(ValueError, match="no attention layer is known"):
        pyprune.prune(model, heads_method(2), ratio=0.5)
    pyprune.prune(model, heads_method(2, names=("ask", "show", "say", "../out")), ratio=0.5)
    assert (model.out.weight == 0).all(0).sum() == 2


@pytest.mark.parametrize(
    ("numbers", "words"),
    [((5,), "5 heads do not divide"), ((4,), "4 key and value heads of size 3"), ((4, 1), "1 key and value heads")],
)
def test_heads_that_do_not_fit_the_weights_are_refused(numbers, words, unchanged):
    model = Grouped()
    before = unchanged(model)
    with pytest.raises(ValueError, match=words):
        pyprune.prune(model, heads_method(*numbers), ratio=0.5)
    before.check()


def test_heads_go_one_by_one_among_the_remaining():
    model = nn.Sequential(Grouped(), Grouped())
    pyprune.prune(model, heads_method(4, 2), ratio=0.25)
    pyprune.prune(model, heads_method(4, 2), ratio=0.34, from_remaining=True)
    statistic = pyprune.pruning_statistic(model).pruned_tensors
    assert sum(tensor.pruned_units for tensor in statistic) == 4 * 2


def test_heads_by_their_largest_score_may_be_negative():
    model = Grouped()
    method = Method(lambda weight: -weight.abs(), granularity.head(4, 2, reduction="max"), scope.tensor())
    with torch.no_grad():
        for weight in (
            model.q_proj.weight[:6],
            model.k_proj.weight[:3],
            model.v_proj.weight[:3],
            model.o_proj.weight[:, :6],
        ):
            weight += torch.sign(weight)  # the largest of -|w| is now lower
    pyprune.prune(model, method, ratio=0.5)
    assert (model.k_proj.weight == 0).all(1).tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("seed", range(8))
def test_heads_of_a_layer_with_two_names_compete_once(seed):
    one, other = nn.MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4)
    model = nn.ModuleList([one, other, one])
    pyprune.prune(model, Method(importance.random(seed), granularity.head(4)), ratio=0.5)
    dead = [(layer.out_proj.weight == 0).all(0).sum() // 4 for layer in (one, other)]
    assert sum(dead) == 4


def test_heads_of_a_convolution_or_of_shared_projections_are_refused():
    convolution = nn.Sequential()
    convolution.qkv, convolution.proj = nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1)
    with pytest.raises(ValueError, match="has 4 dimensions"):
        pyprune.prune(convolution, heads_method(2), ratio=0.5)
    shared = nn.Sequential(Grouped(), Grouped())
    shared[1].k_proj.weight = shared[0].k_proj.weight
    with pytest.raises(ValueError, match=r"0\.k_proj\.weight is part of several attention layers"):
        pyprune.prune(shared, heads_method(4, 2), ratio=0.5)


def test_given_scores_of_heads_are_of_attention_only():
    model = nn.Sequential(Grouped(), nn.Linear(10, 10))
    scores = {f"0.{name}_proj.weight": getattr(model[0], f"{name}_proj").weight.abs().detach() for name in "qkvo"}
    pyprune.prune(model, Method(importance.given(scores), granularity.head(4, 2)), ratio=0.5)
    assert (model[0].k_proj.weight == 0).all(1).sum() == 3
