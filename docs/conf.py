"""How Sphinx makes the documentation: sphinx-build -W docs docs/_build/html."""

import os
import re
from pathlib import Path

import bloodcell_fastai

DOCS = Path(__file__).parent

project = "bloodcell_fastai"
author = "The bloodcell_fastai authors"
project_copyright = author
release = bloodcell_fastai.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "bloodcell_fastai"
html_static_path = ["_static"]
html_css_files = ["code.css"]
pygments_style = "friendly"
myst_heading_anchors = 3  # as code hosting sites name them

autosummary_generate = False
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "special-members": "__call__",
    "exclude-members": "model_config",  # pydantic's
}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!bloodcell_fastai\.).*\..*|Learner|BaseModel"),  # other libraries'
    ("py:class", r"bloodcell_fastai\.(config\.T|distributed\.T|files\.Model)"),  # type variables
]

# Texts that lie beside what they describe, where code hosting sites show them, are pages here too.
BORROWED = {
    "readme": "README.md",
    "benchmarks": "benchmarks/README.md",
    "changelog": "CHANGELOG.md",
    "data-folder": "data/README.md",
    "model-card": "bloodcell_fastai/weights/pbc/README.md",
}


def borrow(app, docname: str, source: list[str]) -> None:
    """Fill a borrowed page with its text, and lead links to borrowed texts to their pages."""
    folder = DOCS
    if docname in BORROWED:
        file = DOCS.parent / BORROWED[docname]
        app.env.note_dependency(file)
        source[0], folder = file.read_text(), file.parent
    pages = {DOCS.parent / file: f"{name}.md" for name, file in BORROWED.items()}

    def linked(match: re.Match) -> str:
        file = Path(os.path.normpath(folder / match[0]))
        return pages.get(file) or os.path.relpath(file, DOCS)

    source[0] = re.sub(r"(?<=\]\()(?!\w+:)[^)#\s]+", linked, source[0])


def find_public(app, env, node, contnode):
    """Where a name of ``bloodcell_fastai`` is described: on the page of the module it is from."""
    name = node["reftarget"].removeprefix("bloodcell_fastai.")
    if node.get("refdomain") != "py" or name not in bloodcell_fastai._MODULES:
        return None
    target = f"bloodcell_fastai.{bloodcell_fastai._MODULES[name]}.{name}"
    python = env.domains["py"]
    return python.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], target, node, contnode
    )


def setup(app) -> None:
    """Sphinx calls this."""
    app.connect("source-read", borrow)
    app.connect("missing-reference", find_public)
