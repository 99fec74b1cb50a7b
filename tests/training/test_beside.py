"""Work in parallel to the loop: acting from a snapshot, and writing checkpoints."""

import concurrent.futures
import copy
import threading

import numpy as np
import pytest
import torch

from mtrl.config.agent import AgentConfig
from mtrl.envs.benchmarks import get_benchmark
from mtrl.envs.make import make_vector_env
from mtrl.sac.agent import MTSAC
from mtrl.sac.replay import ReplayBuffer
from mtrl.training import checkpoint
from mtrl.training.acting import ActorSnapshot
from mtrl.training.checkpoint import CheckpointWriter, load_checkpoint, load_newest
from mtrl.training.noise import ExplorationNoise
from mtrl.training.rollout import Collector

TASKS, COPIES = ("reach-v3", "push-v3"), 2
CONFIG = AgentConfig(hidden_sizes=(8,), normalize_observations=True)


def make_agent() -> MTSAC:
    return MTSAC(TASKS, CONFIG, 39, 4, seed=1)


def change(agent: MTSAC, seed: int) -> None:
    """Change parameters in place, like an update."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in agent.actor.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)


def test_a_snapshot_is_the_policy_at_the_time_it_was_taken():
    agent, rows = make_agent(), np.random.default_rng(0).normal(size=(4, 39)).astype(np.float32)
    tasks = torch.tensor([0, 0, 1, 1])
    noise = ExplorationNoise("white", (4, 4), torch.Generator().manual_seed(5))
    snapshot = ActorSnapshot(agent, tasks, noise)
    draw = torch.Generator().manual_seed(5)

    def expected(policy: MTSAC) -> np.ndarray:
        noise = torch.randn(4, 4, generator=draw)
        return policy.act(torch.from_numpy(rows), tasks, noise).numpy()

    before = copy.deepcopy(agent)
    change(agent, 0)
    agent.normalizer.observe(torch.from_numpy(rows) + 3)
    np.testing.assert_array_equal(snapshot.act(rows), expected(before))
    snapshot.take()
    after = copy.deepcopy(agent)
    change(agent, 1)
    np.testing.assert_array_equal(snapshot.act(rows), expected(after))


def collect(collector: Collector, replay: ReplayBuffer, steps: range) -> np.ndarray:
    """Make vector steps with an update during each; return the actions, `[steps, n, A]`."""
    actions = []
    for step in steps:
        collector.act(uniform=step < 3)
        change(collector.agent, step)
        actions.append(collector._actions)
        collector.store(collector.wait(), replay)
    return np.array(actions)


@pytest.mark.parametrize("noise", ["white", "pink"])
def test_the_snapshot_lags_by_one_update_and_resuming_is_exact(noise):
    envs = make_vector_env(get_benchmark("", TASKS), 9, workers=1, envs_per_task=COPIES)
    try:
        replay = ReplayBuffer(100, 2, 39, 4, envs_per_task=COPIES)
        collector = Collector(envs, make_agent(), seed=2, snapshot=True, noise=noise)
        collector.reset(seed=3)
        seen: list[dict[str, torch.Tensor]] = []
        asked: list[dict[str, torch.Tensor]] = []
        act = collector._snapshot.act

        def noted(observations):
            seen.append(copy.deepcopy(collector._snapshot.state_dict()))
            return act(observations)

        collector._snapshot.act = noted
        for step in range(6):
            asked.append(copy.deepcopy(collector.agent.actor.state_dict()))
            collect(collector, replay, range(step, step + 1))
        for acted, present in zip(seen, asked[2:5], strict=True):
            for name, value in present.items():
                assert torch.equal(acted[f"actor.{name}"], value)
        collector._snapshot.act = act

        state = copy.deepcopy((collector.state_dict(), collector.agent.state_dict()))
        through = collect(collector, replay, range(6, 12))
        other = Collector(envs, make_agent(), seed=9, snapshot=True, noise=noise)
        other.agent.load_state_dict(state[1])
        other.load_state_dict(state[0], seed=3)
        np.testing.assert_array_equal(collect(other, replay, range(6, 12)), through)

        # As if resumed from a CPU.
        current = Collector(envs, make_agent(), seed=9, snapshot=True, noise=noise)
        current.agent.load_state_dict(state[1])
        del state[0]["acting"]
        current.load_state_dict(state[0], seed=3)
        assert not np.array_equal(collect(current, replay, range(6, 8)), through[:2])
    finally:
        envs.close()


def test_the_first_action_is_that_of_the_policy_when_episodes_start():
    """Which may have been loaded, or taken over from another stage, since the collector exists."""

    class Episodes:
        envs_per_task, num_envs = COPIES, len(TASKS) * COPIES

        def __init__(self):
            self.rows = np.zeros((self.num_envs, 39), np.float32)

        def reset(self, seed):
            return self.rows, {}

        def state(self):
            return {"episodes": [0] * self.num_envs, "tells_success": np.zeros(len(TASKS), bool)}

        def restore(self, state, seed):
            return self.rows

        def step_async(self, actions):
            pass

    starts = (
        lambda collector: collector.reset(seed=3),
        lambda collector: collector.take_over(Collector(Episodes(), make_agent(), 0), [], seed=3),
    )
    for start in starts:
        agents, actions = (make_agent(), make_agent()), []
        change(agents[1], 0)
        for agent in agents:
            collector = Collector(Episodes(), agent, seed=2, snapshot=True)
            agent.load_state_dict(agents[1].state_dict())
            start(collector)
            collector.act(uniform=False)
            actions.append(collector._actions)
        np.testing.assert_array_equal(*actions)


STATE = {"steps": 1, "array": np.arange(3.0), "inner": {"tensor": torch.arange(4.0)}}


def test_a_checkpoint_holds_the_state_at_the_call(tmp_path, monkeypatch):
    """Even if tensors and plain values change while it is written."""
    go, write = threading.Event(), checkpoint._write

    def slowly(*work):
        assert go.wait(10)
        return write(*work)

    monkeypatch.setattr(checkpoint, "_write", slowly)
    state, writer = copy.deepcopy(STATE), CheckpointWriter(tmp_path)
    writer.save(1, state, "a: 1")
    state["array"] += 1
    state["inner"]["tensor"].zero_()
    state["steps"] = 2
    writer.check()  # does not wait
    assert not list(tmp_path.rglob("step_*"))
    go.set()
    writer.wait()
    found, _ = load_newest(tmp_path)
    assert found["steps"] == 1
    assert found["array"].tolist() == [0, 1, 2]
    assert found["inner"]["tensor"].tolist() == [0, 1, 2, 3]


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.save(7, STATE, "a: 1")
    writer.wait()
    (beside,) = (tmp_path / "checkpoints").iterdir()
    state, _ = load_checkpoint(beside)
    assert state["steps"] == 1
    assert state["array"].tolist() == STATE["array"].tolist()
    assert torch.equal(state["inner"]["tensor"], STATE["inner"]["tensor"])
    for steps in (8, 9):
        writer.save(steps, STATE, "a: 1")
    writer.wait()
    kept = sorted(path.name for path in beside.parent.iterdir())
    assert kept == ["step_000000000008.safetensors", "step_000000000009.safetensors"]


@pytest.mark.parametrize("notice", ["check", "wait", "save"])
def test_a_failed_write_raises_once_and_keeps_the_previous_one(notice, tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path)
    writer.save(1, STATE, "a: 1")
    writer.wait()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", full)
        writer.save(2, STATE, "a: 1")
        concurrent.futures.wait([writer._pending])
    with pytest.raises(OSError, match="No space left"):
        {"check": writer.check, "wait": writer.wait}.get(
            notice, lambda: writer.save(3, STATE, "a: 1")
        )()
    writer.wait()
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert load_checkpoint(path)[0]["steps"] == 1
