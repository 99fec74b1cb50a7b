"""Training loop: collect, store, learn, evaluate, log and checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mtrl.config import yaml12
from mtrl.config.train import TrainConfig
from mtrl.demonstrations.data import Demonstrations
from mtrl.devices import cpu_threads
from mtrl.envs.benchmarks import Benchmark
from mtrl.envs.processes import WorkerError
from mtrl.errors import RunError, UsageError
from mtrl.folder import DEMONSTRATIONS
from mtrl.sac.agent import MTSAC
from mtrl.sac.diagnose import diagnose
from mtrl.training import report
from mtrl.training.callbacks import Callback
from mtrl.training.checkpoint import CheckpointWriter
from mtrl.training.curriculum import Curriculum
from mtrl.training.episodes import episodes_of
from mtrl.training.hooks import Hooks
from mtrl.training.interrupt import Interrupt
from mtrl.training.judge import Judge
from mtrl.training.logger import RunLogger
from mtrl.training.pace import Pace
from mtrl.training.place import quoted, resumable
from mtrl.training.report import Outcome


class _Stop(Exception):
    """A signal, the time limit or a callback requests a clean stop."""


class Trainer:
    """Trains from the current state of a run to its end, with logs and checkpoints.

    Args:
        config: Resolved configuration.
        run_dir: Folder of the run; must exist.
        saved: Result of `RunState.state_dict`, to resume a run. Default: start a new run.
        agent: Agent to train, see `train`. Default: a new one.

    Attributes:
        state: State of the run, as saved in checkpoints.
        last_step: Result of the environments' last step.

    Raises:
        UsageError: If `saved` is not from a run with this configuration.
    """

    def __init__(
        self,
        config: TrainConfig,
        benchmark: Benchmark,
        device: torch.device,
        run_dir: Path,
        saved: dict[str, Any] | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        agent: MTSAC | None = None,
    ) -> None:
        self.config, self.benchmark, self.run_dir = config, benchmark, run_dir
        self.schedule = config.schedule(len(benchmark.tasks))
        self.hooks = Hooks(callbacks, saved or {})
        path = run_dir / DEMONSTRATIONS
        demonstrations = Demonstrations.load(path) if config.demonstrations else None
        self.curriculum = Curriculum(config, benchmark, device, demonstrations, agent)
        self.state = self.curriculum.begin(saved)
        self.checkpoints = CheckpointWriter(run_dir)
        self.last_step: tuple[Any, ...] = ()
        self.pace = Pace(self.state.steps, self.state.learner.updates)
        self._fps: float | None = None
        self.interrupt = Interrupt(config.max_runtime)
        self.logger = RunLogger(
            run_dir,
            self.schedule.total_timesteps,
            config,
            benchmark.tasks,
            tells_success=benchmark.success_key is not None,
            resume_at=self.state.steps,
            on_row=partial(self.hooks.call, "on_log"),
        )
        about = self.logger, run_dir
        self._judge = Judge(self.state, self.curriculum, *about, tick=self._stop_if_requested)
        for note in (self.state.simulators.note, *self.hooks.notes):
            self.logger.say(note)
        self.hooks.begin(self)

    def run(self) -> Outcome:
        """Train to the end, or until a signal, the time limit or a callback requests a stop.

        A checkpoint is written in every case, and also if simulators are lost for good.

        Raises:
            RunError: If training cannot continue because of NaN or infinite numbers, simulators,
                memory, the disk or a callback; see `resumable`.
        """
        # Closing also writes to files, and fails again if an earlier write has failed.
        threads = cpu_threads(self.config.threads)
        with resumable(self.run_dir), closing(self), self.interrupt, threads:
            return self._run()

    def _run(self) -> Outcome:
        try:
            outcome = self._to_the_end()
            self.checkpoints.wait()
            self.hooks.expect_none_failed()
            self.hooks.call("on_training_end", outcome)
            self.hooks.expect_none_failed()
        except WorkerError:
            self._checkpoint()
            self.checkpoints.wait()
            raise
        except FloatingPointError:
            self.state.expect_numbers(self.run_dir)  # raises a more specific error
            raise
        except UsageError as error:  # such as weights of another shape from a user's method
            raise RunError(str(error)) from None
        if outcome.evaluation is not None:
            self.logger.say(str(outcome))
        return outcome

    def _to_the_end(self) -> Outcome:
        try:
            self._loop()
            self._checkpoint()
            result = self._judge.final()
            self.hooks.call("on_eval", result)
            return Outcome(self.run_dir, result)
        except _Stop:
            self._checkpoint()
            self.checkpoints.wait()
            self.hooks.expect_none_failed()
        signal, hook = self.interrupt.signal, self.hooks.stopped_by
        why = "stopped after --max-runtime" if hook is None else f"stopped by {hook}"
        why = "interrupted" if signal else why
        self.logger.say(f"{why}; to resume: mtrl-train --resume {quoted(self.run_dir)}")
        return Outcome(self.run_dir, None, signal, hook)

    def _stop_if_requested(self, steps: int = 0) -> None:
        if self.interrupt.wanted or self.hooks.wanted:
            raise _Stop  # an unfinished evaluation is repeated when the run resumes

    def close(self) -> None:
        """Close simulators and logs."""
        self.checkpoints.close()
        self.state.close()
        self.logger.close()

    def _loop(self) -> None:
        state, schedule = self.state, self.schedule
        start = time.monotonic() - state.elapsed
        if state.evaluation_pending:
            self._evaluate()
        while state.steps < schedule.total_timesteps:
            self._stop_if_requested()
            self.state = self._judge.state = state = self.curriculum.following(state)
            self.step()
            self.checkpoints.check()
            state.elapsed = time.monotonic() - start
            self.logger.tick(state.steps)
            self.hooks.call("on_step")
            if episodes := episodes_of(state.benchmark.tasks, self.last_step[-1]):
                self.hooks.call("on_rollout_end", episodes)
            print_progress = at_end = state.steps >= schedule.total_timesteps
            if state.due(schedule.log_every):
                self._log()
                print_progress = True
            if state.due(schedule.diagnose_every) and state.metrics:
                found = diagnose(state.learner, state.replay)
                report.diagnosis(self.logger, state.steps, state.benchmark.tasks, found)
            if not at_end:  # the end has its own evaluation and checkpoint
                if state.due(schedule.eval_every):
                    self._evaluate()
                    print_progress = True
                if state.due(schedule.checkpoint_every):
                    self._checkpoint()
            if print_progress:
                self._print_progress()

    def step(self) -> None:
        """Make a vector step; the learner learns from earlier transitions while simulators step.

        The order of dependent operations is fixed, so that results do not depend on timing.
        """
        state = self.state
        learning = state.steps >= state.learns_at
        state.learner.freeze(self.config.transfer.frozen_at(state.steps))
        with self.pace.stage("act"):
            state.collector.act(uniform=not learning and state.unknown())
        with self.pace.stage("learn"):
            if learning:
                state.learner.anneal(state.steps / self.schedule.total_timesteps)
                state.metrics = state.learner.step(state.replay, self.config.learner.gradient_steps)
        with self.pace.stage("wait"):
            self.last_step = state.collector.wait()
        with self.pace.stage("store"):
            state.collector.store(self.last_step, state.replay)
        state.steps += state.envs.num_envs

    def _log(self) -> None:
        """Log values from the device; only diagnoses and evaluations read from it otherwise."""
        state = self.state
        state.expect_numbers(self.run_dir)
        lap = self.pace.lap(state.steps, state.learner.updates)
        self._fps = fps = lap["time/fps"]
        self._judge.left.training(state.steps, self.schedule.log_every, fps)
        values = {
            **lap,
            "time/updates": float(state.learner.updates),
            "time/elapsed": state.elapsed,
            "time/restarts": float(state.envs.restarts + state.eval_envs.restarts),
            **state.collector.statistics.values(state.envs.tells_success),
        }
        metrics = {**state.metrics, "reward_scale": state.replay.scale.factors}
        tasks = state.benchmark.tasks
        report.training(self.logger, state.steps, tasks, values, metrics=metrics)

    def _print_progress(self) -> None:
        """Print a progress line."""
        state = self.state
        rollout = state.collector.statistics.values(state.envs.tells_success)
        left = self._judge.left.seconds(state.steps)
        self.logger.progress(state.steps, self._fps, left, report.scores(rollout, state.score))

    def _evaluate(self) -> None:
        self.hooks.call("on_eval", self._judge.on_the_way())

    def _checkpoint(self) -> None:
        state = self.state
        state.expect_numbers(self.run_dir)
        description = yaml12.dump(state.agent.description() | state.description())
        whole = state.state_dict() | self.hooks.state_dict()
        path = self.checkpoints.save(state.steps, whole, description)
        if self.hooks.listens("on_checkpoint"):
            self.checkpoints.wait()
            self.hooks.call("on_checkpoint", path)
