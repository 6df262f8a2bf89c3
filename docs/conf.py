"""Sphinx configuration. Needs no network: there is no intersphinx."""

import ffr

project = "ffr"
author = "the ffr developers"
copyright = "2026, the ffr developers"
version = release = ffr.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
default_role = "py:obj"  # docstrings write `name` for what can be linked to, and for arguments
html_theme = "furo"
html_title = f"ffr {release}"
html_static_path, html_css_files = ["_static"], ["pages.css"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False

# Names of other libraries: their pages are elsewhere, and the build stays off the network.
nitpick_ignore = [("py:class", "ffr.cam.Maps"), ("py:class", "ffr.metrics.Self")]  # type variables
nitpick_ignore_regex = [(r"py:.*", r"(torch|numpy|np|nn|collections|os|pathlib|types|typing)\..*")]


def setup(app):
    """Leave out what `print` shows of a module, and the fields of a NamedTuple, which its own docstring explains.

    A name in single backticks is a link where there is something to link to.
    """
    app.connect("missing-reference", lambda app, env, node, shown: shown if _argument(node) else None)
    app.connect(
        "autodoc-skip-member", lambda app, what, name, value, skip, options: _said_elsewhere(name, value) or None
    )


def _said_elsewhere(name, value):
    return name == "extra_repr" or (getattr(value, "__doc__", None) or "").startswith("Alias for field number")


def _argument(node):
    """Whether a name that is nowhere to be found may be that of an argument; a dead `ffr.` is an error."""
    return node["reftype"] == "obj" and not node["reftarget"].startswith("ffr.")
