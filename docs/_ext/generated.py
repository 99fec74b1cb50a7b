"""The directive that fills tables in while the manual is built, and docstrings made ready for RST.

A page writes

    ```{generated} settings agent
    ```

and gets what the function `settings("agent")` of `TABLES` returns: Markdown.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

import tables_config
import tables_results
import tables_speed
import tables_surgery
from docutils import nodes
from docutils.statemachine import StringList
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

TABLES: dict[str, Callable[..., str]] = {
    "settings": tables_config.settings,
    "command": tables_config.command,
    "presets": tables_config.presets,
    "preset-values": tables_config.preset_values,
    "methods": tables_surgery.methods,
    "trunks": tables_surgery.trunks,
    "runs": tables_results.runs,
    "origin": tables_results.origin,
    "updates": tables_speed.updates,
    "engines": tables_speed.engines,
    "trunk-updates": tables_speed.trunk_updates,
    "environments": tables_speed.environments,
    "preset-updates": tables_speed.preset_updates,
}


class Generated(SphinxDirective):
    """`{generated} NAME ARGUMENT …`: the table of that name."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Parse what the table's function returns, in place of the directive."""
        name, *arguments = shlex.split(self.arguments[0])
        text = TABLES[name](*arguments)
        container = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), "generated"), 0, container)
        return container.children


def prepare_docstring(*event: Any) -> None:
    """Make plain-text docstrings valid RST: |x| and names that end in _ mean nothing here."""
    lines: list[str] = event[-1]
    lines[:] = [_literal(line) for line in lines]


def _literal(line: str) -> str:
    parts = re.split(r"(`+[^`]*`+)", line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<=\w)_(?!\w)", r"\\_", parts[i]).replace("|", r"\|")
    return "".join(parts)


def shorten_signature(*event: Any) -> tuple[str, None] | None:
    """Leave out the fields of a configuration, which have tables of their own."""
    documented = event[3]
    if isinstance(documented, type) and issubclass(documented, BaseModel):
        return "(**settings)", None
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("generated", Generated)
    app.connect("autodoc-process-docstring", prepare_docstring)
    app.connect("autodoc-process-signature", shorten_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
