import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import pyprune
from pyprune import Dataset, drop_experts
from pyprune.structured.experts import find_mixtures
from pyprune.structured.replay import replay
from tests.conftest import Unchanged

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


def expert(width=8):
    return nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))


class Base(nn.Module):
    """A mixture; ``masked`` are experts that its router is never to choose."""

    def __init__(self, count=5, top_k=2):
        super().__init__()
        self.num_experts, self.top_k, self.masked = count, top_k, ()

    def routes(self, logits):
        """Return weights and numbers of the best experts for each token."""
        logits = logits.clone()
        logits[..., list(self.masked)] = -math.inf
        weights, index = logits.softmax(-1).topk(self.top_k, -1)
        return weights / weights.sum(-1, keepdim=True), index


class Listed(Base):
    """Experts in a list, each called with its tokens."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.Linear(8, self.num_experts)
        self.experts = nn.ModuleList(expert() for _ in range(self.num_experts))

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, index = self.routes(self.gate(tokens))
        out = torch.zeros_like(tokens)
        for number, one in enumerate(self.experts):
            token, slot = torch.where(index == number)
            out.index_add_(0, token, one(tokens[token]) * weights[token, slot, None])
        return out.view_as(x)


class Named(Listed):
    """Experts with names, and something else beside them."""

    def __init__(self, *args):
        super().__init__(*args)
        self.experts = nn.ModuleDict(
            {f"expert_{i}": expert() for i in range(self.num_experts)} | {"off": nn.Dropout()}
        )

    def forward(self, x):
        weights, index = self.routes(self.gate(x))
        outputs = torch.stack([self.experts[f"expert_{i}"](x) for i in range(self.num_experts)], -2)
        picked = outputs.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))
        return self.experts["off"](picked * weights[..., None]).sum(-2)


class Soft(Base):
    """All experts for every token; the router is a bare parameter, with inputs first."""

    def __init__(self, *args):
        super().__init__(*args)
        self.router = nn.Parameter(torch.randn(8, self.num_experts))
        self.experts = nn.ModuleList(expert() for _ in range(self.num_experts))

    def forward(self, x):
        logits = x @ self.router
        logits[..., list(self.masked)] = -math.inf
        weights = logits.softmax(-1)
        return sum(weights[..., i, None] * one(x) for i, one in enumerate(self.experts))


class Fused(nn.Module):
    """Experts in parameters, as in transformers."""

    def __init__(self, count):
        super().__init__()
        self.num_experts = count
        self.up_proj = nn.Parameter(torch.randn(count, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(count, 8, 12))
        self.register_buffer("scale", torch.rand(count) + 0.5)

    def forward(self, tokens, index, weights):
        out = torch.zeros_like(tokens)
        for number in range(self.num_experts):
            token, slot = torch.where(index == number)
            hidden = functional.linear(tokens[token], self.up_proj[number]).relu()
            hidden = functional.linear(hidden, self.down_proj[number]) * self.scale[number]
            out.index_add_(0, token, hidden * weights[token, slot, None])
        return out


class WithFused(Base):
    def __init__(self, *args):
        super().__init__(*args)
        self.router = nn.Linear(8, self.num_experts, bias=False)
        self.experts = Fused(self.num_experts)
        self.shared = nn.Linear(8, self.num_experts)  # as many, and no router
        self.back = nn.Linear(self.num_experts, 8)

    def forward(self, x):
        tokens = x.reshape(-1, 8)
        weights, index = self.routes(self.router(tokens))
        return self.experts(tokens, index, weights=weights).view_as(x) + self.back(self.shared(x))


class Bare(Base):
    """All parameters are the mixture's own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate_weight = nn.Parameter(torch.randn(self.num_experts, 8))
        self.w1 = nn.Parameter(torch.randn(self.num_experts, 8, 12))
        self.b1 = nn.Parameter(torch.randn(self.num_experts, 12))
        self.w2 = nn.Parameter(torch.randn(self.num_experts, 12, 8))

    def forward(self, x):
        weights, index = self.routes(torch.einsum("btd,nd->btn", x, self.gate_weight))
        hidden = torch.einsum("btd,ndf->btnf", x, self.w1) + self.b1
        outputs = torch.einsum("btnf,nfd->btnd", hidden.relu(), self.w2)
        return (outputs.gather(2, index[..., None].expand(*index.shape, 8)) * weights[..., None]).sum(2)


class Noisy(Listed):
    """A router with noise in training."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.ModuleDict({"logits": nn.Linear(8, self.num_experts), "noise": nn.Linear(8, self.num_experts)})

    def routes(self, tokens):
        logits = self.gate["logits"](tokens)
        if self.training:
            logits = logits + torch.randn_like(logits) * functional.softplus(self.gate["noise"](tokens))
        return super().routes(logits)

    def forward(self, x):
        weights, index = self.routes(x)
        outputs = torch.stack([one(x) for one in self.experts], -2)
        return (outputs.gather(-2, index[..., None].expand(*index.shape, 8)) * weights[..., None]).sum(-2)


class Net(nn.Module):
    """Two mixtures."""

    def __init__(self, make, *args):
        super().__init__()
        self.first, self.second, self.head = make(*args), make(*args), nn.Linear(8, 3)

    def forward(self, x):
        x = x + self.first(x)
        return self.head(x + self.second(x))


KINDS = (Listed, Named, Soft, WithFused, Bare, Noisy)


def build(kind, *args):
    torch.manual_seed(0)
    return Net(kind, *args).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_drop_experts_gives_the_outputs_of_a_router_that_never_chooses_them(kind):
    model, fresh = build(kind), build(kind)
    names = [find_mixtures(model)[i].experts[place] for i, place in ((0, 1), (0, 4), (1, 0), (1, 2))]
    dense = copy.deepcopy(model)
    dense.first.masked, dense.second.masked = (1, 4), (0, 2)
    expected = dense(X)
    assert not torch.allclose(model(X), expected)
    parameters = list(model.parameters())
    experts = list(model.first.experts.children()) if issubclass(kind, (Listed, Soft)) and kind is not Named else []
    dropped = drop_experts(model.train(), X, names)
    assert dropped.names == tuple(names)
    torch.testing.assert_close(model.eval()(X), expected, rtol=1e-5, atol=1e-5)
    assert model.first.num_experts == model.second.num_experts == 3
    assert [one.count for one in find_mixtures(model)] == [3, 3]
    if experts:
        assert list(model.first.experts) == [experts[0], experts[2], experts[3]]
    assert set(model.parameters()) <= set(parameters)
    assert all(one.grad is None for one in model.parameters())
    # It is a model like any other.
    model.train()(X).sum().backward()
    # The plan does the same to a fresh model, through JSON.
    replay(fresh, json.loads(json.dumps(dropped.plan))).load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["use", "output"])
def test_drop_experts_by_count_takes_those_with_the_lowest_scores(kind, importance):
    model = build(kind)
    dense = copy.deepcopy(model)
    dropped = drop_experts(model, X, count=2, importance=importance)
    for one, name in zip(find_mixtures(dense), ("first", "second"), strict=True):
        scores = torch.tensor([dropped.scores[expert] for expert in one.experts])
        lowest = sorted(scores.sort(stable=True).indices[:2].tolist())
        assert [one.experts[place] for place in lowest] == [n for n in dropped.names if n.startswith(name)]
        getattr(dense, name).masked = tuple(lowest)
    torch.testing.assert_close(model(X), dense(X), rtol=1e-4, atol=1e-4)


# ---- scores ----


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return x * self.factor


class TimesAll(nn.Module):
    def __init__(self, factors):
        super().__init__()
        self.num_experts = len(factors)
        self.factors = nn.Parameter(torch.tensor(factors).view(-1, 1, 1))

    def forward(self, tokens, index, weights):
        return (tokens[:, None] * self.factors[index][..., 0] * weights[..., None]).sum(1)


class ByHand(nn.Module):
    """One expert per token, with its softmax as weight."""

    def __init__(self, is_fused):
        super().__init__()
        self.gate, self.top_k = nn.Linear(2, 3, bias=False), 1
        self.gate.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]) * math.log(2)
        factors = [2.0, -12.0, 100.0]
        self.experts = TimesAll(factors) if is_fused else nn.ModuleList(map(Times, factors))

    def forward(self, x):
        weights, index = self.gate(x).softmax(-1).topk(1)
        if isinstance(self.experts, TimesAll):
            return self.experts(x, index, weights)
        return torch.stack([self.experts[i](one) for i, one in zip(index.flatten(), x, strict=True)]) * weights


@pytest.mark.parametrize("is_fused", [False, True])
def test_drop_experts_scores_by_hand(is_fused):
    # Two tokens go to the first expert, with the weight 2 / 4: |2 x| / 2 = 1 and 3. One goes to the second, with
    # the weight 4 / 6: |-12 x| * 4 / 6 = 16.
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    expected = {"use": [2 / 3, 1 / 3, 0.0], "output": [1.0, 16.0, 0.0]}
    for kind, scores in expected.items():
        dropped = drop_experts(ByHand(is_fused), tokens, count=1, importance=kind)
        assert dropped.names == ("experts.2",)
        assert list(dropped.scores.values()) == pytest.approx(scores, rel=1e-6)
    # All examples count.
    dropped = drop_experts(ByHand(is_fused), [tokens, tokens[2:]], count=1, importance="use")
    assert list(dropped.scores.values()) == pytest.approx([0.5, 0.5, 0.0])


def test_drop_experts_takes_a_function_and_a_ratio():
    model = build(Listed)
    order = [3, 1, 4, 0, 2]
    dropped = drop_experts(
        model, X, ratio=0.35, importance=lambda name, module, number: order[number] + 0 * len(module)
    )
    # 0.35 * 5 + 0.5 = 2.25.
    assert dropped.names == tuple(f"{name}.experts.{i}" for name in ("first", "second") for i in (1, 3))
    assert drop_experts(build(Listed), X, ratio=0.09).names == ()
    data = Dataset([(X, 0)], lambda item: item[0])
    assert len(drop_experts(build(Listed), data, ratio=0.5).names) == 6


# ---- what goes with them ----


@pytest.mark.parametrize("kind", [Listed, WithFused])
def test_drop_experts_cuts_the_states_of_an_optimizer(kind):
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(X).square().sum().backward()
    optimizer.step()
    gate = model.first.gate if kind is Listed else model.first.router
    moments = optimizer.state[gate.weight]["exp_avg"].clone()
    drop_experts(model, X, [f"first.experts.{i}" for i in (0, 3)] + ["second.experts.1", "second.experts.2"],
                 optimizer=optimizer)  # fmt: skip
    torch.testing.assert_close(optimizer.state[gate.weight]["exp_avg"], moments[[1, 2, 4]], rtol=0, atol=0)
    assert set(optimizer.state) == set(model.parameters()) == set(optimizer.param_groups[0]["params"])
    for parameter, state in optimizer.state.items():
        assert state["exp_avg_sq"].shape == parameter.shape
    model(X).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [Listed, WithFused, Bare])
def test_drop_experts_cuts_what_a_graph_of_an_earlier_step_still_knows(kind):
    model = build(kind)
    loss = model(X).sum()
    loss.backward(retain_graph=True)
    drop_experts(model, X, count=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(X).sum().backward()
    del loss


def test_drop_experts_says_what_states_begin_anew():
    model = build(WithFused)
    optimizer = torch.optim.Adafactor(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    dropped = drop_experts(model, X, count=1, optimizer=optimizer)
    assert "row_var" in dropped.renewed
    assert "begin anew: row_var" in str(dropped)
    model(X).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [Listed, WithFused, Bare])
def test_drop_experts_keeps_masks_on_what_stays(kind):
    model = build(kind)
    raw = copy.deepcopy(model.state_dict())
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5, examples_inputs=X)
    dense = copy.deepcopy(model)
    dense.first.masked = dense.second.masked = (1, 2)
    zeros = {name: value == 0 for name, value in model.state_dict().items()}
    home = "" if kind is Bare else "experts."
    names = [f"{name}.{home}{i}" for name in ("first", "second") for i in (1, 2)]
    drop_experts(model, X, names)
    torch.testing.assert_close(model(X), dense(X), rtol=1e-5, atol=1e-5)
    key, kept = (
        ("first.w1" if kind is Bare else "first.gate.weight" if kind is Listed else "first.experts.up_proj"),
        [0, 3, 4],
    )
    weight = dict(model.named_parameters())[key]
    assert torch.equal(weight == 0, zeros[key][kept])
    # Zeros hold, and what was parked comes back.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model(X).sum().backward()
        optimizer.step()
    assert torch.equal(weight == 0, zeros[key][kept])
    with torch.no_grad():
        model.load_state_dict(model.state_dict())
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.0, examples_inputs=X)
    assert torch.equal(weight[zeros[key][kept]], raw[key][kept][zeros[key][kept]])
    pyprune.strip(model)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in build(kind, 3).state_dict().items()
    } or kind is WithFused


def test_drop_experts_keeps_gates_in_lists_and_refuses_them_on_what_is_cut():
    model = build(Listed)
    scope = pyprune.IgnoredScope(patterns=[r".*gate", "head"])
    pyprune.prune(model, "UNSTRUCTURED_HARD_CONCRETE", ignored_scope=scope).eval()
    dense = copy.deepcopy(model)
    dense.first.masked = dense.second.masked = (0,)
    drop_experts(model, X, ["first.experts.0", "second.experts.0"])
    torch.testing.assert_close(model(X), dense(X), rtol=1e-5, atol=1e-5)
    model = pyprune.prune(build(Listed), "UNSTRUCTURED_HARD_CONCRETE")
    before = Unchanged(model)
    with pytest.raises(ValueError, match=r"first.gate.weight carries a gate.*call pyprune.strip first"):
        drop_experts(model, X, count=1)
    before.check()


def test_drop_experts_of_mixtures_that_disagree_is_said_in_modules():
    model = build(WithFused)
    model.num_experts = 5
    drop_experts(model, X, ["first.experts.0"])
    assert (model.num_experts, model.first.num_experts, model.second.num_experts) == (5, 4, 5)
    drop_experts(model, X, ["second.experts.0"])  # they agree again
    assert (model.num_experts, model.first.num_experts, model.second.num_experts) == (4, 4, 4)
    drop_experts(model, X, count=1)
    assert (model.first.num_experts, model.first.experts.num_experts) == (3, 3)


# ---- wrong input ----


class Grouped(Base):
    """A router that first chooses the best of two groups, as DeepSeek's."""

    def __init__(self, count=8, top_k=2):
        super().__init__(count, top_k)
        self.n_group, self.topk_group = 2, 1
        self.gate = nn.Linear(8, count)
        self.experts = nn.ModuleList(expert() for _ in range(count))

    def forward(self, x):
        scores = self.gate(x).unflatten(-1, (2, -1))
        best = scores.topk(2, -1)[0].sum(-1).argmax(-1, keepdim=True)
        scores = scores.masked_fill(torch.arange(2)[:, None] != best[..., None], -math.inf).flatten(-2)
        weights, index = self.routes(scores)
        outputs = torch.stack([one(x) for one in self.experts], -2)
        return (outputs.gather(-2, index[..., None].expand(*index.shape, 8)) * weights[..., None]).sum(-2)


def test_drop_experts_takes_equally_many_of_each_group():
    model = build(Grouped)
    dropped = drop_experts(model, X, ratio=0.4)  # 3.7 of 8, and so 2
    places = [int(name.rpartition(".")[2]) for name in dropped.names]
    assert [place // 4 for place in places] == [0, 1, 0, 1]
    for options, message in (
        ({"count": 3}, "chooses among 2 groups of experts, which must lose equally many; give a multiple of 2"),
        ({"names": ["first.experts.0"]}, r"2 groups of 4 experts, which must lose equally many; these lose \[1, 0\]"),
        ({"count": 6}, "6 experts of first.experts would go, and at most 4 of its 8 can"),
    ):
        with pytest.raises(ValueError, match=message):
            drop_experts(build(Grouped), X, **options)


class Elsewhere(Base):
    """What looks like a router is none: tokens go by their places."""

    def __init__(self):
        super().__init__(4, 1)
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(expert() for _ in range(4))

    def forward(self, x):
        out = torch.stack([self.experts[i % 4](x[:, i]) for i in range(x.shape[1])], 1)
        return out * self.gate(x).sigmoid().sum(-1, keepdim=True)


WRONG = {
    "none of three": ({}, ValueError, "give names, the experts to drop, or count or ratio"),
    "two of three": ({"count": 1, "ratio": 0.5}, ValueError, "one of them"),
    "no expert": ({"names": ["first.experts.9"]}, ValueError, r"'first.experts.9'.*first.experts.0 to .4"),
    "twice": ({"names": ["first.experts.1", "first.experts.1"]}, ValueError, "twice"),
    "no names": ({"names": []}, ValueError, "names is empty"),
    "a string": ({"names": "first.experts.1"}, TypeError, "names is"),
    "too many": ({"count": 4}, ValueError, "4 experts of first.experts would go, and at most 3 of its 5 can"),
    "ratio": ({"ratio": 1.0}, ValueError, r"ratio is 1.0; give a number in \[0, 1\)"),
    "ratio, too many": ({"ratio": 0.9}, ValueError, "at most 3 of its 5"),
    "importance": ({"count": 1, "importance": "reap"}, ValueError, '"use" and "output"'),
    "optimizer": ({"count": 1, "optimizer": 3}, TypeError, "optimizer is of type int"),
    "NaN": ({"count": 1, "importance": lambda *given: math.nan}, ValueError, "the score that importance gave"),
}


@pytest.mark.parametrize("case", WRONG)
def test_drop_experts_refuses_by_name_and_changes_nothing(case):
    options, error, message = WRONG[case]
    model = build(Listed)
    before = Unchanged(model)
    with pytest.raises(error, match=f"(?s){message}"):
        drop_experts(model, X, **options)
    before.check()


MODELS = {
    "no experts": (lambda: nn.Sequential(nn.Linear(8, 8)), "has no mixture of experts that is known"),
    "another router": (lambda: Net(Elsewhere), r"first.experts, second.experts the (model fails|outputs are)"),
    "tied": (lambda: tied(), r"first.experts.up_proj is tied \(first.experts.up_proj, second.experts.up_proj\)"),
    "compiled": (lambda: torch.compile(build(Listed), backend="eager"), "then compile it"),
    "not called": (lambda: Unused(), "the examples do not call spare.experts, so there are no scores; give names"),
}


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.spare = Listed()

    def forward(self, x):
        return x * 2


def tied():
    model = build(WithFused)
    model.second.experts.up_proj = model.first.experts.up_proj
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", MODELS)
def test_drop_experts_refuses_models_and_changes_nothing(case):
    make, message = MODELS[case]
    model = make()
    before = Unchanged(model)
    with pytest.raises(ValueError, match=message):
        drop_experts(model, X, count=1)
    before.check()


@pytest.mark.filterwarnings("ignore:this reaches")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Bare])  # that has no units
def test_drop_experts_between_two_shrinks_leaves_a_plan_that_fits(kind):
    torch.manual_seed(0)
    model = Net(kind).eval()
    dense = copy.deepcopy(model)

    def shrink(ratio):
        units = pyprune.Method(
            pyprune.importance.magnitude(p=2), pyprune.granularity.coupled(round_to=2), pyprune.scope.tensor()
        )
        pyprune.prune(model, units, ratio=ratio, examples_inputs=X)
        expected = model(X)
        assert pyprune.shrink(model, X).removed
        assert torch.allclose(model(X), expected, atol=1e-5)

    shrink(0.25)
    dropped = drop_experts(model, X, names=[one.experts[1] for one in find_mixtures(model)])
    shrink(0.35)
    plan = pyprune.Plan.from_json(pyprune.plan_of(model).to_json())
    fresh = pyprune.rebuild(pyprune.rebuild(dense, dropped.plan), plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))
