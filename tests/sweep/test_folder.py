"""Status and report of a sweep, read from its folder."""

import base64
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from fake_runs import write_run

from mtrl.cli.sweep import main
from mtrl.errors import UsageError
from mtrl.sweep.folder import SILENCE, Attempt, State, SweepFolder, write_state
from mtrl.sweep.grid import points
from mtrl.sweep.jobs import Known, placed
from mtrl.sweep.plan import Plan
from mtrl.sweep.report import _comparable, write_report
from mtrl.sweep.rules import Rules
from mtrl.sweep.status import Live, read, summary, table

TASKS = ("reach-v3", "push-v3")
TOTAL = 40_000
FIELDS = {
    "tasks": (TASKS,),
    "surgery": ("none", "pcgrad"),
    "total_timesteps": (TOTAL,),
    "learning_starts": (2_000,),
    "eval_every": (10_000,),
    "log_every": (10_000,),
    "checkpoint_every": (10_000,),
    "diagnose_every": (0,),
    "seeds": (0, 1, 2),
}
ATTEMPT = Attempt(host="node7", pid=1, started="2026-01-01T00:00:00+0000", commit="c0ffee", code=0)


@pytest.fixture
def sweep(tmp_path):
    """Sweep with two finished runs, and a running, a lost, a failed and a waiting one."""
    folder = SweepFolder(tmp_path / "lr=1 [a] é")
    folder.make()
    found = points(Plan.read(None, FIELDS), "cpu")
    known = {point.method: Known(TOTAL, TASKS) for point in found}
    planned = placed(folder, found, 1, known=known, rules=Rules())
    folder.record([plan.entry for plan in planned], Rules())
    whats = ["finished", "finished", "running", "running", "failed", "waiting"]
    for plan, what in zip(planned, whats, strict=True):
        name = plan.entry.name
        if what != "waiting":
            stop = None if what == "finished" else 20_000
            write_run(folder.run_dir(name), plan.point.config, stop_at=stop, hours=2.0)
            lines = ("out of <memory>",) if what == "failed" else ()
            state = State(what=what, lines=lines, attempts=(ATTEMPT,))
            write_state(folder.state(name), state)
    lost = folder.state(planned[3].entry.name)
    os.utime(lost, (lost.stat().st_mtime - 2 * SILENCE,) * 2)
    return folder, planned


def test_status_reads_only_the_folder(sweep, capsys):
    folder, _planned = sweep
    rows = read(folder)
    whats = [row.what for row in rows]
    assert whats == ["finished", "finished", "running", "waiting", "failed", "waiting"]
    assert [row.steps for row in rows] == [TOTAL, TOTAL, 20_000, 20_000, 20_000, 0]
    running, lost, failed, waiting = rows[2:]
    assert lost.why == "lost on node7" and failed.why == "out of <memory>"
    assert running.left == pytest.approx(3600) and waiting.left is None and waiting.success is None
    assert summary(rows) == (
        # 1 h of the running one, 1 h of the lost one, 2 h of the one not started
        "6 runs: 1 running, 2 waiting, 1 failed, 2 finished, about 4:00:00 left"
    )
    lines = table(rows).splitlines()
    assert lines[2].startswith(running.entry.name) and "20,000/40,000" in lines[2]
    assert main(["status", str(folder.path)]) == 0
    assert capsys.readouterr().out == table(rows) + "\n"
    short = table(rows, max_lines=5, width=30).splitlines()
    assert len(short) == 5 and short[-1] == "… and 4 more" and max(map(len, short)) <= 30


def test_status_needs_neither_torch_nor_a_simulator(sweep):
    code = "import sys; from mtrl.cli.sweep_options import parse; import mtrl.sweep.status as s\n"
    code += "from mtrl.sweep.folder import SweepFolder; from pathlib import Path\n"
    code += "print(s.table(s.read(SweepFolder(Path(sys.argv[1])))))\n"
    code += "assert not {'torch', 'metaworld', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, sweep[0].path], check=True, capture_output=True)


def test_the_table_is_redrawn_in_place_only_on_a_terminal(sweep, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    live = Live(sweep[0])
    live()
    live()  # not again at once
    live.tell("a line")
    live()
    live.clear()
    captured = capsys.readouterr()
    first, second, third = captured.err.split("\x1b[8F\x1b[J")
    assert first == second == table(read(sweep[0])) + "\n" and third == ""
    assert captured.out == "a line\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    Live(sweep[0])()
    assert capsys.readouterr().err == ""


class Page(HTMLParser):
    """Text and images of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.sources, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_is_self_contained_and_names_the_origin_of_results(sweep):
    folder, planned = sweep
    path = write_report(folder)
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    text = " ".join(page.words)
    assert len(page.sources) >= 3
    for source in page.sources:  # embedded images, no links
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64" and base64.b64decode(data)[:4] == b"\x89PNG"
    assert "2 finished" in text and "out of <memory>" in text and "ended early" not in text
    for plan in planned:
        assert f"--seed {plan.entry.seed} " in text and plan.entry.name in text
    assert "c0ffee" in text and "node7" in text and "mtrl-plot" in text
    assert (path.parent / "curves_mean.pdf").stat().st_size > 1000
    table = (path.parent / "table.md").read_text(encoding="utf-8")
    assert re.match(r"\| final evaluation \| none \| pcgrad \|", table)


def test_runs_of_benchmarks_with_equal_task_names_are_not_compared(tmp_path):
    folder = SweepFolder(tmp_path)
    folder.make()
    benchmarks = ("toy_tasks:POINTS", "toy_tasks:BROKEN")
    fields = {name: FIELDS[name] for name in FIELDS.keys() - {"tasks", "surgery", "seeds"}}
    found = points(Plan.read(None, {**fields, "benchmark": benchmarks}), "cpu")
    known = {point.method: Known(TOTAL, ("left", "right")) for point in found}
    planned = placed(folder, found, 1, known=known, rules=Rules())
    folder.record([plan.entry for plan in planned], Rules())
    for plan in planned:
        write_run(folder.run_dir(plan.entry.name), plan.point.config)
    groups = _comparable(folder, read(folder))
    assert list(groups) == ["points-2-tasks-0", "broken-2-tasks-1"]
    assert [len(rows) for rows in groups.values()] == [1, 1]


def test_a_report_with_early_stops_says_that_it_is_biased(sweep):
    folder, planned = sweep
    ended = State(what="ended early", why="eval/success_rate/mean < 1 at 1", attempts=(ATTEMPT,))
    write_state(folder.state(planned[4].entry.name), ended)
    text = write_report(folder).read_text(encoding="utf-8")
    assert "The table shows only the runs that survived" in text
    assert "eval/success_rate/mean &lt; 1 at 1" in text


def test_a_folder_that_is_not_a_sweep_is_rejected(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="out: expected a sweep or an empty folder"):
        SweepFolder(tmp_path).make()
    with (
        pytest.raises(UsageError, match="out: expected a sweep or an empty folder"),
        SweepFolder(tmp_path).alone(),
    ):
        pass
    assert main(["status", str(tmp_path)]) == 2
    assert "sweep: expected the folder of a sweep, got" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]  # and nothing is left there


def test_a_run_folder_of_another_configuration_is_rejected(sweep):
    folder, planned = sweep
    plan = planned[0]
    other = plan.point.config.model_copy(update={"gamma": 0.5})
    (folder.run_dir(plan.entry.name) / "config.yaml").write_text(other.to_yaml())
    (folder.run_dir(plan.entry.name) / "checkpoints").mkdir()
    (folder.run_dir(plan.entry.name) / "checkpoints/step_000000010000.safetensors").touch()
    known = {plan.point.method: Known(TOTAL, TASKS)}
    with pytest.raises(UsageError, match=r"gamma: expected 0.5, as in the run in .*"):
        placed(folder, [plan.point], 1, known=known, rules=Rules())


def test_a_second_sweep_in_a_folder_is_rejected(sweep):
    folder, _ = sweep
    with (
        folder.alone(),
        pytest.raises(UsageError, match="out: expected a sweep that is not running"),
        folder.alone(),
    ):
        pass


def test_started_runs_stay_listed_after_removal_from_the_grid(sweep):
    folder, planned = sweep
    folder.record([planned[0].entry], Rules())
    names = [entry.name for entry in folder.contents().runs]
    assert names == [plan.entry.name for plan in planned[:5]]  # the sixth was never started
