"""What README and docs/ tell users to type works."""

import re
import shlex
from pathlib import Path

import pytest

from pyprune_command.main import main
from tests.sparse.checkpoints import language_model, save_sharded

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
PAGES = {
    str(page.relative_to(ROOT)): blocks
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (blocks := BLOCK.findall(page.read_text()))
}
NEEDED = {"yaml": "pyprune[recipes]", "transformers": "pyprune[transformers]", "sklearn": "scikit-learn"}
NEEDED |= {"onnxruntime": "onnxruntime onnx", "onnxscript": "onnxscript"}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.onnx.export itself, in torch 2.13
@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for block in PAGES[page]:
        for module, package in NEEDED.items():
            if re.search(rf"^(from|import) {module}\b", block, flags=re.MULTILINE):
                pytest.importorskip(module, reason=f"a block of the page uses it: pip install '{package}'")
        exec(compile(block, page, "exec"), {})  # each by itself, as a reader pastes it
    shown = any("print(pyprune.pruning_statistic(model))" in block for block in PAGES[page])
    assert not shown or "Pruning statistics" in capsys.readouterr().out


COMMANDS = re.findall(
    r"^```bash\n(.*?)^```", (ROOT / "docs/command-line.md").read_text(), flags=re.DOTALL | re.MULTILINE
)


def test_commands_of_the_shell_page_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    save_sharded(tmp_path / "model", language_model())
    monkeypatch.chdir(tmp_path)
    for line in "".join(COMMANDS).splitlines():
        program, *arguments = shlex.split(line)
        assert program == "pyprune"
        assert main(arguments) == 0, capsys.readouterr().err
    assert len(COMMANDS) >= 4


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
