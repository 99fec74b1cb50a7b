"""The loop: collect, store, learn, evaluate, log, checkpoint."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from mtrl.config import yaml12
from mtrl.config.train import TrainConfig
from mtrl.devices import cpu_threads
from mtrl.envs.benchmarks import N_GOALS, Benchmark
from mtrl.envs.processes import WorkerError
from mtrl.envs.record import record_of
from mtrl.envs.tasks import MAX_STEPS
from mtrl.errors import RunError
from mtrl.evaluation.protocol import evaluate_in
from mtrl.evaluation.scores import Evaluation
from mtrl.folder import FINAL, write_atomically, write_benchmark
from mtrl.sac.diagnose import diagnose
from mtrl.training import report
from mtrl.training.checkpoint import CheckpointWriter, what_is_left
from mtrl.training.interrupt import Interrupt
from mtrl.training.logger import RunLogger
from mtrl.training.pace import Pace, TimeLeft, shown
from mtrl.training.place import quoted
from mtrl.training.report import Outcome as Outcome
from mtrl.training.state import RunState


class _Stop(Exception):
    """A signal or the clock asks to stop in good order."""


class Trainer:
    """Takes a run from where its state is to its end, and writes down how it goes.

    Args:
        config: All of it resolved.
        benchmark: The tasks.
        device: Of networks and replay.
        run_dir: An existing folder.
        saved: What `RunState.state_dict` gave; default: a new run.

    Attributes:
        state: What a checkpoint holds.

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
    ) -> None:
        self.config, self.benchmark, self.run_dir = config, benchmark, run_dir
        self.schedule = config.schedule(len(benchmark.tasks))
        self.state = RunState(config, benchmark, device, saved)
        self.checkpoints = CheckpointWriter(run_dir)
        self._metrics: dict[str, torch.Tensor] = {}
        self.pace = Pace(self.state.steps, self.state.learner.updates)
        # Environment steps of an episode of every task; a guess where environments end it.
        self._judged = len(benchmark.tasks) * (config.environment.horizon or MAX_STEPS)
        evaluations = config.eval_episodes * self._judged, N_GOALS * self._judged
        self._left = TimeLeft(self.schedule, *evaluations)
        self._fps = 0.0
        self.interrupt = Interrupt(config.max_runtime)
        self.logger = RunLogger(
            run_dir,
            self.schedule.total_timesteps,
            config,
            benchmark.tasks,
            tells_success=benchmark.success_key is not None,
            resume_at=self.state.steps,
        )
        self.logger.say(self.state.simulators.note)

    def run(self) -> Outcome:
        """Train to the end, or until a signal or the clock asks to stop.

        Either way a checkpoint is written, as it is if simulators are lost for good.

        Raises:
            RunError: if numbers, simulators or the disk do not allow to go on.
        """
        try:
            # Closing writes too, and fails again where a write has failed before.
            with closing(self), self.interrupt, cpu_threads(self.config.threads):
                return self._run()
        except OSError as error:
            raise RunError(f"{error}. {what_is_left(self.run_dir)}") from None

    def _run(self) -> Outcome:
        try:
            self._loop()
            self._checkpoint()
            outcome = Outcome(self.run_dir, self._finish())
            self.checkpoints.wait()
            self.logger.say(str(outcome))
            return outcome
        except _Stop:
            self._checkpoint()
            self.checkpoints.wait()
            why = "interrupted" if self.interrupt.signal else "stopped after --max-runtime"
            self.logger.say(f"{why}; to continue: mtrl-train --resume {quoted(self.run_dir)}")
            return Outcome(self.run_dir, None, self.interrupt.signal)
        except WorkerError as error:
            self._checkpoint()
            raise RunError(f"{error}. {what_is_left(self.run_dir)}") from None
        except FloatingPointError as error:
            self.state.expect_numbers(self.run_dir)  # which knows more about it
            raise RunError(f"{error}. {what_is_left(self.run_dir)}") from None

    def close(self) -> None:
        """End the simulators and the logs."""
        self.checkpoints.close()
        self.state.close()
        self.logger.close()

    def _loop(self) -> None:
        state, schedule = self.state, self.schedule
        start = time.monotonic() - state.elapsed
        if state.evaluation_pending:
            self._evaluate_on_the_way()
        while state.steps < schedule.total_timesteps:
            if self.interrupt.wanted:
                raise _Stop
            self.step()
            self.checkpoints.check()
            state.elapsed = time.monotonic() - start
            self.logger.tick(state.steps)
            at_end = state.steps >= schedule.total_timesteps
            to_tell = at_end
            if state.due(schedule.log_every):
                self._log()
                to_tell = True
            if state.due(schedule.diagnose_every) and self._metrics:
                found = diagnose(state.learner, state.replay)
                report.diagnosis(self.logger, state.steps, self.benchmark.tasks, found)
            if not at_end:  # which has its own
                if state.due(schedule.eval_every):
                    self._evaluate_on_the_way()
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
        with self.pace.stage("act"):
            state.collector.act(uniform=not learning)
        with self.pace.stage("learn"):
            if learning:
                state.learner.anneal(state.steps / self.schedule.total_timesteps)
                self._metrics = state.learner.step(state.replay, self.config.learner.gradient_steps)
        with self.pace.stage("wait"):
            answer = state.collector.wait()
        with self.pace.stage("store"):
            state.collector.store(answer, state.replay)
        state.steps += state.envs.num_envs

    def _log(self) -> None:
        """Read numbers off the device, as only diagnoses and evaluations do besides."""
        state = self.state
        state.expect_numbers(self.run_dir)
        lap = self.pace.lap(state.steps, state.learner.updates)
        self._fps = lap["time/fps"]
        self._left.training(state.steps, self.schedule.log_every, self._fps)
        values = {
            **lap,
            "time/updates": float(state.learner.updates),
            "time/elapsed": state.elapsed,
            "time/restarts": float(state.envs.restarts + state.eval_envs.restarts),
            **state.collector.statistics.values(state.envs.tells_success),
        }
        metrics = {**self._metrics, "reward_scale": state.replay.scale.factors}
        tasks = self.benchmark.tasks
        report.training(self.logger, state.steps, tasks, values, metrics=metrics)

    def _tell(self) -> None:
        """One line for whoever watches."""
        state = self.state
        rollout = state.collector.statistics.values(state.envs.tells_success)
        left = self._left.seconds(state.steps)
        self.logger.progress(state.steps, self._fps, left, report.scores(rollout, state.score))

    def _evaluate_on_the_way(self) -> None:
        self.state.evaluation_pending = True
        self._evaluate(self.config.eval_episodes)
        self.state.evaluation_pending = False

    def _evaluate(self, episodes: int) -> Evaluation:
        state = self.state

        def tick(steps: int) -> None:
            if self.interrupt.wanted:  # it is made anew when the run goes on
                raise _Stop

        # On the host, beside the simulators: a GPU would be asked for a few rows at a time.
        policy = state.agent.snapshot("cpu")
        start = time.monotonic()
        result = evaluate_in(policy, state.eval_envs, self.config.seed, episodes, tick=tick)
        self._left.judging(episodes * self._judged, time.monotonic() - start)
        state.score = result.summary
        write_benchmark(self.run_dir, record_of(self.benchmark, state.envs.tells_success.tolist()))
        report.evaluation(self.logger, state.steps, result, self.config.eval_video)
        return result

    def _finish(self) -> Evaluation:
        """Save and judge the final policy."""
        state = self.state
        description = state.description()
        write_atomically(self.run_dir / FINAL, lambda path: state.agent.save(path, description))
        expected = self._left.last_evaluation()
        about = "" if expected is None else f", about {shown(expected)}"
        self.logger.say(f"final evaluation: {N_GOALS} episodes per task{about}")
        result = self._evaluate(N_GOALS)
        report.final(
            self.run_dir,
            result,
            seed=self.config.seed,
            total_timesteps=state.steps,
            updates=state.learner.updates,
            seconds=round(state.elapsed, 1),
        )
        self.logger.finish()
        return result

    def _checkpoint(self) -> None:
        state = self.state
        state.expect_numbers(self.run_dir)
        description = yaml12.dump(state.agent.description() | state.description())
        self.checkpoints.save(state.steps, state.state_dict(), description)
