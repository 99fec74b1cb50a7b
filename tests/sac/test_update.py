"""An update against Stable-Baselines3's SAC, and invariants of every update."""

import shutil
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import small_learner
import torch
from gymnasium import Env
from gymnasium.spaces import Box
from small_learner import ACTION, HIDDEN, OBSERVATION, filled_replay, make_batch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.utils._python_dispatch import TorchDispatchMode

from mtrl.errors import UsageError
from mtrl.sac.agent import MTSAC
from mtrl.sac.learner import Learner
from mtrl.sac.losses import td_target
from mtrl.sac.problems import critic_problem
from mtrl.sac.replay import Batch, ReplayBuffer
from mtrl.surgery import (
    FAMO,
    FeatureSurgery,
    PCGrad,
    RotoGrad,
    available,
    get_surgery,
    register,
)
from mtrl.surgery.methods.pcgrad import random_orders

BATCH = 16


class Spaces(Env):
    """Environment with only spaces, because SB3 needs one to create a model."""

    observation_space = Box(-1, 1, (OBSERVATION,), np.float64)
    action_space = Box(-1, 1, (ACTION,), np.float64)

    def reset(self, *, seed=None, options=None):
        return np.zeros(OBSERVATION), {}


make_learner = partial(small_learner.make_learner, dtype=torch.float64)


def copy_to_sb3(ours: MTSAC, sb3: SAC) -> None:
    """Copy the weights of a task; SB3 stores them transposed, and μ and log σ in two layers."""

    def trunk(n: int, networks) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shared, own = ({k: v[n] for k, v in tree.items()} for tree in networks.folded()[1:])
        layers = [(shared["weight0"], own["bias0"][0])]
        layers += [(shared[f"weight{i}"], shared[f"bias{i}"]) for i in range(1, len(HIDDEN))]
        return layers, (own["head_weight"][0], own["head_bias"][0])

    def put(linear: torch.nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
        linear.weight.data.copy_(weight.T)
        linear.bias.data.copy_(bias)

    layers, (weight, bias) = trunk(0, ours.actor)
    linears = [m for m in sb3.actor.latent_pi if isinstance(m, torch.nn.Linear)]
    for linear, layer in zip(linears, layers, strict=True):
        put(linear, *layer)
    put(sb3.actor.mu, weight[:, :ACTION], bias[:ACTION])
    put(sb3.actor.log_std, weight[:, ACTION:], bias[ACTION:])
    for theirs, networks in ((sb3.critic, ours.critics), (sb3.critic_target, ours.target_critics)):
        for n, q in enumerate(theirs.q_networks):
            layers, head = trunk(n, networks)
            linears = [m for m in q if isinstance(m, torch.nn.Linear)]
            for linear, layer in zip(linears, [*layers, head], strict=True):
                put(linear, *layer)
    sb3.log_ent_coef.data.copy_(ours.log_alpha)


def distance(sb3: SAC, ours: MTSAC) -> float:
    """Return the largest difference between our parameters and theirs."""
    other = SAC("MlpPolicy", Spaces(), policy_kwargs={"net_arch": list(HIDDEN)}, device="cpu")
    other.policy.double()
    other.log_ent_coef.data = other.log_ent_coef.data.double()
    copy_to_sb3(ours, other)
    pairs = zip(sb3.policy.parameters(), other.policy.parameters(), strict=True)
    gaps = [(a - b).abs().max().item() for a, b in pairs]
    return max(*gaps, (sb3.log_ent_coef - other.log_ent_coef).abs().max().item())


@pytest.mark.parametrize("surgery", ["none", "pcgrad", "rotograd"])
def test_equals_stable_baselines3(surgery, monkeypatch):
    """T = 1, same weights, batch and noise: critic, actor, temperature and target agree.

    SB3 adds 1e-6 inside its tanh correction; we need no epsilon, so its is set to zero.
    """
    learner = make_learner(1, surgery=surgery, max_grad_norm=0.0)
    sb3 = SAC(
        "MlpPolicy",
        Spaces(),
        learning_rate=3e-4,
        ent_coef="auto_0.7",
        device="cpu",
        policy_kwargs={
            "net_arch": list(HIDDEN),
            "optimizer_kwargs": {"eps": 1e-5},
        },
    )
    sb3.policy.double()
    sb3.log_ent_coef.data = sb3.log_ent_coef.data.double()
    sb3.ent_coef_optimizer = torch.optim.Adam([sb3.log_ent_coef], lr=3e-4, eps=1e-5)
    sb3.actor.action_dist.epsilon = 0.0
    sb3.set_logger(Logger(None, []))
    # SB3 casts observations to float32, which would hide differences.
    monkeypatch.setattr("stable_baselines3.common.policies.preprocess_obs", lambda o, *a, **k: o)
    copy_to_sb3(learner.agent, sb3)
    initial = distance(sb3, learner.agent)

    for seed in range(3):
        batch, noise = make_batch(1, seed)
        draws = iter([noise[1, 0], noise[0, 0]])  # SB3 samples the current action first
        monkeypatch.setattr(
            "torch.distributions.normal._standard_normal", lambda *a, d=draws, **k: next(d)
        )
        samples = ReplayBufferSamples(
            batch.observations[0],
            batch.actions[0],
            batch.next_observations[0],
            batch.terminated[0][:, None],
            batch.rewards[0][:, None],
        )
        monkeypatch.setattr(
            sb3, "replay_buffer", SimpleNamespace(sample=Mock(return_value=samples))
        )
        before = learner.agent.actor.shared["weight0"].clone()
        sb3.train(gradient_steps=1, batch_size=BATCH)
        learner.update(batch, noise)
        assert distance(sb3, learner.agent) < 1e-9
        assert not torch.equal(before, learner.agent.actor.shared["weight0"])
    assert initial == 0.0


def test_next_action_is_sampled_at_the_next_observation():
    learner = make_learner(3)
    batch, noise = make_batch(3)
    alpha = torch.ones(3).double()
    agent = learner.agent

    def target(batch: Batch) -> torch.Tensor:
        networks = agent.actor.folded(), agent.target_critics.folded()
        return td_target(*networks, agent.value, batch, noise=noise[0], alpha=alpha, gamma=0.99)

    moved = Batch(**{**vars(batch), "observations": batch.observations + 1})
    assert torch.equal(target(batch), target(moved))
    moved = Batch(**{**vars(batch), "next_observations": batch.next_observations + 1})
    assert not torch.equal(target(batch), target(moved))
    terminal = Batch(**{**vars(batch), "terminated": torch.ones_like(batch.terminated)})
    assert torch.equal(target(terminal), batch.rewards)


def test_surgery_leaves_per_task_parameters_alone():
    """Gradients of heads and task biases are those of the mean loss."""
    batch, noise = make_batch(4)
    taken = {}
    for surgery in ("none", "pcgrad"):
        learner = make_learner(4, surgery=surgery, max_grad_norm=0.0)
        learner.update(batch, noise)
        taken[surgery] = {
            f"{part}.{name}": parameter.grad
            for part in ("actor", "critics")
            for name, parameter in getattr(learner.agent, part).named_parameters()
        }
    # The actor's problem depends on the critics' step, so compare only the critics.
    for name, gradient in taken["none"].items():
        if name.startswith("critics.per_task"):
            torch.testing.assert_close(gradient, taken["pcgrad"][name], atol=1e-12, rtol=1e-9)
    trunk = "critics.shared.weight0"
    assert not torch.allclose(taken["none"][trunk], taken["pcgrad"][trunk])


def test_tasks_do_not_affect_the_per_task_parameters_of_others():
    """Another batch for task 2 changes no per-task parameter of the others in an update."""
    (batch, noise), (other, _) = make_batch(3), make_batch(3, seed=1)
    mixed = {key: value.clone() for key, value in vars(batch).items()}
    for key, value in vars(other).items():
        mixed[key][2] = value[2]
    results = []
    for each in (batch, Batch(**mixed)):
        learner = make_learner(3, max_grad_norm=0.0)
        learner.update(each, noise)
        results.append(learner.agent.critics.per_task["head_weight"])
    assert torch.equal(results[0][:, :2], results[1][:, :2])
    assert not torch.equal(results[0][:, 2], results[1][:, 2])


def test_gradient_norm_is_clipped_per_network():
    batch, noise = make_batch(2)
    learner = make_learner(2, max_grad_norm=1e-3)
    learner.update(batch, noise)
    for networks in (learner.agent.actor, learner.agent.critics):
        for n in range(networks.n_networks):
            grads = [p.grad[n].flatten() for p in networks.parameters()]
            assert torch.cat(grads).norm().item() == pytest.approx(1e-3, rel=2e-2)


def test_updates_are_reproducible():
    batch, noise = make_batch(5)
    runs = []
    for seed in (0, 0, 1):
        learner = make_learner(5, seed=seed, surgery="pcgrad")
        for _ in range(3):
            learner.update(batch, noise)
        runs.append(learner.agent.critics.shared["weight1"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])  # another seed, another order of projections


def test_the_learner_applies_the_weights_of_a_registered_method(monkeypatch):
    """A method that returns 1/T gives the plain average in the whole learner."""
    batch, noise = make_batch(4)
    monkeypatch.setattr(
        PCGrad, "weights", lambda self, g, r: torch.full(g.shape[:2], 0.25).double()
    )
    plain, other = (make_learner(4, surgery=name) for name in ("none", "pcgrad"))
    plain.update(batch, noise)
    other.update(batch, noise)
    for a, b in zip(plain.agent.parameters(), other.agent.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("n_tasks", [1, 4])
@pytest.mark.parametrize("surgery", available())
def test_every_method_takes_a_finite_step(surgery, n_tasks):
    batch, noise = make_batch(n_tasks)
    learner = make_learner(n_tasks, surgery=surgery)
    before = learner.agent.actor.shared["weight0"].clone()
    for _ in range(2):
        metrics = learner.update(batch, noise)
    for name, value in {**learner.agent.state_dict(), **metrics}.items():
        assert value.isfinite().all(), name
    assert not torch.equal(before, learner.agent.actor.shared["weight0"])


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_networks_may_have_different_methods(part):
    batch, noise = make_batch(4)
    plain, both = make_learner(4), make_learner(4, surgery="pcgrad")
    mixed = make_learner(4, **{f"{part}_surgery": "pcgrad"})
    reverse = make_learner(4, surgery="pcgrad", **{f"{part}_surgery": "none"})
    for learner in (plain, both, mixed, reverse):
        learner.generator.manual_seed(0)
        learner.update(batch, noise)

    def critic(learner: Learner) -> torch.Tensor:
        return learner.agent.critics.shared["weight0"]

    def actor(learner: Learner) -> torch.Tensor:
        return learner.agent.actor.shared["weight0"]

    with_pcgrad, without = (reverse, mixed) if part == "actor" else (mixed, reverse)
    assert torch.equal(critic(with_pcgrad), critic(both))
    assert torch.equal(critic(without), critic(plain))
    assert not torch.equal(critic(plain), critic(both))
    assert not torch.equal(actor(mixed), actor(reverse))
    if part == "actor":  # the same critics as without surgery, but another actor
        assert not torch.equal(actor(mixed), actor(plain))


def test_a_temperature_stops_at_its_lower_bound():
    """With a target far below the entropy, temperatures fall as fast as Adam steps."""
    settings = {"target_entropy": -100.0, "learning_rate": 0.1}
    free, held = make_learner(3, **settings), make_learner(3, min_temperature=0.5, **settings)
    batch, noise = make_batch(3)
    for _ in range(2):
        free.update(batch, noise)
        held.update(batch, noise)
    assert torch.equal(free.agent.log_alpha, held.agent.log_alpha)  # no effect above the bound
    for _ in range(5):
        free.update(batch, noise)
        held.update(batch, noise)
    assert (free.agent.log_alpha.exp() < 0.4).all()
    torch.testing.assert_close(held.agent.log_alpha.exp(), torch.full((3,), 0.5).double())


def test_applied_weights_are_reported():
    batch, noise = make_batch(4)
    metrics = make_learner(4).update(batch, noise)
    assert torch.equal(metrics["critic_weight"], torch.ones(4).double())
    metrics = make_learner(4, surgery="pcgrad").update(batch, noise)
    assert (metrics["critic_weight"] - 1).abs().max() > 1e-3


def test_a_method_gets_the_losses_after_the_step(monkeypatch):
    heard = {}

    def hear(self, losses):
        heard[len(heard)] = losses().clone()

    monkeypatch.setattr(FAMO, "after_step", hear)
    batch, noise = make_batch(3)
    learner = make_learner(3, surgery="famo")
    with torch.no_grad():
        alpha = learner.agent.log_alpha.exp()
        before = critic_problem(learner.agent, learner.config, batch, noise=noise[0], alpha=alpha)
        learner.update(batch, noise)
        critics, actor = heard.values()
        assert critics.shape == (2, 3) and actor.shape == (1, 3)
        # The problems hold views of the updated parameters, and the old targets.
        torch.testing.assert_close(critics, before.losses())


def test_the_state_of_a_method_is_saved():
    @register("test-remembers")
    class Remembers(FeatureSurgery):
        def prepare(self, networks):
            self.register_buffer("seen", torch.zeros(networks.n_networks, networks.n_tasks))

        def weights(self, tasks, found):
            self.seen[:, tasks] += found.losses.float()
            return torch.full_like(found.losses, 1 / found.losses.shape[-1])

    batch, noise = make_batch(3)
    learner, other = (make_learner(3, surgery="test-remembers") for _ in range(2))
    learner.update(batch, noise)
    other.load_state_dict(learner.state_dict())
    assert learner.surgeries["critics"].seen.all()
    assert torch.equal(learner.surgeries["critics"].seen, other.surgeries["critics"].seen)


def drawn(learner: Learner, replay: ReplayBuffer, monkeypatch) -> list[torch.Tensor]:
    """Return all inputs of three updates."""
    fed, update = [], Learner.update

    def spy(self, batch, noise):
        fed.extend([*vars(batch).values(), noise])
        return update(self, batch, noise)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "update", spy)
        for _ in range(3):
            learner.step(replay)
    return fed


@pytest.mark.parametrize("surgery", available())
def test_equal_seeds_give_equal_batches_and_noise_for_every_method(surgery, monkeypatch):
    """Runs of two methods are paired: their inputs are equal until they act differently."""
    plain, other = (
        drawn(small_learner.make_learner(surgery=name), filled_replay(), monkeypatch)
        for name in ("none", surgery)
    )
    assert not torch.equal(plain[-1], plain[len(plain) // 3 - 1])  # noise differs in every update
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a, b)


def test_the_random_stream_of_surgery_is_saved():
    """Two more updates after resuming draw the same orders as without."""
    whole, stopped, resumed = (small_learner.make_learner(surgery="pcgrad") for _ in range(3))
    replay, other = filled_replay(), filled_replay()
    for _ in range(2):
        whole.step(replay)
        stopped.step(other)
    resumed.agent.load_state_dict(stopped.agent.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    for _ in range(2):
        whole.step(replay)
        resumed.step(other)
    for a, b in zip(whole.agent.parameters(), resumed.agent.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_older_checkpoint_without_a_stream_for_surgery_continues_exactly():
    """Its orders were drawn after the noise, critics first, also after two resumes."""
    learner, replay = small_learner.make_learner(surgery="pcgrad"), filled_replay()
    learner.step(replay)
    old = learner.state_dict()
    del old["surgery_generator"]
    expected = torch.Generator()
    expected.set_state(old["generator"])
    for _ in range(2):
        resumed = small_learner.make_learner(surgery="pcgrad")
        resumed.load_state_dict(old)
        resumed.step(replay)
        torch.randn(2, 4, 8, ACTION, generator=expected)
        for n_networks in (2, 1):
            random_orders(n_networks, 4, expected)
        old = resumed.state_dict()
        assert torch.equal(old["generator"], expected.get_state())


class NothingLeavesTheDevice(TorchDispatchMode):
    """Raises where a GPU's host would synchronise, or a shape would depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} in a captured update"
        for index in args[1] if name in ("index", "index_put_", "_index_put_impl_") else ():
            assert index is None or index.dtype != torch.bool, "boolean index in a captured update"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["jacobian", "factored"])
@pytest.mark.parametrize("surgery", [name for name in available() if get_surgery(name).capturable])
def test_a_capturable_update_never_synchronises(surgery, engine):
    """Tensors that a captured graph would refer to stay in place."""
    learner = make_learner(4, surgery=surgery, gradient_engine=engine)
    batch, noise = make_batch(4)
    learner.update(batch, noise)  # optimisers create their state

    def addresses() -> dict[str, int]:
        held = {f"agent.{k}": v for k, v in learner.agent.state_dict().items()}
        for name, method in learner.surgeries.items():
            held |= {f"{name}.{k}": v for k, v in method.state_dict().items()}
        for name, optimizer in learner.optimizers.items():
            for i, state in enumerate(optimizer.state.values()):
                held |= {f"{name}.{i}.{k}": v for k, v in state.items()}
        return {name: value.data_ptr() for name, value in held.items()}

    before = addresses()
    with NothingLeavesTheDevice():
        learner.update(batch, noise)
    assert addresses() == before


@pytest.mark.parametrize("surgery", ["imtl-g", "aligned-mtl"])
def test_synchronisation_is_detected(surgery):
    with pytest.raises(AssertionError, match="captured update"), NothingLeavesTheDevice():
        torch.ones(3)[torch.tensor([True, False, True])]
    assert not get_surgery(surgery).capturable


def test_the_replay_buffer_samples_without_synchronising():
    replay = ReplayBuffer(10, 2, OBSERVATION, ACTION)
    x = np.zeros((2, OBSERVATION))
    replay.add(x, np.zeros((2, ACTION)), np.zeros(2), np.zeros(2), x, done=np.zeros(2, bool))
    with NothingLeavesTheDevice():
        replay.sample(4)


def test_maintenance_and_the_count_of_updates(monkeypatch):
    """Rotations are orthonormalised at fixed intervals, however many updates a call makes."""
    monkeypatch.setattr("mtrl.sac.learner.MAINTAIN_EVERY", 4)
    called = []
    monkeypatch.setattr(RotoGrad, "maintain", lambda self, networks: called.append(networks))
    learner = make_learner(2, surgery="rotograd", batch_size=8)
    learner.agent.float()
    learner = Learner(learner.agent, learner.config)
    replay, x = ReplayBuffer(10, 2, OBSERVATION, ACTION), np.zeros((2, OBSERVATION))
    replay.add(x, np.zeros((2, ACTION)), np.zeros(2), np.zeros(2), x, done=np.zeros(2, bool))
    for _ in range(3):
        learner.step(replay, 3)
    with pytest.raises(UsageError, match="updates: expected an integer of at least 1, got 0"):
        learner.step(replay, 0)
    assert learner.updates == 9
    assert len(called) == 2 * 2  # actor and critics, after the updates 4 and 8
    other = make_learner(2, surgery="rotograd")
    other.load_state_dict(learner.state_dict())
    assert other.updates == 9


@pytest.mark.slow  # it compiles for a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU")
@pytest.mark.parametrize("surgery", ["pcgrad", "rotograd"])
def test_compiled_updates_equal_eager_ones(surgery):
    eager, compiled = (make_learner(3, surgery=surgery, compile=each) for each in (False, True))
    for seed in range(3):
        batch, noise = make_batch(3, seed)
        eager.update(batch, noise)
        compiled.update(batch, noise)
    for (name, value), (_, expected) in zip(
        compiled.agent.named_parameters(), eager.agent.named_parameters(), strict=True
    ):
        torch.testing.assert_close(value, expected, atol=1e-9, rtol=0, msg=name)
