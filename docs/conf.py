"""The documentation: `sphinx-build -W -b html docs docs/_build/html`."""

from importlib.resources import files

from hfmpi import __version__

project = "hfmpi"
author = "The hfmpi developers"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_click",
]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "results/speedup"]  # files that pages include
templates_path = ["_templates"]

autodoc_member_order = "bysource"
autodoc_mock_imports = ["cupy", "torch", "jax"]  # the first needs a GPU to be imported, the others are large
autodoc_typehints = "description"
suppress_warnings = ["ref.python"]  # attributes of one name in several classes, such as size
napoleon_google_docstring = False
napoleon_use_ivar = True  # else attributes of tuples are described twice
default_role = "code"  # docstrings write `name` for code, as this site does

html_theme = "furo"
html_title = "hfmpi"

html_css_files = ["pages.css"]

# MathJax from a package of PyPI in place of a CDN, so that formulas need no network; drawn as SVG, because a
# browser may refuse fonts to pages that it reads from a disk.
mathjax = files("sphinx-mathjax-offline") / "static" / "mathjax" / "tex-svg.js"
html_static_path = ["_static", str(mathjax)]
mathjax_path = "tex-svg.js"
