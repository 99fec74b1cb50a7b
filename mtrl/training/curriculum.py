"""Stages of a run, each with its own set of tasks."""

from __future__ import annotations

from typing import Any

import torch

from mtrl.config.train import TrainConfig
from mtrl.demonstrations.data import Demonstrations
from mtrl.envs.benchmarks import Benchmark, select
from mtrl.envs.record import record_of
from mtrl.folder import BenchmarkRecord
from mtrl.sac.agent import MTSAC
from mtrl.training.console import say
from mtrl.training.state import RunState


class Curriculum:
    """Creates the state of each stage; without `config.transfer.curriculum` there is only one.

    At a new stage, tasks that stay keep their heads, temperatures, replay data and return scale,
    and the trunks are kept. New tasks start from scratch in all of these. Optimisers, the state of
    surgery methods, random streams and all episodes start anew. If there is a new task, updates
    pause until it has as many transitions as every task has before the first update; meanwhile the
    policy acts in known tasks.

    Args:
        demonstrations: Demonstrations of any tasks of any stages.
        agent: Agent of the first stage. Later stages have new agents of its class. Default: a new
            one.

    Attributes:
        benchmark: All tasks of all stages.
    """

    def __init__(
        self,
        config: TrainConfig,
        benchmark: Benchmark,
        device: torch.device,
        demonstrations: Demonstrations | None = None,
        agent: MTSAC | None = None,
    ) -> None:
        self._config, self.benchmark, self._device = config, benchmark, device
        self._demonstrations, self._agent = demonstrations, agent
        self._by_success = dict(zip(benchmark.tasks, benchmark.by_success, strict=True))
        self._stages = list((config.transfer.curriculum or {0: benchmark.tasks}).items())

    def begin(self, saved: dict[str, Any] | None) -> RunState:
        """Return the state of a new run, or the saved one.

        Raises:
            UsageError: See `RunState`.
        """
        if saved is not None:
            return self._state(saved.get("stage", 0), saved)
        state = self._state(0)
        state.begin(self._warm_up(state.benchmark))
        return state

    def following(self, state: RunState) -> RunState:
        """Return the state of the current stage, which is `state` itself within a stage."""
        due = sum(step <= state.steps for step, _ in self._stages) - 1
        if due == state.stage:
            return state
        new = self._state(due)
        new.take_over(state)
        state.close()
        say(f"new stage with tasks: {' '.join(new.benchmark.tasks)}")
        if state.agent is self._agent:
            say("the given agent is not trained any further: this stage has an agent of its class")
        if len(new.known) < len(new.benchmark.tasks):
            new.learns_at = state.steps + self._warm_up(new.benchmark)
        return new

    def record(self, state: RunState) -> BenchmarkRecord:
        """Return the record of all tasks, updated by the success reports that `state` has seen."""
        for task, told in zip(state.benchmark.tasks, state.envs.tells_success, strict=True):
            self._by_success[task] |= bool(told)
        return record_of(self.benchmark, list(self._by_success.values()))

    def _state(self, stage: int, saved: dict[str, Any] | None = None) -> RunState:
        benchmark = select(self.benchmark, self._stages[stage][1])
        given: MTSAC | type[MTSAC] = MTSAC
        if self._agent is not None:
            given = type(self._agent) if stage else self._agent
        return RunState(
            self._config,
            benchmark,
            self._device,
            saved,
            demonstrations=self._demonstrations,
            agent=given,
            stage=stage,
        )

    def _warm_up(self, benchmark: Benchmark) -> int:
        """Return the random steps over all tasks of a stage, a share of the run's number."""
        n_tasks = len(self.benchmark.tasks)
        starts = self._config.schedule(n_tasks).learning_starts
        return starts * len(benchmark.tasks) // n_tasks
