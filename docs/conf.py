# SPDX-License-Identifier: Apache-2.0
"""The documentation site: `sphinx-build -W docs build/site`, with the extra `docs` installed.

The API comes from the docstrings of the installed package. What already stands in the README, in ARCHITECTURE.md and in
examples/ is included from there, so that it stands in one place.
"""

import base64
import json
from pathlib import Path

import mha_c

HERE = Path(__file__).parent

project = "mha_c"
author = "the mha_c contributors"
copyright = author
version = release = mha_c.__version__

extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_nb", "matplotlib.sphinxext.plot_directive"]

# Sphinx reads its own folder only: the notebooks are copied into it, with the outputs that were committed. The
# alternative text of a picture is in the metadata of its output, and MyST-NB reads that of the cell. The gallery shows
# each notebook's title, first paragraph and first picture.
NOTEBOOKS = HERE / "notebooks"
for copy in (*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("*.png")):
    copy.unlink()
gallery = ""
for notebook in sorted((HERE.parent / "examples").glob("*.ipynb")):
    content = json.loads(notebook.read_text("utf-8"))
    pictures = []
    for cell in content["cells"]:
        for output in cell.get("outputs", []):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt:
                cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
            pictures += [output["data"]["image/png"]] if "image/png" in output.get("data", {}) else []
    (NOTEBOOKS / notebook.name).write_text(json.dumps(content), "utf-8")
    (NOTEBOOKS / f"{notebook.stem}.png").write_bytes(base64.b64decode(pictures[0]))
    title, first, *_ = "".join(content["cells"][0]["source"]).removeprefix("# ").split("\n\n")
    page = f"notebooks/{notebook.name}"
    gallery += f"## [{title}]({page})\n\n[![](notebooks/{notebook.stem}.png){{.thumbnail}}]({page})\n\n{first}\n\n"
(NOTEBOOKS / "gallery.txt").write_text(gallery, "utf-8")
nb_execution_mode = "off"

myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc's sections say more
autodoc_default_options = {"members": True, "undoc-members": False}
autosummary_generate = False
numpydoc_show_class_members = False
default_role = "py:obj"  # `name` in a docstring: a link where there is such an object
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# Pictures of the API's pages are drawn while the site is built.
plot_formats = ["svg"]
plot_html_show_formats = plot_html_show_source_link = False
plot_include_source = True

pygments_dark_style = "github-dark"
html_theme = "furo"
html_title = f"mha_c {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
