import os

import pytest
import torch

from pyprune import SensitivityResult, SensitivityTarget
from pyprune.files import whole_file


class Stops(dict):
    """Is interrupted while it is written."""

    def items(self):
        for i, pair in enumerate(super().items()):
            if i == 2:
                raise KeyboardInterrupt
            yield pair


def result(kind):
    names = [f"layer{i}.weight" for i in range(3)]
    return SensitivityResult(0.9, kind({name: SensitivityTarget(40, 40, {0.5: 0.8, 0.9: 0.3}) for name in names}))


def test_whole_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "file.txt"
    for content in ("one", "two"):
        with whole_file(path) as unfinished:
            assert (unfinished.parent, unfinished.suffix) == (tmp_path, ".txt")
            unfinished.write_text(content)
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("is_there", [True, False])
def test_whole_file_that_fails_leaves_the_old_one(tmp_path, error, is_there):
    path = tmp_path / "file"
    if is_there:
        path.write_text("old")

    def fail():
        with whole_file(path) as unfinished:
            unfinished.write_text("half of")
            raise error

    with pytest.raises(error):
        fail()
    assert [one.read_text() for one in tmp_path.iterdir()] == ["old"] * is_there


def test_whole_file_follows_a_link_and_writes_to_what_is_no_file(tmp_path):
    (tmp_path / "real").write_text("old")
    os.symlink(tmp_path / "real", tmp_path / "link")
    with whole_file(tmp_path / "link") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    with whole_file(os.devnull) as unfinished:
        assert str(unfinished) == os.devnull


@pytest.mark.parametrize("writer", ["to_json", "to_csv", "plot"])
def test_an_interrupted_result_leaves_the_old_file(tmp_path, writer):
    if writer == "plot":
        pytest.importorskip("matplotlib")
    path = tmp_path / "result.png"
    getattr(result(dict), writer)(path)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        getattr(result(Stops), writer)(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_whole_file_holds_what_torch_saves(tmp_path):
    with whole_file(tmp_path / "state.pt") as unfinished:
        torch.save({"a": torch.ones(2)}, unfinished)
    assert torch.load(tmp_path / "state.pt")["a"].tolist() == [1.0, 1.0]
