"""The manual: `pip install -e ".[docs]" && sphinx-autobuild docs build/docs` builds and serves it.

Tables of settings, methods, trunks, results and times are made while it is built, from the
package and from `results/`; see `_ext/`.
"""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "mtrl"
author = "The mtrl authors"
copyright = "The mtrl authors, MIT licence"
release = version = installed("mtrl-surgery")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "generated",
    "mathml",
]
exclude_patterns = ["_ext", "_build"]
default_role = "code"  # docstrings write code in single backticks
nitpicky = False

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/docs/test_notebooks.py runs them; what is stored is shown

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"mtrl {release}"
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = "$ "
