import itertools

import pytest
import torch

from pyprune import ops
from pyprune.ops import reference
from tests.ops.cases import layouts

LENGTHS = [*range(18), 31, 32, 33, 63, 64, 65, 127, 1000, 65_537, 140_003]


def raw(tensor):
    """Return the bytes of a tensor, a row per element."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).view(tensor.numel(), tensor.element_size())


def some_bits(count, dtype, seed=0, zeros=0.5):
    """Return elements of any bits, NaN payloads and infinities among them, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (count, size), dtype=torch.uint8, generator=generator)
    data[torch.rand(count, generator=generator) < zeros] = 0
    if dtype.is_floating_point:
        data[torch.rand(count, generator=generator) < 0.1] = 0
        data[:, -1] |= torch.where(torch.rand(count, generator=generator) < 0.1, 128, 0).to(torch.uint8)
    return data.reshape(-1).view(dtype)


def assert_same(found, wanted):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert torch.equal(raw(found), raw(wanted))


@pytest.mark.parametrize("dtype", ops.PACK_DTYPES, ids=str)
@pytest.mark.parametrize("negative_zeros", [False, True])
def test_pack_is_what_the_reference_says_and_unpack_brings_it_back(device, dtype, negative_zeros):
    shares = itertools.cycle((0.0, 0.5, 0.97, 1.0, 0.5))
    tensors = [some_bits(count, dtype, count, next(shares)).to(device) for count in LENGTHS]
    for masks in (None, [torch.rand(one.shape, device=device) < 0.5 for one in tensors]):
        bits, values = ops.pack(tensors, masks, negative_zeros=negative_zeros)
        wanted_bits, wanted_values = reference.pack(tensors, masks, negative_zeros=negative_zeros)
        back = ops.unpack(bits, values, [one.shape for one in tensors])
        wanted = reference.unpack(wanted_bits, wanted_values, [one.shape for one in tensors])
        for found, expected in ((bits, wanted_bits), (values, wanted_values), (back, wanted)):
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)
        if masks is None and negative_zeros:
            for one, other in zip(back, tensors, strict=True):
                assert_same(one, other)


@pytest.mark.parametrize("dtype", ops.PACK_DTYPES, ids=str)
def test_unpack_writes_into_tensors_that_are_there(device, dtype):
    # The last is so large that all go past the caches, from the start of a line of the cache and from within one.
    counts = [*LENGTHS, (1 << 23) // dtype.itemsize + 77]
    tensors = [some_bits(count, dtype, count).to(device) for count in counts]
    bits, values = ops.pack(tensors, negative_zeros=True)
    memory = [torch.full((count + 1,), 1, dtype=torch.uint8, device=device).to(dtype) for count in counts]
    for first in (1, 0):  # then the last element is behind what is written
        out = [one[first : first + count] for one, count in zip(memory, counts, strict=True)]
        ends = [one[[0, -1]] for one in memory]
        versions = [one._version for one in out]
        found = ops.unpack(bits, values, [one.shape for one in tensors], out=out)
        for one, there, version, wanted in zip(found, out, versions, tensors, strict=True):
            assert one is there
            assert one._version > version
            assert_same(one, wanted)
        for one, before in zip(memory, ends, strict=True):
            assert_same(one[:1] if first else one[-1:], before[:1] if first else before[1:])


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda bits, values: [torch.zeros(14)], "must be contiguous, of shape"),
        (lambda bits, values: [torch.zeros(13, 2)[:, 0]], "must be contiguous, of shape"),
        (lambda bits, values: [torch.zeros(13, dtype=torch.int32)], "out.0. is torch.int32"),
        (lambda bits, values: [], "got 0 out"),
        (lambda bits, values: [values[:13]], "shares memory with values"),
    ],
)
def test_unpack_refuses_to_write_where_it_does_not_fit(device, out, message):
    memory = torch.arange(1.0, 14, device=device)
    [bits], _ = ops.pack([memory])
    into = [one if one.data_ptr() == memory.data_ptr() else one.to(device) for one in out(bits, memory)]
    with pytest.raises(ValueError, match=message):
        ops.unpack([bits], [memory], [(13,)], out=into)
    assert torch.equal(memory, torch.arange(1.0, 14, device=device))


def test_unpack_leaves_memory_as_it_was_if_something_does_not_fit(device):
    [bits], [values] = ops.pack([torch.arange(13.0, device=device)])
    out = torch.full((13,), 7.0, device=device)
    for damage, message in (DAMAGED["a value too few"], DAMAGED["a bit beyond the end"]):
        row, some = damage(bits.cpu(), values.cpu())
        with pytest.raises(ValueError, match=message):
            ops.unpack([row.to(device)], [some.to(device)], [(13,)], out=[out])
        assert torch.equal(out, torch.full_like(out, 7))


def test_pack_takes_lists_that_are_packed_in_several_parts(device):
    tensors = [some_bits(count, torch.float32, count) for count in (3_000_001, 5, 0, 2_000_000, 1_500_000, 70_000)]
    tensors = [one.to(device) for one in tensors]
    bits, values = ops.pack(tensors)
    for one, row, some in zip(tensors, bits, values, strict=True):
        [wanted_bits], [wanted_values] = reference.pack([one])
        assert_same(row, wanted_bits)
        assert_same(some, wanted_values)


def test_pack_does_not_depend_on_the_layout(device):
    weight = some_bits(26 * 3 * 5 * 7, torch.bfloat16).view(26, 3, 5, 7).to(device)
    [bits], [values] = ops.pack([weight])
    for name, view in layouts(weight).items():
        [other_bits], [other_values] = ops.pack([view])
        assert torch.equal(other_bits, bits), name
        assert_same(other_values, values)
        assert_same(ops.unpack([bits], [values], [weight.shape])[0], torch.where(weight == 0, 0, weight))


def test_pack_tells_zeros_from_what_only_looks_like_them(device):
    for dtype, word in ((torch.float8_e4m3fnuz, 0x80), (torch.float8_e5m2fnuz, 0x80), (torch.int8, 0x80)):
        [bits], [values] = ops.pack([torch.tensor([0, word], dtype=torch.uint8, device=device).view(dtype)])
        assert (bits.tolist(), raw(values).tolist()) == ([0b10], [[word]]), dtype


def test_pack_of_nothing(device):
    assert ops.pack([]) == ([], [])
    assert ops.unpack([], [], []) == []
    [bits], [values] = ops.pack([torch.empty(3, 0, device=device)])
    assert (bits.shape, values.shape) == ((0,), (0,))
    assert ops.unpack([bits], [values], [(3, 0)])[0].shape == (3, 0)


DAMAGED = {
    "a value too few": (lambda bits, values: (bits, values[:-1]), "values for"),
    "a value too many": (lambda bits, values: (bits, torch.cat([values, values[:1]])), "values for"),
    "a bit beyond the end": (
        lambda bits, values: (bits + torch.tensor([0, 128], dtype=torch.uint8), values),
        "beyond",
    ),
    "a byte too few": (lambda bits, values: (bits[:1], values), "need 2 bytes"),
    "a byte too many": (lambda bits, values: (torch.cat([bits, bits[:1] * 0]), values), "need 2 bytes"),
    "no row of bits": (lambda bits, values: (bits.view(1, 2), values), "need 2 bytes"),
    "no row of values": (lambda bits, values: (bits, values.view(1, -1)), "a row of values"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_unpack_refuses_what_does_not_fit(device, name):
    [bits], [values] = ops.pack([torch.arange(13.0, device=device)])
    damage, message = DAMAGED[name]
    found = damage(bits.cpu(), values.cpu())
    with pytest.raises(ValueError, match=message):
        ops.unpack([found[0].to(device)], [found[1].to(device)], [(13,)])


def test_unpack_refuses_shapes_that_no_tensor_has():
    bits, values = torch.zeros(1, dtype=torch.uint8), torch.zeros(0)
    for shape in ((-1,), (2**62, 2**62), (2**70,)):
        with pytest.raises(ValueError, match=r"shapes\[0\]"):
            ops.unpack([bits], [values], [shape])


def test_pack_passes_opcheck():
    tensors = [torch.randn(30, 4), torch.randn(7).relu()]
    masks = [torch.rand(one.shape) < 0.5 for one in tensors]
    torch.library.opcheck(torch.ops.pyprune.pack, (tensors, [], False))
    torch.library.opcheck(torch.ops.pyprune.pack, (tensors, masks, True))
    bits, values = ops.pack(tensors)
    torch.library.opcheck(torch.ops.pyprune.unpack, (bits, values, [120, 7]))
    torch.library.opcheck(torch.ops.pyprune.unpack_into, (bits, values, [torch.empty(30, 4), torch.empty(7)]))
