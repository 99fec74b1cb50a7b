"""What the README shows works as it stands there."""

import re
import shlex
import subprocess
import sys

import pytest

from mtrl.cli.eval import main as eval_main
from mtrl.cli.export import main as export_main
from mtrl.cli.plot import main as plot_main
from mtrl.cli.train import main as train_main
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.training.run import check


@pytest.fixture
def readme(request) -> str:
    return (request.config.rootpath / "README.md").read_text(encoding="utf-8")


def test_python_examples_run(readme, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        script = tmp_path / f"example{number}.py"
        script.write_text(block)
        done = subprocess.run(
            [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs").glob("custom_none_seed0_*/policy_final.safetensors"))


def test_command_lines_are_understood(readme, request, monkeypatch):
    """Each command line of ours is given to its program as it stands, up to the heavy part."""
    started = []

    def start(*arguments, **settings):
        started.append(arguments or settings)
        for config in arguments:
            if isinstance(config, TrainConfig):
                check(config)  # which knows every name in it
        raise UsageError("far enough")

    for heavy in (
        "mtrl.training.run.train",
        "mtrl.training.run.resume",
        "mtrl.evaluation.saved.evaluate_file",
        "mtrl.policy.export.export_policy",
        "mtrl.analysis.comparison.read_run",
        "mtrl.analysis.cosines.read_cosines",
    ):
        monkeypatch.setattr(heavy, start)
    monkeypatch.chdir(request.config.rootpath)
    mains = {
        "mtrl-train": train_main,
        "mtrl-eval": eval_main,
        "mtrl-plot": plot_main,
        "mtrl-export": export_main,
    }
    lines = re.findall(r"^    (?:.*&& )?(mtrl-(?:\w+) .*)$", readme, re.MULTILINE)
    assert len(lines) >= 18
    for line in lines:
        program, *arguments = shlex.split(line)
        assert mains[program](arguments) == 2
    assert len(started) == len(lines)


def test_every_setting_in_the_table_exists(readme, capsys):
    with pytest.raises(SystemExit):
        train_main(["--help"])
    shown = capsys.readouterr().out
    rows = re.findall(r"^\| (`--.*?) \|", readme, re.MULTILINE)
    flags = re.findall(r"--[a-z-]+", " ".join(rows))
    assert len(flags) >= 27
    assert all(flag in shown for flag in flags)


def test_the_configurations_it_names_exist(readme, request):
    for name in set(re.findall(r"(?:configs|results)/\w[\w/]*\.yaml", readme)):
        TrainConfig.from_yaml(request.config.rootpath / name)
