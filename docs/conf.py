"""How the documentation site is built: ``python -m sphinx -W docs build/docs``, without the network."""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS / "_sphinx"), str(DOCS.parent)]
os.environ["COLUMNS"] = "80"  # of the command line's help

from docutils import nodes  # noqa: E402
from sphinx.ext.autodoc.mock import _MockObject  # noqa: E402

import bnarray  # noqa: E402  # found there
from bnarray import cli  # noqa: E402

project = "bnarray"
author = "the bnarray developers"
version = release = bnarray.__version__
copyright = author  # noqa: A001  # as Sphinx calls it

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "inline_svg",
]
exclude_patterns = ["examples/*"]
default_role = "autolink"
nitpicky = True
# In docstrings: arguments and attributes, and names that are documented in another module or not here.
nitpick_ignore = {
    ("py:obj", name)
    for name in ("batch_norm_backward", "correction", "num_skipped", "statistics", "stats", "where", "x", "zarr")
}
nitpick_ignore_regex = {("py:obj", r"torch\..*")}

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"
autodoc_member_order = "bysource"
# torch is not needed to read the docstrings of its modules; but their annotations are unions of its types.
autodoc_mock_imports = ["torch"]
_MockObject.__or__ = _MockObject.__ror__ = lambda self, _: self
numpydoc_show_class_members = False

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "image_scrapers": ("draw.scraper",),
    "reset_modules": ("matplotlib", "draw.use_style"),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "notebook_extensions": set(),
    "show_memory": False,
    "show_signature": False,
    "capture_repr": (),
    "default_thumb_file": str(DOCS / "_static" / "icon.svg"),
    "min_reported_time": 1e9,
    "write_computation_times": False,
}

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = f"bnarray {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}
html_favicon = "_static/icon.svg"
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "bnarray", "image_light": "_static/icon.svg", "image_dark": "_static/icon.svg"},
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_nav_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def write_help(_: object) -> None:
    """Write what the command line says of itself, for a page to include."""
    texts = []
    for arguments in ([], ["demo"], ["normalize"], ["stats"], ["plot"], ["info"]):
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            cli.main([*arguments, "--help"])
        texts.append(" ".join(["$ bnarray", *arguments, "--help\n"]) + text.getvalue())
    path = DOCS / "_generated" / "help.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(texts), encoding="utf-8")


def trim_examples(_: object, doctree: nodes.document) -> None:
    """Drop the empty line that ends an example in Markdown, where it tells doctest so."""
    for block in doctree.findall(nodes.literal_block):
        block.rawsource = block.astext().rstrip()
        block[:] = [nodes.Text(block.rawsource)]


def setup(app: Any) -> None:
    app.connect("doctree-read", trim_examples)
    app.connect("builder-inited", write_help)
