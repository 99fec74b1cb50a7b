"""Sweeps on this machine, with real runs."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from small_sweeps import HERE, TOTAL, command, has_started, never_interrupted, same_policy, wait_for

from mtrl.cli.sweep import main
from mtrl.sweep.attempt import Ending, Job
from mtrl.sweep.drive import LOSSES, drive
from mtrl.sweep.folder import SweepFolder, read_state


def processes_of(out: Path) -> list[int]:
    """Return training processes with the sweep's folder in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"mtrl.cli.train" in words and any(str(out).encode() in word for word in words):
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores and leash require Linux")
@pytest.mark.slow
def test_a_killed_sweep_continues_to_the_same_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    out = tmp_path / "sweep"
    sweep = command(out, "--surgery", "pcgrad", "--max-parallel", "1")
    with subprocess.Popen(sweep, stdout=subprocess.DEVNULL) as process:
        wait_for(has_started(out, "pcgrad"), process)
        (pid,) = processes_of(out)
        assert len(os.sched_getaffinity(pid)) == 1
        process.kill()
    wait_for(lambda: not processes_of(out))  # the leash stops it cleanly
    (run,) = out.glob("runs/*")
    assert not (run / ".owner").exists() and not (run / "eval.json").exists()

    assert main(sweep[3:]) == 0
    assert "1 runs: 1 finished" in capsys.readouterr().out
    assert same_policy(run, never_interrupted(tmp_path / "alone", "--surgery", "pcgrad"))
    state = read_state(SweepFolder(out).state(run.name))
    assert state.what == "finished" and [a.code for a in state.attempts] == [None, 0]
    assert json.loads((run / "eval.json").read_text())["total_timesteps"] == TOTAL
    assert (out / "report/report.html").stat().st_size > 20_000

    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}
    assert main([*sweep[3:], "--dry-run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert line.startswith("# done: mtrl-train ") and str(run) in line
    assert main([*sweep[3:], "--surgery", "pcgrad", "no-such-method"]) == 2
    assert "surgery: unknown 'no-such-method'" in capsys.readouterr().err
    assert main([*sweep[3:], "--surgery", "pcgrad", "rotograd", "--dry-run"]) == 0
    done, new = capsys.readouterr().out.splitlines()
    assert done == line and new.startswith("mtrl-train ") and "--surgery rotograd" in new
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}


def broken(out: Path, *arguments: str) -> list[str]:
    """Return the arguments of a sweep over benchmarks; an environment of one of them fails."""
    flags = "--config mt10_plain --max-restarts 0 --total-timesteps 240 --learning-starts 200 "
    flags += "--hidden-sizes 8 --batch-size 8 --device cpu --max-parallel 1 --cpus-per-run 1"
    return [*flags.split(), "-o", str(out), "--benchmark", *arguments]


def test_a_failing_run_is_told_with_its_last_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    out = tmp_path / "sweep"
    assert main(broken(out, "toy_tasks:BROKEN", "--retries", "0")) == 1
    printed = capsys.readouterr().out
    assert re.search(r"toy_tasks-BROKEN_none_\w+ failed:\n(    .*\n)*    .*no such luck", printed)
    assert printed.endswith("1 runs: 1 failed\n")  # and no report, because there is no result
    (state,) = (read_state(path) for path in out.glob("states/*.json"))
    assert state.what == "failed" and [each.code for each in state.attempts] == [1]


@pytest.mark.slow
def test_a_failing_run_is_retried_and_stops_no_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    out = tmp_path / "sweep"
    assert main(broken(out, "toy_tasks:POINTS", "toy_tasks:BROKEN")) == 1
    printed = capsys.readouterr().out
    assert "failed and is retried (1 of 1): RuntimeError: no such luck" in printed
    assert "2 runs: 1 failed, 1 finished" in printed
    (state,) = (read_state(path) for path in out.glob("states/*BROKEN*"))
    assert state.what == "failed" and len(state.attempts) == 2
    assert "no such luck" in " ".join(state.lines)


def test_parallel_runs_share_the_memory(tmp_path, monkeypatch, capsys):
    """Reject runs that fit alone, but not as many at a time; a single one is not parallel."""
    monkeypatch.setattr("mtrl.devices.total_memory", lambda device: 400 * 2**20)
    monkeypatch.setattr("mtrl.sweep.local.cores", lambda: [0, 1])
    monkeypatch.setattr("mtrl.cli.sweep_options.cores", lambda: [0, 1])
    # A transition of reach-v3 has 39 + 4 + 2 numbers: 300 of 400 MiB.
    flags = f"--config mt10_plain --tasks reach-v3 --device cpu --max-parallel 2 -o {tmp_path}/out"
    flags += (
        f" --dry-run --buffer-size {300 * 2**20 // (4 * 45)} --hidden-sizes 8 --envs-per-task 1"
    )
    assert main([*flags.split(), "--seeds", "0"]) == 0
    assert main([*flags.split(), "--seeds", "0", "1"]) == 2
    assert "0.2 GiB of memory for each of 2 runs at a time" in capsys.readouterr().err


class Script:
    """Backend whose runs end as listed."""

    def __init__(self, *endings: str) -> None:
        self.running, self._endings, self.started, self._waiting = 0, list(endings), [], []

    @property
    def has_room(self) -> bool:
        return not self.running

    def start(self, job: Job) -> None:
        self.running += 1
        self.started.append(job.name)
        self._waiting.append(Ending(job.name, self._endings.pop(0), ("its last words",)))

    def endings(self, timeout: float) -> list[Ending]:
        done, self._waiting = self._waiting, []
        self.running -= len(done)
        return done

    def stop(self) -> None:
        self._endings = ["stopped"] * 9

    def close(self) -> None:
        pass


def jobs(tmp_path, *names: str):
    for name in names:
        paths = {"run_dir": tmp_path / name, "log": tmp_path / "log", "state": tmp_path / "state"}
        yield Job(name=name, arguments=(), **paths)


def test_retries_of_failed_and_of_lost_runs(tmp_path):
    backend = Script("failed", "finished", "failed", "finished")
    found = drive(jobs(tmp_path, "a", "b"), backend, retries=1)
    assert backend.started == ["a", "a", "b", "b"]
    assert [e.name for e in found.having("finished")] == ["a", "b"]

    backend = Script("failed", "failed", "finished")
    found = drive(jobs(tmp_path, "a", "b"), backend, retries=1)
    assert found.ended["a"].lines == ("its last words",) and found.ended["b"].what == "finished"

    backend = Script(*["lost"] * (LOSSES + 5))
    found = drive(jobs(tmp_path, "a"), backend)
    assert found.ended["a"].what == "lost" and len(backend.started) == LOSSES + 1


def test_a_signal_stops_runs_and_starts_no_more(tmp_path):
    backend = Script(*["finished"] * 3)
    calls = iter(range(9))

    def show() -> None:
        if next(calls) == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    found = drive(jobs(tmp_path, "a", "b", "c"), backend, show=show)
    assert found.signal == signal.SIGTERM and backend.started == ["a"]
