"""The documentation: `sphinx-build -W -b html docs docs/_build/html`."""

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
exclude_patterns = ["_build"]
templates_path = ["_templates"]

autodoc_member_order = "bysource"
autodoc_mock_imports = ["cupy"]  # needs a GPU to be imported
autodoc_typehints = "description"
suppress_warnings = ["ref.python"]  # attributes of one name in several classes, such as size
napoleon_google_docstring = False
napoleon_use_ivar = True  # else attributes of tuples are described twice
default_role = "code"  # docstrings write `name` for code, as this site does

html_theme = "furo"
html_title = "hfmpi"
