"""Real faults of runs at small sizes, and what remains of them."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy_tasks
from safetensors.torch import load_file
from small_runs import TASKS, TOTAL, point_config, save_checkpoint, small_config

from mtrl import Benchmark, Callback, TrainConfig, resume, train
from mtrl.envs.benchmarks import get_benchmark
from mtrl.errors import RunError, UsageError, plain
from mtrl.folder import find_policy, newest_checkpoint, steps_evaluated
from mtrl.training.check import check
from mtrl.training.checkpoint import load_newest
from mtrl.training.interrupt import Interrupt
from mtrl.training.lock import locked
from mtrl.training.trainer import Trainer

POINTS = "--benchmark toy_tasks:POINTS"
FINDS_POINTS = os.environ | {"PYTHONPATH": str(Path(toy_tasks.__file__).parent)}
"""Environment variables of a process that can import `toy_tasks`."""


def trainer_of(settings: TrainConfig) -> Trainer:
    benchmark, device, settings = check(settings)
    assert settings.run_dir is not None
    settings.run_dir.mkdir()
    (settings.run_dir / "config.yaml").write_text(settings.to_yaml())
    return Trainer(settings, benchmark, device, settings.run_dir)


def policy(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "policy_final.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run without faults."""
    return train(point_config(tmp_path_factory.mktemp("runs") / "a")).run_dir


def stopped(run_dir: Path, at: int, config: Callable[[Path], TrainConfig] = point_config) -> Path:
    """A run that was stopped after some steps."""
    trainer = trainer_of(config(run_dir))
    step = trainer.step

    def and_stop() -> None:
        step()
        if trainer.state.steps == at:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.step = and_stop  # type: ignore[method-assign]
    assert trainer.run().signal == signal.SIGTERM
    return run_dir


def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(finished, tmp_path, capsys):
    run_dir = stopped(tmp_path / "b", 150)
    newest = newest_checkpoint(run_dir)
    content = bytearray(newest.read_bytes())
    content[-7] ^= 1  # one bit of one weight
    newest.write_bytes(content)
    outcome = resume(run_dir)
    said = capsys.readouterr().out
    assert f"{newest} is damaged: its checksum does not match; it is set aside" in said
    assert newest.with_suffix(".damaged").exists()
    assert same(policy(outcome.run_dir), policy(finished))


def test_a_run_with_only_damaged_checkpoints_gives_an_error(tmp_path):
    run_dir = stopped(tmp_path / "b", 150)
    for path in (run_dir / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"cannot read .*; resume: cannot read .*"):
        resume(run_dir)


def test_a_damaged_record_or_a_missing_folder_is_named(finished, tmp_path, monkeypatch):
    run_dir = shutil.copytree(finished, tmp_path / "b")
    (run_dir / "run.json").write_text("[{")
    with pytest.raises(UsageError, match=r"^resume: cannot read .*run\.json: .*; remove it$"):
        resume(run_dir, total_timesteps=320)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(UsageError, match=f"got {tmp_path / 'b' / 'b'}, which is no folder$"):
        resume(Path("b"))


def test_max_runtime_stops_cleanly_and_the_run_can_be_resumed(finished, tmp_path, capsys):
    settings = point_config(tmp_path / "b", max_runtime=1e-9)
    assert train(settings).evaluation is None
    assert "stopped after --max-runtime" in capsys.readouterr().out
    outcome = resume(tmp_path / "b", max_runtime=1.0)
    assert outcome.evaluation is not None and outcome.signal is None
    assert same(policy(outcome.run_dir), policy(finished))


@pytest.mark.parametrize("final", [False, True], ids=["on the way", "the last one"])
def test_a_signal_does_not_wait_for_an_evaluation(final, finished, tmp_path, monkeypatch):
    """The evaluation is abandoned, and made when the run is resumed, with the same logs."""
    asked = interrupt_evaluations(monkeypatch, of=50 if final else 1)
    outcome = train(point_config(tmp_path / "b"))
    assert outcome.signal == signal.SIGTERM and asked == [50 if final else 1]
    assert resume(tmp_path / "b").evaluation is not None
    assert same(policy(tmp_path / "b"), policy(finished))
    assert evaluations(tmp_path / "b") == evaluations(finished)


def interrupt_evaluations(monkeypatch, of):
    """Send SIGTERM within the first evaluation of so many episodes; the list has them then."""
    import mtrl.training.judge

    original, asked = mtrl.training.judge.evaluate_in, []

    def evaluate_in(agent, envs, seed, episodes, tick, watch):
        def interrupted(*done: int) -> None:
            if not asked and episodes == of:
                asked.append(episodes)
                os.kill(os.getpid(), signal.SIGTERM)
            tick(*done)

        return original(agent, envs, seed, episodes, tick=interrupted, watch=watch)

    monkeypatch.setattr(mtrl.training.judge, "evaluate_in", evaluate_in)
    return asked


def test_an_extended_run_is_complete_only_once_its_own_policy_is_evaluated(
    finished, tmp_path, monkeypatch
):
    """The earlier policy and its evaluation stay in the folder, but are not taken for the new."""
    run_dir = shutil.copytree(finished, tmp_path / "b")
    assert find_policy(run_dir).name == "policy_final.safetensors"
    resume(run_dir, total_timesteps=320, max_runtime=1e-9)
    assert steps_evaluated(run_dir) == 240
    asked = interrupt_evaluations(monkeypatch, of=50)
    outcome = resume(run_dir, max_runtime=1.0)
    assert outcome.signal == signal.SIGTERM and asked == [50] and steps_evaluated(run_dir) == 240
    assert find_policy(run_dir).name == "step_000000000320.safetensors"
    assert resume(run_dir).evaluation is not None
    assert steps_evaluated(run_dir) == 320
    assert find_policy(run_dir).name == "policy_final.safetensors"
    with pytest.raises(UsageError, match="is complete with 320 steps"):
        resume(run_dir)


def test_a_second_signal_exits_at_once():
    with Interrupt() as interrupt:
        assert not interrupt.wanted
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.wanted and interrupt.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run_dir / "progress.json").read_text().splitlines())
    tag = "eval/success_rate/mean"
    return [(row["time/total_timesteps"], row[tag]) for row in rows if tag in row]


def test_a_second_process_in_a_run_folder_is_rejected(tmp_path):
    run_dir = stopped(tmp_path / "b", 100)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom pathlib import Path\nfrom mtrl.training.lock import locked\n"
            "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)",
            run_dir,
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match=f"run_dir: expected .* where process {holder.pid} on .*"):
        resume(run_dir)
    holder.kill()
    holder.wait()
    with locked(run_dir) as note:  # the kernel has released the lock
        assert note is not None and f"taking over from process {holder.pid}" in note
    with locked(run_dir) as note:
        assert note is None


@pytest.mark.parametrize(
    "frequent",
    ["--checkpoint-every 60 --log-every 2000", "--log-every 20 --buffer-size 20"],
    ids=["checkpoints", "logs"],
)
def test_a_full_disk_leaves_the_previous_checkpoint(frequent, tmp_path):
    """Simulated by a limit on file sizes: the first checkpoints fit and later ones do not, or
    they all do and TensorBoard's file does not.
    """
    code = (
        "import resource, signal, sys\nfrom mtrl.cli.train import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2 * (limit := int(sys.argv[1])), limit * 2))\n"
        "sys.exit(main(sys.argv[2:]))"
    )
    flags = (
        "--total-timesteps 4000 --learning-starts 40 --checkpoint-every 100 --horizon 10 "
        "--workers 1 --hidden-sizes 8 --batch-size 8 --eval-every 4000 "
        f"{POINTS} {frequent}"
    )
    run_dir = tmp_path / "b"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "40000",
            "--config",
            "plain",
            *flags.split(),
            "--run-dir",
            run_dir,
        ],
        env=FINDS_POINTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    state, notes = load_newest(run_dir)
    assert not notes and 60 <= state["steps"] < 4000
    path = newest_checkpoint(run_dir)
    assert f"{path} is intact; to resume: mtrl-train --resume {run_dir}" in done.stderr
    assert "too large" in done.stderr and done.stderr.count("\n") == 1
    assert not list(run_dir.rglob("*.tmp"))


def test_a_removed_folder_stops_the_run_with_an_error(tmp_path):
    trainer = trainer_of(point_config(tmp_path / "b"))
    step = trainer.step

    def and_lose() -> None:
        step()
        if trainer.state.steps == 100:
            (tmp_path / "b/checkpoints").rename(tmp_path / "elsewhere")
            (tmp_path / "b/checkpoints").touch()  # a file

    trainer.step = and_lose  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"exists.*No checkpoint has been written yet"):
        trainer.run()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_whole_folder_is_removed_names_it(tmp_path):
    trainer = trainer_of(point_config(tmp_path / "b"))
    step = trainer.step

    def and_lose() -> None:
        step()
        if trainer.state.steps == 100:
            (tmp_path / "b").rename(tmp_path / "elsewhere")

    trainer.step = and_lose  # type: ignore[method-assign]
    with pytest.raises(RunError, match=f"^the run folder {tmp_path / 'b'} no longer exists$"):
        trainer.run()


def test_errors_of_files_named_in_bytes_are_plain():
    with pytest.raises(FileNotFoundError) as error:
        os.stat(b"no-such-folder/events")
    assert plain(error.value) == "No such file or directory: 'no-such-folder/events'"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_lost_permissions_leave_the_previous_checkpoint():
    nobody = 65534
    with tempfile.TemporaryDirectory() as folder:  # other users cannot access pytest's folder
        Path(folder).chmod(0o755)
        run_dir = Path(folder) / "b"
        trainer = trainer_of(point_config(run_dir))
        step, user = trainer.step, os.geteuid()

        def and_lose() -> None:
            step()
            if trainer.state.steps == 100:
                for path in (run_dir, run_dir / "checkpoints"):
                    path.chmod(0o555)
                if user == 0:  # root ignores permissions
                    os.seteuid(nobody)

        trainer.step = and_lose  # type: ignore[method-assign]
        try:
            with pytest.raises(
                RunError, match=r"Permission denied.*step_\d*60\.safetensors is intact"
            ):
                trainer.run()
        finally:
            os.seteuid(user)
            for path in (run_dir, run_dir / "checkpoints"):
                path.chmod(0o755)
        state, notes = load_newest(run_dir)
        assert not notes and state["steps"] == 60


def test_lost_simulators_are_replaced_and_counted_up_to_the_limit(tmp_path):
    trainer = trainer_of(point_config(tmp_path / "b", max_restarts=1))
    step, lost = trainer.step, (90, 150)

    def and_kill() -> None:
        if trainer.state.steps in lost:
            trainer.state.envs._parts[0]._processes[0].kill()
        step()

    trainer.step = and_kill  # type: ignore[method-assign]
    with pytest.raises(
        RunError, match=r"task '(left|right)'.*died.*step_0*150\.safetensors is intact; to resume"
    ):
        trainer.run()
    rows = list(map(json.loads, (tmp_path / "b/progress.json").read_text().splitlines()))
    assert [row["time/restarts"] for row in rows if "time/restarts" in row] == [0, 0, 1]
    assert load_newest(tmp_path / "b")[0]["steps"] == 150
    outcome = resume(tmp_path / "b")
    assert outcome.evaluation is not None


EXBIBYTE = 2**60
SHORT: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.empty(EXBIBYTE, dtype=torch.uint8),
    "Python": lambda: bytearray(EXBIBYTE),
    "NumPy": lambda: np.empty(EXBIBYTE, np.uint8),
}
"""Allocations that fail on any machine."""
wanted: list[str] = []
"""Those that `hungry` makes."""


def hungry(gramian: torch.Tensor) -> torch.Tensor:
    """Plain average, until it needs more memory than there is."""
    for name in wanted:
        SHORT[name]()
    return torch.full_like(gramian[0], 1 / len(gramian))


class Hungry(Callback):
    """Makes the method fail after 100 steps."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_step(self) -> None:
        if self.num_timesteps == 100:
            wanted.append(self.name)


@pytest.mark.parametrize("name", SHORT)
def test_a_run_that_lacks_memory_says_how_to_resume(name, tmp_path):
    """Real failures of three allocators; the newest checkpoint is of 60 steps."""
    settings = point_config(tmp_path / "b", surgery=f"{__name__}:hungry")
    path = tmp_path / "b/checkpoints/step_000000000060.safetensors"
    left = re.escape(f"{path} is intact; to resume: mtrl-train --resume {tmp_path / 'b'}")
    reason = r"^not enough memory: \S.*; free some, or start a new run with a smaller batch_size\. "
    try:
        with pytest.raises(RunError, match=f"{reason}{left}$"):
            train(settings, callbacks=[Hungry(name)])
        with pytest.raises(RunError, match=f"{reason}{left}$"):
            resume(tmp_path / "b")  # nor is there enough now
    finally:
        wanted.clear()
    assert load_newest(tmp_path / "b")[0]["steps"] == 60
    smaller = {"init_from": tmp_path / "b", "batch_size": 4, "total_timesteps": 80}
    assert train(point_config(tmp_path / "c", **smaller)).evaluation is not None
    assert resume(tmp_path / "b").evaluation is not None


def odd(gramian: torch.Tensor) -> torch.Tensor:
    """Plain average, until it returns weights of another shape, or raises."""
    if "raise" in wanted:
        raise ArithmeticError("my word")
    return torch.full_like(gramian[0], 1 / len(gramian))[: 1 if wanted else None]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "shape",
            RunError,
            "surgery: expected weights of shape (2,)",
        ),
        ("raise", ArithmeticError, "my word"),
    ],
)
def test_other_errors_of_a_run_say_how_to_resume(name, kind, message, tmp_path, capsys):
    """A wrong result is one line; the traceback of an error of a user's function is kept."""
    settings = point_config(tmp_path / "b", surgery=f"{__name__}:odd")
    path = tmp_path / "b/checkpoints/step_000000000060.safetensors"
    try:
        with pytest.raises(kind, match=re.escape(message)) as told:
            train(settings, callbacks=[Hungry(name)])
    finally:
        wanted.clear()
    said = str(told.value) if kind is RunError else capsys.readouterr().out
    assert f"{path} is intact; to resume: mtrl-train --resume {tmp_path / 'b'}" in said
    assert resume(tmp_path / "b").evaluation is not None


class Rich(gym.Env):
    """Its rewards overflow float32 when squared from its fortieth step on."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, pays: bool) -> None:
        self.pays, self.steps = pays, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        reward = 1e30 if self.pays and self.steps > 40 else 0.0
        return np.zeros(3, np.float32), reward, False, False, {"success": False}


def test_nan_stops_the_run_before_it_is_saved(tmp_path):
    benchmark = Benchmark("rich", {"poor": partial(Rich, False), "rich": partial(Rich, True)})
    often = {"checkpoint_every": 40, "eval_every": TOTAL}
    settings = point_config(tmp_path / "b", **often)
    pattern = r"critic_loss of task 'rich' became .* in update \d+, noticed after \d+ steps.*intact"
    with pytest.raises(RunError, match=pattern):
        train(settings, benchmark)
    (evidence,) = (tmp_path / "b").glob("stopped_*.safetensors")
    assert load_file(evidence)["rewards"][1].max() > 1e29
    state, _ = load_newest(tmp_path / "b")
    assert all(value.isfinite().all() for value in state["agent"].values())


def test_a_checkpoint_is_intact_whenever_its_writer_is_killed(tmp_path):
    """Fifty kills at random moments while only writing."""
    dice = random.Random(0)
    state = {"x": torch.arange(200_000), "name": "value"}
    save_checkpoint(tmp_path, 0, state, "a: 1")
    seen = set()
    for kill in range(50):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            steps = 1_000 * (kill + 1)
            while True:
                steps += 1
                save_checkpoint(tmp_path, steps, state, "a: 1")
                os.write(write, b".")
        if kill % 2:  # otherwise the child may not have started on a busy machine
            os.read(read, 1)
        time.sleep(dice.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
        found, notes = load_newest(tmp_path)
        assert not notes and torch.equal(found["x"], state["x"])
        seen.add(newest_checkpoint(tmp_path).name)
    assert len(seen) > 10  # some checkpoints were written


@pytest.mark.slow
def test_a_run_killed_at_fifty_random_moments_can_always_be_resumed(tmp_path):
    """With the real command; the final result equals that of an uninterrupted run."""
    dice = random.Random(1)
    flags = (
        "--total-timesteps 6000 --learning-starts 200 --checkpoint-every 40 --horizon 50 "
        "--workers 1 --hidden-sizes 8 --batch-size 8 --eval-every 3000 --eval-episodes 1 "
        "--log-every 100 --diagnose-every 0 --simulator metaworld"
    ).split()
    program = [sys.executable, "-m", "mtrl.cli.train"]

    def begin(run_dir: Path) -> list[str]:
        return [*program, "--config", "plain", "--tasks", *TASKS, *flags, "--run-dir", str(run_dir)]

    subprocess.run(begin(tmp_path / "a"), check=True, capture_output=True)
    run_dir, kills = tmp_path / "b", 0
    command = begin(run_dir)
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if kills < 50:
            start = time.monotonic()
            before = set((run_dir / "checkpoints").glob("step_*"))
            while set((run_dir / "checkpoints").glob("step_*")) == before:  # it makes progress
                assert process.poll() is None and time.monotonic() < start + 120
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.5))
            process.kill()
            kills += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        assert not load_newest(run_dir)[1]
        command = [*program, "--resume", str(run_dir)]
    assert kills == 50
    assert same(policy(run_dir), policy(tmp_path / "a"))
    assert (run_dir / "eval.csv").read_bytes() == (tmp_path / "a/eval.csv").read_bytes()


FAILS = """
import sys
from mtrl.cli import train
from mtrl.training.trainer import Trainer
step = Trainer.step
def fail(self):
    step(self)
    if self.state.steps >= 60: raise OSError("no such luck")
if "--fails" in sys.argv:
    sys.argv.remove("--fails")
    Trainer.step = fail
sys.exit(train.main())
"""
"""The command, which can be made to fail."""


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([], 1),
        ([signal.SIGTERM], 128 + signal.SIGTERM),
        ([signal.SIGINT, signal.SIGINT], 128 + signal.SIGINT),
        ([signal.SIGKILL], -signal.SIGKILL),
    ],
    ids=["fails", "asked", "asked twice", "killed"],
)
def test_no_process_is_left_behind(signals, code, tmp_path):
    """Neither simulators nor the server that forks them outlive the command."""
    flags = (
        "--total-timesteps 1000000 --learning-starts 40 --horizon 10 --hidden-sizes 8 "
        f"--batch-size 8 --checkpoint-every 40 {POINTS}"
    )
    command = [sys.executable, "-c", FAILS, "--config", "plain"]
    command += flags.split()
    command += ["--run-dir", str(tmp_path / "b"), *([] if signals else ["--fails"])]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, start_new_session=True, env=FINDS_POINTS
    ) as process:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "b/checkpoints").glob("step_*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.05)
        _, errors = process.communicate(timeout=60)
    # A second SIGINT may kill the interpreter during its exit: a shell reports
    # both as 130.
    assert process.returncode in ({130, -signal.SIGINT} if code == 130 else {code}), errors
    assert signals or b"no such luck" in errors
    deadline = time.monotonic() + 10
    while alive := [p for p in processes() if p[1] == process.pid]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def processes() -> list[tuple[int, int]]:
    """Return the number and session of each process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found.append((int(path.parent.name), int(fields[3])))
    return found


def test_a_checkpoint_of_other_tasks_is_rejected(tmp_path):
    """With a one-line error, also without a benchmark.json."""
    run_dir = stopped(tmp_path / "b", 100, small_config)
    with pytest.raises(UsageError, match="mt1-reach-v3 without 'drawer-close-v3'"):
        resume(run_dir, benchmark=get_benchmark("mt1:reach-v3"))
    (run_dir / "benchmark.json").unlink()
    with pytest.raises(UsageError, match="tasks: unknown 'drawer-close-v3'"):
        resume(run_dir, benchmark=get_benchmark("mt1:reach-v3"))
    before = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        before.replace("hidden_sizes:\n  - 8", "hidden_sizes:\n  - 9")
    )
    edited = (run_dir / "config.yaml").read_text()
    assert edited != before
    with pytest.raises(UsageError, match="resume: expected the state of a run with this config"):
        resume(run_dir)
    assert (run_dir / "config.yaml").read_text() == edited  # nothing was overwritten
    assert not (run_dir / "benchmark.json").exists()
