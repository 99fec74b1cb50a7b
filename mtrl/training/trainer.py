"""The loop: collect, store, learn, evaluate, log, checkpoint."""

from __future__ import annotations

import html
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mtrl.config import yaml12
from mtrl.config.train import TrainConfig
from mtrl.devices import cpu_threads
from mtrl.envs.benchmarks import N_GOALS, Benchmark
from mtrl.envs.processes import WorkerError
from mtrl.errors import RunError, UsageError
from mtrl.evaluation.protocol import evaluate_in
from mtrl.evaluation.scores import Evaluation
from mtrl.folder import FINAL, newest_checkpoint, write_atomically, write_text
from mtrl.sac.watch import expect_finite
from mtrl.training import report
from mtrl.training.checkpoint import save_checkpoint
from mtrl.training.interrupt import Interrupt
from mtrl.training.logger import RunLogger
from mtrl.training.pace import Pace, TimeLeft, shown
from mtrl.training.place import quoted
from mtrl.training.state import RunState


@dataclass(frozen=True)
class Outcome:
    """How `train` ended.

    Attributes:
        run_dir: Folder of the run.
        evaluation: Of the final policy, all 50 goals; None if the run was interrupted.
        signal: What interrupted it, or None.
    """

    run_dir: Path
    evaluation: Evaluation | None
    signal: int | None = None

    def _repr_html_(self) -> str:
        """For notebooks: the folder and the evaluation's table."""
        table = "" if self.evaluation is None else self.evaluation._repr_html_()
        return f"<code>{html.escape(str(self.run_dir))}</code>{table}"


class _Stop(Exception):
    """A signal or the clock asks to stop in good order."""


class Trainer(RunState):
    """A run and its folder."""

    def __init__(
        self,
        config: TrainConfig,
        benchmark: Benchmark,
        device: torch.device,
        run_dir: Path,
        state: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, benchmark, device, state)
        self.run_dir, self.schedule = run_dir, config.schedule(self.n_tasks)
        self._metrics: dict[str, torch.Tensor] = {}
        self.pace = Pace(self.steps, self.learner.updates)
        horizon = config.environment.horizon
        self._judged = self.n_tasks * horizon  # environment steps of an episode of every task
        self._left = TimeLeft(
            self.schedule, config.eval_episodes * self._judged, N_GOALS * self._judged
        )
        self._fps = 0.0
        self.interrupt = Interrupt(config.max_runtime)
        self.logger = RunLogger(run_dir, self.schedule.total_timesteps, config, self.steps)
        self.logger.say(self.simulators.note)

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
            raise RunError(f"{error}. {self._whole()}") from None

    def _run(self) -> Outcome:
        try:
            self._loop()
            self._checkpoint()
            return Outcome(self.run_dir, self._finish())
        except _Stop:
            self._checkpoint()
            why = "interrupted" if self.interrupt.signal else "stopped after --max-runtime"
            self.logger.say(f"{why}; to continue: mtrl-train --resume {quoted(self.run_dir)}")
            return Outcome(self.run_dir, None, self.interrupt.signal)
        except WorkerError as error:
            self._checkpoint()
            raise RunError(f"{error}. {self._whole()}") from None

    def close(self) -> None:
        """End the simulators and the logs."""
        super().close()
        self.logger.close()

    def _loop(self) -> None:
        schedule, start = self.schedule, time.monotonic() - self.elapsed
        if self.evaluation_pending:
            self._evaluate_on_the_way()
        while self.steps < schedule.total_timesteps:
            if self.interrupt.wanted:
                raise _Stop
            self.step()
            self.elapsed = time.monotonic() - start
            self.logger.tick(self.steps)
            at_end = self.steps >= schedule.total_timesteps
            to_tell = at_end
            if self._due(schedule.log_every):
                self._log()
                to_tell = True
            if self._due(schedule.diagnose_every) and self._metrics:
                found = self.learner.diagnose(self.replay)
                report.diagnosis(self.logger, self.steps, self.benchmark.tasks, found)
            if not at_end:  # which has its own
                if self._due(schedule.eval_every):
                    self._evaluate_on_the_way()
                    to_tell = True
                if self._due(schedule.checkpoint_every):
                    self._checkpoint()
            if to_tell:
                self._tell()

    def step(self) -> None:
        """One vector step; while it is simulated, the learner learns from those before it.

        The order of what depends on what is fixed, so that a run does not depend on who is faster.
        """
        learning = self.steps >= self.schedule.learning_starts
        with self.pace.stage("act"):
            self.collector.act(uniform=not learning)
        with self.pace.stage("learn"):
            if learning:
                self.learner.anneal(self.steps / self.schedule.total_timesteps)
                self._metrics = self.learner.step(self.replay, self.config.learner.gradient_steps)
        with self.pace.stage("wait"):
            answer = self.collector.wait()
        with self.pace.stage("store"):
            self.collector.store(answer, self.replay)
        self.steps += self.envs.num_envs

    def _due(self, every: int) -> bool:
        return every > 0 and self.steps // every > (self.steps - self.envs.num_envs) // every

    def _log(self) -> None:
        """Read numbers off the device, as only diagnoses and evaluations do besides."""
        self._expect_numbers()
        lap = self.pace.lap(self.steps, self.learner.updates)
        self._fps = lap["time/fps"]
        self._left.training(self.steps, self.schedule.log_every, self._fps)
        values = {
            **lap,
            "time/updates": float(self.learner.updates),
            "time/elapsed": self.elapsed,
            "time/restarts": float(self.envs.restarts + self.eval_envs.restarts),
            **self.collector.statistics.values(),
        }
        metrics = {**self._metrics, "reward_scale": self.replay.scale.factors}
        tasks = self.benchmark.tasks
        report.training(self.logger, self.steps, tasks, values, metrics)

    def _tell(self) -> None:
        """One line for whoever watches."""
        scores = report.scores(self.collector.statistics.values(), self.success)
        self.logger.progress(self.steps, self._fps, self._left.seconds(self.steps), scores)

    def _expect_numbers(self) -> None:
        """Stop before a checkpoint or a log holds what is no number."""
        try:
            self.learner.watch.expect_finite(self.benchmark.tasks, self.learner.updates)
            expect_finite(self.agent.named_parameters())
        except RunError as error:
            path = self.run_dir / f"stopped_{self.steps:012d}.safetensors"
            batch = {name: v.contiguous() for name, v in vars(self.learner.last_batch).items()}
            write_atomically(path, lambda temporary: save_file(batch, temporary))
            raise RunError(
                f"{error}, noticed after {self.steps:,} steps; the last batch is in {path}. "
                f"{self._whole()}"
            ) from None

    def _whole(self) -> str:
        """What is left of a run that ends."""
        try:
            path = newest_checkpoint(self.run_dir)
        except UsageError:
            return "No checkpoint has been written yet."
        return f"{path} is whole; to continue: mtrl-train --resume {quoted(self.run_dir)}"

    def _evaluate_on_the_way(self) -> None:
        self.evaluation_pending = True
        self._evaluate(self.config.eval_episodes)
        self.evaluation_pending = False

    def _evaluate(self, episodes: int) -> Evaluation:
        def tick(steps: int) -> None:
            if self.interrupt.wanted:  # it is made anew when the run goes on
                raise _Stop

        start = time.monotonic()
        result = evaluate_in(self.agent, self.eval_envs, self.config.seed, episodes, tick=tick)
        self._left.judging(episodes * self._judged, time.monotonic() - start)
        self.success = result.mean if result.tells_success else None
        report.evaluation(self.logger, self.steps, result, self.config.eval_video)
        return result

    def _finish(self) -> Evaluation:
        """Save and judge the final policy."""
        extra = self._description()
        write_atomically(self.run_dir / FINAL, lambda path: self.agent.save(path, extra))
        expected = self._left.last_evaluation()
        about = "" if expected is None else f", about {shown(expected)}"
        self.logger.say(f"final evaluation: {N_GOALS} episodes per task{about}")
        result = self._evaluate(N_GOALS)
        write_text(self.run_dir / "eval.csv", result.to_csv())
        text = result.to_json(
            policy=FINAL,
            seed=self.config.seed,
            total_timesteps=self.steps,
            updates=self.learner.updates,
            seconds=round(self.elapsed, 1),
        )
        write_text(self.run_dir / "eval.json", text)
        self.logger.finish()
        self.logger.say(f"{result.table()}\n{self.run_dir}")
        return result

    def _description(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark.name,
            "surgery": self.config.learner.surgery,
            "seed": self.config.seed,
            "horizon": self.config.environment.horizon,
            "total_timesteps": self.steps,
        }

    def _checkpoint(self) -> None:
        self._expect_numbers()
        description = yaml12.dump(self.agent.description() | self._description())
        save_checkpoint(self.run_dir, self.steps, self.state_dict(), description)
