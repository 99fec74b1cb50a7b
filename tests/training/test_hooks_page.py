"""docs/hooks.md and docs/demonstrations.md run as they are printed."""

import re
import runpy
import shlex
import subprocess
import sys

import pytest

from mtrl.cli.collect import main as collect_main
from mtrl.cli.train import main as train_main
from mtrl.errors import UsageError


def blocks(request, page: str) -> list[str]:
    text = (request.config.rootpath / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def run(code: str, folder) -> str:
    (folder / "my_module.py").write_text(code)
    command = [sys.executable, "my_module.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_callbacks_and_what_else_can_be_given(request, tmp_path, monkeypatch, capsys):
    """In this process, which has imported what a new one would import again."""
    monkeypatch.chdir(tmp_path)
    said = []
    for name, code in zip("ab", blocks(request, "hooks.md"), strict=False):
        (tmp_path / f"{name}.py").write_text(code)
        runpy.run_path(f"{name}.py", run_name="__main__")
        said.append(capsys.readouterr().out)
    assert "StopWhenSolved.on_eval" in said[0] or "complete" in said[0]
    assert "my/episodes" in (tmp_path / "runs/hooks/progress.csv").read_text()
    assert "rollout/" in said[1]


def test_a_functions_demonstrations_of_a_custom_task(request, tmp_path):
    (code,) = blocks(request, "demonstrations.md")
    said = run(code, tmp_path)
    assert "pendulum 5 episodes" in said and "[-" in said
    assert (tmp_path / "pendulum.npz").exists()


def test_the_loop_in_the_page_is_the_example_which_runs(request, tmp_path, monkeypatch, capsys):
    path = request.config.rootpath / "examples" / "own_loop.py"
    assert blocks(request, "hooks.md")[2] == path.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path))["main"](steps=140, random_steps=130, episodes=1)
    assert "worst fifth" in capsys.readouterr().out
    assert (tmp_path / "own_loop.safetensors").exists()


COMMANDS = {"train": train_main, "collect": collect_main}


@pytest.mark.parametrize("page", ["hooks.md", "demonstrations.md"])
def test_the_commands_of_the_pages_are_understood(page, request, tmp_path, monkeypatch, capsys):
    def start(*arguments, **settings):
        raise UsageError("far enough")

    for heavy in ("mtrl.training.run.train", "mtrl.demonstrations.collect.collect"):
        monkeypatch.setattr(heavy, start)
    for name in ("check_names", "check_plan"):  # files and modules that are the reader's
        monkeypatch.setattr(f"mtrl.cli.train.{name}", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    text = (request.config.rootpath / "docs" / page).read_text(encoding="utf-8")
    lines = re.findall(r"^    mtrl-(train|collect) (.*)$", text, re.M)
    assert lines
    for program, line in lines:
        assert COMMANDS[program](shlex.split(line)) == 2
        said = capsys.readouterr().err
        assert "far enough" in said or "runs/" in line, said  # the reader's run
