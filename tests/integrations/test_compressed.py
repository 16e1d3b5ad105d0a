"""Compressed checkpoints of transformers: saved, and read by ``from_pretrained``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pyprune
from tests.conftest import masks_of

transformers = pytest.importorskip("transformers")

from pyprune.integrations import compressed, compressed_loading  # noqa: E402
from pyprune.integrations.transformers import from_pretrained, save_compressed, save_pretrained  # noqa: E402
from pyprune_command.main import main  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama(**options):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **options)
    return transformers.LlamaForCausalLM(config), transformers.AutoModelForCausalLM


def tied_llama():
    return llama(tie_word_embeddings=True)


def gpt2():
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), transformers.AutoModelForCausalLM


def bert():
    config = transformers.BertConfig(**SIZES, max_position_embeddings=16, num_labels=3)
    return transformers.BertForSequenceClassification(config), transformers.AutoModelForSequenceClassification


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), transformers.AutoModelForSeq2SeqLM


def mixtral():
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config), transformers.AutoModelForCausalLM


MODELS = [llama, tied_llama, gpt2, bert, t5, mixtral]


def masked(make=llama, dtype=torch.float32, **options):
    """A model of which four fifths are masked, and the automatic class that loads it."""
    torch.manual_seed(0)
    model, loader = make(**options)
    model.to(dtype).eval()
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.8, examples_inputs=arguments_of(model))
    assert masks_of(model)
    return model, loader


def arguments_of(model):
    return {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def logits(model):
    return model(**arguments_of(model)).logits


def load(loader, folder, **options):
    """Load a model, of which no tensor may be missing, too many, or of another shape."""
    model, found = loader.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model


def check_not_loaded(loader, folder):
    """Check that a process without pyprune stops."""
    code = f"import sys, transformers\ntransformers.{loader.__name__}.from_pretrained({str(folder)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert "Unknown quantization type, got pyprune" in found.stderr
    assert found.stderr.splitlines()[-1].startswith("RuntimeError: ")  # shapes, or experts that cannot be merged


def weights(folder):
    return sorted(folder.glob("*.safetensors"))


def same(found, wanted):
    assert type(found) is type(wanted)
    assert torch.equal(logits(found), logits(wanted))
    found, wanted = found.state_dict(), wanted.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("shards", [None, "30KB"])
@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("make", MODELS)
def test_from_pretrained_loads_what_save_compressed_wrote(make, codec, shards, tmp_path):
    if codec:
        pytest.importorskip("zstandard")
    model, loader = masked(make)
    written = save_compressed(model, tmp_path / "small", codec=codec, max_shard_size=shards)
    files = weights(tmp_path / "small")
    assert (len(files) > 1) == (shards is not None)
    assert written.file_bytes == sum(file.stat().st_size for file in files) < 0.5 * written.dense_bytes
    assert os.listdir(tmp_path) == ["small"]

    again = load(loader, tmp_path / "small")
    same(again, model)
    # A plain model, which is saved as one.
    assert not again.is_quantized
    assert not hasattr(again.config, "quantization_config")
    again.save_pretrained(tmp_path / "dense")
    same(load(loader, tmp_path / "dense"), model)


@pytest.mark.parametrize("shards", [None, "30KB"])
@pytest.mark.parametrize("make", MODELS)
def test_save_pretrained_of_transformers_writes_the_zeros_of_masks(make, shards, tmp_path):
    model, loader = masked(make)
    model.save_pretrained(tmp_path, **({} if shards is None else {"max_shard_size": shards}))
    same(load(loader, tmp_path), model)


def test_save_compressed_again_and_from_a_stripped_model(tmp_path):
    model, loader = masked()
    save_compressed(model, tmp_path / "masked")
    again = load(loader, tmp_path / "masked")
    save_compressed(again, tmp_path / "again")
    save_compressed(pyprune.strip(model), tmp_path / "stripped")
    [one], [two], [three] = (weights(tmp_path / name) for name in ("masked", "again", "stripped"))
    assert one.read_bytes() == two.read_bytes() == three.read_bytes()


@pytest.mark.parametrize("shards", [None, "30KB"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("make", [tied_llama, gpt2, bert])
def test_from_pretrained_loads_what_the_command_compressed(make, codec, shards, tmp_path):
    if codec == "zstd":
        pytest.importorskip("zstandard")
    model, loader = masked(make)
    save_pretrained(model, tmp_path / "dense", max_shard_size=shards)
    small, dense, again = (str(tmp_path / name) for name in ("small", "dense", "again"))
    assert main(["compress", dense, small, "--codec", codec, "-q"]) == 0
    same(load(loader, small), model)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "pyprune"}
    check_not_loaded(loader, small)
    assert main(["expand", small, again, "-q"]) == 0
    files = [{one.name: one.read_bytes() for one in Path(folder).glob("*.json")} for folder in (dense, again)]
    assert files[0]["config.json"] == files[1]["config.json"]
    same(load(loader, again), model)


def test_prune_packs_and_unpacks_for_from_pretrained(tmp_path):
    model, loader = masked()
    save_compressed(model, tmp_path / "small")
    for name, options in {"dense": [], "packed": ["--compress"]}.items():
        assert main(["prune", str(tmp_path / "small"), str(tmp_path / name), "-r", "0.9", "-q", *options]) == 0
    same(load(loader, tmp_path / "packed"), load(loader, tmp_path / "dense"))
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    check_not_loaded(loader, tmp_path / "packed")


def test_from_pretrained_loads_a_file_of_save_sparse_beside_a_config(tmp_path):
    model, loader = masked()
    model.config.save_pretrained(tmp_path)
    pyprune.save_sparse(model, tmp_path / "model.safetensors")
    same(load(loader, tmp_path), model)


@pytest.mark.parametrize("make", [llama, mixtral])
def test_from_pretrained_casts_compressed_weights(make, tmp_path):
    model, loader = masked(make, torch.bfloat16)
    save_compressed(model, tmp_path / "small")
    save_pretrained(model, tmp_path / "dense")
    for dtype in (torch.bfloat16, torch.float32):
        found = load(loader, tmp_path / "small", dtype=dtype)
        assert {parameter.dtype for parameter in found.parameters()} == {dtype}
        same(found, load(loader, tmp_path / "dense", dtype=dtype))
    assert load(loader, tmp_path / "small", dtype="auto").dtype is torch.bfloat16


@pytest.mark.parametrize("place", ["cpu", {"": "cpu"}])
def test_from_pretrained_puts_compressed_weights_where_it_is_told(place, tmp_path):
    pytest.importorskip("accelerate")
    model, loader = masked()
    save_compressed(model, tmp_path)
    same(load(loader, tmp_path, device_map=place), model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_pretrained_puts_compressed_weights_on_a_gpu(tmp_path):
    pytest.importorskip("accelerate")
    model, loader = masked()
    save_compressed(model, tmp_path)
    found = load(loader, tmp_path, device_map="cuda")
    assert {parameter.device.type for parameter in found.parameters()} == {"cuda"}
    same(found.cpu(), model)


def test_from_pretrained_loads_a_part_of_a_compressed_model(tmp_path):
    model, _ = masked(bert)
    save_compressed(model, tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(base(TOKENS).pooler_output, model.bert(TOKENS).pooler_output)


def test_from_pretrained_trains_on_with_the_zeros_held(tmp_path):
    model, loader = masked()
    save_compressed(model, tmp_path)
    found = load(loader, tmp_path)
    zero = {name: weight == 0 for name, weight in found.state_dict().items()}
    pyprune.keep_sparse(found, None)
    optimizer = torch.optim.AdamW(found.parameters(), lr=1e-2)
    found.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert all((weight[zero[name]] == 0).all() for name, weight in found.state_dict().items())


def test_the_index_lists_every_entry(tmp_path):
    model, _ = masked()
    save_compressed(model, tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {}
    for file in weights(tmp_path):
        with pyprune.SparseFile(file) as one:
            found |= dict.fromkeys(one.header.entries, file.name)
    assert index["weight_map"] == found
    assert "model.layers.0.mlp.up_proj.weight_bitmask" in found


@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_without_pyprune_a_compressed_model_is_not_loaded(make, codec, tmp_path):
    if codec:
        pytest.importorskip("zstandard")
    model, loader = masked(make)
    save_compressed(model, tmp_path, codec=codec)
    check_not_loaded(loader, tmp_path)


def damaged(file, change):
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


def flip(data):
    data[-1] ^= 1


@pytest.mark.parametrize("make", [llama, mixtral])
def test_from_pretrained_names_the_tensor_that_is_damaged(make, tmp_path):
    model, loader = masked(make)
    save_compressed(model, tmp_path, max_shard_size="30KB")
    file = weights(tmp_path)[1]
    with pyprune.SparseFile(file) as one:
        last = max(one.header.entries, key=lambda name: one.header.entries[name].end).removesuffix("_bitmask")
    damaged(file, flip)
    with pytest.raises(ValueError, match=rf"{file.name}: {last}: its .* are damaged"):
        loader.from_pretrained(tmp_path)


@pytest.mark.parametrize("length", [0, 7, 200, -1])
def test_from_pretrained_refuses_a_file_that_is_cut_off(length, tmp_path):
    model, loader = masked()
    save_compressed(model, tmp_path)
    [file] = weights(tmp_path)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        loader.from_pretrained(tmp_path)


def test_from_pretrained_refuses_compressed_weights_that_stay_on_the_disk(tmp_path):
    pytest.importorskip("accelerate")
    model, loader = masked()
    save_compressed(model, tmp_path / "small")
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match=r"cannot stay on the disk \(device_map\)"):
        loader.from_pretrained(tmp_path / "small", device_map=places, offload_folder=tmp_path / "offload")


def test_from_pretrained_refuses_to_compress_a_dense_checkpoint(tmp_path):
    model, loader = masked()
    model.save_pretrained(tmp_path)
    config = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING["pyprune"]()
    with pytest.raises(ValueError, match="this checkpoint is not compressed"):
        loader.from_pretrained(tmp_path, quantization_config=config)


def test_from_pretrained_says_that_a_transformers_is_not_known(tmp_path, monkeypatch):
    model, loader = masked()
    save_compressed(model, tmp_path)

    def other(model, state_dict, checkpoint_files, how):
        raise AssertionError

    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", staticmethod(other))
    compressed_loading._wrap()
    assert transformers.PreTrainedModel._load_pretrained_model is other
    with pytest.raises(ImportError, match=r"does not know how transformers .* reads files"):
        loader.from_pretrained(tmp_path)


def gated():
    model, _ = llama()
    return pyprune.prune(model, "UNSTRUCTURED_HARD_CONCRETE")


def with_adapters():
    model, _ = masked()
    model._hf_peft_config_loaded = True  # as add_adapter() does, which wants a recent peft
    return model


def wrapped_by_peft():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(masked()[0], peft.LoraConfig(r=2, target_modules=["q_proj"]))


def quantised():
    model, _ = masked()
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, TypeError, "give a model of transformers"),
        (lambda: None, {}, TypeError, "give a model of transformers"),
        (wrapped_by_peft, {}, TypeError, "give a model of transformers"),
        (gated, {}, ValueError, "has gates.*strip"),
        (with_adapters, {}, ValueError, "has adapters"),
        (quantised, {}, ValueError, "is quantised"),
        (lambda: masked()[0], {"codec": "gzip"}, ValueError, "codec"),
        (lambda: masked()[0], {"codec": 3}, (TypeError, ValueError), "codec"),
        (lambda: masked()[0], {"max_shard_size": "many"}, ValueError, ""),
    ],
)
def test_save_compressed_refuses(make, options, error, message, tmp_path):
    model = make()
    with pytest.raises(error, match=message):
        save_compressed(model, tmp_path / "small", **options)
    assert not os.listdir(tmp_path)


def test_save_compressed_refuses_what_is_no_folder(tmp_path):
    model, _ = masked()
    with pytest.raises(TypeError, match="folder"):
        save_compressed(model, 3)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        save_compressed(model, tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_save_compressed_leaves_other_weights_alone(name, tmp_path):
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"has weights in it .{name}."):
        save_compressed(masked()[0], tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(["tokenizer.json", name])


def test_save_compressed_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(compressed, "compress_checkpoint", full)
    with pytest.raises(OSError, match="no space left"):
        save_compressed(masked()[0], tmp_path / "small")
    assert not os.listdir(tmp_path)


def test_adapters_are_merged_and_compressed(tmp_path):
    model = wrapped_by_peft().merge_and_unload().eval()
    save_compressed(model, tmp_path)
    same(load(transformers.AutoModelForCausalLM, tmp_path), model)


def test_gates_are_refused_where_they_would_be_lost(tmp_path):
    model = gated().eval()
    with pytest.raises(ValueError, match=r"has gates.*strip"):
        save_pretrained(model, tmp_path / "ours")
    # Trainers save gates to go on with; what is loaded from that is not taken for the pruned model.
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"unexpected keys .*weight_mask\.logits"):
        from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "theirs")
    save_compressed(pyprune.strip(model), tmp_path / "stripped")
    same(load(transformers.AutoModelForCausalLM, tmp_path / "stripped"), model)


def test_a_shrunk_model_is_compressed_with_its_plan(tmp_path):
    torch.manual_seed(0)
    model, loader = bert()
    model.eval()
    with torch.no_grad():
        layer = model.bert.encoder.layer[0]
        layer.intermediate.dense.weight[:8] = 0  # one layer only, which no config says
        layer.intermediate.dense.bias[:8] = 0
    pyprune.shrink(model, (TOKENS,))
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_GLOBAL", ratio=0.8)
    save_compressed(model, tmp_path)
    assert (tmp_path / "pyprune_plan.json").is_file()
    again = from_pretrained(loader, tmp_path)
    assert again.bert.encoder.layer[0].intermediate.dense.weight.shape == (40, 32)
    same(again, model)
