"""The documentation builds, says all that is public, and refers to nothing that is not there."""

import html.parser
import re
import subprocess
import sys
import zlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import pyprune
from pyprune import granularity, importance, schedules, scope, torch_prune

pytest.importorskip("sphinx", reason="no Sphinx: pip install 'pyprune[docs]'")

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/pyprune/pyprune"
IN_REPOSITORY = re.compile(
    r"https://(?:github\.com/pyprune/pyprune/blob|raw\.githubusercontent\.com/pyprune/pyprune)/main/([^\s)\]>\"#]+)"
)
KINDS = (
    importance.Importance,
    granularity.Granularity,
    scope.Scope,
    pyprune.Schedule,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build all pages; the strictest that Sphinx can be."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--nitpicky", "--fail-on-warning", "--keep-going", "--quiet", "-d", str(folder / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, "-b", "html", str(ROOT / "docs"), str(folder / "html")]
    output = subprocess.run(command, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    return folder / "html"


class Page(html.parser.HTMLParser):
    """The places that a page has, and those that it refers to."""

    def __init__(self, path):
        super().__init__()
        self.places, self.references, self.titles = set(), set(), 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.titles += tag == "h1"
        if attributes.get("id"):
            self.places.add(attributes["id"])
        for name in ("href", "src"):
            if attributes.get(name):
                self.references.add(attributes[name])


def test_site_has_no_dead_links(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    assert len(pages) > 20
    dead = []
    for path, page in pages.items():
        for reference in page.references:
            parts = urlsplit(reference)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            if not target.is_file() or (place and target in pages and place not in pages[target].places):
                dead.append(f"{path.relative_to(site)} -> {reference}")
    assert not dead


def test_site_describes_every_public_name(site):
    *_, listed = (site / "objects.inv").read_bytes().split(b"\n", maxsplit=4)
    described = {line.split()[0] for line in zlib.decompress(listed).decode().splitlines() if " py:" in line}
    expected = {f"pyprune.{name}" for name in pyprune.__all__ if not name.startswith("__")}
    expected |= {f"pyprune.torch_prune.{name}" for name in torch_prune.__all__}
    for module in (importance, granularity, scope, schedules):
        there = vars(module)
        makers = {
            name for name, value in there.items() if getattr(value, "__annotations__", {}).get("return") in KINDS
        }
        expected |= {
            f"pyprune.{module.__name__.rpartition('.')[2]}.{name}" for name in makers if not name.startswith("_")
        }
    expected -= {"pyprune.schedules.as_schedule"}  # reads what users give
    expected |= {f"pyprune.integrations.{name}.PruningCallback" for name in ("lightning", "transformers")}
    assert expected <= described, sorted(expected - described)


@pytest.mark.parametrize("name", ["README.md", "pyproject.toml", "CITATION.cff", ".github/ISSUE_TEMPLATE/config.yml"])
def test_links_into_the_repository_lead_to_files(name):
    text = (ROOT / name).read_text()
    for place in IN_REPOSITORY.findall(text):
        assert (ROOT / place).is_file(), place
    assert REPOSITORY in text


def test_readme_links_work_outside_of_the_repository():
    text = re.sub(r"^```.*?^```|`.*?`", "", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)]+)\)|^\[[^]]+\]: (\S+)", text, flags=re.MULTILINE)
    assert targets
    assert all("".join(target).startswith("https://") for target in targets)
    defined = set(re.findall(r"^\[([^]]+)\]: ", text, flags=re.MULTILINE))
    assert set(re.findall(r"(?<!\!)\[([^]]+)\](?![(:])", text)) == defined
