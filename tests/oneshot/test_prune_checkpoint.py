"""Checkpoints pruned block by block: what is written, what is in memory, what is refused."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import pyprune
from pyprune import Method, allocations, importance, scope, solvers
from pyprune.oneshot import model_in_files
from tests.oneshot import models

transformers = pytest.importorskip("transformers", minversion="5")
safetensors = pytest.importorskip("safetensors.torch")

WANDA = Method(importance.wanda(), scope=scope.row())
# The rules with the names of their arguments.
HOW = {
    "wanda": {"method": WANDA, "ratio": 0.5},
    "sparsegpt": {"method": scope.tensor(), "ratio": 0.5, "solver": solvers.sparsegpt()},
    "2 of 4": {"method": scope.n_of_m(keep=2, of=4), "solver": solvers.sparsegpt()},
    "dense inputs": {"method": WANDA, "ratio": 0.5, "propagate": False},
    "reconstructed": {"method": WANDA, "ratio": 0.5, "reconstruct": solvers.reconstruct(steps=2)},
    "owl": {"method": WANDA, "ratio": 0.5, "allocation": allocations.owl()},
    "alpha": {"method": WANDA, "ratio": 0.5, "allocation": allocations.alpha_pruning()},
    "patterns": {"method": WANDA, "ratio": {".*mlp.*": 0.25}},
}
FEW = ("Llama", "Qwen3", "Mixtral", "GPT-2", "BERT", "T5")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="one-shot pruning: |importance wanda leaves out")
        yield


def saved(folder, name="Llama", dtype=torch.float32, size="20KB"):
    model = models.make(name).to(dtype)
    model.save_pretrained(folder, max_shard_size=size)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.load_file(path)
    return found


def loaded(folder, name, dtype="auto"):
    return getattr(transformers, models.CASES[name][0]).from_pretrained(folder, dtype=dtype)


def cast(batches, dtype):
    return [{key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()} for batch in batches]


def check_same(source, destination, name, how, dtype="auto", data=None):
    """Check that the new checkpoint is what comes out for the loaded model."""
    data = models.batches(name) if data is None else data
    before = contents(source)
    result = pyprune.prune_checkpoint(
        source, destination, data, **how, dtype=None if isinstance(dtype, str) else dtype
    )
    assert contents(source) == before
    model = loaded(source, name, dtype)
    expected = pyprune.prune_one_shot(model, data, **how)
    assert [replace(one, seconds=0) for one in result.weights] == [
        replace(one, seconds=0) for one in expected.weights
    ]
    assert result.notes == expected.notes
    assert set(contents(destination)) == {*before, "progress.json"}
    old, new = tensors(source), tensors(destination)
    assert {key: (x.shape, x.dtype) for key, x in new.items()} == {key: (x.shape, x.dtype) for key, x in old.items()}
    given = loaded(destination, name).state_dict()
    for key, value in pyprune.strip(model).state_dict().items():
        assert torch.equal(given[key], value.to(given[key].dtype)), key
    return result


@pytest.mark.parametrize("name", FEW)
def test_prune_checkpoint_is_prune_one_shot_of_the_loaded_model(name, tmp_path):
    check_same(saved(tmp_path / "source", name), tmp_path / "new", name, HOW["sparsegpt"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, case in models.CASES.items() if case[0] is not None])
def test_prune_checkpoint_of_all_architectures(name, dtype, tmp_path):
    data = cast(models.batches(name), dtype)
    check_same(saved(tmp_path / "source", name, dtype), tmp_path / "new", name, HOW["sparsegpt"], data=data)


@pytest.mark.parametrize("how", HOW)
def test_prune_checkpoint_takes_all_that_prune_one_shot_takes(how, tmp_path):
    check_same(saved(tmp_path / "source", dtype=torch.bfloat16), tmp_path / "new", "Llama", HOW[how])


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_what_is_made_of_the_files_goes_to_files(name, tmp_path, monkeypatch):
    # Experts that are fused, and weights of another dtype.
    monkeypatch.setattr(model_in_files, "_SMALL", 0)
    source = saved(tmp_path / "source", name, torch.bfloat16)
    check_same(source, tmp_path / "new", name, HOW["wanda"], torch.float32)
    files = model_in_files.ModelInFiles(source, tmp_path / "other", dtype=torch.float32)
    assert len(list((tmp_path / "other" / "made").iterdir())) >= len(list(files.model.parameters()))


def test_one_file_without_an_index_and_what_lies_beside_it(tmp_path):
    source, new = saved(tmp_path / "source", size="1GB"), tmp_path / "new"
    (source / "tokenizer.json").write_text("{}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"dense")
    with pytest.warns(UserWarning, match=r"pytorch_model\.bin: other weights of the same folder, and not copied"):
        result = pyprune.prune_checkpoint(source, new, models.batches("Llama"), WANDA, ratio=0.5)
    assert result.notes == ("pytorch_model.bin: other weights of the same folder, and not copied",)
    assert set(contents(new)) == {*contents(source), "progress.json"} - {"pytorch_model.bin"}


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize(("name", "how"), [("Llama", "reconstructed"), ("Mixtral", "sparsegpt")])
def test_a_run_goes_on_bit_for_bit(name, how, tmp_path, monkeypatch):
    source, data = saved(tmp_path / "source", name), models.batches(name)
    whole = pyprune.prune_checkpoint(source, tmp_path / "whole", data, **HOW[how])
    write = model_in_files.ModelInFiles.write
    for number in (0, 1, 3):  # in the middle of a block that is written, and before the end
        new = tmp_path / f"new {number}"
        calls = []

        def stopped(files, block, calls=calls, number=number):
            calls.append(block)
            if len(calls) > number:
                # Half of the block is written.
                name, parameter = next(iter(block.module.named_parameters(prefix=block.name)))
                files._shards.write(files._as_in_files(name, parameter, torch.zeros_like(parameter)))
                raise Interrupted
            write(files, block)

        def stopped_at_last(files):
            raise Interrupted

        with monkeypatch.context() as patch:
            patch.setattr(model_in_files.ModelInFiles, "write", stopped)
            patch.setattr(model_in_files.ModelInFiles, "finish", stopped_at_last)
            with pytest.raises(Interrupted):
                pyprune.prune_checkpoint(source, new, data, **HOW[how])
        assert not list(new.glob("*.safetensors"))
        assert not (new / "made").exists()
        with pytest.raises(ValueError, match="resume=True"):
            pyprune.prune_checkpoint(source, new, data, **HOW[how])
        again = pyprune.prune_checkpoint(source, new, data, **HOW[how], resume=True)
        assert [replace(one, seconds=0) for one in again.weights] == [
            replace(one, seconds=0) for one in whole.weights
        ]
        files = contents(new)
        expected = contents(tmp_path / "whole")
        assert {key: files[key] for key in files if key != "progress.json"} == {
            key: expected[key] for key in expected if key != "progress.json"
        }


def test_a_run_that_has_ended_returns_its_result_again_and_takes_no_other(tmp_path):
    source, new, data = saved(tmp_path / "source"), tmp_path / "new", models.batches("Llama")
    result = pyprune.prune_checkpoint(source, new, data, WANDA, ratio=0.5)
    files = contents(new)
    assert pyprune.prune_checkpoint(source, new, data, WANDA, ratio=0.5, resume=True) == result
    assert contents(new) == files
    with pytest.raises(ValueError, match="method, ratio, solver"):
        pyprune.prune_checkpoint(source, new, data, WANDA, ratio=0.25, resume=True)
    with pytest.raises(ValueError, match="another"):
        pyprune.prune_one_shot(loaded(source, "Llama"), data, WANDA, ratio=0.5, store=new, resume=True)
    assert contents(new) == files


# ---- models that are not of transformers ----


class Net(nn.Module):
    def __init__(self, buffer_device=None):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)
        self.back = nn.Linear(8, 4)
        self.back.weight = self.head.weight
        self.register_buffer("scale", torch.ones(8, device=buffer_device), persistent=False)

    def forward(self, x):
        x = self.embed(x) * self.scale
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x.mean(1))
        return self.head(x) + self.back(x)


def plain(folder):
    torch.manual_seed(0)
    model = Net()
    state = model.state_dict()
    del state["back.weight"]
    folder.mkdir()
    safetensors.save_file(state, folder / "model.safetensors")
    return model.eval()


def test_a_model_of_ones_own_is_pruned(tmp_path):
    model, data = plain(tmp_path / "source"), [torch.randn(3, 5, 4) for _ in range(2)]
    with torch.device("meta"):
        empty = Net(buffer_device="cpu")
    pyprune.prune_checkpoint(tmp_path / "source", tmp_path / "new", data, **HOW["sparsegpt"], model=empty)
    pyprune.prune_one_shot(model, data, **HOW["sparsegpt"])
    found = tensors(tmp_path / "new")
    state = pyprune.strip(model).state_dict()
    assert set(found) == set(state) - {"back.weight"}
    assert all(torch.equal(found[key], state[key]) for key in found)


def test_a_model_of_transformers_on_the_meta_device_is_pruned(tmp_path):
    source, data = saved(tmp_path / "source", "BERT"), models.batches("BERT")
    with torch.device("meta"):
        model = transformers.BertModel(transformers.AutoConfig.from_pretrained(source))
    with pytest.warns(UserWarning, match=r"classifier\.bias, classifier\.weight: in the files and not in the model"):
        pyprune.prune_checkpoint(source, tmp_path / "new", data, WANDA, ratio=0.5, model=model)
    whole = loaded(source, "BERT")
    pyprune.prune_one_shot(whole, data, WANDA, ratio=0.5)
    new = loaded(tmp_path / "new", "BERT").state_dict()
    assert all(torch.equal(new[key], value) for key, value in whole.state_dict().items())


# ---- what is refused ----


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def without(key):
    def change(folder):
        for path in folder.glob("*.safetensors"):
            found = safetensors.load_file(path)
            if found.pop(key, None) is not None:
                safetensors.save_file(found, path)
        edited(folder / "model.safetensors.index.json", lambda index: index["weight_map"].pop(key))

    return change


def cut(folder):
    path = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-8])


def garbage(folder):
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(b"\xff" * 64)


DAMAGED = {
    "no weights": (lambda folder: [path.unlink() for path in folder.glob("model*")], "has neither model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "no file of the index": (lambda folder: min(folder.glob("*.safetensors")).unlink(), "not beside it"),
    "an index with a path": (
        lambda folder: edited(
            folder / "model.safetensors.index.json", lambda index: index["weight_map"].update(x="../x.safetensors")
        ),
        "not beside it",
    ),
    "an index that is none": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "no index of safetensors",
    ),
    "an index with a name too many": (
        lambda folder: edited(
            folder / "model.safetensors.index.json",
            lambda index: index["weight_map"].update(x=min(index["weight_map"].values())),
        ),
        "names x, which are not in",
    ),
    "a file that was cut": (cut, "damaged.*is cut off"),
    "a file of something else": (garbage, "damaged"),
    "a weight missing": (without("model.layers.1.mlp.up_proj.weight"), r"has model\.layers\.1\.mlp\.up_proj\.weight"),
    "another shape": (
        lambda folder: edited(folder / "config.json", lambda config: config.update(intermediate_size=40)),
        "does not fit LlamaForCausalLM",
    ),
    "no architecture": (
        lambda folder: edited(folder / "config.json", lambda config: config.pop("architectures")),
        "names no class as architectures",
    ),
    "an unknown architecture": (
        lambda folder: edited(folder / "config.json", lambda config: config.update(architectures=["OurModel"])),
        "names OurModel as architectures",
    ),
    "quantised": (
        lambda folder: edited(
            folder / "config.json",
            lambda config: config.update(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ),
        "is quantised",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_checkpoints_that_cannot_be_loaded_are_refused(what, tmp_path):
    change, message = DAMAGED[what]
    change(saved(tmp_path / "source"))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        pyprune.prune_checkpoint(tmp_path / "source", tmp_path / "new", models.batches("Llama"), WANDA, ratio=0.5)
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    source = saved(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(source)
    for destination, message in [
        ("source", "not in each other"),
        ("link", "not in each other"),
        ("source/new", "not in each other"),
        (".", "not in each other"),
        ("full", r"which has notes\.txt in it"),
        ("full/notes.txt", "is a file"),
    ]:
        before = contents(tmp_path)
        for resume in (False, True):
            with pytest.raises(ValueError, match=message):
                pyprune.prune_checkpoint(source, tmp_path / destination, [{}], WANDA, ratio=0.5, resume=resume)
        assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="which is no folder"):
        pyprune.prune_checkpoint(tmp_path / "nothing", tmp_path / "new", [{}], WANDA, ratio=0.5)


def test_a_failure_before_the_first_block_leaves_nothing(tmp_path):
    source = saved(tmp_path / "source", "Mixtral")
    for how, error in [
        ({"method": WANDA, "ratio": 2.0}, ValueError),
        ({"method": WANDA, "ratio": 0.5, "blocks": "layers"}, ValueError),
        ({"method": 3, "ratio": 0.5}, TypeError),
    ]:
        with pytest.raises(error):
            pyprune.prune_checkpoint(source, tmp_path / "new", models.batches("Mixtral"), **how)
        assert not (tmp_path / "new").exists()


def test_models_with_values_or_without_buffers_are_refused(tmp_path):
    model = plain(tmp_path / "source")
    with torch.device("meta"):
        empty, other = Net(), Net(buffer_device="cpu")
    other.more = nn.Linear(2, 2, device="meta")
    for given, message in [
        (model, r"has embed\.weight.* with values already"),
        (empty, "scale of Net is on the meta device"),
        (other, r"Net has more\.bias, more\.weight, which .* lacks"),
        (Net(buffer_device="cpu").to("meta", torch.float64), "has another shape or dtype in the files"),
    ]:
        with pytest.raises(ValueError, match=message):
            pyprune.prune_checkpoint(
                tmp_path / "source", tmp_path / "new", [torch.ones(2, 5, 4)], WANDA, ratio=0.5, model=given
            )


def test_prune_one_shot_says_of_weights_elsewhere_what_to_do(tmp_path):
    model, data = models.make("Llama"), models.batches("Llama")
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn.*meta device.*prune_checkpoint"):
        pyprune.prune_one_shot(model, data, WANDA, ratio=0.5)
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(models.make("Llama"), "cpu")
    with pytest.raises(ValueError, match=r"offloaded.*prune_checkpoint"):
        pyprune.prune_one_shot(model, data, WANDA, ratio=0.5)


# ---- memory ----

RUN = """
import sys, threading, time
import torch, pyprune, transformers
from pyprune import Method, importance, scope

torch.set_num_threads(1)
small, source, new = sys.argv[1:4]
data = [{"input_ids": torch.randint(0, 90, (2, 32))} for _ in range(2)]
how = {"method": Method(importance.wanda(), scope=scope.row()), "ratio": 0.5}
pyprune.prune_checkpoint(small, new + " small", data, **how)  # what is imported then does not count

def used():
    return int(open("/proc/self/smaps_rollup").read().split("Anonymous:")[1].split()[0]) * 1024

def watch():
    while True:
        peak[0] = max(peak[0], used())
        time.sleep(0.005)

base = used()
peak = [base]
threading.Thread(target=watch, daemon=True).start()
assert pyprune.prune_checkpoint(source, new, data, **how).ratio == 0.5
print(base, peak[0])
"""


def random_checkpoint(folder, layers, width, inner):
    """Write a checkpoint of random weights, a file for each layer, and return its size."""
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {key: x.shape for key, x in transformers.LlamaForCausalLM(config).state_dict().items()}
    files = {}
    for key, shape in shapes.items():
        layer = key.split(".")[2] if "layers" in key else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[key] = shape
    for file, inside in files.items():
        made = {key: (torch.randn(shape) * 0.02).bfloat16() for key, shape in inside.items()}
        safetensors.save_file(made, folder / file)
    index = {"metadata": {}, "weight_map": {key: file for file, inside in files.items() for key in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measured(tmp_path):
    random_checkpoint(tmp_path / "small", 2, 64, 64)
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path / "small", tmp_path / "source", tmp_path / "new"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux says what is used")
def test_memory_is_of_a_block_and_not_of_the_model(tmp_path):
    size = random_checkpoint(tmp_path / "source", 48, 256, 512)
    assert size > 60e6
    base, peak = measured(tmp_path)
    assert peak - base < size / 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux says what is used")
def test_a_checkpoint_of_3_gb_is_pruned_in_1_gb(tmp_path):
    try:
        size = random_checkpoint(tmp_path / "source", 55, 1536, 4096)
        assert size > 3e9
        _, peak = measured(tmp_path)
        assert peak < 2**30
    finally:
        shutil.rmtree(tmp_path)
