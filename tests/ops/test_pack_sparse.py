"""Tests of lists of what is not zero: they stand for the weight, and damaged ones are known."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor

from pyprune import ops
from pyprune.ops import reference

MODULE = import_module("pyprune.ops.pack_sparse")
SHAPES = [(1, 1), (3, 1), (4, 7), (5, 8), (33, 128), (7, 129), (66, 257), (13, 1000), (2, 3000), (0, 5), (5, 0)]
ZEROS = (0.0, 0.5, 0.9, 0.99, 1.0)


def sparse(shape: tuple[int, int], zeros: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a weight with so many zeros of both signs, and a row of nothing else."""
    torch.manual_seed(shape[0] * 7919 + shape[1])
    weight = torch.randn(shape) * torch.where(torch.rand(shape) < zeros, 0.0, 1.0)
    weight[shape[0] // 2 : shape[0] // 2 + 1] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
@pytest.mark.parametrize("dtype", ops.SPARSE_DTYPES, ids=str)
def test_pack_sparse_is_undone_by_unpack_sparse(device, layout, dtype):
    for shape in SHAPES:
        for zeros in ZEROS:
            for given in (torch.float32, torch.bfloat16, torch.float16):
                weight = sparse(shape, zeros, given)
                packed = ops.pack_sparse(weight, layout, dtype=dtype)
                assert packed.values.dtype == dtype
                ops.check_sparse(packed)
                wanted = reference.pack_sparse(weight, layout, dtype=dtype)
                assert torch.equal(ops.unpack_sparse(packed), wanted), (shape, zeros, given)


def test_pack_sparse_keeps_the_dtype_and_takes_any_strides(device):
    weight = sparse((40, 300), 0.7, torch.bfloat16)
    for layout in ops.SPARSE_LAYOUTS:
        for view in (weight, weight.T.contiguous().T, weight.repeat_interleave(2, 1)[:, ::2], weight.flip(0).flip(0)):
            packed = ops.pack_sparse(view, layout)
            assert packed.values.dtype == torch.bfloat16
            assert torch.equal(ops.unpack_sparse(packed), weight)


def test_pack_sparse_holds_what_is_not_zero_and_little_more(device):
    weight = sparse((256, 1024), 0.9)
    count = int((weight != 0).sum())
    found = {layout: ops.pack_sparse(weight, layout) for layout in ops.SPARSE_LAYOUTS}
    for layout in ("index", "rows"):
        entries = int(found[layout].offsets[-1])
        assert count <= entries <= count + 3 * (found[layout].offsets.numel() - 1)
    assert int(found["bitmask"].offsets[-1]) == count
    columns = int((weight.view(-1, 4, 1024) != 0).any(1).sum())
    assert int(found["block4"].offsets[-1]) == columns
    assert all(one.nbytes < weight.nbytes / 1.2 for one in found.values())


def test_pack_sparse_keeps_values_that_are_not_finite(device):
    weight = torch.tensor([[0.0, torch.inf, -0.0], [torch.nan, 0.0, -torch.inf]])
    for layout in ops.SPARSE_LAYOUTS:
        found = ops.unpack_sparse(ops.pack_sparse(weight, layout))
        torch.testing.assert_close(found, weight, equal_nan=True)
        with pytest.raises(ValueError, match="not finite, which int8"):
            ops.pack_sparse(weight, layout, dtype=torch.int8)


def test_pack_sparse_does_not_depend_on_threads_or_on_how_much_is_packed_at_a_time(monkeypatch):
    weight = sparse((203, 1100), 0.6)
    for layout in ops.SPARSE_LAYOUTS:
        wanted = ops.pack_sparse(weight, layout)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            monkeypatch.setattr(MODULE, "_ELEMENTS_TOGETHER", 40_000)
            found = ops.pack_sparse(weight, layout)
        finally:
            torch.set_num_threads(threads)
            monkeypatch.undo()
        assert all(map(torch.equal, found.tensors[:3], wanted.tensors[:3]))


@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
def test_pack_sparse_bits_is_pack_sparse_of_the_weight(monkeypatch, layout):
    for shape in (*SHAPES, (77, 131)):
        for dtype in (None, torch.int8, torch.bfloat16):
            weight = sparse(shape, 0.6)
            [bits], [values] = ops.pack([weight])
            wanted = ops.pack_sparse(weight, layout, dtype=dtype)
            for together in (1 << 22, 3000):
                monkeypatch.setattr(MODULE, "_ELEMENTS_TOGETHER", together)
                found = ops.pack_sparse_bits(bits, values, shape, layout, dtype=dtype)
                assert found.shape == wanted.shape
                assert all(map(torch.equal, found.tensors[:3], wanted.tensors[:3])), (shape, dtype, together)


def test_pack_sparse_refuses_what_it_cannot_hold():
    weight = sparse((4, 6), 0.5)
    with pytest.raises(ValueError, match="at most 65535 columns"):
        ops.pack_sparse(torch.ones(1, 65_536), "rows")
    ops.check_sparse(ops.pack_sparse(torch.ones(1, 65_535), "rows"))
    with pytest.raises(ValueError, match="layout is 'csr'"):
        ops.pack_sparse(weight, "csr")
    with pytest.raises(ValueError, match="weight is of shape"):
        ops.pack_sparse(weight[0], "index")
    [bits], [values] = ops.pack([weight])
    for wrong in ((bits, values[:-1], (4, 6)), (bits, values, (4, 7)), (bits[:-1], values, (4, 6))):
        with pytest.raises(ValueError, match=r"values for|needs \d+ bytes"):
            ops.pack_sparse_bits(*wrong, "index")


def damaged(packed: ops.SparseWeight) -> dict[str, ops.SparseWeight]:
    """Return packed weights with a thing or two that do not fit."""
    found: dict[str, ops.SparseWeight] = {}

    def change(name: str, field: str, at: int, value: int) -> None:
        tensor = getattr(packed, field).clone()
        tensor[at] = value
        found[name] = replace(packed, **{field: tensor})

    change("an offset below zero", "offsets", 3, -4)
    change("an offset beyond the end", "offsets", 3, 2**31 - 1)
    change("offsets that fall", "offsets", 4, 0)
    change("another end", "offsets", -1, int(packed.offsets[-1]) - 4)
    change("another begin", "offsets", 0, 4)
    change("a column outside", "index", 1 if packed.layout == "rows" else 0, 255)
    if packed.layout != "bitmask":
        size = 2 if packed.layout == "rows" else 1
        swapped = packed.index.clone()
        swapped[:size], swapped[size : 2 * size] = packed.index[size : 2 * size], packed.index[:size]
        found["columns that fall"] = replace(packed, index=swapped)
        found["a column that fills in the middle"] = replace(
            packed, index=torch.cat([torch.tensor([200, 0][:size], dtype=torch.uint8), packed.index[size:]])
        )
    return found


@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
def test_check_sparse_knows_damaged_lists_and_nobody_reads_outside_of_them(device, layout):
    packed = ops.pack_sparse(sparse((24, 200), 0.5), layout)
    for name, one in damaged(packed).items():
        with pytest.raises(ValueError, match="packed is damaged"):
            ops.check_sparse(one)
        with pytest.raises(ValueError, match="packed is damaged"):
            ops.unpack_sparse(one)
        for rows in (1, 5, 20, 70):
            assert ops.sparse_linear(torch.ones(rows, 200), one).shape == (rows, 24), name


@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
def test_check_sparse_refuses_tensors_of_other_sizes_and_so_does_sparse_linear(layout):
    packed, kind = ops.pack_sparse(sparse((24, 200), 0.5), layout), ops.SPARSE_LAYOUTS.index(layout)
    for field in ("values", "index", "offsets"):
        own = getattr(packed, field)
        for other in (own[:-1], torch.cat([own, own]), own[:0], own.view(1, -1), own[::2]):
            wrong = replace(packed, **{field: other})
            with pytest.raises(ValueError, match=r"packed (has|is damaged)"):
                ops.check_sparse(wrong)
            if layout == "bitmask" and field == "values" and other.numel() >= 288 and other.is_contiguous():
                continue  # how many there are only the offsets know
            with pytest.raises(ValueError, match="packed has"):
                ops.sparse_linear(torch.ones(2, 200), wrong)
            with pytest.raises(RuntimeError):
                torch.ops.pyprune.sparse_linear(torch.ones(2, 200), *wrong.tensors[:3], None, None, kind, 24, 0)


def test_check_sparse_refuses_scales_that_do_not_fit():
    packed = ops.pack_sparse(sparse((6, 9), 0.5), "index", dtype=torch.int8)
    for scale, error in (
        (None, ValueError), (packed.scale[:-1], ValueError), (packed.scale.double(), TypeError),
        (packed.scale / 0, ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match="scale"):
            ops.check_sparse(replace(packed, scale=scale))
    with pytest.raises(ValueError, match="others none"):
        ops.check_sparse(replace(ops.pack_sparse(sparse((6, 9), 0.5), "index"), scale=packed.scale))


@pytest.mark.parametrize("layout", ops.SPARSE_LAYOUTS)
def test_pack_sparse_passes_opcheck(layout):
    weight, kind = sparse((9, 300), 0.5), ops.SPARSE_LAYOUTS.index(layout)
    packed = ops.pack_sparse(weight, layout)
    blocks = (packed.offsets.numel() - 1) // (3 if layout == "block4" else 9)
    check = torch.library.opcheck
    check(torch.ops.pyprune.count_sparse, (weight, kind, blocks))
    check(torch.ops.pyprune.check_sparse, (*packed.tensors[:3], kind, 9, 300))
    check(torch.ops.pyprune.unpack_sparse, (*packed.tensors[:3], kind, 9, 300))
    check(
        torch.ops.pyprune.fill_sparse, (weight, kind, packed.offsets, 9, 0, packed.values, packed.index),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
