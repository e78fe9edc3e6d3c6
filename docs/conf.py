"""Configuration of Sphinx: `sphinx-build -W docs build/docs`."""

import re
import urllib.request
from importlib.metadata import version as installed_version
from typing import Any

project = "lowbit_ext"
author = "The lowbit_ext developers"
release = version = installed_version("lowbit-ext")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx", "myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings name types and shapes
napoleon_custom_sections = ["Gradient", "Shape", "Source"]

html_theme = "furo"
html_title = "lowbit_ext"


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}objects.inv", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


_others = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "sklearn": "https://scikit-learn.org/stable/",
}
# Without a network the pages are built without links to other projects.
intersphinx_mapping = {name: (url, None) for name, url in _others.items() if _reachable(url)}


def _plain_text(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: |x| is a magnitude and (*batch, D) a shape, not markup."""
    lines[:] = [re.sub(r"(?<!\\)([*|])", r"\\\1", line) for line in lines]


def setup(app: Any) -> None:
    """Before napoleon, which makes markup of the sections."""
    app.connect("autodoc-process-docstring", _plain_text, priority=400)
