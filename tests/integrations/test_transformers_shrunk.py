import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="pip install 'pyprune[transformers]'")

from pyprune import coupled_groups, plan_of, rebuild, shrink  # noqa: E402
from pyprune.integrations.transformers import from_pretrained, save_pretrained  # noqa: E402
from tests.structured.dead_units import kill, shake  # noqa: E402

PLAN = "pyprune_plan.json"
BERT = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
LM = {**BERT, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
GROUPED = {**LM, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 99, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
OPT = {
    "vocab_size": 99, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 64,
}  # fmt: skip
FALCON = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {**GROUPED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
T5 = {
    "vocab_size": 99, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 99, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "decoder_start_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
MLP = {"intermediate_size": 48}
# The class, the config, and what the config says when half of all went everywhere: None, if it cannot say it.
MODELS = {
    "BertModel": (BERT, None),
    "RobertaForMaskedLM": (BERT, None),
    "DistilBertModel": ({"vocab_size": 99, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}, None),
    "AlbertModel": ({**BERT, "embedding_size": 32}, None),
    "LlamaForCausalLM": (GROUPED, HEADS | MLP | {"head_dim": 16}),
    "MistralForCausalLM": (GROUPED, HEADS | MLP | {"head_dim": 16}),
    "Qwen2ForCausalLM": (GROUPED, HEADS | MLP | {"head_dim": 16}),
    "Qwen3ForCausalLM": ({**GROUPED, "head_dim": 16}, HEADS | MLP),
    "Gemma3ForCausalLM": ({**GROUPED, "head_dim": 16}, HEADS | MLP),
    "GPT2LMHeadModel": (GPT2, None),
    "GPTNeoXForCausalLM": (LM, None),
    "OPTForCausalLM": (OPT, None),
    "FalconForCausalLM": (FALCON, {"ffn_hidden_size": 128}),
    "MixtralForCausalLM": ({**GROUPED, "num_local_experts": 4}, HEADS | MLP | {"head_dim": 16}),
    "Qwen3MoeForCausalLM": (EXPERTS, HEADS | {"moe_intermediate_size": 24}),
    "T5ForConditionalGeneration": (T5, ...),
    "BartForConditionalGeneration": ({**SEQ2SEQ, "max_position_embeddings": 64}, None),
    "WhisperForConditionalGeneration": (
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}, None,
    ),
    "ViTForImageClassification": (VISION, ...),
    "MambaForCausalLM": ({"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}, {"intermediate_size": 32}),
    "CLIPModel": ({"text_config": BERT, "vision_config": VISION, "projection_dim": 32}, None),
}  # fmt: skip
# And when half of the MLPs went.
MLP_ONLY = {
    "BertModel": MLP,
    "RobertaForMaskedLM": MLP,
    "DistilBertModel": {"hidden_dim": 48},
    "AlbertModel": MLP,
    "GPT2LMHeadModel": {"n_inner": 128},
    "GPTNeoXForCausalLM": MLP,
    "OPTForCausalLM": {"ffn_dim": 48},
    "T5ForConditionalGeneration": {"d_ff": 48},
    "BartForConditionalGeneration": {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    "WhisperForConditionalGeneration": {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    "ViTForImageClassification": MLP,
    "CLIPModel": {"text_config": MLP, "vision_config": MLP},
}
IS_MLP = "mlp|ffn|fc|intermediate|dense_h|experts|lin1|wi"


QUICK = {
    *(
        "BertModel",
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "GPT2LMHeadModel",
        "MixtralForCausalLM",
        "MambaForCausalLM",
    ),
    "ViTForImageClassification",
}
QUICK_MLP = {"GPT2LMHeadModel", "T5ForConditionalGeneration", "BartForConditionalGeneration"}
QUICK_UNEVEN = {"GPT2LMHeadModel"}


def some_slow(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def made(name):
    cls = getattr(transformers, name)
    if not hasattr(cls, "config_class"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = cls.config_class(**copy.deepcopy(MODELS[name][0]))
    torch.manual_seed(0)
    model, ids = shake(cls(config)), torch.randint(5, 99, (2, 7))
    if name == "ViTForImageClassification":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "CLIPModel":
        return model, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "WhisperForConditionalGeneration":
        return model, {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids}
    if name in ("T5ForConditionalGeneration", "BartForConditionalGeneration"):
        return model, {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    return model, {"input_ids": ids}


def small(name, **how):
    model, examples = made(name)
    assert kill(model, examples, **how)
    assert shrink(model, examples).removed
    return model, examples


def output(model, examples):
    with torch.no_grad():
        return model(**examples)[0]


def says(folder, expected):
    """Whether the config in a folder says this."""

    def holds(values, expected):
        return all(
            holds(values[key], one) if isinstance(one, dict) else values[key] == one for key, one in expected.items()
        )

    return holds(json.loads((Path(folder) / "config.json").read_text()), expected)


def check_same(model, again, examples):
    assert type(again) is type(model)
    assert torch.equal(output(again, examples), output(model, examples))
    assert not again.training
    assert "pyprune_plan" not in again.config.to_dict()


@pytest.mark.parametrize("name", some_slow(MODELS, QUICK))
def test_save_pretrained_of_a_model_whose_layers_agree(name, tmp_path):
    model, examples = small(name)
    model.save_pretrained(tmp_path)  # that of transformers
    expected = MODELS[name][1]
    if expected is not None and expected is not ...:
        assert says(tmp_path, expected)
    if expected is None:
        assert says(tmp_path, MODELS[name][0])  # the dense sizes, and beside them:
        assert (tmp_path / PLAN).is_file()
        with pytest.raises(RuntimeError, match="mismatched"):
            type(model).from_pretrained(tmp_path)
    elif not (tmp_path / PLAN).exists():
        check_same(model, type(model).from_pretrained(tmp_path), examples)
    check_same(model, from_pretrained(type(model), tmp_path), examples)


@pytest.mark.parametrize("name", some_slow(MLP_ONLY, QUICK_MLP))
def test_save_pretrained_of_a_model_whose_mlps_agree(name, tmp_path):
    model, examples = small(name, only=IS_MLP)
    save_pretrained(model, tmp_path)
    assert says(tmp_path, MLP_ONLY[name])
    assert not (tmp_path / PLAN).exists()
    check_same(model, type(model).from_pretrained(tmp_path), examples)


@pytest.mark.parametrize(
    "name",
    some_slow(["BertModel", "LlamaForCausalLM", "GPT2LMHeadModel", "BartForConditionalGeneration"], QUICK_UNEVEN),
)
def test_save_pretrained_of_a_model_whose_layers_disagree(name, tmp_path):
    model, examples = small(name, uneven=True, only=IS_MLP)
    save_pretrained(model, tmp_path / "one")
    assert (tmp_path / "one" / PLAN).is_file()
    again = from_pretrained(type(model), tmp_path / "one")
    check_same(model, again, examples)
    # What was loaded, copied or pickled is saved so again, and becomes smaller still.
    for number, other in enumerate((again, copy.deepcopy(again), pickle.loads(pickle.dumps(again)))):
        other.save_pretrained(tmp_path / str(number))
        check_same(model, from_pretrained(type(model), tmp_path / str(number)), examples)
        assert plan_of(other) == plan_of(model)
    kill(again, examples)
    shrink(again, examples)
    again.save_pretrained(tmp_path / "two")
    check_same(again, from_pretrained(type(model), tmp_path / "two"), examples)
    fresh = rebuild(type(model)(type(model.config)(**MODELS[name][0])), plan_of(again)).eval()
    fresh.load_state_dict(again.state_dict())
    assert torch.equal(output(fresh, examples), output(again, examples))


@pytest.mark.parametrize(("name", "is_plain"), [("LlamaForCausalLM", True), ("Qwen3ForCausalLM", False)])
def test_width_under_rms_norms_changes_their_epsilon_too(name, is_plain, tmp_path):
    model, examples = made(name)
    width = next(group for group in coupled_groups(model, examples) if not group.is_exact)
    with torch.no_grad():
        for member in width.members:
            member.tensor.index_fill_(member.dim, torch.from_numpy(member.indices[:16].ravel()), 0)
    shrink(model, examples, width=True)
    save_pretrained(model, tmp_path)
    # In Qwen3 the norms of heads have the same epsilon, and keep it.
    assert (tmp_path / PLAN).exists() is not is_plain
    assert says(tmp_path, {"hidden_size": 48, "rms_norm_eps": 1e-6 * 64 / 48} if is_plain else {"hidden_size": 64})
    check_same(model, from_pretrained(type(model), tmp_path), examples)


def test_config_goes_back_when_layers_disagree_later(tmp_path):
    model, examples = small("Qwen2ForCausalLM")
    assert model.config.num_attention_heads == 2
    assert model.config.head_dim == 16
    kill(model, examples, uneven=True)
    shrink(model, examples)
    model.save_pretrained(tmp_path)
    assert says(tmp_path, GROUPED)
    assert "head_dim" not in json.loads((tmp_path / "config.json").read_text())
    assert model.config.head_dim == 16  # of the model itself, nothing changed
    check_same(model, from_pretrained(transformers.Qwen2ForCausalLM, tmp_path), examples)


def test_from_pretrained_in_another_process(tmp_path):
    names = ["BertModel", "T5ForConditionalGeneration"]
    for name in names:
        model, examples = small(name, uneven=True, only=IS_MLP)
        save_pretrained(model, tmp_path / name)
        torch.save((examples, output(model, examples)), tmp_path / f"{name}.pt")
    code = (
        "import sys, torch, transformers\n"
        "from pyprune.integrations.transformers import from_pretrained\n"
        "for name in sys.argv[2:]:\n"
        "    examples, expected = torch.load(f'{sys.argv[1]}/{name}.pt')\n"
        "    model = from_pretrained(getattr(transformers, name), f'{sys.argv[1]}/{name}')\n"
        "    with torch.no_grad():\n"
        "        assert torch.equal(model(**examples)[0], expected), name\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, *names], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


def test_from_pretrained_of_an_automatic_class_shards_and_types(tmp_path):
    model, examples = small("GPT2LMHeadModel", uneven=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    save_pretrained(model, tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "shards", device_map="cpu")
    check_same(model, again, examples)
    assert again.lm_head.weight is again.transformer.wte.weight
    tokens = model.generate(**examples, max_new_tokens=5, do_sample=False)
    assert torch.equal(again.generate(**examples, max_new_tokens=5, do_sample=False), tokens)

    half = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "shards", dtype=torch.bfloat16)
    assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
    save_pretrained(model.bfloat16(), tmp_path / "half")
    again = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "half")
    assert again.dtype == torch.bfloat16
    check_same(model, again, examples)


def test_from_pretrained_with_another_head(tmp_path):
    model, examples = small("BertModel", uneven=True)
    save_pretrained(model, tmp_path / "body")
    with pytest.raises(ValueError, match=r"missing keys .*classifier"):
        from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path / "body")
    longer = from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path / "body", strict=False)
    assert torch.equal(output(longer.bert, examples), output(model, examples))
    save_pretrained(longer, tmp_path / "head")
    check_same(longer, from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path / "head"), examples)
    with pytest.raises(ValueError, match=r"unexpected keys .*classifier"):
        from_pretrained(transformers.AutoModel, tmp_path / "head")
    check_same(model, from_pretrained(transformers.AutoModel, tmp_path / "head", strict=False), examples)
    longer.bert.save_pretrained(tmp_path / "part")  # a part remembers, too
    with pytest.raises(RuntimeError, match="mismatched"):
        transformers.BertModel.from_pretrained(tmp_path / "part")


def test_shrink_of_a_model_with_another_around_it(tmp_path):
    class Around(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.parts = nn.ModuleList([nn.Identity(), body])
            self.out = nn.Linear(64, 3)

        def forward(self, input_ids):
            return self.out(self.parts[1](input_ids=input_ids).last_hidden_state)

    body, examples = made("BertModel")
    model = Around(body).eval()
    assert kill(model, examples, only=IS_MLP)
    shrink(model, examples)
    body.save_pretrained(tmp_path / "even")
    assert says(tmp_path / "even", MLP)
    check_same(body, transformers.BertModel.from_pretrained(tmp_path / "even"), examples)
    kill(model, examples, only=IS_MLP, uneven=True)
    shrink(model, examples)
    body.save_pretrained(tmp_path / "uneven")
    check_same(body, from_pretrained(transformers.BertModel, tmp_path / "uneven"), examples)


def test_trainer_saves_and_resumes_a_shrunk_model(tmp_path):
    pytest.importorskip("accelerate")
    model, examples = small("BertModel", uneven=True, only=IS_MLP)
    data = [{"input_ids": row, "labels": torch.tensor(1)} for row in torch.randint(5, 99, (8, 7))]
    save_pretrained(model, tmp_path / "body")
    classifier = from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path / "body", strict=False)
    options = transformers.TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=2, save_strategy="epoch", eval_strategy="epoch", report_to="none",
        use_cpu=True, load_best_model_at_end=True, disable_tqdm=True,
    )  # fmt: skip

    def trainer(model):
        return transformers.Trainer(model, options, train_dataset=data, eval_dataset=data)

    trainer(classifier).train()
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert len(checkpoints) == 2
    again = from_pretrained(transformers.AutoModelForSequenceClassification, checkpoints[-1])
    expected = output(again, examples)
    resumed = trainer(again)
    resumed.train(resume_from_checkpoint=str(checkpoints[0]))
    resumed.save_model(str(tmp_path / "end"))
    assert torch.allclose(output(again.eval(), examples), expected, atol=1e-3)
    check_same(again, from_pretrained(type(again), tmp_path / "end"), examples)


def test_from_pretrained_refuses_what_is_damaged(tmp_path):
    model, _ = small("BertModel", uneven=True)
    save_pretrained(model, tmp_path)
    good = (tmp_path / PLAN).read_text()
    for text, message in (
        ("", "no plan"),
        (good.replace('"pyprune_plan": 1', '"pyprune_plan": 9'), "version"),
        (good.replace("encoder.layer.0", "encoder.layer.7"), "another model"),
        (json.dumps({"pyprune_plan": 1}), "mismatched|does not fit"),
    ):
        (tmp_path / PLAN).write_text(text)
        with pytest.raises((ValueError, RuntimeError), match=message):
            from_pretrained(transformers.BertModel, tmp_path)
    (tmp_path / PLAN).unlink()
    with pytest.raises(ValueError, match=f"has no {PLAN}"):
        from_pretrained(transformers.BertModel, tmp_path)
    for cls in (None, "BertModel", nn.Linear, model):
        with pytest.raises(TypeError, match="cls"):
            from_pretrained(cls, tmp_path)
    with pytest.raises(TypeError, match="strict"):
        from_pretrained(transformers.BertModel, tmp_path, strict="no")


def test_save_pretrained_refuses_what_could_not_be_loaded(tmp_path):
    with pytest.raises(TypeError, match="model is a Linear"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "a")
    model, _ = made("BertModel")
    model.encoder.layer[0].intermediate.dense = nn.Linear(64, 7)
    with pytest.raises(ValueError, match="does not say its sizes"):
        save_pretrained(model, tmp_path / "a")
    model, _ = small("BertModel", uneven=True)
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "a", push_to_hub=True)
    model.pooler.dense = nn.Linear(64, 7)
    with pytest.raises(ValueError, match=r"pooler\.dense\.weight is \(7, 64\)"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert "pyprune_plan" not in model.config.to_dict()
