"""The loop: collect, store, learn, evaluate, log, checkpoint."""

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
from mtrl.errors import RunError
from mtrl.folder import DEMONSTRATIONS
from mtrl.sac.agent import MTSAC
from mtrl.sac.diagnose import diagnose
from mtrl.training import report
from mtrl.training.callbacks import Callback
from mtrl.training.checkpoint import CheckpointWriter, what_is_left
from mtrl.training.hooks import Hooks
from mtrl.training.interrupt import Interrupt
from mtrl.training.judge import Judge
from mtrl.training.logger import RunLogger
from mtrl.training.pace import Pace
from mtrl.training.place import quoted
from mtrl.training.report import Outcome as Outcome
from mtrl.training.rollout import episodes_of
from mtrl.training.state import RunState


class _Stop(Exception):
    """A signal, the clock or a callback asks to stop in good order."""


class Trainer:
    """Takes a run from where its state is to its end, and writes down how it goes.

    Args:
        config: All of it resolved.
        benchmark: The tasks.
        device: Of networks and replay.
        run_dir: An existing folder.
        saved: What `RunState.state_dict` gave; default: a new run.
        callbacks: The user's.
        agent: What is trained, in place of a new one.

    Attributes:
        state: What a checkpoint holds.
        metrics: Of the last update.
        last_step: What the environments' last step returned.

    Raises:
        UsageError: if `saved` is not of a run with this configuration.
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
        shown = Demonstrations.load(run_dir / DEMONSTRATIONS) if config.demonstrations else None
        self.state = RunState(config, benchmark, device, saved, demonstrations=shown, agent=agent)
        self.checkpoints = CheckpointWriter(run_dir)
        self.metrics: dict[str, torch.Tensor] = {}
        self.last_step: tuple[Any, ...] = ()
        self.pace = Pace(self.state.steps, self.state.learner.updates)
        self._fps = 0.0
        self.interrupt = Interrupt(config.max_runtime)
        self.logger = RunLogger(
            run_dir,
            self.schedule.total_timesteps,
            config,
            benchmark.tasks,
            tells_success=benchmark.success_key is not None,
            resume_at=self.state.steps,
            told=partial(self.hooks.call, "on_log"),
        )
        self._judge = Judge(config, self.state, self.logger, run_dir, tick=self._expect_to_go_on)
        for note in (self.state.simulators.note, *self.hooks.notes):
            self.logger.say(note)
        self.hooks.begin(self)

    def run(self) -> Outcome:
        """Train to the end, or until a signal, the clock or a callback asks to stop.

        Either way a checkpoint is written, as it is if simulators are lost for good.

        Raises:
            RunError: if numbers, simulators, the disk or a callback do not allow to go on.
        """
        try:
            # Closing writes too, and fails again where a write has failed before.
            with closing(self), self.interrupt, cpu_threads(self.config.threads):
                return self._run()
        except OSError as error:
            raise RunError(f"{error}. {what_is_left(self.run_dir)}") from None

    def _run(self) -> Outcome:
        try:
            outcome = self._to_the_end()
            self.checkpoints.wait()
            self.hooks.expect_none_failed()
            self.hooks.call("on_training_end", outcome)
            self.hooks.expect_none_failed()
        except WorkerError as error:
            self._checkpoint()
            raise RunError(f"{error}. {what_is_left(self.run_dir)}") from None
        except FloatingPointError as error:
            self.state.expect_numbers(self.run_dir)  # which knows more about it
            raise RunError(f"{error}. {what_is_left(self.run_dir)}") from None
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
        self.logger.say(f"{why}; to continue: mtrl-train --resume {quoted(self.run_dir)}")
        return Outcome(self.run_dir, None, signal, hook)

    def _expect_to_go_on(self, steps: int = 0) -> None:
        if self.interrupt.wanted or self.hooks.wanted:
            raise _Stop  # an evaluation is made anew when the run goes on

    def close(self) -> None:
        """End the simulators and the logs."""
        self.checkpoints.close()
        self.state.close()
        self.logger.close()

    def _loop(self) -> None:
        state, schedule = self.state, self.schedule
        start = time.monotonic() - state.elapsed
        if state.evaluation_pending:
            self._evaluate()
        while state.steps < schedule.total_timesteps:
            self._expect_to_go_on()
            self.step()
            self.checkpoints.check()
            state.elapsed = time.monotonic() - start
            self.logger.tick(state.steps)
            self.hooks.call("on_step")
            if episodes := episodes_of(self.benchmark.tasks, self.last_step[-1]):
                self.hooks.call("on_rollout_end", episodes)
            at_end = state.steps >= schedule.total_timesteps
            to_tell = at_end
            if state.due(schedule.log_every):
                self._log()
                to_tell = True
            if state.due(schedule.diagnose_every) and self.metrics:
                found = diagnose(state.learner, state.replay)
                report.diagnosis(self.logger, state.steps, self.benchmark.tasks, found)
            if not at_end:  # which has its own
                if state.due(schedule.eval_every):
                    self._evaluate()
                    to_tell = True
                if state.due(schedule.checkpoint_every):
                    self._checkpoint()
            if to_tell:
                self._tell()

    def step(self) -> None:
        """One vector step; while it is simulated, the learner learns from those before it.

        The order of what depends on what is fixed, so that a run does not depend on who is faster.
        """
        state = self.state
        learning = state.steps >= self.schedule.learning_starts
        state.learner.freeze(self.config.transfer.frozen_at(state.steps))
        with self.pace.stage("act"):
            state.collector.act(uniform=not learning and state.unknown())
        with self.pace.stage("learn"):
            if learning:
                state.learner.anneal(state.steps / self.schedule.total_timesteps)
                self.metrics = state.learner.step(state.replay, self.config.learner.gradient_steps)
        with self.pace.stage("wait"):
            self.last_step = state.collector.wait()
        with self.pace.stage("store"):
            state.collector.store(self.last_step, state.replay)
        state.steps += state.envs.num_envs

    def _log(self) -> None:
        """Read numbers off the device, as only diagnoses and evaluations do besides."""
        state = self.state
        state.expect_numbers(self.run_dir)
        lap = self.pace.lap(state.steps, state.learner.updates)
        self._fps = lap["time/fps"]
        self._judge.left.training(state.steps, self.schedule.log_every, self._fps)
        values = {
            **lap,
            "time/updates": float(state.learner.updates),
            "time/elapsed": state.elapsed,
            "time/restarts": float(state.envs.restarts + state.eval_envs.restarts),
            **state.collector.statistics.values(state.envs.tells_success),
        }
        metrics = {**self.metrics, "reward_scale": state.replay.scale.factors}
        tasks = self.benchmark.tasks
        report.training(self.logger, state.steps, tasks, values, metrics=metrics)

    def _tell(self) -> None:
        """One line for whoever watches."""
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
