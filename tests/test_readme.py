import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_readme_examples_run(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})
    assert "Pruning statistics" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"masked.pt", "plain.pt", "last.pt", "checkpoint.pt"}
