"""What a tensor is a part of, against the numbers of a parameter that counts its own elements."""

import pytest
import torch
from torch import nn

from pyprune.modules.origins import Origins

VIEWS = {
    "itself": lambda w: w,
    "transposed": lambda w: w.mT,
    "permuted": lambda w: w.permute(2, 0, 1),
    "select": lambda w: w[2],
    "select within": lambda w: w[:, 3],
    "chunk": lambda w: w.chunk(2, 1)[1].mT,
    "step": lambda w: w[1::2, ::3, 1:],
    "one entry": lambda w: w[1:2, :, 4:5],
    "unsqueezed": lambda w: w.unsqueeze(1).transpose(2, 3),
    "expanded": lambda w: w.expand(7, *w.shape),
    "twice": lambda w: w.mT[1:][:, 2:].mT[:, 3:],
    "detached": lambda w: w.detach()[0],
    "flat rows": lambda w: w.reshape(24, 5),
    "flat": lambda w: w.reshape(-1),
}
PARAMETERS = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.mT.contiguous().mT,
    "channels last": lambda w: w.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "a part of a buffer": lambda w: torch.cat([torch.zeros(17), w.flatten()])[17:].view(w.shape),
}


def counted(layout):
    """A parameter whose elements are their own flat indices."""
    return nn.Parameter(layout(torch.arange(4.0 * 6 * 5).view(4, 6, 5)), requires_grad=False)


def along(tensor):
    """Along which dimensions of the parameter each dimension of a tensor of its elements moves; and which it has."""
    places = torch.unravel_index(tensor.long(), (4, 6, 5))
    moves = []
    for dim in range(tensor.dim()):
        moved = [p.narrow(dim, 1, p.shape[dim] - 1) != p.narrow(dim, 0, p.shape[dim] - 1) for p in places]
        moves.append({of for of, changes in enumerate(moved) if bool(changes.any())})
    return moves, [sorted(set(p.flatten().tolist())) for p in places]


@pytest.mark.parametrize(("view", "stored"), [
    (view, stored) for view in VIEWS for stored in PARAMETERS
    if not view.startswith("flat") or stored in ("contiguous", "a part of a buffer")
])  # fmt: skip
def test_parts_says_what_a_view_has(view, stored):
    holder = nn.ParameterList([counted(PARAMETERS[stored])])
    origins = Origins(holder)
    tensor = VIEWS[view](holder[0])
    (part,) = origins.parts(tensor)
    moves, entries = along(tensor)
    assert part.parameter is holder[0]
    assert [set(dims) for dims in part.dims] == moves
    assert [list(one) for one in part.ranges] == entries


COPIES = {
    "clone": torch.clone,
    "contiguous": lambda w: w.mT.contiguous(),
    "cast": lambda w: w.bfloat16(),
    "scaled": lambda w: w * 2 + 1,
    "normalised": lambda w: nn.functional.batch_norm(w.reshape(1, 4, -1), None, None, training=True).view_as(w),
    "standardised": lambda w: (w - w.mean((1, 2), keepdim=True)) / w.std((1, 2), keepdim=True),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("view", ["itself", "transposed", "select", "step", "expanded"])
def test_parts_follows_what_is_made_of_weights_alone(view, copy):
    holder = nn.ParameterList([counted(PARAMETERS["contiguous"])])
    origins = Origins(holder)

    class Follow(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            origins.follow(func, args, result)
            return result

    with Follow():
        made = COPIES[copy](holder[0])
        mixed = holder[0] + torch.randn(4, 6, 5)
    transposed = made.shape != holder[0].shape
    tensor = VIEWS[view](made)
    (part,) = origins.parts(tensor)
    elements = VIEWS[view](holder[0].mT if transposed else holder[0])
    moves, entries = along(elements)
    assert [set(dims) for dims in part.dims] == moves
    assert [list(one) for one in part.ranges] == entries
    assert origins.parts(mixed) == []
    assert not origins.is_known(mixed)


def test_parts_knows_picked_entries():
    holder = nn.ParameterList([counted(PARAMETERS["contiguous"])])
    origins = Origins(holder)
    index = torch.tensor([3, 0, -1])
    picked = holder[0][index]
    origins.follow(torch.ops.aten.index.Tensor, [holder[0], [index]], picked)
    (part,) = origins.parts(picked[1:].mT)
    assert part.entries.tolist() == [0, 3]
    assert [set(dims) for dims in part.dims] == [{0}, {2}, {1}]
    table = nn.ParameterList([nn.Parameter(torch.randn(9, 4))])
    origins, ids = Origins(table), torch.tensor([1, 2])
    origins.follow(torch.ops.aten.index.Tensor, [table[0], [ids]], rows := table[0][ids])
    assert origins.parts(rows) == []  # they are inputs


def test_parts_forgets_what_is_gone():
    linear = nn.Linear(3, 3)
    origins = Origins(linear)
    for _ in range(100):  # the memory of a copy is used again
        copy = linear.weight.detach().clone()
        origins.follow(torch.ops.aten.clone.default, [linear.weight], copy)
        assert len(origins.parts(copy)) == 1
        del copy
        assert origins.parts(torch.randn(3, 3)) == []
