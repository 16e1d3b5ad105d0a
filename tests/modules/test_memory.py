import pytest
import torch

from pyprune.modules.memory import overlapping, overlaps_itself


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(3, 4), False),
        (torch.ones(3, 4).t(), False),
        (torch.ones(3, 4)[:, ::2], False),
        (torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), False),
        (torch.ones(()), False),
        (torch.ones(1).expand(1, 1), False),
        (torch.ones(0, 1).expand(0, 4), False),
        (torch.ones(3, 1).expand(3, 4), True),
        (torch.ones(()).expand(2), True),
        (torch.ones(6).unfold(0, 3, 1), True),
    ],
)
def test_overlaps_itself(tensor, expected):
    assert overlaps_itself(tensor) is expected


def test_overlapping_yields_pairs_with_a_common_element():
    matrix = torch.ones(6, 6)
    parts = {
        "rows": matrix[:2],
        "more rows": matrix[2:],
        "left": matrix[:3, :3],
        "right": matrix[:3, 3:],
        "other": torch.ones(6),
        "empty": matrix[:0],
        "bytes": matrix.view(torch.int8)[5],
    }
    names = {id(tensor): name for name, tensor in parts.items()}
    found = {frozenset((names[id(one)], names[id(other)])) for one, other in overlapping(list(parts.values()))}
    assert found == {
        frozenset(pair)
        for pair in [
            ("rows", "left"),
            ("rows", "right"),
            ("more rows", "left"),
            ("more rows", "right"),
            ("more rows", "bytes"),
        ]
    }
