"""The scripts that draw pictures run, and write what they promise."""

import csv
import importlib
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image


@pytest.fixture
def script(request, tmp_path):
    """Runs one with --quick into `tmp_path`, and gives what it printed."""

    def run(name: str, *arguments: str) -> str:
        path = request.config.rootpath / "scripts" / name
        command = [sys.executable, path, "--quick", "-o", tmp_path / "out", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def picture(path) -> tuple[int, int]:
    """Size of a picture that decodes, is not blank, and is small."""
    with Image.open(path) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 20
        assert path.stat().st_size < 250_000
        return image.size


def cells(text: str) -> list[list[str]]:
    """Rows of the Markdown tables in it, without their heads' rules."""
    rows = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-:")]


def test_landscape(script, tmp_path):
    printed = script("landscape.py")
    assert picture(tmp_path / "out/triad.png") == (1012, 705)
    assert picture(tmp_path / "out/theorem1.png") == (1012, 780)
    assert (tmp_path / "out/landscape.md").read_text(encoding="utf-8") == printed
    rows = cells(printed)
    methods = {"Adam", "PCGrad + Adam", "RotoScale + Adam"}
    assert {row[1] for row in rows if row[0].startswith("(")} == methods
    assert "the bound held at every step" in printed
    together, separate = rows[-2:]
    for row in (together, separate):
        assert re.fullmatch(r"\d\d of 40", row[2]) and float(row[3]) >= 1
    assert float(together[5]) < 1e-3  # the minimum
    assert float(separate[4]) == -1 and float(separate[5]) > 0.1  # stopped before it


def test_the_theorem_fails_where_the_bound_is_violated(request, monkeypatch):
    """With twice the step the theorem allows."""
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")
    theorem = importlib.import_module("theorem1")
    heads = {task: theorem.Quadratic((x, 0.5), 0, 1, 1) for task, x in {"a": 0, "b": 1}.items()}
    monkeypatch.setitem(theorem.CASES, "two bowls", theorem.Case(heads, (3.0, 2.0)))
    theorem.check_theorem("two bowls")
    eigvalsh = torch.linalg.eigvalsh
    monkeypatch.setattr("torch.linalg.eigvalsh", lambda hessian: eigvalsh(hessian) / 2)
    with pytest.raises(SystemExit, match="two bowls: the bound of theorem 1 is violated by"):
        theorem.check_theorem("two bowls")


def test_digits(script, tmp_path):
    surgery = ["none", "pcgrad", "rotograd(rotation_lr=0.01)", "famo"]
    printed = script("digits.py", "--surgery", *surgery, "--seeds", "3")
    assert picture(tmp_path / "out/digits.png") == (1012, 456)
    assert (tmp_path / "out/digits.md").read_text(encoding="utf-8") == printed
    methods = [*surgery, "none, MSE ÷ variance", "each task alone"]
    with (tmp_path / "out/digits.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:2] == ["method", "seed"] and len(head) == 5
    assert [row[:2] for row in rows] == [[name, str(seed)] for name in methods for seed in range(3)]
    assert all(0 <= float(row[i]) <= 1 >= float(row[4]) for row in rows for i in (2, 3))
    tables = cells(printed)
    assert [row[0] for row in tables] == ["surgery", *methods, "surgery", *methods[1:]]
    mean = sum(float(row[2]) for row in rows[:3]) / 3
    assert tables[1][1].startswith(f"{mean:.3f} ± ")
