"""Sphinx configuration of the documentation: `python -m sphinx -W --keep-going docs build/docs`."""

project = "rlsc_mcore"
author = "the rlsc_mcore authors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["make_reference.py"]
html_theme = "furo"
html_title = "rlsc_mcore"
html_static_path = ["images"]
nitpicky = True
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
