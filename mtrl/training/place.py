"""Where a run lies: its folder is made, found again, or taken away."""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtrl.config.rates import total
from mtrl.config.train import AgentConfig, Schedule, TrainConfig, shown
from mtrl.errors import RunError, UsageError, one_line
from mtrl.folder import newest_or_none, read_benchmark

MAY_CHANGE = ("total_timesteps", "max_runtime", "max_restarts")
"""Fields that a resumed run may change."""


def quoted(path: Path) -> str:
    """As a shell reads it."""
    return shlex.quote(str(path))


def begun(config: TrainConfig, compare_tasks: bool) -> Path | None:
    """The folder of the run that `config` would go on with; None if it has to begin.

    Raises:
        UsageError: if the folder holds something else, or a run with another configuration.
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
    resolved |= {name for name, value in ours.items() if value is None}  # by default
    if (record := read_benchmark(run_dir)) is not None:
        ours |= {name: total(ours[name], len(record.tasks)) for name in Schedule.PER_TASK}
    if isinstance(ours["target_entropy"], str):  # per action, of which nothing is known here
        resolved.add("target_entropy")
    resolved |= set() if compare_tasks else {"benchmark", "tasks"}
    if config.transfer.init_from is not None:  # whose networks the run took
        resolved |= AgentConfig.model_fields.keys()
    for name, value in ours.items():
        if name not in resolved and value != before[name]:
            raise UsageError(
                f"{name}: expected {shown(before[name])}, what the run in {run_dir} began with, "
                f"got {shown(value)}"
            )
    return run_dir


def make_folder(config: TrainConfig, benchmark: str, may_exist: bool) -> list[Path]:
    """Make the run's folder; returns it and the folders around it that were made, inmost first.

    Raises:
        UsageError: if it exists or cannot be made.
    """
    name = f"{file_name(benchmark)}_{file_name(config.learner.surgery)}_seed{config.seed}"
    default = Path("runs") / f"{name}_{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1, 1_000):
        run_dir = config.run_dir or default
        if config.run_dir is None and attempt > 1:  # another run began in this second
            run_dir = default.with_name(f"{default.name}-{attempt}")
        try:
            missing = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
            run_dir.mkdir(parents=True)
            return missing
        except FileExistsError:
            if may_exist and run_dir.is_dir():
                return []
            if config.run_dir is None:
                continue
            break
        except OSError as error:
            raise UsageError(f"run_dir: cannot create {run_dir}: {error.strerror}") from None
    raise _exists(run_dir)


def expect_new(run_dir: Path | None) -> None:
    """Refuse a folder that exists.

    Raises:
        UsageError: if it does.
    """
    if run_dir is not None and run_dir.exists():
        raise _exists(run_dir)


def _exists(run_dir: Path) -> UsageError:
    return UsageError(
        f"run_dir: expected a folder that does not exist, got {run_dir} "
        f"(--resume {quoted(run_dir)} continues the run in it)"
    )


@contextmanager
def nothing_left(made: list[Path]) -> Iterator[None]:
    """If what is done inside fails, remove the run's folder, which holds nothing of worth yet."""
    try:
        yield
    except BaseException as error:
        for path in made[:1]:
            shutil.rmtree(path, ignore_errors=True)
        for path in made[1:]:
            with suppress(OSError):  # another run is in it
                path.rmdir()
        if isinstance(error, MemoryError) or _is_out_of_memory(error):
            raise RunError(
                f"not enough memory: {one_line(error)}; a smaller buffer_size, fewer envs_per_task "
                "or narrower hidden_sizes need less"
            ) from None
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch's own error on CUDA; on a CPU a RuntimeError of its allocator."""
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError"
        or "not enough memory" in str(error)
        or "can't allocate memory" in str(error)
    )


def file_name(text: str) -> str:
    """`torchjd:CAGrad(c=0.4)` without what a shell or a file system would mind, and not long."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.").encode()[:80]
    return name.decode(errors="ignore")
