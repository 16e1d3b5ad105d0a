"""What `make zoo` judges, as far as it takes no other library than those of the tests."""

import pytest
import torch

by_hand = pytest.importorskip("zoo.by_hand", reason="the benchmarks are not beside these tests")
from zoo import transformers_models  # noqa: E402
from zoo.judge import judge  # noqa: E402

# One of each kind of attention, of experts, and of how a layer is written down.
TRANSFORMERS = (
    "llama",
    "mixtral",
    "qwen3",
    "qwen3_moe",
    "gemma3",
    "gpt2",
    "falcon",
    "mamba",
    "t5",
    "whisper",
    "albert",
    "deberta_v2",
)
CASES = {**by_hand.CASES, **{name: transformers_models.CASES[name] for name in TRANSFORMERS}}
# A size stands as a number in its forward.
HELD = {"hard_coded_view"}


@pytest.mark.filterwarnings("ignore")  # of torch and transformers, and ours of what is held, which is asserted on
@pytest.mark.parametrize("name", CASES)
def test_shrink_leaves_the_masked_model(name):
    torch.manual_seed(0)
    seen = judge(CASES[name], export=False)
    assert seen["finite"]
    assert seen["equal"], f"outputs differ by {seen['error']:.1e}"
    assert seen["rebuilt"] is True
    assert seen["trains"] is True
    assert seen.get("tokens", True) is True
    assert bool(seen["held"]) == (name in HELD), seen["held"]
    if name not in HELD:
        assert seen["kept"] == []
        assert seen["exact"] > 0
