"""Compare EnvPool's Meta-World with the reference for each task, and decide where to use it.

    python scripts/parity.py [TASK ...] [--quick] [--jobs N] [--write]

EnvPool draws the random vector of a task (positions of object and goal) from a Mersenne Twister
seeded with the pool's seed. The reference gets the same numbers, so both simulators start every
episode in the same state. All episodes run in the same pool, which also reveals errors that
accumulate over resets. Three kinds of episodes of 300 steps are played from equal starts: uniformly
*random* actions, the scripted *expert* of `metaworld.policies`, and a *noisy* expert with N(0,
0.5²) added to its actions. Each episode is played on the reference and repeated on EnvPool with the
same actions. Experts also play it on EnvPool a second time, based on EnvPool's observations.

Contacts are chaotic, so long sequences diverge even if the dynamics are equal. A task passes if

- resets: no element of any first observation differs by more than 0.005 (metres; quaternions);
- dynamics: with equal random actions, observations agree to 0.005 in at least half of the steps;
- rewards: where observations agree to 0.005, 95% of the rewards agree to 0.1 (rewards are at most
  10); success: the flags agree in 99% of these steps;
- returns: for each kind of episode, EnvPool's mean return is within 10% of the reference's, and so
  is the 95% interval of the median paired difference (by order statistics; a single grasp that
  succeeds by chance changes a mean but not a median);
- experts: at most 10% of the experts' episodes differ in whether they succeed, and the fraction of
  successful steps differs by at most 0.1 on average.

12 episodes of each kind are played, and 36 more if a task misses only the last two criteria, and
not clearly. Noise therefore counts against a task: if in doubt, it fails. `--write` stores numbers
and verdicts in the package, in `mtrl/envs/parity.json`, with the versions they hold for; if only
some tasks are given, it updates these.
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
    """A task on the reference simulator that starts episodes like EnvPool's pool with `seed`."""

    def __init__(self, task: str, seed: int) -> None:
        self.env = MetaWorldTask(task, STEPS)
        # This has the same seeding as C++'s std::mt19937.
        self._twister = np.random.RandomState(seed)._bit_generator

    def reset(self) -> np.ndarray:
        """Start the next episode; return its first observation [39]."""
        simulator, drawn = self.env.simulator, []

        def draw() -> np.ndarray:
            space = simulator._random_reset_space
            assert space is not None
            low, high = space.low.astype(float), space.high.astype(float)
            words = self._twister.random_raw(2 * low.size).astype(float).reshape(-1, 2)
            # libstdc++'s uniform_real_distribution: 64 bits, the lower word first.
            drawn.append((words[:, 0] + words[:, 1] * 2.0**32) / 2.0**64 * (high - low) + low)
            return drawn[-1]

        # The reference applies its own rejection rule.
        self.env._set_random_vector(np.zeros(0))
        simulator._get_state_rand_vec = draw  # type: ignore[method-assign]
        simulator.reset_model()
        del simulator._get_state_rand_vec
        self.env._set_random_vector(drawn[-1])
        return simulator.reset()[0]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Step; return observation [39], reward and success."""
        observation, reward, _, _, info = self.env.simulator.step(action)
        return observation, float(reward), bool(info["success"])


class Native:
    """The same task on EnvPool."""

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
        """Start the next episode; return its first observation [39]."""
        return self.pool.reset()[0][0]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Step; return observation [39], reward and success."""
        observation, reward, _, _, info = self.pool.step(action[None])
        return observation[0], float(reward[0]), bool(info["success"][0])


class Comparison:
    """All three kinds of episodes of one task, and their statistics."""

    def __init__(self, task: str) -> None:
        self.reference = Reference(task, SEED)
        self.repeated, self.acting = Native(task, SEED), Native(task, SEED)
        policies: dict[str, Any] = ENV_POLICY_MAP
        self.expert = policies[task]()
        self.generator = np.random.default_rng(SEED)
        self.resets: list[float] = []
        # Errors of observations, rewards and flags with the reference's actions [episode][step, 3].
        self.errors: list[np.ndarray] = []
        # Rewards and flags of reference and EnvPool, each with its own actions [episode][step, 4].
        self.outcomes: list[np.ndarray] = []

    def play(self, kind: str) -> None:
        """Play one episode on both simulators."""
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
        """Return the statistics that the criteria use."""
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
    """Return a quantile; for no values, a finite substitute for infinity, which JSON lacks."""
    return float(np.quantile(values, q)) if values.size else 1e9


def compare(pairs: np.ndarray) -> dict[str, float]:
    """Return mean returns, and the 95% interval of the median relative difference."""
    (reference, native), n = pairs.mean(0), len(pairs)
    differences = np.sort(pairs[:, 1] - pairs[:, 0]) / max(abs(reference), 1e-9)
    rank = max(1, int(binom.ppf(0.025, n, 0.5)))
    low, high = differences[rank - 1], differences[n - rank]
    return {"reference": reference, "native": native, "low": low, "high": high}


def failures(found: dict[str, Any]) -> tuple[list[str], bool]:
    """Return the criteria that a task misses, and whether more episodes may change that."""
    reasons = []
    if found["reset_error"] > 0.005:
        reasons.append("first observations differ")
    if found["agreement"] < 0.5:
        reasons.append("observations diverge under random actions")
    if found["reward_error"] > 0.1:
        reasons.append("rewards differ in equal states")
    if found["flag_error"] > 0.01:
        reasons.append("success differs in equal states")
    undecided = not reasons
    differ, gap = found["success_differs"], abs(np.subtract(*found["success_steps"]))
    if differ > 0.1:
        reasons.append("experts succeed in different episodes")
    if gap > 0.1:
        reasons.append("experts hold success for different lengths")
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
    """Round all numbers to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{float(value):.4g}")


def judge(task: str, episodes: int) -> dict[str, Any]:
    """Return the verdict of one task with its statistics."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    warnings.simplefilter("ignore")  # metaworld.policies warns of clipped actions
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIMEOUT)
    try:
        comparison = Comparison(task)
        for goal in (episodes, 4 * episodes):
            while len(comparison.errors) < goal * len(KINDS):
                # Alternate, so that an error accumulated over resets affects all kinds.
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
    """Print a line per task; store the verdicts with --write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="default: all 50")
    parser.add_argument(
        "--quick", action="store_true", help="3 episodes of each kind instead of 12"
    )
    parser.add_argument("--write", action="store_true", help="store the verdicts in the package")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="tasks in parallel")
    arguments = parser.parse_args()
    if arguments.write and arguments.quick:
        parser.error("--write: expected no --quick with it")

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
                parser.error("--write: expected no TASK, as stored verdicts are of other versions")
            tasks = verdicts()["tasks"] | tasks
        text = json.dumps({"versions": simulator_versions(), "tasks": tasks}, indent=1)
        (files("mtrl.envs") / "parity.json").write_text(text + "\n")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
