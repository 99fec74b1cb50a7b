"""Evaluations during a run and of its final policy."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mtrl.envs.benchmarks import N_GOALS
from mtrl.envs.tasks import MAX_STEPS
from mtrl.evaluation.protocol import Watch, evaluate_in
from mtrl.evaluation.scores import Evaluation
from mtrl.folder import FINAL, write_atomically, write_benchmark
from mtrl.progress import duration, lines
from mtrl.training import report
from mtrl.training.curriculum import Curriculum
from mtrl.training.logger import RunLogger
from mtrl.training.pace import TimeLeft
from mtrl.training.state import RunState


class Judge:
    """Evaluates the policy of a run and writes the results to logs and files.

    Args:
        tick: Called after each vector step; an exception ends the evaluation.

    Attributes:
        state: State of the current stage.
        left: Estimate of the time to the end of the run, evaluations included.
    """

    def __init__(
        self,
        state: RunState,
        curriculum: Curriculum,
        logger: RunLogger,
        run_dir: Path,
        *,
        tick: Callable[[int], None],
    ) -> None:
        self.state, self._curriculum, self._logger = state, curriculum, logger
        self._run_dir, self._tick = run_dir, tick
        self._config = config = state.config
        n_tasks = len(curriculum.benchmark.tasks)
        # Environment steps of one episode per task; a guess if the environments end episodes.
        self._steps = n_tasks * (config.environment.horizon or MAX_STEPS)
        evaluations = config.eval_episodes * self._steps, N_GOALS * self._steps
        self.left = TimeLeft(config.schedule(n_tasks), *evaluations)

    def on_the_way(self) -> Evaluation:
        """Evaluate; an evaluation that does not finish stays pending in the state."""
        self.state.evaluation_pending = True
        result = self._evaluate(self._config.eval_episodes)
        self.state.evaluation_pending = False
        return result

    def final(self) -> Evaluation:
        """Save and evaluate the final policy."""
        state = self.state
        description = state.description()
        write_atomically(self._run_dir / FINAL, lambda path: state.agent.save(path, description))
        expected = self.left.last_evaluation()
        about = "" if expected is None else f", about {duration(expected)}"
        self._logger.say(f"final evaluation: {N_GOALS} episodes per task{about}")
        result = self._evaluate(N_GOALS, partial(lines, say=self._logger.say))
        report.final(
            self._run_dir,
            result,
            seed=self._config.seed,
            total_timesteps=state.steps,
            updates=state.learner.updates,
            seconds=round(state.elapsed, 1),
        )
        self._logger.finish()
        return result

    def _evaluate(self, episodes: int, watch: Watch | None = None) -> Evaluation:
        state, seed = self.state, self._config.seed
        # Act on the CPU: the simulators are there, and batches are too small for a GPU.
        policy = state.agent.snapshot("cpu")
        start = time.monotonic()
        result = evaluate_in(policy, state.eval_envs, seed, episodes, tick=self._tick, watch=watch)
        self.left.judging(episodes * self._steps, time.monotonic() - start)
        state.score = result.summary
        write_benchmark(self._run_dir, self._curriculum.record(state))
        report.evaluation(self._logger, state.steps, result, self._config.eval_video)
        return result
