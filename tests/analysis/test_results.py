"""Every run kept in `results/`, whatever version made it, still reads and plots."""

import json
import re
from pathlib import Path

import pytest

from mtrl.analysis.runs import read_run
from mtrl.cli.plot import main

RESULTS = Path(__file__).parents[2] / "results"
RUNS = sorted(file.parent for file in RESULTS.rglob("config.yaml"))


def test_every_run_reads_as_its_evaluation_says():
    assert len(RUNS) > 100
    for path in RUNS:
        run, final = read_run(path), path / "eval.json"
        assert len(run.steps) == len(run.scores) > 0, path
        if final.exists():
            stored = json.loads(final.read_text(encoding="utf-8"))
            assert run.final is not None, path
            assert run.final.scores.mean() == pytest.approx(stored[f"mean_{run.score}"]), path


@pytest.mark.parametrize("name", ["mt10_cpu*seed*", "surgery/mt10*", "ablation/recipe_seed*"])
def test_runs_of_all_versions_plot(name, tmp_path):
    runs = [str(path) for path in sorted(RESULTS.glob(name)) if path.is_dir()]
    assert runs and main([*runs, "-o", str(tmp_path)]) == 0
    assert (tmp_path / "curves_mean.png").stat().st_size > 10_000


def test_no_run_names_a_folder_of_the_machine_it_ran_on():
    for path in RESULTS.rglob("*"):
        if path.suffix in {".json", ".yaml", ".md", ".csv"}:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w./])/(root|home|tmp|mnt|Users)/", text), path
