"""Start a run, or resume one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mtrl.config.train import TrainConfig
from mtrl.envs.processes import expect_main_guard
from mtrl.errors import UsageError, expect_kind
from mtrl.folder import (
    DEMONSTRATIONS,
    newest_checkpoint,
    read_benchmark,
    steps_evaluated,
    write_text,
)
from mtrl.training.check import check, expect_agent, expect_fitting
from mtrl.training.console import say
from mtrl.training.lock import locked
from mtrl.training.place import (
    MAY_CHANGE,
    existing_run,
    make_folder,
    nothing_left,
    quoted,
    resumable,
)
from mtrl.training.record import record_benchmark, record_process

if TYPE_CHECKING:
    import torch
    from stable_baselines3.common.logger import Logger

    from mtrl.envs.benchmarks import Benchmark
    from mtrl.sac.agent import MTSAC
    from mtrl.training.callbacks import Callback
    from mtrl.training.report import Outcome
    from mtrl.training.trainer import Trainer


def train(
    config: TrainConfig,
    benchmark: Benchmark | None = None,
    note: str | None = None,
    *,
    resume_if_exists: bool = False,
    callbacks: Sequence[Callback] = (),
    agent: MTSAC | None = None,
    logger: Logger | None = None,
) -> Outcome:
    """Train, evaluate and save one policy.

    Args:
        config: Configuration of the run.
        benchmark: Custom tasks to use instead of `config.benchmark`; `config.tasks` selects among
            them.
        note: Lines to print when the run starts.
        resume_if_exists: Resume the run in `config.run_dir` if there is one. Use this with
            schedulers that restart jobs. A complete run is left unchanged; a run without a
            checkpoint starts again.
        callbacks: Callbacks to call after those in `config.callbacks`.
        agent: Agent to train in place. Default: a new one. Its network configuration replaces
            `config.agent`. With a curriculum it is the agent of the first stage; each later stage
            creates an agent of the same class.
        logger: Logger of Stable-Baselines3 that receives every row in addition to the run's own
            files. It is not closed.

    Raises:
        UsageError: If the configuration is invalid; nothing is written then.
    """
    expect_main_guard()
    expect_kind("config", config, TrainConfig, "preset('quickstart')")
    given = _Given(benchmark, callbacks, agent, logger)
    if agent is not None:
        config = config.model_copy(update={"agent": expect_agent(agent).config})
    before = existing_run(config, benchmark is None) if resume_if_exists else None
    if before is not None:
        changes = {name: config.flat()[name] for name in MAY_CHANGE}
        return _resume(before, changes, given, may_be_complete=True)
    lines = [] if note is None else [note]
    if config.transfer.init_from is not None:
        if agent is not None:
            raise UsageError("init_from: expected no agent=... with it, got both")
        from mtrl.sac.transfer import adopted, expect_sizes

        config, header, replaced = adopted(config)
        lines += replaced
    benchmark, device, config = check(config, benchmark)
    if config.transfer.init_from is not None:
        expect_sizes(header, *benchmark.sizes)
    parts = given.parts(config, benchmark)
    from mtrl.demonstrations.sources import sources

    wanted = sources(config.demonstrations, benchmark) if config.demonstrations else None
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
            record_benchmark(run_dir, benchmark)
            record_process(run_dir, config, benchmark, device)
            if wanted is not None:
                how = config.environment.horizon, config.environment.workers
                if wanted.experts:
                    say(f"demonstrations: {sum(wanted.experts.values())} episodes of the experts")
                found = wanted.gather(benchmark, config.seed, *how)
                found.save(run_dir / DEMONSTRATIONS)
                say(f"demonstrations: {found}")
            trainer = _trainer(config, benchmark, device, run_dir, **parts)
        return trainer.run()


def resume(
    run_dir: Path,
    total_timesteps: int | None = None,
    max_runtime: float | None = None,
    benchmark: Benchmark | None = None,
    *,
    max_restarts: int | None = None,
    callbacks: Sequence[Callback] = (),
    agent: MTSAC | None = None,
    logger: Logger | None = None,
) -> Outcome:
    """Resume a run from its latest checkpoint.

    Args:
        run_dir: Folder of the run.
        total_timesteps: New end of the run [environment steps over all tasks].
        max_runtime: New time limit [hours]. Default: the run's own limit.
        benchmark: Same `benchmark` as in `train`. Default: the run's benchmark, imported from the
            source in its benchmark.json.
        max_restarts: New number of simulator processes that may fail. Default: the run's own.
        callbacks, agent, logger: Same as in `train`. A run does not store them, so pass them
            again. The state of callbacks is restored from the checkpoint.

    Raises:
        UsageError: If there is no checkpoint, the run is complete, or the benchmark cannot be
            imported.
    """
    expect_main_guard()
    changes = {
        "total_timesteps": total_timesteps,
        "max_runtime": max_runtime,
        "max_restarts": max_restarts,
    }
    given = _Given(benchmark, callbacks, agent, logger)
    return _resume(Path(run_dir).expanduser(), changes, given)


class _Given(NamedTuple):
    """Arguments that a configuration cannot hold and that are therefore not stored in a run."""

    benchmark: Benchmark | None
    callbacks: Sequence[Callback]
    agent: MTSAC | None
    logger: Logger | None

    def parts(self, config: TrainConfig, examined: Benchmark) -> dict[str, Any]:
        """Check the arguments, and return those of `Trainer`."""
        from mtrl.training.hooks import GivenLogger, made

        if self.agent is not None:
            expect_fitting(expect_agent(self.agent), examined, config)
        callbacks = made(config.callbacks, self.callbacks)
        if self.logger is not None:
            callbacks.append(GivenLogger(self.logger))
        return {"callbacks": callbacks, "agent": self.agent}


def _resume(
    run_dir: Path, changes: dict[str, Any], given: _Given, may_be_complete: bool = False
) -> Outcome:
    newest_checkpoint(run_dir)
    with locked(run_dir) as warning:
        if warning is not None:
            say(warning)
        with resumable(run_dir):
            trainer = _resumed(run_dir, changes, given, may_be_complete)
        from mtrl.training.report import Outcome

        return Outcome(run_dir, None) if trainer is None else trainer.run()


def _resumed(
    run_dir: Path, changes: dict[str, Any], given: _Given, may_be_complete: bool
) -> Trainer | None:
    """Return the trainer of a run, or None if the run is complete and may be."""
    benchmark, device, config = _resolved(run_dir, changes, given.benchmark)
    parts = given.parts(config, benchmark)
    from mtrl.training.checkpoint import load_newest

    state, notes = load_newest(run_dir)
    for note in notes:
        say(note)
    total, steps = config.schedule(len(benchmark.tasks)).total_timesteps, state.get("steps", 0)
    if steps >= total and steps_evaluated(run_dir) >= steps:  # not only an earlier policy
        complete = f"{run_dir} is complete with {steps} steps"
        if not may_be_complete:
            reason = f"{complete}; use a larger --total-timesteps to extend it"
            raise UsageError(f"resume: {reason}")
        say(complete)
        return None
    trainer = _trainer(config, benchmark, device, run_dir, saved=state, **parts)
    # The state is valid: update the run's files.
    write_text(run_dir / "config.yaml", config.to_yaml())
    if read_benchmark(run_dir) is None:  # an older run
        record_benchmark(run_dir, benchmark)
    record_process(run_dir, config, benchmark, device)
    return trainer


def _resolved(
    run_dir: Path, changes: dict[str, Any], given: Benchmark | None
) -> tuple[Benchmark, torch.device, TrainConfig]:
    """Check the configuration of a run with changes, and return it with its benchmark."""
    before, record = TrainConfig.from_yaml(run_dir / "config.yaml"), read_benchmark(run_dir)
    changes = {name: value for name, value in changes.items() if value is not None}
    benchmark = given
    if record is not None:
        from mtrl.envs.record import benchmark_of, expect_tasks_of

        benchmark = benchmark_of(record) if given is None else expect_tasks_of(record, given)
    # Demonstrations are in the folder, so their source is not needed.
    changed = before.model_copy(update=changes | {"demonstrations": ()})
    benchmark, device, config = check(changed, benchmark)
    same: dict[str, Any] = {"demonstrations": before.demonstrations}
    if given is None:  # the recorded name may not be valid in a configuration
        same |= {"benchmark": before.benchmark, "tasks": before.tasks}
    return benchmark, device, config.model_copy(update=same)


def _trainer(
    config: TrainConfig, benchmark: Benchmark, device: torch.device, run_dir: Path, **parts: Any
) -> Trainer:
    from mtrl.devices import keep_freed_memory
    from mtrl.training.trainer import Trainer

    if device.type == "cpu":
        keep_freed_memory()
    return Trainer(config, benchmark, device, run_dir, **parts)
