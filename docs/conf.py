"""The site: `tox -e docs`, or `sphinx-build -W docs docs/_build` where sphinx is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# torch_npu without CANN would end the import of torch
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from drawing import draw  # noqa: E402

draw(Path(__file__).parent / "_generated" / "served.svg")

project = "flash_attn_npu"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "flash_attn_npu"
html_show_copyright = False
html_show_sphinx = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
add_module_names = False
# headings of an included part of compat_matrix.md begin at the second level
suppress_warnings = ["myst.header"]
