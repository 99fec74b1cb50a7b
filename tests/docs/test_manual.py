"""The manual builds without a warning, and its notebooks run."""

import re
import subprocess
import sys

import pytest
from doc_pages import ROOT

pytestmark = pytest.mark.slow


def test_the_manual_builds_without_a_warning(tmp_path):
    """Sphinx warns of links that lead nowhere, pages in no list, and docstrings that are no RST."""
    pytest.importorskip("furo", reason='pip install -e ".[docs]"')
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "cache"]
    done = subprocess.run(
        [*build, "-b", "html", ROOT / "docs", tmp_path / "html"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    settings = (tmp_path / "html/training.html").read_text(encoding="utf-8")
    assert "--batch-size" in settings and "transitions per task" in settings  # generated
    home = (tmp_path / "html/index.html").read_text(encoding="utf-8")
    for page in re.findall(r'href="([\w/]+\.html)', home):
        assert (tmp_path / "html" / page).is_file(), page


@pytest.mark.parametrize("name", ["any_model", "reading_a_run"])
def test_a_notebook_runs(name, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason='pip install -e ".[docs]"')
    client = pytest.importorskip("nbclient", reason='pip install -e ".[docs]"')
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = ROOT / f"docs/notebooks/{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    stored = [len(cell.outputs) > 0 for cell in notebook.cells if cell.cell_type == "code"]
    resources = {"metadata": {"path": str(path.parent)}}
    client.NotebookClient(
        notebook, timeout=500, resources=resources
    ).execute()  # raises if a cell does
    shown = [len(cell.outputs) > 0 for cell in notebook.cells if cell.cell_type == "code"]
    assert shown == stored  # the manual shows what is stored
