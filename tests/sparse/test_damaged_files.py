"""Files that are cut off, changed, or made to do harm: each is refused, with the tensor's name where there is one."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from pyprune import SparseFile, load_sparse, save_sparse


def state():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 30, generator=generator) * (torch.rand(24, 30, generator=generator) < 0.4)
    rows = torch.randn(16, 20, generator=generator)
    rows[::2] = 0
    point = torch.full((300, 2), 128, dtype=torch.uint8)
    point[:9] = 7
    return {
        "weight": weight.bfloat16(), "rows": rows, "bias": torch.ones(7), "steps": torch.tensor(3), "point": point,
        "point_zero_point": torch.tensor(128),
    }  # fmt: skip


@pytest.fixture(params=["plain", "zstd", "compressed-tensors"])
def file(request, tmp_path):
    path = tmp_path / "model.safetensors"
    options = {"plain": {}, "zstd": {"codec": "zstd"}, "compressed-tensors": {"layout": "compressed-tensors"}}
    tensors = state()
    if request.param == "compressed-tensors":
        tensors = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    save_sparse(tensors, path, min_zeros=0, **options[request.param])
    return path


def test_every_truncation_is_refused(file):
    whole = file.read_bytes()
    for length in {*range(0, len(whole), 37), len(whole) - 1, 7, 8, 9}:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            load_sparse(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="bytes of data"):
        load_sparse(file)


def test_every_flipped_bit_of_the_data_is_refused_with_the_name(file):
    whole = file.read_bytes()
    with SparseFile(file) as opened:
        begin = opened.header.data
        spans = {name: (begin + one.begin, begin + one.end) for name, one in opened.header.entries.items()}
        wanted = {name: tensor.clone() for name, tensor in load_sparse(file).items()}
    for entry, (start, end) in spans.items():
        for at in range(start, end, max(1, (end - start) // 20)):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << at % 8
            file.write_bytes(damaged)
            if entry.endswith("row_offsets"):  # which say nothing new, and are not read
                assert torch.equal(load_sparse(file)["weight.weight"], wanted["weight.weight"])
                continue
            with pytest.raises(ValueError, match=r"(weight|rows|bias|steps|point)\S*: "):
                load_sparse(file)


def test_flipped_bits_of_the_header_change_no_tensor(file):
    whole = file.read_bytes()
    wanted = load_sparse(file)
    for at in range(0, int.from_bytes(whole[:8], "little") + 8, 3):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 7
        file.write_bytes(damaged)
        try:
            found = load_sparse(file)
        except ValueError as error:
            assert "model.safetensors" in str(error)  # noqa: PT017
        else:
            for name in found.keys() & wanted.keys():
                assert torch.equal(found[name], wanted[name])


def rewritten(path, change):
    """Change the header of a file, and leave the data as it is."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    ours = json.loads(header["__metadata__"]["pyprune"])
    change(header, ours)
    header["__metadata__"]["pyprune"] = json.dumps(ours)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])


def w(ours):
    return ours["tensors"]["weight"]


LIES = {
    "a newer version": (lambda header, ours: ours.update(version=2), "update it"),
    "no version": (lambda header, ours: ours.pop("version"), "version None"),
    "another layout": (lambda header, ours: ours.update(layout="mine"), "damaged"),
    "no tensors": (lambda header, ours: ours.pop("tensors"), "damaged"),
    "one tensor too few": (lambda header, ours: ours["tensors"].pop("bias"), "bias: it belongs to no tensor"),
    "one too many": (lambda header, ours: ours["tensors"].update(more=w(ours)), "more: there is no more in the file"),
    "tied to nothing": (lambda header, ours: ours.update(tied={"a": "b"}), "a: it is to be tied to 'b'"),
    "tied to itself": (lambda header, ours: ours.update(tied={"bias": "bias"}), "bias: it is to be tied"),
    "another shape": (lambda header, ours: w(ours).update(shape=[30, 24]), "weight: its shape is damaged"),
    "a larger shape": (lambda header, ours: w(ours).update(shape=[2**40, 30]), "weight: its shape is damaged"),
    "a shape that overflows": (lambda header, ours: w(ours).update(shape=[2**62, 2**62]), "weight: its metadata"),
    "a negative shape": (lambda header, ours: w(ours).update(shape=[-24, -30]), "weight: its metadata"),
    "a shape of bools": (lambda header, ours: w(ours).update(shape=[True, 720]), "weight: its metadata"),
    "another count": (lambda header, ours: w(ours).update(nnz=w(ours)["nnz"] + 1), "weight: its values have shape"),
    "another dtype": (lambda header, ours: w(ours).update(dtype="F16"), "weight: its values are torch.bfloat16"),
    "an unknown dtype": (lambda header, ours: w(ours).update(dtype="F4"), "weight: its metadata"),
    "a codec": (lambda header, ours: w(ours).update(codec="zstd"), "weight: there is no weight_high"),
    "an unknown codec": (lambda header, ours: w(ours).update(codec="gzip"), "weight: its metadata"),
    "another checksum": (lambda header, ours: w(ours).update(crc32=[0, 1]), "weight: its values are"),
    "no checksum": (lambda header, ours: w(ours).pop("crc32"), "weight: its metadata"),
    "a block": (lambda header, ours: w(ours).update(block=[4, 1]), "weight: there is no weight_block"),
    "a block of nothing": (lambda header, ours: w(ours).update(block=[0, 1]), "weight: its metadata"),
    "a zero point": (lambda header, ours: w(ours).update(zero=True), "weight: there is no weight_zero"),
    "no object": (lambda header, ours: ours["tensors"].update(weight=[]), "weight: its metadata"),
    "an offset beyond": (
        lambda header, ours: header["bias"].update(data_offsets=[2**40, 2**40 + 28]), "weight: it begins at",
    ),
    "an offset that overflows": (
        lambda header, ours: header["bias"].update(data_offsets=[2**64 - 28, 2**64]), "bias: its data_offsets",
    ),
    "offsets that cross": (lambda header, ours: header["bias"].update(data_offsets=[28, 0]), "bias: shape"),
    "an entry of another size": (lambda header, ours: header["bias"].update(shape=[8]), "bias: shape"),
    "an entry without a shape": (lambda header, ours: header["bias"].pop("shape"), "bias: its entry"),
    "an entry with more": (lambda header, ours: header["bias"].update(more=1), "bias: its entry"),
    "an entry that is none": (lambda header, ours: header.update(bias=3), "bias: its entry"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie_are_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    save_sparse(state(), path, min_zeros=0.05)
    change, message = LIES[name]
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        load_sparse(path)


STARTS = {
    "nothing": b"",
    "a few bytes": b"1234",
    "a header of 2**63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of -1 bytes": b"\xff" * 8 + b"{}",
    "no JSON": (2).to_bytes(8, "little") + b"{]",
    "no text": (2).to_bytes(8, "little") + b"\xff\xfe",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "nested without end": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a number without end": (100_006).to_bytes(8, "little") + b'{"w":' + b"1" * 100_000 + b"}",
    "a name twice": (17).to_bytes(8, "little") + b'{"w":{}, "w":{}} ',
    "metadata of numbers": (22).to_bytes(8, "little") + b'{"__metadata__":{"a":1}}'[:22],
    "pickle": b"\x80\x02}q\x00." * 10,
}


@pytest.mark.parametrize("name", STARTS)
def test_what_is_no_such_file_is_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(STARTS[name])
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        load_sparse(path)
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "nowhere")


def entries(**changes):
    tensors = {
        "w": torch.ones(2), "w_bitmask": torch.tensor([0b101, 0], dtype=torch.uint8), "w_shape": torch.tensor([3, 4])
    }  # fmt: skip
    return {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}


ENTRIES = {
    "a value too many": (entries(w=torch.ones(3)), "w: .*3 values for 2 bits"),
    "spare bits": (entries(w_bitmask=torch.tensor([1, 128], dtype=torch.uint8)), "w: .*beyond the last"),
    "too few bits": (entries(w_bitmask=torch.tensor([5], dtype=torch.uint8)), "w: .*need 2 bytes"),
    "bits of another type": (entries(w_bitmask=torch.tensor([5.0, 0.0])), "w: its bitmask is torch.float32"),
    "a shape that overflows": (entries(w_shape=torch.tensor([2**62, 2**62])), "w: its shape"),
    "a negative shape": (entries(w_shape=torch.tensor([-3, -4])), "w: its shape"),
    "a shape of floats": (entries(w_shape=torch.tensor([3.0, 4.0])), "w: w_shape is torch.float32"),
    "a shape of many": (entries(w_shape=torch.ones(100, dtype=torch.int64)), "w: w_shape is"),
    "a huge shape": (entries(w_shape=torch.tensor([2**31, 2**31])), "w: .*need 576460752303423488 bytes"),
    "no rows in a block": (entries(w_block=torch.tensor([0, 1])), "w: its block"),
    "a block of three": (entries(w_block=torch.tensor([1, 1, 1])), "w: its block"),
    "blocks without values": (entries(w_block=torch.tensor([1, 2]), w_bitmask=torch.tensor([63], dtype=torch.uint8)),
                              "w: it has 2 values for blocks of 12"),
    "another zero point": (entries(w_zero=torch.tensor([1])), "w: its zero point"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_that_do_not_fit_each_other_are_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    tensors, message = ENTRIES[name]
    save_file(entries(), path)
    assert load_sparse(path)["w"].tolist() == [[1, 0, 1, 0]] + [[0] * 4] * 2
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        load_sparse(path)


def test_sparse_file_is_closed_and_does_not_hold_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_sparse({"w": torch.eye(64)}, path)
    with SparseFile(path) as file:
        tensor = file.read("w")
        with pytest.raises(KeyError, match="no tensor 'v'"):
            file.read("v")
    os.truncate(path, 0)
    assert tensor.sum() == 64
    with pytest.raises(ValueError, match="closed"):
        file.read("w")
