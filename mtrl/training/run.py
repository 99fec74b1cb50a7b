"""Start a run, or go on with one."""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.folder import (
    installed_versions,
    newest_checkpoint,
    read_benchmark,
    write_benchmark,
    write_text,
)
from mtrl.training.check import check as check
from mtrl.training.check import sizes_of
from mtrl.training.console import say
from mtrl.training.lock import locked
from mtrl.training.place import MAY_CHANGE, begun, make_folder, nothing_left, quoted

if TYPE_CHECKING:
    import torch

    from mtrl.envs.benchmarks import Benchmark
    from mtrl.training.trainer import Outcome, Trainer


def train(
    config: TrainConfig,
    benchmark: Benchmark | None = None,
    note: str | None = None,
    *,
    resume_if_exists: bool = False,
) -> Outcome:
    """Train, evaluate and save one policy.

    Args:
        config: Everything that decides what the run does.
        benchmark: Custom tasks, in place of those that `config.benchmark` names; `config.tasks`
            chooses among them.
        note: Lines to print once the run begins.
        resume_if_exists: Go on with the run in `config.run_dir` if there is one, as schedulers need
            that start a job again. A complete run is left as it is; one without a checkpoint
            begins anew.

    Raises:
        UsageError: if the configuration asks for what cannot be done; nothing is written then.
    """
    _expect_main_guard()
    before = begun(config, benchmark is None) if resume_if_exists else None
    if before is not None:
        changes = {name: config.flat()[name] for name in MAY_CHANGE}
        return _locked_resume(before, changes, benchmark, may_be_complete=True)
    lines = [] if note is None else [note]
    if config.transfer.init_from is not None:
        from mtrl.sac.transfer import adopted, expect_sizes

        config, header, replaced = adopted(config)
        lines += replaced
    benchmark, device, config = check(config, benchmark)
    if config.transfer.init_from is not None:
        expect_sizes(header, *sizes_of(benchmark))
    made = make_folder(config, benchmark.name, resume_if_exists)
    run_dir = config.run_dir or made[0]
    with locked(run_dir) as warning:
        with nothing_left(made):
            logdir = run_dir if config.run_dir else run_dir.parent
            watch = f"run folder: {run_dir}\nwatch: tensorboard --logdir {quoted(logdir)}"
            for text in (*lines, warning, watch):
                if text is not None:
                    say(text)
            write_text(run_dir / "config.yaml", config.to_yaml())
            _record_benchmark(run_dir, benchmark)
            _record_process(run_dir, config, benchmark, device)
            trainer = _trainer(config, benchmark, device, run_dir)
        return trainer.run()


def resume(
    run_dir: Path,
    total_timesteps: int | None = None,
    max_runtime: float | None = None,
    benchmark: Benchmark | None = None,
    *,
    max_restarts: int | None = None,
) -> Outcome:
    """Go on with a run from its newest checkpoint.

    Args:
        run_dir: Its folder.
        total_timesteps: A new end for the run [environment steps over all tasks].
        max_runtime: Stop after so long [hours], instead of after what the run began with.
        benchmark: What `train` was given; default: what the run was trained on, imported from
            where its benchmark.json says.
        max_restarts: How many more simulator processes may fail, instead of as many as the run
            began with.

    Raises:
        UsageError: if there is nothing to go on from, or nothing left to do, or the benchmark
            cannot be imported.
    """
    _expect_main_guard()
    changes = {
        "total_timesteps": total_timesteps,
        "max_runtime": max_runtime,
        "max_restarts": max_restarts,
    }
    return _locked_resume(Path(run_dir).expanduser(), changes, benchmark)


def _locked_resume(
    run_dir: Path,
    changes: dict[str, Any],
    benchmark: Benchmark | None,
    *,
    may_be_complete: bool = False,
) -> Outcome:
    newest_checkpoint(run_dir)
    with locked(run_dir) as warning:
        if warning is not None:
            say(warning)
        return _resume(run_dir, changes, benchmark, may_be_complete)


def _resume(
    run_dir: Path, changes: dict[str, Any], benchmark: Benchmark | None, may_be_complete: bool
) -> Outcome:
    before, given = TrainConfig.from_yaml(run_dir / "config.yaml"), benchmark
    changes = {name: value for name, value in changes.items() if value is not None}
    record = read_benchmark(run_dir)
    if record is not None:
        from mtrl.envs.record import benchmark_of, expect_tasks_of

        benchmark = benchmark_of(record) if given is None else expect_tasks_of(record, given)
    benchmark, device, config = check(before.model_copy(update=changes), benchmark)
    if given is None:  # the name in the record need not be one that a configuration takes
        same = {"benchmark": before.benchmark, "tasks": before.tasks}
        config = config.model_copy(update=same)
    from mtrl.training.checkpoint import load_newest
    from mtrl.training.trainer import Outcome

    state, notes = load_newest(run_dir)
    for note in notes:
        say(note)
    total = config.schedule(len(benchmark.tasks)).total_timesteps
    if state.get("steps", 0) >= total and (run_dir / "eval.json").exists():
        complete = f"{run_dir} is complete with {total} steps"
        if not may_be_complete:
            reason = f"{complete}; a larger --total-timesteps would extend it"
            raise UsageError(f"resume: {reason}")
        say(complete)
        return Outcome(run_dir, None)
    trainer = _trainer(config, benchmark, device, run_dir, state)
    # Now that the state is known to fit: the run's files say what it goes on with.
    write_text(run_dir / "config.yaml", config.to_yaml())
    if record is None:  # a run from before this was recorded
        _record_benchmark(run_dir, benchmark)
    _record_process(run_dir, config, benchmark, device)
    return trainer.run()


def _trainer(
    config: TrainConfig,
    benchmark: Benchmark,
    device: torch.device,
    run_dir: Path,
    state: dict[str, Any] | None = None,
) -> Trainer:
    from mtrl.devices import keep_freed_memory
    from mtrl.training.trainer import Trainer

    if device.type == "cpu":
        keep_freed_memory()
    return Trainer(config, benchmark, device, run_dir, state)


def _expect_main_guard() -> None:
    from mtrl.envs.processes import expect_main_guard

    expect_main_guard()


def _record_benchmark(run_dir: Path, benchmark: Benchmark) -> None:
    """At a run's start, when no step has said yet whether its task is solved."""
    from mtrl.envs.record import record_of

    told = [not benchmark.custom or t in benchmark.tells_success for t in benchmark.tasks]
    write_benchmark(run_dir, record_of(benchmark, told))


def _record_process(
    run_dir: Path, config: TrainConfig, benchmark: Benchmark, device: torch.device
) -> None:
    """Add this process to run.json: what was typed, which packages, simulators and machine."""
    import torch

    from mtrl.envs.parity import choose_simulators
    from mtrl.envs.processes import n_cores

    path = run_dir / "run.json"
    processes = json.loads(path.read_text()) if path.exists() else []
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    simulators = choose_simulators(benchmark, config.environment).by_task
    processes.append(
        {
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": installed_versions(),
            "simulators": dict(zip(benchmark.tasks, simulators, strict=True)),
            "machine": {
                "platform": platform.platform(),
                "instructions": torch.backends.cpu.get_cpu_capability(),  # rounding differs by them
                "cores": n_cores(),
                "gpu": gpu,
            },
        }
    )
    write_text(path, json.dumps(processes, indent=2) + "\n")
