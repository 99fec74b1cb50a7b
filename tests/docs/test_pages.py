"""What the pages show works as it stands there: commands, Python examples, tags, tables."""

import ast
import importlib
import re
import runpy
import shlex
import sys
from itertools import pairwise

import pytest
from doc_pages import PAGES, README, ROOT, SHOWN, commands, name, python_blocks, read

import mtrl.surgery
from mtrl.cli.eval import main as eval_main
from mtrl.cli.export import main as export_main
from mtrl.cli.plot import main as plot_main
from mtrl.cli.sweep import main as sweep_main
from mtrl.cli.train import main as train_main
from mtrl.config.registry import METHODS, TRUNKS
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.training.check import check

MAINS = {
    "mtrl-train": train_main,
    "mtrl-eval": eval_main,
    "mtrl-plot": plot_main,
    "mtrl-export": export_main,
}
OTHERS = {"pip", "pytest", "tensorboard", "python3", ".", "apt", "sphinx-autobuild", "ruff", "mypy"}
"""Programs that are not ours."""

HEAVY = (
    "mtrl.training.run.train",
    "mtrl.training.run.resume",
    "mtrl.sac.transfer.adopted",
    "mtrl.evaluation.saved.evaluate_file",
    "mtrl.policy.export.export_policy",
    "mtrl.analysis.comparison.read_run",
    "mtrl.analysis.cosines.read_cosines",
)

EXAMPLES = [
    pytest.param(block, id=f"{name(page)}-{number}")
    for page in SHOWN
    for number, block in enumerate(python_blocks(read(page)))
]


@pytest.fixture
def registries(monkeypatch):
    """Names that an example registers are forgotten after the test."""
    for registry in (METHODS, TRUNKS):
        monkeypatch.setattr(registry, "classes", dict(registry.classes))


@pytest.fixture
def my_module(tmp_path, monkeypatch, registries):
    """A folder with `my_module.py`, made of the examples of custom tasks, a method and a trunk."""
    blocks = python_blocks(read(ROOT / "docs/extending.md"))
    own = "my_benchmark = reachers\n\ndef my_weights(gramian):\n    return gramian[0] * 0 + 1\n"
    (tmp_path / "my_module.py").write_text("\n\n".join([*blocks, own]))
    for folder in ("configs", "results", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for example in (ROOT / "examples").iterdir():
        (tmp_path / example.name).symlink_to(example)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_module", None)


def test_our_commands_are_understood(my_module, monkeypatch):
    """Each command is given to its program as it stands, up to the heavy part."""
    started = []

    def start(*arguments, **settings):
        started.append(arguments or settings)
        for config in arguments:
            if isinstance(config, TrainConfig):
                check(config)  # which knows every name in it
        raise UsageError("far enough")

    for heavy in HEAVY:
        monkeypatch.setattr(heavy, start)
    monkeypatch.setattr("mtrl.evaluation.video.find_backend", lambda: "egl")
    for command in ("eval", "export"):  # these runs are not there
        monkeypatch.setattr(f"mtrl.cli.{command}.find_policy", lambda path: path)
    ours = [
        (line, page) for page in SHOWN for line in commands(page) if shlex.split(line)[0] in MAINS
    ]
    assert len(ours) >= 30
    for line, page in ours:
        program, *arguments = shlex.split(line)
        assert MAINS[program](arguments) == 2, f"{line} in {name(page)}"
        assert len(started) == 1, f"{line} in {name(page)} was refused"
        started.clear()


def test_the_readme_s_sweeps_are_understood(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in commands(README) if line.startswith("mtrl-sweep")]
    assert lines
    for line in lines:
        assert sweep_main([*shlex.split(line)[1:], "--dry-run"]) == 0, line
    assert capsys.readouterr().out.count("mtrl-train ") == 9


@pytest.mark.parametrize("page", SHOWN, ids=name)
def test_scripts_take_the_flags_that_pages_show(page):
    for line in commands(page):
        program, *arguments = shlex.split(line, comments=True)
        if program in MAINS or program in OTHERS or program == "mtrl-sweep":
            continue
        assert program == "python", line
        script = ROOT / arguments[0]
        sources = [script, *sorted((ROOT / "scripts").glob("*.py"))]
        assert script.is_file(), line
        text = "".join(read(source) for source in sources)
        for flag in [word for word in arguments if word.startswith("-")]:
            assert f'"{flag}"' in text, line


@pytest.mark.parametrize("block", EXAMPLES)
def test_python_examples_run(block, tmp_path, monkeypatch, registries):
    if block.startswith("# skip"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
        return
    script = tmp_path / "example.py"
    script.write_text(block)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")  # which simulators import as well


SHORT = shlex.split(
    "--total-timesteps 720 --learning-starts 240 --eval-every 360 --checkpoint-every 360 "
    "--log-every 120 --diagnose-every 240 --eval-episodes 2 --horizon 10 --envs-per-task 1 "
    "--batch-size 16 --hidden-sizes 16 16 --threads 1 --workers 1 --simulator metaworld"
)
"""What makes the quickstart a run of seconds."""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder in which the README's first ten minutes were run, as they stand but shorter."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lines = [line for line in commands(README) if "runs/quick" in line]
        lines += [line for line in commands(ROOT / "docs/quickstart.md") if "runs/quick" in line]
        assert len(lines) >= 9
        for line in dict.fromkeys(lines):
            program, *arguments = shlex.split(line)
            if "--resume" in arguments:
                arguments += ["--total-timesteps", "840"]  # else there is nothing left to do
            elif program == "mtrl-train":
                arguments += SHORT
            if program == "mtrl-eval":
                arguments += ["--episodes", "1"]
            if "--video" in arguments and not can_draw():
                continue
            assert MAINS[program](arguments) == 0, line
    return folder


def can_draw() -> bool:
    from mtrl.evaluation.video import find_backend

    try:
        return bool(find_backend())
    except UsageError:
        return False


def test_the_first_ten_minutes(quickstart):
    left = {path.name for path in quickstart.iterdir()}
    assert {"runs", "plots", "policy.safetensors"} <= left
    assert {"curves_mean.png", "table.md"} <= {p.name for p in (quickstart / "plots").iterdir()}
    if can_draw():
        assert len(list((quickstart / "films").glob("*.mp4"))) == 3


def test_every_tag_has_a_row_and_every_row_a_tag(quickstart):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = quickstart / "runs/quick"
    found = EventAccumulator(str(run)).Reload().Tags()
    tags = {
        *found["scalars"],
        *found["images"],
        *read(run / "progress.csv").split("\n")[0].split(","),
    }
    tags |= {tag.removesuffix("/text_summary") for tag in found["tensors"] if "/" in tag}
    tags = {re.sub(r"/\w+(-\w+)*-v3$", "/<task>", tag) for tag in tags}
    tags = {re.sub(r"/(actor|critic\d)/", "/<network>/", tag) for tag in tags}
    tags = {tag for tag in tags if not tag.startswith("_")}  # TensorBoard's own
    rows = re.findall(r"^\| (`.*?`) \|", read(ROOT / "docs/tensorboard.md"), re.MULTILINE)
    told = {tag for row in rows for tag in re.findall(r"`([\w/<>]+)`", row)}
    sometimes = {"eval/video/<task>", "surgery/<network>/conflict_repeats"}
    sometimes |= {"surgery/<network>/conflict_repeats_by_chance"}
    assert tags - {"config"} <= told
    assert told - tags <= sometimes


def test_the_promised_tests_exist():
    text = read(ROOT / "docs/faults.md")
    files = set(re.findall(r"`((?:\w+/)?test_\w+\.py)`", text))
    assert len(files) >= 12
    assert all((ROOT / "tests" / file).is_file() for file in files)
    for page in PAGES:
        for file in re.findall(r"`(tests/[\w/]*(?:\.py)?)`", read(page)):
            assert (ROOT / file).exists(), f"{file} in {name(page)}"


def test_the_api_pages_have_every_public_name():
    text = "".join(read(page) for page in (ROOT / "docs/api").glob("*.md"))
    assert all(f":: mtrl.{name}\n" in text for name in mtrl.__all__)
    assert all(f":: mtrl.surgery.{name}\n" in text for name in mtrl.surgery.__all__)


def test_the_layout_names_every_package():
    packages = {path.parent.name for path in ROOT.glob("mtrl/*/__init__.py")}
    assert all(f"`{package}/`" in read(ROOT / "docs/layout.md") for package in packages)


def test_headings_go_down_by_one():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
        levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
        assert all(after - before <= 1 for before, after in pairwise(levels)), name(page)
