"""Installed package: files of the wheel, name of the distribution, commands."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import yaml

import mtrl
from mtrl.cli import collect, eval, export, plot, sweep, train
from mtrl.folder import DISTRIBUTION, installed_versions

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_types_presets_and_verdicts(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "mtrl", source / "mtrl", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("mtrl_surgery-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = [p for p in (ROOT / "mtrl").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert {p.relative_to(ROOT).as_posix() for p in wanted} <= held
    assert "mtrl/py.typed" in held and "mtrl/config/presets/quickstart.yaml" in held


@pytest.mark.parametrize("command", [train, eval, collect, export, plot, sweep])
def test_every_command_prints_its_version(command, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--version"])
    assert end.value.code == 0
    name = command.__name__.rpartition(".")[2]
    assert capsys.readouterr().out == f"mtrl-{name} {version(DISTRIBUTION)}\n"


def test_versions_are_those_of_the_distribution():
    found = version(DISTRIBUTION)
    assert mtrl.__version__ == installed_versions()["mtrl"] == found
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == found and citation["license"] == "MIT"


def test_all_commands_of_the_distribution_are_tested():
    commands = {e.name for e in distribution(DISTRIBUTION).entry_points if "mtrl-" in e.name}
    assert commands == {
        "mtrl-train",
        "mtrl-eval",
        "mtrl-collect",
        "mtrl-export",
        "mtrl-plot",
        "mtrl-sweep",
    }
