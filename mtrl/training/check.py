"""Everything that is checked before a run begins: the cheap first, PyTorch only when needed."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING

from mtrl.config.registry import METHODS, TRUNKS
from mtrl.config.train import TrainConfig, shown
from mtrl.errors import UsageError, import_attribute

if TYPE_CHECKING:
    import torch

    from mtrl.envs.benchmarks import Benchmark
    from mtrl.sac.agent import MTSAC

SIMULATOR_MEMORY = 20 * 2**20
"""The least that an environment of Meta-World takes [bytes]: 20 to 34 MiB were measured."""

LONGEST_TEMPORARY_FOLDER = 75
"""What a socket's address, of at most 107 bytes, leaves of the folder it is in [bytes]."""


def check_names(config: TrainConfig, benchmark: Benchmark | None = None) -> Benchmark:
    """Import the modules that are named, and look up methods and tasks, without PyTorch.

    Raises:
        UsageError: if a name is unknown or a module cannot be imported.
    """
    for module in config.imports:
        import_attribute("imports", module)
    learner = config.learner
    for spec in (learner.surgery, learner.actor_surgery, learner.critic_surgery):
        if spec is not None:
            METHODS.check(spec)
    agent = config.agent
    for spec in (agent.trunk, agent.actor_trunk, agent.critic_trunk):
        if spec is not None:
            TRUNKS.check(spec)
    from mtrl.envs.benchmarks import get_benchmark  # brings Gymnasium

    return get_benchmark(config.benchmark, config.tasks) if benchmark is None else benchmark


def check_plan(config: TrainConfig, benchmark: Benchmark) -> None:
    """Check numbers, simulators and the machine, without PyTorch.

    Raises:
        UsageError: if they do not fit together.
    """
    from mtrl.envs.make import steps_of_an_episode
    from mtrl.envs.parity import choose_simulators

    config.schedule(len(benchmark.tasks))
    steps_of_an_episode(benchmark, config.environment.horizon)
    choose_simulators(benchmark, config.environment)
    if config.eval_video and benchmark.custom:
        raise UsageError(f"eval_video: expected tasks of Meta-World's, got {benchmark.name}")
    folder = tempfile.gettempdir()
    if len(folder.encode()) > LONGEST_TEMPORARY_FOLDER:
        raise UsageError(
            f"TMPDIR: expected a path of at most {LONGEST_TEMPORARY_FOLDER} bytes, because "
            f"simulator processes put sockets there, got {len(folder.encode())}: {folder}; "
            "set a shorter one: TMPDIR=/tmp mtrl-train …"
        )


def check(
    config: TrainConfig, benchmark: Benchmark | None = None
) -> tuple[Benchmark, torch.device, TrainConfig]:
    """Look up every name and fill in defaults, before anything heavy starts.

    Args:
        config: As it was asked for.
        benchmark: In place of what `config.benchmark` names. The configuration that is returned
            names it: by where it can be imported from, or else by its own name.

    Raises:
        UsageError: if a name is unknown, the device or a simulator is missing, numbers do not fit
            together, or the run would not fit in memory.
    """
    if benchmark is not None:
        benchmark, config = _named(benchmark, config)
    benchmark = check_names(config, benchmark)
    check_plan(config, benchmark)
    from mtrl.devices import resolve_device
    from mtrl.envs.examine import examined
    from mtrl.envs.make import steps_of_an_episode
    from mtrl.nets.precision import resolve_precision

    device = resolve_device(config.device)
    precision = resolve_precision(config.learner.precision, device)
    benchmark = examined(benchmark)
    _check_networks(config, benchmark, device)
    if config.eval_video:
        from mtrl.evaluation.video import find_backend

        find_backend()
    compiles = config.learner.compile and device.type == "cuda"
    if compiles != config.learner.compile:
        warnings.warn("compile: left out on a CPU, where it makes updates slower", stacklevel=2)
    learner = config.learner.model_copy(update={"precision": precision, "compile": compiles})
    schedule = config.schedule(len(benchmark.tasks))
    horizon = steps_of_an_episode(benchmark, config.environment.horizon)
    environment = config.environment.model_copy(update={"horizon": horizon})
    update = asdict(schedule) | {"learner": learner, "environment": environment}
    return benchmark, device, config.model_copy(update=update)


def _named(benchmark: Benchmark, config: TrainConfig) -> tuple[Benchmark, TrainConfig]:
    """The tasks of `benchmark` that `config` chooses, and `config` such that it names them.

    So the run's own file says what it was trained on, and `--config` finds it again.
    """
    from mtrl.envs.benchmarks import NAMED, select
    from mtrl.envs.record import with_source

    benchmark = with_source(benchmark)
    if config.tasks is not None:
        benchmark = select(benchmark, config.tasks)
    name = benchmark.source or benchmark.name
    whole = benchmark.custom or NAMED.get(name) == benchmark.tasks
    tasks = config.tasks if whole else benchmark.tasks
    return benchmark, config.model_copy(update={"benchmark": name, "tasks": tasks})


def _check_networks(config: TrainConfig, benchmark: Benchmark, device: torch.device) -> None:
    """Make networks and methods without memory: a method says what it cannot do with them.

    Raises:
        UsageError: from the method, or if networks or replay would not fit in memory.
    """
    import torch

    from mtrl.envs.tasks import ACTION_SPACE, OBSERVATION_SPACE
    from mtrl.sac.agent import MTSAC
    from mtrl.surgery import get_surgery

    learner = config.learner
    surgeries = {
        "actor": get_surgery(learner.actor_surgery or learner.surgery, learner),
        "critics": get_surgery(learner.critic_surgery or learner.surgery, learner),
    }
    spaces = benchmark.spaces or (OBSERVATION_SPACE, ACTION_SPACE)
    sizes = [space.shape[0] for space in spaces]
    try:
        with torch.device("meta"):
            agent = MTSAC(
                benchmark.tasks, config.agent, *sizes, descriptions=benchmark.descriptions
            )
            for name, networks in agent.networks().items():
                surgeries[name].prepare(networks)
    except UsageError:
        raise
    except (RuntimeError, OverflowError, TypeError) as error:
        if "overflow" not in str(error).lower() and "too large" not in str(error).lower():
            raise
        raise UsageError(
            "agent: expected networks that fit in memory, got hidden_sizes "
            f"{shown(config.agent.hidden_sizes)}"
        ) from None
    _check_memory(config, agent, device)
    _check_simulators(config, benchmark)


def _check_memory(config: TrainConfig, agent: MTSAC, device: torch.device) -> None:
    """Compare the least that training needs with all the memory there is."""
    from mtrl.devices import total_memory

    memory = total_memory(device)
    if memory is None:
        return
    # Parameters, gradients and two moments; targets, which have none of these, stand for buffers.
    networks = 4 * sum(4 * parameter.numel() for parameter in agent.parameters())
    if networks > memory:
        raise UsageError(
            f"agent: expected networks that fit in {memory / 2**30:,.1f} GiB of memory, got "
            f"{networks / 2**30:,.1f} GiB of parameters, gradients and moments; smaller "
            "hidden_sizes or critic_bins need less"
        )
    # Observation, action, reward and end of each transition.
    row = 4 * len(agent.tasks) * (agent.observation_size + agent.action_size + 2)
    fits = int((memory - networks) // row)
    if config.learner.buffer_size > fits:
        raise UsageError(
            f"buffer_size: expected at most the {fits:,} transitions per task that "
            f"{memory / 2**30:,.1f} GiB of memory hold, got {config.learner.buffer_size:,}"
        )


def _check_simulators(config: TrainConfig, benchmark: Benchmark) -> None:
    """Compare the memory of Meta-World's reference environments with all the machine has."""
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
            f"envs_per_task: expected at most the {fits:,} environments of each of {n_tasks} tasks "
            f"that {memory / 2**30:,.1f} GiB of memory hold, got "
            f"{config.environment.envs_per_task:,}"
        )
