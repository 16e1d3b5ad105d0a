"""The site of docs/: Markdown by MyST, the reference from docstrings. ``make docs`` builds it, without a network."""

import inspect
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

import pyprune
from pyprune import allocations, granularity, importance, ops, schedules, scope, solvers, torch_prune

HERE = Path(__file__).parent

project = "pyprune"
author = "The pyprune developers"
copyright = f"2026, {author}"
version = release = pyprune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["inventories"]
default_role = "py:obj"  # in docstrings `prune` is a link
nitpicky = True
nitpick_ignore_regex = [("py:class", r"pyprune\.[\w.]+\._?[A-Z]\w*")]  # classes of the inside in signatures
myst_heading_anchors = 3

autodoc_mock_imports = ["ultralytics"]  # it needs torchvision
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Paper", "notes_style"), ("Papers", "notes_style")]

html_theme = "pydata_sphinx_theme"
html_title = "pyprune"
html_static_path = ["static"]
html_css_files = ["pyprune.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": [], "performance": []}
html_theme_options = {
    "logo": {"text": "pyprune"},
    "navbar_align": "left",
    "header_links_before_dropdown": 4,
    "navigation_with_keys": False,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
}


def inventories() -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield what intersphinx wants to know of other projects: from lists of symbols, since nothing is downloaded.

    The first line of a list is the address of the site; each other line is a role, a symbol, and its page. ``$`` at
    the end of a page stands for the symbol.
    """
    for listed in sorted((HERE / "inventories").glob("*.txt")):
        site, *symbols = listed.read_text().splitlines()
        lines = [f"{symbol} {role} 1 {page} -" for role, symbol, page in map(str.split, filter(None, symbols))]
        header = f"# Sphinx inventory version 2\n# Project: {listed.stem}\n# Version: \n# compressed with zlib\n"
        file = Path(_INVENTORIES.name, f"{listed.stem}.inv")
        file.write_bytes(header.encode() + zlib.compress("\n".join([*lines, ""]).encode()))
        yield listed.stem, (site, str(file))


_INVENTORIES = tempfile.TemporaryDirectory()  # removed when Python ends
intersphinx_mapping = dict(inventories())

MODULES = {
    "allocations": allocations,
    "solvers": solvers,
    "importance": importance,
    "granularity": granularity,
    "scope": scope,
    "schedules": schedules,
    "ops": ops,
    "torch_prune": torch_prune,
}


def public_classes() -> Iterator[tuple[str, type]]:
    """Yield the public classes, with the module where users find them."""
    for name in pyprune.__all__:
        yield "pyprune", getattr(pyprune, name)
    for prefix, module in MODULES.items():
        for name, value in vars(module).items():
            if name in getattr(module, "__all__", ()) or getattr(value, "__module__", "") == module.__name__:
                yield f"pyprune.{prefix}", value


# Signatures name classes where users find them, not where they are written.
_SEEN: set[type] = set()
for _module, _value in public_classes():
    if inspect.isclass(_value) and _value.__module__.startswith("pyprune.") and _value not in _SEEN:
        _value.__module__ = _module
        _SEEN.add(_value)


def resolve_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> Any:
    """Find what a docstring calls by a part of its name: `magnitude`, or `from_file` beside it."""
    if node.get("refdomain") != "py":
        return None
    objects = env.domains.python_domain.objects
    target = node["reftarget"].removeprefix("pyprune.")
    found = [name for name in objects if name.endswith(f".{target}")]
    module = node.get("py:module") or "pyprune"
    name = max(found, key=lambda name: (name.startswith(f"{module}."), -len(name)), default=None)
    if name is None:
        return None
    entry = objects[name]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, name)


class LinkCode(SphinxPostTransform):
    """Make links of what pages say as code, where it is a public name: ``prune``, ``importance.wanda()``."""

    default_priority = 5
    _NAME = re.compile(r"^(?:pyprune\.)?([A-Za-z_][\w.]*)(?:\(.*\))?$", flags=re.DOTALL)

    def run(self, **kwargs: Any) -> None:
        """Called by Sphinx for each page."""
        objects = self.env.domains.python_domain.objects
        for literal in list(self.document.findall(nodes.literal)):
            parents = (nodes.reference, pending_xref, nodes.title, nodes.literal)
            if "code" in literal["classes"] or isinstance(literal.parent, parents):
                continue
            text = literal.astext()
            if self.env.docname in ("moving", "recipes") and not text.startswith("pyprune."):
                continue  # there `prune` may be that of another library, or a stage
            match = self._NAME.match(text)
            entry = objects.get(f"pyprune.{match[1]}") if match else None
            if entry is None or entry.docname == self.env.docname:
                continue
            link = make_refnode(self.app.builder, self.env.docname, entry.docname, entry.node_id, literal.deepcopy())
            literal.replace_self(link)


_CODE = re.compile(r"(``.*?``)")


def escape_bars(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Let docstrings say |w|, which reStructuredText would replace by something."""
    for i, line in enumerate(lines):
        if "|" in line and not line.lstrip().startswith((">>>", "...")):
            parts = _CODE.split(line)
            lines[i] = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", escape_bars, priority=100)
    app.connect("missing-reference", resolve_short_name)
    app.add_post_transform(LinkCode)
