"""Run folders: creating, finding and removing them, and what is left after an error."""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtrl.config.agent import AgentConfig
from mtrl.config.rates import total
from mtrl.config.schedule import Schedule
from mtrl.config.train import TrainConfig, shown
from mtrl.errors import RunError, UsageError, is_out_of_memory, one_line, plain
from mtrl.folder import newest_checkpoint, newest_or_none, read_benchmark
from mtrl.training.console import say

MAY_CHANGE = ("total_timesteps", "max_runtime", "max_restarts")
"""Fields that a resumed run may change."""


def quoted(path: Path) -> str:
    """Quote a path for the shell."""
    return shlex.quote(str(path))


def existing_run(config: TrainConfig, compare_tasks: bool) -> Path | None:
    """Return the folder of the run that `config` would resume; None if it has to be started.

    Raises:
        UsageError: If the folder holds something else, or a run with another configuration.
    """
    run_dir = config.run_dir
    if run_dir is None:
        raise UsageError("resume_if_exists: expected --run-dir with it, got none")
    if not run_dir.exists():
        return None
    if newest_or_none(run_dir) is None:
        is_ours = (run_dir / "config.yaml").exists() or not any(run_dir.glob("[!.]*"))
        if not is_ours:
            raise UsageError(f"run_dir: expected a run or an empty folder, got {run_dir}")
        return None
    ours, before = config.flat(), TrainConfig.from_yaml(run_dir / "config.yaml").flat()
    resolved = {"run_dir", "precision", "compile", *MAY_CHANGE}
    resolved |= {name for name, value in ours.items() if value is None}  # the default
    if (record := read_benchmark(run_dir)) is not None:
        ours |= {name: total(ours[name], len(record.tasks)) for name in Schedule.PER_TASK}
    if isinstance(ours["target_entropy"], str):  # per action, and their number is unknown here
        resolved.add("target_entropy")
    resolved |= set() if compare_tasks else {"benchmark", "tasks"}
    if config.transfer.init_from is not None:  # whose networks the run took
        resolved |= AgentConfig.model_fields.keys()
    for name, value in ours.items():
        if name not in resolved and value != before[name]:
            raise UsageError(
                f"{name}: expected {shown(before[name])}, as in the run in {run_dir}, got "
                f"{shown(value)}"
            )
    return run_dir


def make_folder(config: TrainConfig, benchmark: str, may_exist: bool) -> list[Path]:
    """Create the run folder; return the created folders, innermost first.

    Raises:
        UsageError: If it exists or cannot be created.
    """
    name = f"{file_name(benchmark)}_{file_name(config.learner.surgery)}_seed{config.seed}"
    default = Path("runs") / f"{name}_{time.strftime('%Y%m%d-%H%M%S')}"
    # Another run may have started in this second.
    defaults = [default, *(default.with_name(f"{default.name}-{n}") for n in range(2, 1_000))]
    for run_dir in defaults if config.run_dir is None else [config.run_dir]:
        try:
            missing = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
            run_dir.mkdir(parents=True)
            return missing
        except FileExistsError:
            if may_exist and run_dir.is_dir():
                return []
        except OSError as error:
            raise UsageError(f"run_dir: cannot create {run_dir}: {error.strerror}") from None
    raise _exists(run_dir)


def expect_new(run_dir: Path | None) -> None:
    """Check that a folder does not exist."""
    if run_dir is not None and run_dir.exists():
        raise _exists(run_dir)


def _exists(run_dir: Path) -> UsageError:
    return UsageError(
        f"run_dir: expected a folder that does not exist, got {run_dir} "
        f"(--resume {quoted(run_dir)} resumes the run in it)"
    )


@contextmanager
def nothing_left(made: list[Path]) -> Iterator[None]:
    """Remove the run folder on failure, as long as it holds nothing of value."""
    try:
        with enough_memory("reduce buffer_size, envs_per_task or hidden_sizes"):
            yield
    except BaseException:
        for path in made[:1]:
            shutil.rmtree(path, ignore_errors=True)
        for path in made[1:]:
            with suppress(OSError):  # it contains another run
                path.rmdir()
        raise


@contextmanager
def resumable(run_dir: Path) -> Iterator[None]:
    """Return a context in which an error that ends a run says how to resume it.

    Errors of other kinds keep their type and traceback, after a line that says it.

    Raises:
        RunError: In place of one of memory, the disk, simulators, callbacks or infinite numbers.
    """
    try:
        with enough_memory("free some, or start a new run with a smaller batch_size"):
            yield
    except UsageError:  # of what was asked, before anything ran
        raise
    except (FloatingPointError, OSError, RunError) as error:
        if isinstance(error, OSError) and not run_dir.is_dir():
            raise RunError(f"the run folder {run_dir} no longer exists") from None
        raise RunError(f"{plain(error)}. {_what_is_left(run_dir)}") from error.__cause__
    except Exception:
        say(f"the run ends with an error. {_what_is_left(run_dir)}")
        raise


def _what_is_left(run_dir: Path) -> str:
    try:
        path = newest_checkpoint(run_dir)
    except UsageError:
        return "No checkpoint has been written yet."
    return f"{path} is intact; to resume: mtrl-train --resume {quoted(run_dir)}"


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Return a context in which an error for lack of memory becomes one line with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = one_line(error) or type(error).__name__  # Python's own says nothing
        raise RunError(f"not enough memory: {reason}; {advice}") from None


def file_name(text: str) -> str:
    """Turn a text such as `torchjd:CAGrad(c=0.4)` into a short, safe file name."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.").encode()[:80]
    return name.decode(errors="ignore")
