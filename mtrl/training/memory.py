"""Checks that a configuration fits in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError

if TYPE_CHECKING:
    import torch

    from mtrl.envs.benchmarks import Benchmark
    from mtrl.sac.agent import MTSAC

SIMULATOR_MEMORY = 20 * 2**20
"""Lower bound on the memory of a Meta-World environment [bytes]; measured: 20 to 34 MiB."""


def expect_memory(config: TrainConfig, agent: MTSAC, device: torch.device, runs: int = 1) -> None:
    """Compare a lower bound on the memory of training with the total memory of the device.

    Args:
        runs: Number of runs at a time that share the memory.

    Raises:
        UsageError: If there is not enough.
    """
    from mtrl.devices import total_memory

    memory = total_memory(device)
    if memory is None:
        return
    memory //= runs
    room = f"{memory / 2**30:,.1f} GiB of memory"
    if runs > 1:
        room += f" for each of {runs} runs at a time (max_parallel)"
    # Parameters, gradients and two moments. Targets count too, although they have no gradients
    # and moments; this makes up for buffers.
    networks = 4 * sum(4 * parameter.numel() for parameter in agent.parameters())
    if networks > memory:
        raise UsageError(
            f"agent: expected networks that fit in {room}, got "
            f"{networks / 2**30:,.1f} GiB of parameters, gradients and moments; smaller "
            "hidden_sizes or critic_bins need less"
        )
    # Observation, action, reward and end flag of each transition.
    row = 4 * len(agent.tasks) * (agent.observation_size + agent.action_size + 2)
    fits = int((memory - networks) // row)
    if config.learner.buffer_size > fits:
        raise UsageError(
            f"buffer_size: expected at most the {fits:,} transitions per task that fit in "
            f"{room}, got {config.learner.buffer_size:,}"
        )


def expect_memory_for_simulators(config: TrainConfig, benchmark: Benchmark) -> None:
    """Compare the memory of Meta-World's reference environments with all the machine has.

    Raises:
        UsageError: If there is not enough.
    """
    import torch

    from mtrl.devices import total_memory
    from mtrl.envs.parity import choose_simulators

    memory = total_memory(torch.device("cpu"))
    n_tasks = choose_simulators(benchmark, config.environment).by_task.count("metaworld")
    if memory is None or not n_tasks:
        return
    fits = memory // (n_tasks * SIMULATOR_MEMORY)
    if config.environment.envs_per_task > fits:
        raise UsageError(
            f"envs_per_task: expected at most the {fits:,} environments for each of {n_tasks} "
            f"tasks that fit in {memory / 2**30:,.1f} GiB of memory, got "
            f"{config.environment.envs_per_task:,}"
        )
