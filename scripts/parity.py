"""Compare EnvPool's Meta-World with the reference, task by task, and say where it may stand in.

    python scripts/parity.py [TASK ...] [--quick] [--jobs N] [--write]

EnvPool draws a task's random vector (positions of object and goal) from a Mersenne Twister seeded
with the pool's seed. The reference is given the same numbers, so both simulators begin every
episode alike, and go on from one episode to the next in the same pool, so that errors which
resets accumulate show too. Three kinds of episodes of 300 steps are played from equal starts:
uniformly *random* actions, the scripted *expert* of `metaworld.policies`, and a *noisy* expert
whose actions have N(0, 0.5²) added. Each is played on the reference, repeated on EnvPool with the
same actions, and, for the experts, played on EnvPool once more by the expert looking at EnvPool's
observations.

Contacts are chaotic, so long sequences part although the dynamics are equal. A task passes if

- resets: no element of any first observation differs by more than 0.005 (metres; quaternions);
- dynamics: with equal random actions, observations agree to 0.005 in at least half of the steps;
- rewards: where observations agree to 0.005, 95% of the rewards agree to 0.1, rewards being at
  most 10; success: there the flags agree in 99%;
- returns: of each kind of episodes, EnvPool's mean return is within 10% of the reference's, and so
  is the 95% interval of the median difference of pairs (by order statistics; one lucky grasp more
  or less, which noise decides, moves a mean and no median);
- experts: the two differ in whether success was ever seen in at most 10% of the experts'
  episodes, and in the share of steps that show success by at most 0.1 on average.

12 episodes of each kind are played, and 36 more where a task misses nothing but the last two
criteria, and those not clearly. So noise counts against a task: in doubt it fails. `--write` puts
numbers and verdicts into the package, `mtrl/envs/parity.json`, with the versions they hold for; of
some tasks, into those that are there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import warnings
from functools import partial
from importlib.resources import files
from typing import Any

import envpool
import numpy as np
from envpool.mujoco.metaworld.registration import metaworld_task_id
from metaworld.policies import ENV_POLICY_MAP
from scipy.stats import binom

from mtrl.envs.benchmarks import NAMED
from mtrl.envs.metaworld import MetaWorldTask
from mtrl.envs.parity import simulator_versions, verdicts

KINDS = ("random", "expert", "noisy")
SEED, STEPS, TIMEOUT = 20, 300, 900  # TIMEOUT [seconds per task]: some resets may never end


class Reference:
    """A task on the reference simulator that begins episodes as EnvPool's pool of `seed` does."""

    def __init__(self, task: str, seed: int) -> None:
        self.env = MetaWorldTask(task, STEPS)
        # C++'s std::mt19937 and this have the same seeding.
        self._twister = np.random.RandomState(seed)._bit_generator

    def reset(self) -> np.ndarray:
        """The next episode's first observation [39]."""
        simulator, drawn = self.env.simulator, []

        def draw() -> np.ndarray:
            space = simulator._random_reset_space
            assert space is not None
            low, high = space.low.astype(float), space.high.astype(float)
            words = self._twister.random_raw(2 * low.size).astype(float).reshape(-1, 2)
            # libstdc++'s uniform_real_distribution: 64 bits, the lower word first.
            drawn.append((words[:, 0] + words[:, 1] * 2.0**32) / 2.0**64 * (high - low) + low)
            return drawn[-1]

        # The reference rejects and draws again by its own rule.
        self.env._set_random_vector(np.zeros(0))
        simulator._get_state_rand_vec = draw  # type: ignore[method-assign]
        simulator.reset_model()
        del simulator._get_state_rand_vec
        self.env._set_random_vector(drawn[-1])
        return simulator.reset()[0]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Observation [39], reward, success."""
        observation, reward, _, _, info = self.env.simulator.step(action)
        return observation, float(reward), bool(info["success"])


class Native:
    """The same on EnvPool."""

    def __init__(self, task: str, seed: int) -> None:
        self.pool = envpool.make_gymnasium(
            metaworld_task_id(task),
            num_envs=1,
            seed=seed,
            max_episode_steps=STEPS,
            partially_observable=False,
            num_threads=1,
        )

    def reset(self) -> np.ndarray:
        """The next episode's first observation [39]."""
        return self.pool.reset()[0][0]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Observation [39], reward, success."""
        observation, reward, _, _, info = self.pool.step(action[None])
        return observation[0], float(reward[0]), bool(info["success"][0])


class Comparison:
    """All three kinds of episodes of one task, and the numbers they give."""

    def __init__(self, task: str) -> None:
        self.reference = Reference(task, SEED)
        self.repeated, self.acting = Native(task, SEED), Native(task, SEED)
        policies: dict[str, Any] = ENV_POLICY_MAP
        self.expert = policies[task]()
        self.generator = np.random.default_rng(SEED)
        self.resets: list[float] = []
        # Errors of observations, rewards, flags with the reference's actions [episode][step, 3].
        self.errors: list[np.ndarray] = []
        # Rewards and flags of the reference and of EnvPool, each with its own [episode][step, 4].
        self.outcomes: list[np.ndarray] = []

    def play(self, kind: str) -> None:
        """One episode on both simulators."""
        noise = self.generator.normal(0, 0.5, (STEPS, 4)) * (kind == "noisy")
        if kind == "random":
            noise = self.generator.uniform(-1, 1, (STEPS, 4))

        def act(step: int, seen: np.ndarray) -> np.ndarray:
            wanted = 0.0 if kind == "random" else self.expert.get_action(seen)
            return np.clip(wanted + noise[step], -1, 1).astype(np.float32)

        now, theirs, own = self.reference.reset(), self.repeated.reset(), self.acting.reset()
        self.resets.append(np.abs(now - theirs).max())
        errors, outcomes = np.zeros((STEPS, 3)), np.zeros((STEPS, 4))
        for step in range(STEPS):
            action = act(step, now)
            now, reward, success = self.reference.step(action)
            theirs, their_reward, their_success = self.repeated.step(action)
            errors[step] = (
                np.abs(now - theirs).max(),
                abs(reward - their_reward),
                success != their_success,
            )
            own_reward, own_success = their_reward, their_success
            if kind != "random":
                own, own_reward, own_success = self.acting.step(act(step, own))
            outcomes[step] = reward, success, own_reward, own_success
        self.errors.append(errors)
        self.outcomes.append(outcomes)

    def numbers(self) -> dict[str, Any]:
        """What the criteria are about."""
        kinds = np.arange(len(self.errors)) % len(KINDS)
        observation, reward, flag = np.moveaxis(np.array(self.errors), -1, 0)
        agree = observation <= 0.005
        outcomes = np.array(self.outcomes)
        returns = outcomes[:, :, ::2].sum(1)  # [episode, simulator]
        flags = outcomes[kinds > 0][:, :, 1::2]  # [episode, step, simulator]
        seen = np.any(flags, 1)
        return {
            "episodes_of_each_kind": len(self.errors) // len(KINDS),
            "reset_error": max(self.resets),
            "agreement": agree[kinds == 0].mean(),
            "reward_error": quantile(reward[agree], 0.95),
            "flag_error": flag[agree].mean() if agree.any() else 1.0,
            "returns": {kind: compare(returns[kinds == k]) for k, kind in enumerate(KINDS)},
            "success": seen.mean(0).tolist(),
            "success_differs": (seen[:, 0] != seen[:, 1]).mean(),
            "success_steps": flags.mean((0, 1)).tolist(),
        }


def quantile(values: np.ndarray, q: float) -> float:
    """Of no values, infinity's stand-in in JSON."""
    return float(np.quantile(values, q)) if values.size else 1e9


def compare(pairs: np.ndarray) -> dict[str, float]:
    """Mean returns, and the 95% interval of the median difference over the reference's mean."""
    (reference, native), n = pairs.mean(0), len(pairs)
    differences = np.sort(pairs[:, 1] - pairs[:, 0]) / max(abs(reference), 1e-9)
    rank = max(1, int(binom.ppf(0.025, n, 0.5)))
    low, high = differences[rank - 1], differences[n - rank]
    return {"reference": reference, "native": native, "low": low, "high": high}


def failures(found: dict[str, Any]) -> tuple[list[str], bool]:
    """Which criteria a task does not meet, in words, and whether more episodes may change that."""
    reasons = []
    if found["reset_error"] > 0.005:
        reasons.append("first observations differ")
    if found["agreement"] < 0.5:
        reasons.append("observations part under random actions")
    if found["reward_error"] > 0.1:
        reasons.append("rewards differ in equal states")
    if found["flag_error"] > 0.01:
        reasons.append("success differs in equal states")
    undecided = not reasons
    differ, gap = found["success_differs"], abs(np.subtract(*found["success_steps"]))
    if differ > 0.1:
        reasons.append("experts succeed in other episodes")
    if gap > 0.1:
        reasons.append("experts hold success for other lengths")
    undecided &= max(differ, gap) <= 0.2
    for kind, values in found["returns"].items():
        low, high = values["low"], values["high"]
        apart = low > 0.1 or high < -0.1
        close = abs(values["native"] - values["reference"]) <= 0.1 * abs(values["reference"])
        if low < -0.1 or high > 0.1 or not close:
            undecided &= not apart
            reasons.append(f"returns {'' if apart else 'may '}differ by more than 10% ({kind})")
    return reasons, undecided and bool(reasons)


def rounded(value: Any) -> Any:
    """Four significant digits are enough to judge by."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{float(value):.4g}")


def judge(task: str, episodes: int) -> dict[str, Any]:
    """The verdict of one task, and the numbers behind it."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    warnings.simplefilter("ignore")  # metaworld.policies: of actions that are clipped
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIMEOUT)
    try:
        comparison = Comparison(task)
        for goal in (episodes, 4 * episodes):
            while len(comparison.errors) < goal * len(KINDS):
                # In turns, lest an error that resets accumulate hit one kind alone.
                comparison.play(KINDS[len(comparison.errors) % len(KINDS)])
            found = comparison.numbers()
            reasons, undecided = failures(found)
            if not undecided:
                break
    except TimeoutError:
        return {"passed": False, "reasons": [f"no result within {TIMEOUT} s"]}
    finally:
        signal.alarm(0)
    return {"passed": not reasons, "reasons": reasons, **rounded(found)}


def main() -> None:
    """Print a line per task, and write the verdicts with --write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="default: all 50")
    parser.add_argument("--quick", action="store_true", help="3 episodes of each kind, not 12")
    parser.add_argument("--write", action="store_true", help="put the verdicts into the package")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="tasks at once")
    arguments = parser.parse_args()
    if arguments.write and arguments.quick:
        parser.error("--write: expected no --quick beside it")

    names = arguments.tasks or list(NAMED["mt50"])
    tasks = {}
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        found = pool.imap(partial(judge, episodes=3 if arguments.quick else 12), names)
        for task, verdict in zip(names, found, strict=True):
            tasks[task] = verdict
            print(f"{task:30} {'; '.join(verdict['reasons']) or 'passed'}", flush=True)
    print(f"{sum(verdict['passed'] for verdict in tasks.values())} of {len(tasks)} passed")
    if arguments.write:
        if arguments.tasks:
            if verdicts()["versions"] != simulator_versions():
                parser.error("--write: expected no TASK, as the verdicts are for other versions")
            tasks = verdicts()["tasks"] | tasks
        text = json.dumps({"versions": simulator_versions(), "tasks": tasks}, indent=1)
        (files("mtrl.envs") / "parity.json").write_text(text + "\n")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
