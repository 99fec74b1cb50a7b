"""What the README shows works as it stands there."""

import re
import shlex
import subprocess
import sys

import pytest

from mtrl.cli import eval_main, train_main
from mtrl.config import TrainConfig


@pytest.fixture
def readme(request) -> str:
    return (request.config.rootpath / "README.md").read_text(encoding="utf-8")


def test_python_examples_run(readme, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        script = tmp_path / f"example{number}.py"
        script.write_text(block)
        done = subprocess.run(
            [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs").glob("custom_none_seed0_*/policy_final.safetensors"))


def test_commands_name_flags_that_exist(readme, capsys):
    """Each command line is parsed as it stands, with --help appended so that it does no more."""
    lines = re.findall(r"(mtrl-(?:train|eval)(?: [^`\n]*)?)", readme)
    mains = {"mtrl-train": train_main, "mtrl-eval": eval_main}
    flags = set()
    for line in lines:
        program, *arguments = shlex.split(line)
        used = [argument for argument in arguments if argument.startswith("--")]
        with pytest.raises(SystemExit) as end:
            mains[program](["--help"])
        shown = capsys.readouterr().out
        assert end.value.code == 0
        assert all(flag in shown for flag in used), line
        flags.update(used)
    assert {"--benchmark", "--surgery", "--config", "--resume", "--json"} <= flags


def test_every_setting_in_the_table_exists(readme, capsys):
    with pytest.raises(SystemExit):
        train_main(["--help"])
    shown = capsys.readouterr().out
    rows = re.findall(r"^\| (`--.*?) \|", readme, re.MULTILINE)
    flags = re.findall(r"--[a-z-]+", " ".join(rows))
    assert len(flags) >= 11
    assert all(flag in shown for flag in flags)


def test_the_configurations_it_names_exist(readme, request):
    for name in set(re.findall(r"configs/\w+\.yaml", readme)):
        TrainConfig.from_yaml(request.config.rootpath / name)
