"""Everything that is checked before a run begins: the cheap first, PyTorch only when needed."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mtrl.config.registry import METHODS, TRUNKS
from mtrl.config.train import AgentConfig, TrainConfig, shown
from mtrl.errors import UsageError, import_attribute
from mtrl.training.callbacks import check as check_callback
from mtrl.training.memory import expect_memory, expect_memory_for_simulators

if TYPE_CHECKING:
    import torch

    from mtrl.envs.benchmarks import Benchmark
    from mtrl.sac.agent import MTSAC

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
    for spec in config.callbacks:
        check_callback(spec)
    from mtrl.envs.benchmarks import get_benchmark  # brings a simulator

    return get_benchmark(config.benchmark, config.tasks) if benchmark is None else benchmark


def check_plan(config: TrainConfig, benchmark: Benchmark) -> None:
    """Check numbers, simulators and the machine, without PyTorch.

    Raises:
        UsageError: if they do not fit together.
    """
    from mtrl.demonstrations.sources import sources
    from mtrl.envs.make import steps_of_an_episode
    from mtrl.envs.parity import choose_simulators

    config.schedule(len(benchmark.tasks))
    steps_of_an_episode(benchmark, config.environment.horizon)
    choose_simulators(benchmark, config.environment)
    if config.demonstrations:
        sources(config.demonstrations, benchmark)
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
    expect_memory(config, _check_networks(config, benchmark), device)
    expect_memory_for_simulators(config, benchmark)
    if config.eval_video:
        from mtrl.evaluation.video import find_backend

        find_backend()
    compiles = config.learner.compile and device.type == "cuda"
    if compiles != config.learner.compile:
        warnings.warn("compile: left out on a CPU, where it makes updates slower", stacklevel=2)
    resolved: dict[str, Any] = {"precision": precision, "compile": compiles}
    if isinstance(config.learner.target_entropy, str):  # per action dimension
        resolved["target_entropy"] = config.learner.entropy_of(sizes_of(benchmark)[1])
    learner = config.learner.model_copy(update=resolved)
    schedule = config.schedule(len(benchmark.tasks))
    horizon = steps_of_an_episode(benchmark, config.environment.horizon)
    environment = config.environment.model_copy(update={"horizon": horizon})
    update = asdict(schedule) | {"learner": learner, "environment": environment}
    return benchmark, device, config.model_copy(update=update)


def check_elsewhere(config: TrainConfig) -> Benchmark:
    """Check what does not depend on this machine, for a run on another.

    Raises:
        UsageError: if a name is unknown, numbers do not fit together, or a method cannot do with
            the networks.
    """
    benchmark = check_names(config)
    check_plan(config, benchmark)
    from mtrl.envs.examine import examined

    benchmark = examined(benchmark)
    _check_networks(config, benchmark)
    return benchmark


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


def _check_networks(config: TrainConfig, benchmark: Benchmark) -> MTSAC:
    """Make networks and methods without memory: a method says what it cannot do with them.

    Returns:
        The agent, on the meta device.

    Raises:
        UsageError: from the method, or if networks are beyond all memory.
    """
    import torch

    from mtrl.sac.agent import MTSAC
    from mtrl.surgery import get_surgery

    learner = config.learner
    surgeries = {
        "actor": get_surgery(learner.actor_surgery or learner.surgery, learner),
        "critics": get_surgery(learner.critic_surgery or learner.surgery, learner),
    }
    try:
        with torch.device("meta"):
            agent = MTSAC(
                benchmark.tasks,
                config.agent,
                *sizes_of(benchmark),
                descriptions=benchmark.descriptions,
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
    return agent


def sizes_of(benchmark: Benchmark) -> tuple[int, int]:
    """How many numbers an observation and an action have, of a benchmark that was examined."""
    from mtrl.envs.tasks import ACTION_SPACE, OBSERVATION_SPACE

    observations, actions = benchmark.spaces or (OBSERVATION_SPACE, ACTION_SPACE)
    return observations.shape[0], actions.shape[0]


def expect_agent(
    agent: Any, benchmark: Benchmark | None = None, config: AgentConfig | None = None
) -> MTSAC:
    """Refuse anything but an agent of these tasks, sizes and networks.

    Raises:
        UsageError: `agent: …`.
    """
    from mtrl.sac.agent import MTSAC

    if not isinstance(agent, MTSAC):
        raise UsageError(f"agent: expected an object of mtrl.MTSAC's, got {type(agent).__name__}")
    if benchmark is not None:
        sizes = agent.observation_size, agent.action_size
        for name, expected, got in (
            ("tasks in this order:", " ".join(benchmark.tasks), " ".join(agent.tasks)),
            ("observations and actions of length", sizes_of(benchmark), sizes),
        ):
            if expected != got:
                raise UsageError(f"agent: expected {name} {expected}, got {got}")
    for name, expected in config or ():
        if expected != (got := getattr(agent.config, name)):
            values = f"{shown(expected)}, got {shown(got)}"
            raise UsageError(f"agent: expected networks as the run's: {name} {values}")
    return agent
