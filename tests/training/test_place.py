"""Run folders: creating, resuming, invalid ones, and locking."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from small_runs import save_checkpoint

from mtrl import resume, train
from mtrl.cli.train import main
from mtrl.config.train import TrainConfig
from mtrl.errors import RunError, UsageError
from mtrl.training import place
from mtrl.training.check import LONGEST_TEMPORARY_FOLDER, check
from mtrl.training.checkpoint import load_newest
from mtrl.training.lock import locked
from mtrl.training.place import make_folder, nothing_left, resumable

FLAGS = (
    "--config plain --tasks reach-v3 --hidden-sizes 8 --batch-size 8 "
    "--total-timesteps 120 --learning-starts 40 "
    "--horizon 10 --eval-every 60 --eval-episodes 1 --log-every 40 --checkpoint-every 40 "
    "--diagnose-every 0 --simulator metaworld --workers 1"
).split()


def test_a_run_folder_may_start_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TrainConfig(run_dir="~/x").run_dir == tmp_path / "x"


def test_runs_started_in_the_same_second_have_different_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(place.time, "strftime", lambda _: "20261126-120000")
    made = [make_folder(TrainConfig(), "mt10", False)[0] for _ in range(3)]
    name = "mt10_none_seed0_20261126-120000"
    assert [path.name for path in made] == [name, f"{name}-2", f"{name}-3"]


def test_folder_names_are_valid_on_any_file_system(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(surgery=f"torchjd:Constant(weights={[0.1] * 200})")
    (run_dir, _) = make_folder(config, "../ä" + "€" * 300, False)
    assert len(run_dir.name.encode()) < 255 and run_dir.parent == Path("runs") and run_dir.is_dir()
    with pytest.raises(UsageError, match=r"cannot create x.*: File name too long"):
        make_folder(TrainConfig(run_dir="x" * 300), "mt10", False)


def test_hints_can_be_pasted_into_a_shell(tmp_path):
    (tmp_path / "a b").mkdir()
    with pytest.raises(UsageError, match=r"\(--resume '.*/a b' resumes the run"):
        make_folder(TrainConfig(run_dir=tmp_path / "a b"), "mt10", False)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RunError, "not enough memory"),
        (RuntimeError("something else"), RuntimeError, "something else"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_failed_start_leaves_nothing_behind(error, kind, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = make_folder(TrainConfig(), "mt10", False)
    with pytest.raises(kind, match=message), nothing_left(made):
        (made[0] / "config.yaml").write_text("seed: 1\n")
        raise error
    assert not list(tmp_path.iterdir())


def test_too_little_memory_on_a_gpu_is_recognised(tmp_path):
    pattern = r"^not enough memory: CUDA out .*; free some, or .*batch_size\. No checkpoint has"
    with pytest.raises(RunError, match=pattern), resumable(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize("room", [32, 96], ids=["to open it", "to read it"])
def test_a_checkpoint_that_does_not_fit_is_not_taken_for_a_damaged_one(room, tmp_path):
    """Its 64 MiB are mapped twice; `room` is the memory left [MiB]."""
    path = save_checkpoint(tmp_path, 5, {"x": torch.ones(2**24)}, "a: 1")
    pattern = (
        r"^not enough memory: .*Cannot allocate memory.*step_0*5\.safetensors is intact; to re"
    )
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room * 2**20, before[1]))
    try:
        with pytest.raises(RunError, match=pattern), resumable(tmp_path):
            load_newest(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert path.exists() and load_newest(tmp_path)[1] == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_note(number, monkeypatch, tmp_path):
    def acquire(self, timeout):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with locked(tmp_path) as warning:
        assert warning is not None and "does not support locks" in warning
    monkeypatch.undo()
    with locked(tmp_path) as warning:
        assert warning is None


def test_a_temporary_folder_too_long_for_sockets_gives_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/" + "t" * LONGEST_TEMPORARY_FOLDER)
    assert main([*FLAGS, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "TMPDIR: expected a path of at most 75 bytes" in error and "TMPDIR=/tmp" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--buffer-size", "1000000000000"], "buffer_size: expected at most the "),
        (["--hidden-sizes", "65536", "65536"], "agent: expected networks that fit in "),
        (["--hidden-sizes", "99999999999999999999"], "expected widths from 1 to 65536, got 999"),
        (["--threads", "100000"], "threads: input should be less than or equal to 1024, got"),
        (["--workers", "100000"], "workers: input should be less than or equal to 1024, got"),
        (["--envs-per-task", "10_000"], "envs_per_task: expected at most the "),
        (["--envs-per-task", "1000", "--buffer-size", "10"], "envs_per_task: expected at most buf"),
        (["--critic-bins", "1e11"], "agent: expected networks that fit in "),
        (["--total-timesteps", "1e18"], "total_timesteps: input should be less than 10000000"),
    ],
)
def test_runs_beyond_the_memory_are_rejected_at_once(flags, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*FLAGS, "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_errors_come_before_pytorch():
    """Wrong names, numbers or folders are found without its import, which takes two seconds."""
    cases = [
        ["--surgery", "pcgard"],
        ["--surgery", "cagrad(d=1)"],
        ["--surgery", "nowhere.at:all"],
        ["--import", "nowhere"],
        ["--tasks", "reech-v3"],
        ["--benchmark", "mt11"],
        ["--config", "quickstart", "--learning-starts", "300000"],
        ["--run-dir", "/tmp"],
        ["--seed", "-1"],
        ["--init-from", "nowhere"],
        ["--horizon", "5000"],  # more than Meta-World's on any device
        ["--demonstrations", "nowhere.npz"],
    ]
    code = (
        "import sys\nfrom mtrl.cli import collect, eval, export, train\n"
        f"for flags in {cases}: assert train.main(flags) == 2\n"
        "assert eval.main(['nowhere']) == collect.main(['nowhere', '-o', 'x.npz']) == 2\n"
        "assert export.main(['nowhere', '-o', 'x.safetensors']) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr.count("error: ") == len(cases) + 3


def test_resume_if_exists(tmp_path, capsys):
    """One command starts, resumes, keeps a complete run, and rejects a different one."""
    run_dir = tmp_path / "run"
    flags = ["--benchmark", "mt1:reach-v3", *FLAGS[:2], *FLAGS[4:], "--device", "cpu"]
    again = [*flags, "--run-dir", str(run_dir), "--resume-if-exists"]
    run_dir.mkdir()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert main([*again, "--max-runtime", "1e-9"]) == 0
    assert "stopped after --max-runtime" in capsys.readouterr().out
    for path in (run_dir / "checkpoints").iterdir():  # killed before its first checkpoint
        path.unlink()
    assert main([*again, "--max-runtime", "1e-9"]) == 0
    assert main([*again, "--max-runtime", "1"]) == 0
    capsys.readouterr()
    before = (run_dir / "eval.json").read_bytes()
    assert main([*again, "--max-runtime", "1"]) == 0
    assert "is complete with 120 steps" in capsys.readouterr().out
    assert (run_dir / "eval.json").read_bytes() == before
    resumed = TrainConfig.from_yaml(run_dir / "config.yaml")
    assert (resumed.benchmark, resumed.tasks) == ("mt1:reach-v3", None)
    assert main([*again, "--seed", "5"]) == 2
    assert "seed: expected 0, as in the run in" in capsys.readouterr().err
    assert main([*FLAGS, "--resume-if-exists"]) == 2
    assert "resume_if_exists: expected --run-dir with it" in capsys.readouterr().err
    assert main([*FLAGS, "--run-dir", str(tmp_path / "other"), "--resume-if-exists"]) == 2
    assert "expected a run or an empty folder" in capsys.readouterr().err
    with pytest.raises(UsageError, match="is complete"):
        resume(run_dir)
    config = TrainConfig.from_yaml(run_dir / "config.yaml")
    outcome = train(config.model_copy(update={"total_timesteps": 160}), resume_if_exists=True)
    assert outcome.evaluation is not None


def test_a_check_takes_no_memory_for_networks():
    """Networks of 3 GiB, including optimisers, are checked on the meta device."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = {"tasks": ("reach-v3", "push-v3"), "hidden_sizes": (4000, 4000, 4000)}
    check(TrainConfig(**sizes, surgery="rotograd", device="cpu", buffer_size=200))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
