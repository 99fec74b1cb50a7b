"""Output that cannot be written, and the estimate of the time left."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest
import toy_tasks

from mtrl import TrainConfig
from mtrl.cli.flags import run
from mtrl.config.schedule import Schedule
from mtrl.errors import UsageError, import_attribute
from mtrl.folder import STEP, read_rows
from mtrl.progress import duration
from mtrl.training import report
from mtrl.training.console import Bar, say
from mtrl.training.logger import RunLogger
from mtrl.training.pace import TimeLeft
from mtrl.training.report import scores

MODULE = """
from mtrl.surgery import GramianSurgery, register

@register("equal")
class Equal(GramianSurgery):
    def weights(self, gramian, generator):
        return gramian.new_full(gramian.shape[:2], 1 / gramian.shape[-1])
"""
FLAGS = (
    "--config plain --benchmark toy_tasks:POINTS --hidden-sizes 8 --batch-size 8 "
    "--total-timesteps 160 "
    "--learning-starts 80 --horizon 10 --eval-every 80 --eval-episodes 1 --log-every 40 "
    "--workers 1 --threads 1 --device cpu --diagnose-every 0"
).split()
TASKS_FOUND = os.environ | {"PYTHONPATH": str(Path(toy_tasks.__file__).parent)}
PROGRAM = [sys.executable, "-c", "import sys; from mtrl.cli.train import main; sys.exit(main())"]


class Broken(io.StringIO):
    """A pipe without a reader."""

    def write(self, text):
        raise BrokenPipeError

    def isatty(self):
        return True


def test_a_line_that_cannot_be_written_is_dropped(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    say("– α 1")
    assert ascii_only.buffer.getvalue() == b"? ? 1\n"
    closed = io.StringIO()
    closed.close()
    for stream in (Broken(), closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        say("text")
        bar = Bar(10, 0)
        bar.move(3, "–")
        bar.close()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_run_in_an_encoding_that_lacks_characters(encoding, tmp_path):
    """Its output is closed early, and it uses a custom method; it still runs to the end."""
    (tmp_path / "mine.py").write_text(MODULE)
    flags = [*FLAGS, "--import", "mine", "--surgery", "equal", "--run-dir", "run"]
    flags += ["--diagnose-every", "80"] if encoding == "ascii" else []
    process = subprocess.Popen(
        [*PROGRAM, *flags],
        cwd=tmp_path,
        env=TASKS_FOUND | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    lines = [process.stdout.readline() for _ in range(5)]
    if encoding == "latin-1":
        process.stdout.close()
    else:
        lines += process.stdout.readlines()
        assert b"? left  training: success 0.00  evaluation: ?" in b"".join(lines)
    error = process.stderr.read()
    assert process.wait(timeout=300) == 0 and not error, error
    assert lines[1] == b"run folder: run\n" and lines[2] == b"watch: tensorboard --logdir run\n"
    assert (tmp_path / "run" / "eval.json").exists()
    assert "- mine" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_whose_streams_are_closed(tmp_path):
    """As some schedulers and daemons start programs, also with a warning."""
    command = " ".join([f"{PROGRAM[0]} -c '{PROGRAM[2]}'", *FLAGS, "--run-dir run <&- >&- 2>&-"])
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=TASKS_FOUND, timeout=300, check=False
    )
    assert done.returncode == 0 and (tmp_path / "run" / "eval.json").exists()


def test_our_warnings_are_one_line(capsys):
    def show(arguments):
        for text, file in (("not this code", report.__file__), ("this place", "/theirs.py")):
            print(warnings.formatwarning(text, UserWarning, file, 3), end="")
        return 0

    before = warnings.formatwarning
    assert run("mtrl-train", show, None) == 0 and warnings.formatwarning is before
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == "warning: not this code" and theirs == "/theirs.py:3: UserWarning: this place"


def test_an_installed_packages_method(tmp_path):
    """By an entry point of the group `mtrl.surgery`."""
    (tmp_path / "theirs.py").write_text(MODULE.replace('@register("equal")', ""))
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mtrl.surgery]\nequal-too = theirs:Equal\n")
    code = (
        "from mtrl.config.registry import METHODS\nimport sys\nMETHODS.check('equal-too')\n"
        "assert 'torch' not in sys.modules\nfrom mtrl.surgery import get_surgery\n"
        "assert type(get_surgery('equal-too')).__name__ == 'Equal'"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True)


def test_importing_changes_no_search_path(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.path)
    assert import_attribute("surgery", "math:pi") > 3
    with pytest.raises(UsageError, match=r"ZeroDivisionError: .*faulty\.py, line 1"):
        import_attribute("imports", "faulty")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UsageError, match=r"imports: cannot import 'leaves': SystemExit: 0 \(/.*"):
        import_attribute("imports", "leaves")
    (tmp_path / "older.py").write_text("import math\n\nmath.tau2\n")
    (tmp_path / "lacks.py").write_text("import not_installed\n")
    lines = {"older": "AttributeError: .*tau2.*, line 3", "lacks": "'not_installed' .*, line 1"}
    for name, place in lines.items():  # the fault is the module's, so its line is named
        with pytest.raises(UsageError, match=f"cannot import '{name}': .*{place}"):
            import_attribute("imports", name)
    for name in ("nowhere:x", "faulty_too:x"):
        with pytest.raises(UsageError, match=rf" \(working directory: {re.escape(os.getcwd())}\)$"):
            import_attribute("imports", name)
    with pytest.raises(UsageError, match=r"has no attribute 'tau2'$"):
        import_attribute("imports", "math:tau2")
    for name in ("./faulty.py", "faulty.py:x", "", ":x", ".faulty:x", "a b:x"):
        with pytest.raises(UsageError, match="imports: expected the name of a module as in"):
            import_attribute("imports", name)
    assert sys.path == before


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGUSR1,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_training_gives_a_message_and_leaves_nothing(number, tmp_path):
    with subprocess.Popen(
        [*PROGRAM, *FLAGS],
        cwd=tmp_path,
        env=TASKS_FOUND,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("watch:"):  # simulators are starting
            assert process.poll() is None
        time.sleep(0.1)
        if number in (signal.SIGINT, signal.SIGHUP):  # sent by a terminal to all of its processes
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert error == f"mtrl-train: interrupted by {number.name}\n"
    assert not list(tmp_path.iterdir())


def test_time_left_counts_evaluations_and_leaves_out_random_steps():
    schedule = Schedule(
        total_timesteps=10_000,
        learning_starts=1_000,
        eval_every=2_500,
        checkpoint_every=2_500,
        log_every=500,
        diagnose_every=0,
    )
    left = TimeLeft(schedule, evaluation=1_000, final=5_000)
    left.training(500, 500, 1_000.0)
    left.training(1_000, 500, 1_000.0)
    assert left.seconds(1_000) is None and left.last_evaluation() is None
    left.training(1_250, 500, 500.0)  # half of it random, so it measures neither
    assert left.seconds(1_250) is None
    left.training(2_000, 500, 100.0)
    # 8,000 steps at 100 per second; at 1,000 per second, 3 evaluations of 1,000 and one of 5,000.
    assert left.seconds(2_000) == pytest.approx(80 + 3 + 5)
    left.judging(1_000, 2.0)
    assert left.seconds(2_500) == pytest.approx(75 + 2 * 2 + 10)
    assert left.seconds(10_000) == left.last_evaluation() == pytest.approx(10)
    assert duration(3_725.4) == "1:02:05" and duration(None) == "–"


def test_a_progress_line_before_the_first_measurement_has_no_numbers(tmp_path, capsys):
    """As at the end of a run that was resumed shortly before it."""
    with closing(RunLogger(tmp_path, 1_000, TrainConfig(), ("a",), resume_at=990)) as logger:
        logger.progress(1_000, None, None, "training: –")
        logger.progress(1_000, 1234.5, 61.0, "training: –")
    assert capsys.readouterr().out.splitlines() == [
        "1,000/1,000 steps  – steps/s  – left  training: –",
        "1,000/1,000 steps  1,234 steps/s  0:01:01 left  training: –",
    ]


def test_scores_are_shown_from_the_first_episodes_on():
    assert scores({}, "") == "training: –  evaluation: –"
    rollout = {f"rollout/success_rate/{t}": r for t, r in (("a", 0.5), ("b", 1.0))}
    rollout["rollout/ep_rew_mean/a"] = 700.0
    told = "training: success 0.75  evaluation: success 0.25"
    assert scores(rollout, "success 0.25") == told
    assert scores({"rollout/ep_rew_mean/a": 700.0}, "") == "training: return 700.0  evaluation: –"


@pytest.mark.parametrize(
    "broken",
    ["", "\0\0\0", '{"time/total_timesteps": 30', "[30]", "{}", '"x"', "null",
     '{"time/total_timesteps": "30"}', '{"time/total_timesteps": NaN}', "\xff", "[" * 10_000],
)  # fmt: skip
def test_a_broken_line_does_not_affect_others(broken, tmp_path):
    rows = [{STEP: step, "x": step / 10} for step in (10, 20, 40)]
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / "progress.json"
    text = "\n".join([*lines[:2], broken, "\0" + lines[2], lines[2][:9]])
    path.write_bytes(text.encode("latin-1"))
    assert read_rows(path) == rows
    assert read_rows(path, up_to=20) == rows[:2]


def test_the_last_rows_alone(tmp_path):
    """A row of which only the end is read does not count."""
    rows = [{STEP: step, "x": step / 10} for step in (10, 20, 40)]
    lines = [json.dumps(row) + "\n" for row in rows]
    path = tmp_path / "progress.json"
    path.write_text("".join(lines))
    size = len("".join(lines))
    assert read_rows(path, last=size) == read_rows(path, last=size + 1) == rows
    assert read_rows(path, last=size - 1) == rows[1:]
    assert read_rows(path, last=len(lines[2])) == rows[2:]
    assert read_rows(path, last=len(lines[2]) - 1) == []
