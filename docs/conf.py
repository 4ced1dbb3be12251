"""How Sphinx builds the documentation: ``scripts/docs``."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.benchmarks import tables  # noqa: E402

project = "groupify"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3  # links to headings, as GitHub has them

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_use_type_comments = False
maximum_signature_line_length = 88
add_module_names = False
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "groupify"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "github-dark"


def fill_tables(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the tables of ``benchmarks/`` where a page asks for them; a name that nobody makes is an error."""
    source[0] = tables.fill_page(source[0])


def setup(app: Sphinx) -> None:
    """Connect what is this project's own."""
    app.connect("source-read", fill_tables)
