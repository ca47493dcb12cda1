"""Sphinx configuration of the documents: `make docs`."""

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from v2flow import __version__

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # some libraries ask a hub for news when they are imported
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "v2flow"
copyright = "the v2flow developers; MIT licence"
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "v2flow_docs",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"v2flow {release}"
html_show_sphinx = False

default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autoclass_content = "class"
python_use_unqualified_type_names = True
python_display_short_literal_types = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Names of other projects: their documents would have to be fetched over the network to link to them.
_OTHERS = (
    "torch|nn|np|numpy|lightning|PIL|transformers|tokenizers|huggingface_hub|argparse|pathlib|collections"
)
_OTHERS += "|tarfile|datetime|threading|torch_fidelity"
nitpick_ignore_regex = [
    (r"py:.*", rf"({_OTHERS})\b.*"),
    (r"py:class", r"\w+\[.*"),  # a generic type that was written as text
    (
        r"py:class",
        r"v2flow\.([\w.]+\._\w+|baselines\.\w+\.(Autoencoder|Quantizer)Config)",
    ),  # in no page by themselves
]


def skip_constants(app: Sphinx, what: str, name: str, found: Any, skip: bool, options: Any) -> bool | None:
    """Leaves constants and aliases of modules out of the reference; None keeps what Sphinx would do."""
    return None if what != "module" or inspect.isclass(found) or inspect.isroutine(found) else True


def link_repository(app: Sphinx, page: str, text: list[str]) -> None:
    """Markdown outside of docs/ is no page here: links to it become downloads, and stay links on a code host."""
    text[0] = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", text[0])


def setup(app: Sphinx) -> None:
    """Registers what is above."""
    app.connect("autodoc-skip-member", skip_constants)
    app.connect("source-read", link_repository)
