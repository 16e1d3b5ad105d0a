import pytest
import torch
from torch import nn

from pyprune import Method, importance, prune, scope
from pyprune.methods.allocation import Amount
from pyprune.modules.targets import find_targets
from pyprune.selection import choose_masks as module
from pyprune.selection.choose_masks import choose_masks, unit_groups_of


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


@pytest.mark.parametrize("where", [scope.model(), scope.tensor(), scope.row()], ids=lambda where: where.name)
def test_choose_masks_writes_where_it_is_told_to(where):
    targets = find_targets(two_layers())
    method = Method(importance.magnitude(), scope=where)
    expected = choose_masks(method, Amount(0.5), targets, {}).masks
    into = {target: torch.empty_like(target.parameter, dtype=torch.bool) for target in targets}
    chosen = choose_masks(method, Amount(0.5), targets, {}, into=into).masks
    for target in targets:
        assert chosen[target].mask is into[target]
        assert torch.equal(into[target], expected[target].mask)


def test_check_names_what_is_not_finite():
    model = two_layers()
    model[1].weight.data[0, :2] = torch.nan
    choice = choose_masks(Method(importance.magnitude()), Amount(0.5), find_targets(model), {})
    with pytest.raises(ValueError, match=r"NaN or infinite weights: 2 in 1\.weight"):
        choice.check()


@pytest.mark.parametrize(("ratio", "zeros"), [(0.2, 15), (0.5, 15), (0.8, 24)])
def test_what_is_dropped_can_stay_dropped(ratio, zeros):
    """The ratio is one of all elements, and what a base lacks counts."""
    model = prune(nn.Linear(6, 5), Method(importance.magnitude()), ratio=0.5)
    (target,) = find_targets(model)
    before = target.attachment.mask.clone()
    target.parameter.data[~before] = 10.0
    amount = Amount(ratio, dropped_stay=True)
    mask = choose_masks(Method(importance.magnitude()), amount, [target], {}).masks[target].mask
    assert int((~mask).sum()) == zeros
    assert not (mask & ~before).any()


def test_weights_that_compete_must_be_on_one_device():
    targets = find_targets(two_layers())
    method = Method(importance.magnitude())
    unit_groups = unit_groups_of(method, Amount(0.5), targets, {})
    assert [len(together) for together in module._by_device(method, unit_groups)] == [2]
