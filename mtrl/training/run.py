"""Start a run, or go on with one: everything that is checked before anything heavy starts."""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from mtrl.config.train import TrainConfig
from mtrl.devices import resolve_device
from mtrl.envs.benchmarks import NAMED, Benchmark, get_benchmark, select
from mtrl.envs.examine import examined
from mtrl.envs.make import steps_of_an_episode
from mtrl.envs.parity import choose_simulators
from mtrl.envs.processes import expect_main_guard, n_cores
from mtrl.envs.record import benchmark_of, expect_tasks_of, record_of, with_source
from mtrl.errors import UsageError
from mtrl.folder import (
    installed_versions,
    newest_checkpoint,
    read_benchmark,
    write_benchmark,
    write_text,
)
from mtrl.nets.precision import resolve_precision
from mtrl.sac.agent import MTSAC
from mtrl.sac.learner import Learner
from mtrl.training.checkpoint import load_newest
from mtrl.training.lock import locked
from mtrl.training.trainer import Outcome, Trainer


def train(
    config: TrainConfig, benchmark: Benchmark | None = None, note: str | None = None
) -> Outcome:
    """Train, evaluate and save one policy.

    Args:
        config: Everything that decides what the run does.
        benchmark: Custom tasks, in place of those that `config.benchmark` names; `config.tasks`
            chooses among them.
        note: A line to print once the run begins.

    Raises:
        UsageError: if the configuration asks for what cannot be done; nothing is written then.
    """
    expect_main_guard()
    benchmark, device, config = check(config, benchmark)
    run_dir = config.run_dir or Path("runs") / (
        f"{_file_name(benchmark.name)}_{_file_name(config.learner.surgery)}_seed{config.seed}_"
        f"{time.strftime('%Y%m%d-%H%M%S')}"
    )
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(
            f"run_dir: expected a folder that does not exist, got {run_dir} (--resume {run_dir} "
            "goes on with it)"
        ) from None
    except OSError as error:
        raise UsageError(f"run_dir: cannot create {run_dir}: {error.strerror}") from None
    if note is not None:
        print(note, flush=True)
    with locked(run_dir):
        write_text(run_dir / "config.yaml", config.to_yaml())
        _record_benchmark(run_dir, benchmark)
        _record_process(run_dir, config, benchmark, device)
        try:
            trainer = Trainer(config, benchmark, device, run_dir)
        except BaseException:  # there is no run yet
            shutil.rmtree(run_dir)
            raise
        return trainer.run()


def resume(
    run_dir: Path,
    total_timesteps: int | None = None,
    max_runtime: float | None = None,
    benchmark: Benchmark | None = None,
) -> Outcome:
    """Go on with a run from its newest checkpoint.

    Args:
        total_timesteps: A new end for the run [environment steps over all tasks].
        max_runtime: Stop after so long [hours], instead of after what the run began with.
        benchmark: What `train` was given; default: what the run was trained on, imported from
            where its benchmark.json says.

    Raises:
        UsageError: if there is nothing to go on from, or nothing left to do, or the benchmark
            cannot be imported.
    """
    expect_main_guard()
    newest_checkpoint(run_dir)
    with locked(run_dir) as note:
        if note is not None:
            print(note)
        return _resume(run_dir, total_timesteps, max_runtime, benchmark)


def _resume(
    run_dir: Path,
    total_timesteps: int | None,
    max_runtime: float | None,
    benchmark: Benchmark | None,
) -> Outcome:
    config = TrainConfig.from_yaml(run_dir / "config.yaml")
    changes = {"total_timesteps": total_timesteps, "max_runtime": max_runtime}
    changes = {name: value for name, value in changes.items() if value is not None}
    record = read_benchmark(run_dir)
    if record is not None:
        given = benchmark
        benchmark = benchmark_of(record) if given is None else expect_tasks_of(record, given)
    benchmark, device, config = check(config.model_copy(update=changes), benchmark)
    state, notes = load_newest(run_dir)
    for note in notes:
        print(note)
    total = config.schedule(len(benchmark.tasks)).total_timesteps
    if state.get("steps", 0) >= total and (run_dir / "eval.json").exists():
        raise UsageError(
            f"resume: {run_dir} is complete with {total} steps; a larger "
            "--total-timesteps would extend it"
        )
    trainer = Trainer(config, benchmark, device, run_dir, state)
    # Now that the state is known to fit: the run's files say what it goes on with.
    write_text(run_dir / "config.yaml", config.to_yaml())
    if record is None:  # a run from before this was recorded
        _record_benchmark(run_dir, benchmark)
    _record_process(run_dir, config, benchmark, device)
    return trainer.run()


def check(
    config: TrainConfig, benchmark: Benchmark | None = None
) -> tuple[Benchmark, torch.device, TrainConfig]:
    """Look up every name and fill in defaults, before anything heavy starts.

    Args:
        benchmark: In place of what `config.benchmark` names. The configuration that is returned
            names it: by where it can be imported from, or else by its own name.

    Raises:
        UsageError: if a name is unknown, the device or a simulator is missing, or numbers do not
            fit together.
    """
    if benchmark is None:
        benchmark = get_benchmark(config.benchmark, config.tasks)
    else:
        benchmark = with_source(benchmark)
        if config.tasks is not None:
            benchmark = select(benchmark, config.tasks)
        # So that the run's own file says what it was trained on, and `--config` finds it again.
        name = benchmark.source or benchmark.name
        whole = benchmark.custom or NAMED.get(name) == benchmark.tasks
        tasks = config.tasks if whole else benchmark.tasks
        config = config.model_copy(update={"benchmark": name, "tasks": tasks})
    benchmark = examined(benchmark)
    device = resolve_device(config.device)
    precision = resolve_precision(config.learner.precision, device)
    # With the narrowest inputs: here a method says what it cannot do with such networks.
    narrow = config.learner.model_copy(update={"precision": "fp32", "compile": False})
    Learner(MTSAC(benchmark.tasks, config.agent, 1, 1), narrow)
    choose_simulators(benchmark, config.environment)
    if config.eval_video and benchmark.custom:
        raise UsageError(f"eval_video: expected tasks of Meta-World's, got {benchmark.name}")
    if config.eval_video:
        from mtrl.evaluation.video import find_backend

        find_backend()
    schedule = config.schedule(len(benchmark.tasks))
    compiles = config.learner.compile and device.type == "cuda"
    if compiles != config.learner.compile:
        warnings.warn("compile: left out on a CPU, where it makes updates slower", stacklevel=2)
    learner = config.learner.model_copy(update={"precision": precision, "compile": compiles})
    horizon = steps_of_an_episode(benchmark, config.environment.horizon)
    environment = config.environment.model_copy(update={"horizon": horizon})
    update = asdict(schedule) | {"learner": learner, "environment": environment}
    return benchmark, device, config.model_copy(update=update)


def _file_name(surgery: str) -> str:
    """`torchjd:CAGrad(c=0.4)` without what a shell or a file system would mind."""
    return re.sub(r"[^\w.-]+", "-", surgery).strip("-")


def _record_benchmark(run_dir: Path, benchmark: Benchmark) -> None:
    """At a run's start, when no step has said yet whether its task is solved."""
    told = [not benchmark.custom or t in benchmark.tells_success for t in benchmark.tasks]
    write_benchmark(run_dir, record_of(benchmark, told))


def _record_process(
    run_dir: Path, config: TrainConfig, benchmark: Benchmark, device: torch.device
) -> None:
    """Add this process to run.json: what was typed, which packages, simulators and machine."""
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
