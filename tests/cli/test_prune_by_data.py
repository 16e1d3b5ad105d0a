"""``pyprune prune --data``: what it writes is what the Python API makes of the same samples."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import pyprune
from pyprune import Method, allocations, importance, scope, solvers
from pyprune.cli.samples import samples_of
from pyprune_command.main import main

transformers = pytest.importorskip("transformers", minversion="5")
tokenizers = pytest.importorskip("tokenizers")
load_file = pytest.importorskip("safetensors.torch").load_file

WORDS = [f"w{number}" for number in range(60)]
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 24}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bert": ("BertModel", "BertConfig", {**SIZES, "intermediate_size": 48}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
}
WANDA, RIA = (Method(rule(), scope=scope.row()) for rule in (importance.wanda, importance.ria))


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="one-shot pruning: |importance wanda leaves out")
        yield


def tokenizer(kind=""):
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if kind != "gpt2":
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>" if kind == "bert" else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


def saved(folder, name="llama", dtype=torch.float32, size="50GB"):
    torch.manual_seed(0)
    cls, config, sizes = MODELS[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
    model.to(dtype).save_pretrained(folder, max_shard_size=size)
    tokenizer(name).save_pretrained(folder)
    return folder


def text(path, count=400):
    numbers = torch.randint(0, 60, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    words = [WORDS[number] for number in numbers]
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": " ".join(words[at : at + 50])}) for at in range(0, count, 50)]
        path.write_text("\n\n".join(lines) + "\n")
    else:
        path.write_text(" ".join(words))
    return path


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def batches(path, name="llama", length=16, count=4, seed=0):
    """The samples, as they are said to be: drawn from the pieces of the text, with the tokenizer's own tokens."""
    before, after = {"gpt2": ([], []), "bert": ([1], [2])}.get(name, ([1], []))
    inner = length - len(before) - len(after)
    ids = [4 + WORDS.index(word) for word in path.read_text().split()]
    drawn = torch.randperm(len(ids) // inner, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    samples = [torch.tensor([before + ids[one * inner : (one + 1) * inner] + after]) for one in drawn]
    names = ("input_ids", "decoder_input_ids") if name == "t5" else ("input_ids",)
    return [dict.fromkeys(names, sample) for sample in samples]


SAMPLES = ["--samples", "4", "--length", "16"]
# Options, and what they are in Python.
HOW = {
    "wanda": (["--method", "wanda", "-r", "0.5"], {"method": WANDA, "ratio": 0.5}),
    "ria": (["--method", "ria", "-r", "0.5"], {"method": RIA, "ratio": 0.5}),
    "magnitude": (["-r", "0.5"], {"method": Method(importance.magnitude(), scope=scope.row()), "ratio": 0.5}),
    "wanda 2:4": (
        ["--method", "wanda", "--n-of-m", "2:4"],
        {"method": Method(importance.wanda(), scope=scope.n_of_m(keep=2, of=4))},
    ),
    "sparsegpt": (["--solver", "sparsegpt", "-r", "0.5"], {"ratio": 0.5, "solver": solvers.sparsegpt()}),
    "sparsegpt 2:4": (
        ["--solver", "sparsegpt", "--n-of-m", "2:4"],
        {"method": scope.n_of_m(keep=2, of=4), "solver": solvers.sparsegpt()},
    ),
    "admm": (
        ["--solver", "admm", "-r", "0.6", "--scope", "row"],
        {"method": scope.row(), "ratio": 0.6, "solver": solvers.admm()},
    ),
    "least squares": (
        ["--method", "wanda", "--solver", "least-squares", "-r", "0.5"],
        {"method": WANDA, "ratio": 0.5, "solver": solvers.least_squares()},
    ),
    "swaps": (
        ["--method", "ria", "--solver", "swaps", "-r", "0.5"],
        {"method": RIA, "ratio": 0.5, "solver": solvers.swaps()},
    ),
    "owl": (
        ["--method", "wanda", "-r", "0.5", "--allocation", "owl"],
        {"method": WANDA, "ratio": 0.5, "allocation": allocations.owl()},
    ),
    "some": (
        ["--method", "wanda", "-r", "0.5", "--include", ".*mlp", "--exclude", ".*down"],
        {
            "method": WANDA,
            "ratio": {".*mlp": 0.5},
            "ignored_scope": pyprune.IgnoredScope(patterns=[".*down"]),
        },
    ),
    "one block, reconstructed": (
        ["--method", "wanda", "-r", "0.5", "--blocks", "model.layers.1", "--reconstruct"],
        {"method": WANDA, "ratio": 0.5, "blocks": ["model.layers.1"], "reconstruct": solvers.reconstruct()},
    ),
}


def check_same(capsys, tmp_path, source, name, how):
    """Prune a folder by the command and by `prune_one_shot` of the loaded model, and compare all that is written."""
    options, arguments = how
    data = text(tmp_path / "text.txt")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert main(["prune", str(source), str(tmp_path / "out"), "--data", str(data), *SAMPLES, *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(before)
    cls = getattr(transformers, MODELS[name][0])
    model = cls.from_pretrained(source, dtype="auto")
    result = pyprune.prune_one_shot(model, batches(data, name), **arguments)
    assert said["zeros_by_tensor"] == {one.name: one.removed for one in result.weights}
    assert (said["samples"], said["length"]) == (4, 16)
    found, loading = cls.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(loading.values())
    found, wanted = found.state_dict(), pyprune.strip(model).state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    old, new = tensors(source), tensors(tmp_path / "out")
    assert {key: (x.shape, x.dtype) for key, x in new.items()} == {key: (x.shape, x.dtype) for key, x in old.items()}
    return said


@pytest.mark.parametrize("how", HOW)
def test_prune_with_data_is_the_python_call(how, capsys, tmp_path):
    said = check_same(capsys, tmp_path, saved(tmp_path / "in"), "llama", HOW[how])
    assert 0 < said["zeros"] < said["elements"]


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("gpt2", torch.float32, "50GB"),
        ("bert", torch.float32, "30KB"),
        ("t5", torch.float32, "50GB"),
        ("tied", torch.bfloat16, "20KB"),
    ],
)
@pytest.mark.parametrize("how", ["wanda", "sparsegpt"])
def test_prune_with_data_of_other_models(name, dtype, size, how, capsys, tmp_path):
    source = saved(tmp_path / "in", name, dtype, size)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (size != "50GB")
    said = check_same(capsys, tmp_path, source, name, HOW[how])
    assert abs(said["zeros"] / said["elements"] - 0.5) < 0.01
    if name == "tied":
        assert "lm_head.weight" not in tensors(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_prune_with_data_finds_the_class_that_a_config_does_not_name(name, capsys, tmp_path):
    source = saved(tmp_path / "in", name)
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    check_same(capsys, tmp_path, source, name, HOW["wanda"])


@pytest.mark.parametrize("options", [[], ["--codec", "zstd"], ["--layout", "compressed-tensors"]])
def test_prune_with_data_packs(options, capsys, tmp_path):
    source, data = saved(tmp_path / "in", "tied", torch.bfloat16, "20KB"), text(tmp_path / "text.jsonl")
    capsys.readouterr()  # transformers shows how it saves
    how = ["--data", str(data), *SAMPLES, "--method", "wanda", "-r", "0.6", "-q"]
    assert main(["prune", str(source), str(tmp_path / "dense"), *how]) == 0
    assert main(["prune", str(source), str(tmp_path / "packed"), *how, "--compress", *options]) == 0
    assert main(["expand", str(tmp_path / "packed"), str(tmp_path / "again"), "-q"]) == 0
    assert main(["diff", str(tmp_path / "dense"), str(tmp_path / "again"), "-q"]) == 0
    packed, dense = ((tmp_path / one).glob("*.safetensors") for one in ("packed", "dense"))
    assert sum(path.stat().st_size for path in packed) < sum(path.stat().st_size for path in dense)
    assert sorted(os.listdir(tmp_path)) == ["again", "dense", "in", "packed", "text.jsonl"]
    assert capsys.readouterr() == ("", "")


def test_prune_with_data_in_a_process_of_its_own(tmp_path):
    source, data = saved(tmp_path / "in"), text(tmp_path / "text.txt")
    arguments = ["prune", source, tmp_path / "out", "--data", data, *SAMPLES, "--method", "wanda", "-r", "0.5"]
    command = [sys.executable, "-m", "pyprune", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "are zero (50.00 %): wanda, over 4 samples of 16 tokens." in done.stdout
    assert "model.layers.1.mlp.down_proj.weight" in done.stdout
    # Other libraries may log when they are imported.
    assert not any(word in done.stderr for word in ("pyprune: error", "Traceback", "%|", "\x1b"))
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (1, "")
    assert "is there already" in again.stderr


def test_prune_with_data_says_that_transformers_is_missing(tmp_path, capsys, monkeypatch):
    source, data = saved(tmp_path / "in"), text(tmp_path / "text.txt")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["prune", str(source), str(tmp_path / "out"), "--data", str(data), "-r", "0.5"]) == 1
    assert "needs transformers, to build the model and to read the text: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lamp"], "--method lamp is not for --data"),
        (["--max-memory", "1G"], "--max-memory is not for --data"),
        (["--dry-run"], "--dry-run is not for --data"),
        (["--min-size", "5"], "--min-size is not for --data"),
        (["--allocation", "erk"], "--allocation erk is not for --data"),
        (["--scope", "model"], "weights of the model cannot compete"),
        (["--solver", "admm", "--method", "wanda"], "--solver admm chooses single weights itself"),
        (["--solver", "sparsegpt", "--unit", "row"], "--solver sparsegpt chooses single weights itself"),
        (["--samples", "0"], "0 is too small"),
        (["--method", "wanda", "--norms", "x"], "--norms is not for --data"),
    ],
)
def test_wrong_usage_with_data(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prune", "in", "out", "--data", "text.txt", "-r", "0.5", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "ria"], "--method ria needs --data FILE"),
        (["--solver", "admm"], "--solver needs --data FILE"),
        (["--samples", "3"], "--samples needs --data FILE"),
        (["--allocation", "owl"], "--allocation owl needs --data FILE"),
    ],
)
def test_wrong_usage_without_data(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prune", "in", "out", "-r", "0.5", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--data", "none.txt"], "No such file"),
        ({}, ["--samples", "40", "--length", "16"], "has 400 tokens, which is 26 samples of 16"),
        ({}, ["--length", "25"], "--length is 25, and the model takes 24 tokens"),
        ({}, ["--length", "1"], "the tokenizer fills with its own tokens"),
        ({"text.txt": b"\xff\xfe"}, [], "is no text in UTF-8"),
        ({"text.txt": b""}, [], "has 0 tokens"),
        ({"a.jsonl": b'{"text": "w1"}\n{"body": "w1"}'}, ["--data", "a.jsonl"], "line 2: it has body, and no text"),
        ({"a.jsonl": b"[]"}, ["--data", "a.jsonl"], "line 1: it is"),
        ({"a.jsonl": b"{"}, ["--data", "a.jsonl"], "line 1: no JSON"),
        ({"in/config.json": None}, [], "has no config.json"),
        ({"in/config.json": b'{"model_type": "none"}'}, [], "none"),
        ({"in/tokenizer.json": None, "in/tokenizer_config.json": None}, [], "tokenizer"),
        ({}, ["--include", "layers.*none"], "layers.*none"),
        ({}, ["--blocks", "model.none"], "model.none"),
    ],
)
def test_wrong_input_with_data_leaves_nothing(change, options, message, capsys, monkeypatch, tmp_path):
    saved(tmp_path / "in")
    text(tmp_path / "text.txt")
    for name, content in change.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
    before = sorted(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["prune", "in", "out", "--data", "text.txt", "--method", "wanda", "-r", "0.5", *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("pyprune: error: ")
    assert sorted(os.listdir(tmp_path)) == before


def test_samples_of_json_lines_with_a_field_are_those_of_the_text(tmp_path):
    words = text(tmp_path / "text.txt")
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"body": one}) + "\n" for one in words.read_text().split()))
    how = {"count": None, "length": 10, "most": None, "seed": 3}
    samples = [samples_of(str(path), tokenizer(), field="body", **how) for path in (words, lines)]
    assert len(samples[0]) == 400 // 9
    assert all(torch.equal(one, two) for one, two in zip(*samples, strict=True))
    wanted = batches(words, length=10, count=None, seed=3)
    assert all(torch.equal(one, two["input_ids"]) for one, two in zip(samples[0], wanted, strict=True))
