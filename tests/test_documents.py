"""What README and docs/ tell users to type works."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
PAGES = {
    str(page.relative_to(ROOT)): blocks
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (blocks := BLOCK.findall(page.read_text()))
}
NEEDED = {"yaml": "pyprune[recipes]", "transformers": "pyprune[transformers]", "sklearn": "scikit-learn"}


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    for module, package in NEEDED.items():
        if any(re.search(rf"^(from|import) {module}\b", block, flags=re.MULTILINE) for block in PAGES[page]):
            pytest.importorskip(module, reason=f"the page uses it: pip install '{package}'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for block in PAGES[page]:
        exec(compile(block, page, "exec"), {})  # each by itself, as a reader pastes it
    shown = any("print(pyprune.pruning_statistic(model))" in block for block in PAGES[page])
    assert not shown or "Pruning statistics" in capsys.readouterr().out


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
