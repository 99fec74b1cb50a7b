"""Checks before a run starts: cheap ones first, with PyTorch only when needed."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mtrl.config.agent import AgentConfig
from mtrl.config.registry import METHODS, TRUNKS
from mtrl.config.train import TrainConfig, shown
from mtrl.errors import UsageError, import_attribute, one_line
from mtrl.training.callbacks import check as check_callback
from mtrl.training.memory import expect_memory, expect_memory_for_simulators
from mtrl.training.tasks import chosen, named

if TYPE_CHECKING:
    import torch

    from mtrl.envs.benchmarks import Benchmark
    from mtrl.sac.agent import MTSAC

LONGEST_TEMPORARY_FOLDER = 75
"""Maximum length of the temporary folder [bytes]: socket addresses have at most 107 bytes."""


def check_names(config: TrainConfig, benchmark: Benchmark | None = None) -> Benchmark:
    """Import the modules in `imports`, and look up methods and tasks, without PyTorch.

    Raises:
        UsageError: If a name is unknown or a module cannot be imported.
    """
    for module in config.imports:
        import_attribute("imports", module)
    learner = config.learner
    for spec in (learner.surgery, learner.actor_surgery, learner.critic_surgery):
        if spec is not None:
            METHODS.check(spec)
    for spec in config.agent.trunks:
        TRUNKS.check(spec)
    for spec in config.callbacks:
        check_callback(spec)
    return chosen(config) if benchmark is None else benchmark


def check_plan(config: TrainConfig, benchmark: Benchmark) -> None:
    """Check numbers, simulators and the machine, without PyTorch.

    Raises:
        UsageError: If they are inconsistent.
    """
    from mtrl.demonstrations.sources import sources
    from mtrl.envs.make import steps_of_an_episode
    from mtrl.envs.parity import choose_simulators

    total = config.schedule(len(benchmark.tasks)).total_timesteps
    if (last := max(config.transfer.curriculum or (0,))) >= total:
        raise UsageError(
            f"curriculum: expected stages that start before total_timesteps ({total}), got one at "
            f"{last}"
        )
    steps_of_an_episode(benchmark, config.environment.horizon)
    choose_simulators(benchmark, config.environment)
    if config.demonstrations:
        sources(config.demonstrations, benchmark)
    if config.eval_video and benchmark.custom:
        raise UsageError(f"eval_video: expected Meta-World tasks, got {benchmark.name}")
    folder = tempfile.gettempdir()
    if len(folder.encode()) > LONGEST_TEMPORARY_FOLDER:
        raise UsageError(
            f"TMPDIR: expected a path of at most {LONGEST_TEMPORARY_FOLDER} bytes, because "
            f"simulator processes create sockets there, got {len(folder.encode())}: {folder}; "
            "set a shorter one: TMPDIR=/tmp mtrl-train …"
        )


def check(
    config: TrainConfig, benchmark: Benchmark | None = None, runs: int = 1
) -> tuple[Benchmark, torch.device, TrainConfig]:
    """Look up every name and fill in defaults, before anything heavy starts.

    Args:
        benchmark: Benchmark in place of `config.benchmark`. The returned configuration names it by
            where it can be imported from, or else by its name.
        runs: Number of such runs at a time, which share the memory.

    Raises:
        UsageError: If a name is unknown, the device or a simulator is missing, numbers are
            inconsistent, or the run would not fit in memory.
    """
    if benchmark is not None:
        benchmark, config = named(benchmark, config)
    benchmark = check_names(config, benchmark)
    check_plan(config, benchmark)
    from mtrl.devices import resolve_device
    from mtrl.envs.examine import examined
    from mtrl.envs.make import steps_of_an_episode
    from mtrl.nets.precision import resolve_precision
    from mtrl.nets.trunks import with_sizes

    device = resolve_device(config.device)
    precision = resolve_precision(config.learner.precision, device)
    benchmark = examined(benchmark)
    agent = _check_networks(config, benchmark)
    if config.transfer.curriculum is not None:  # one size of networks for all stages
        sized = with_sizes(config.agent, len(benchmark.tasks))
        config = config.model_copy(update={"agent": sized})
    expect_memory(config, agent, device, runs)
    expect_memory_for_simulators(config, benchmark)
    if config.eval_video:
        from mtrl.evaluation.video import find_backend

        find_backend()
    compiles = config.learner.compile and device.type == "cuda"
    if compiles != config.learner.compile:
        warnings.warn("compile: ignored on a CPU, where it makes updates slower", stacklevel=2)
    resolved: dict[str, Any] = {"precision": precision, "compile": compiles}
    if isinstance(config.learner.target_entropy, str):  # per action dimension
        resolved["target_entropy"] = config.learner.entropy_of(benchmark.sizes[1])
    learner = config.learner.model_copy(update=resolved)
    schedule = config.schedule(len(benchmark.tasks))
    horizon = steps_of_an_episode(benchmark, config.environment.horizon)
    environment = config.environment.model_copy(update={"horizon": horizon})
    update = asdict(schedule) | {"learner": learner, "environment": environment}
    return benchmark, device, config.model_copy(update=update)


def check_elsewhere(config: TrainConfig) -> Benchmark:
    """Check everything that does not depend on this machine, for a run on another one.

    Raises:
        UsageError: If a name is unknown, numbers are inconsistent, or a method does not support
            the networks.
    """
    benchmark = check_names(config)
    check_plan(config, benchmark)
    from mtrl.envs.examine import examined

    benchmark = examined(benchmark)
    _check_networks(config, benchmark)
    return benchmark


def _check_networks(config: TrainConfig, benchmark: Benchmark) -> MTSAC:
    """Build networks and methods without allocating memory; return the agent on the meta device.

    Raises:
        UsageError: If a method does not support the networks, or their sizes overflow.
    """
    import torch

    from mtrl.sac.agent import MTSAC
    from mtrl.surgery import get_surgery

    learner, sizes, told = config.learner, benchmark.sizes, benchmark.descriptions
    surgeries = {
        "actor": get_surgery(learner.actor_surgery or learner.surgery, learner),
        "critics": get_surgery(learner.critic_surgery or learner.surgery, learner),
    }
    try:
        with torch.device("meta"):
            agent = MTSAC(benchmark.tasks, config.agent, *sizes, descriptions=told)
            for name, networks in agent.networks().items():
                surgeries[name].prepare(networks)
    except (RuntimeError, OverflowError, TypeError) as error:
        if "overflow" not in str(error).lower() and "too large" not in str(error).lower():
            raise
        raise UsageError(
            "agent: expected networks that fit in memory, got hidden_sizes "
            f"{shown(config.agent.hidden_sizes)}"
        ) from None
    return agent


def expect_agent(agent: Any) -> MTSAC:
    """Return the object given as an agent, after checking that it is one."""
    from mtrl.sac.agent import MTSAC

    if not isinstance(agent, MTSAC):
        raise UsageError(f"agent: expected an mtrl.MTSAC, got {type(agent).__name__}")
    return agent


def expect_fitting(agent: MTSAC, benchmark: Benchmark, config: TrainConfig) -> None:
    """Check that an agent has the tasks, sizes and networks of a run's first stage.

    Args:
        benchmark: All tasks of the run, examined.
        config: Resolved configuration of the run.

    Raises:
        UsageError: If it differs, or if a curriculum cannot create further agents of its class.
    """
    from mtrl.nets.trunks import with_sizes

    stages = config.transfer.curriculum
    tasks = benchmark.tasks if stages is None else stages[0]
    sizes = agent.observation_size, agent.action_size
    for name, expected, got in (
        ("tasks in this order:", " ".join(tasks), " ".join(agent.tasks)),
        ("observations and actions of length", benchmark.sizes, sizes),
    ):
        if expected != got:
            raise UsageError(f"agent: expected {name} {expected}, got {got}")
    networks, theirs = (with_sizes(c, len(tasks)) for c in (config.agent, agent.config))
    for name, expected in networks:
        if expected != (got := getattr(theirs, name)):
            values = f"{shown(expected)}, got {shown(got)}"
            raise UsageError(f"agent: expected the run's networks: {name} {values}")
    if stages is not None:
        _expect_class(type(agent), benchmark, config.agent)


def _expect_class(made: type[MTSAC], benchmark: Benchmark, config: AgentConfig) -> None:
    """Check that an agent's class takes the arguments of `MTSAC`, without allocating memory."""
    import torch

    sizes, told = benchmark.sizes, benchmark.descriptions
    try:
        with torch.device("meta"):
            made(benchmark.tasks, config, *sizes, 0, descriptions=told)
    except TypeError as error:
        raise UsageError(
            "agent: expected a class that takes the arguments of mtrl.MTSAC, because a curriculum "
            f"creates an agent for each stage, got {made.__qualname__}: {one_line(error)}"
        ) from None
