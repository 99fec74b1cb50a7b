"""Custom tasks: Gymnasium's MuJoCo environments, trained end to end."""

import json
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from own_tasks import REACHERS
from small_runs import small_config

from mtrl import Benchmark, TrainConfig, resume, train
from mtrl.analysis.runs import read_run
from mtrl.cli.eval import main as eval_main
from mtrl.cli.export import main as export_main
from mtrl.cli.train import main as train_main
from mtrl.config.agent import AgentConfig
from mtrl.config.environment import EnvironmentConfig
from mtrl.envs.benchmarks import get_benchmark
from mtrl.envs.custom import CustomTask
from mtrl.envs.examine import examined
from mtrl.envs.make import make_vector_env
from mtrl.envs.parity import choose_simulators
from mtrl.errors import UsageError
from mtrl.folder import read_benchmark
from mtrl.policy.policy import Policy

HORIZON = 20


def make(**spaces):
    """An environment with other spaces."""

    class Other(gym.Env):
        observation_space = spaces.get("observation", Box(-1, 1, (3,)))
        action_space = spaces.get("action", Box(-1, 1, (2,)))

        def reset(self, *, seed=None, options=None):
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, False, False, {}

    return Other()


def test_episodes_equal_those_of_the_bare_environment():
    """In worker processes, any number of rows, with actions scaled to its range."""
    envs = make_vector_env(REACHERS, HORIZON, workers=2, envs_per_task=2)
    draw = np.random.default_rng(0)
    try:
        observations, _ = envs.reset(seed=5)
        alone = [
            CustomTask(task, REACHERS.custom[task], "solved", HORIZON, stride=2)
            for task in REACHERS.tasks
            for _ in range(2)
        ]
        for row, env in enumerate(alone):
            env.reset(seed=5, options={"episode": row % 2})
            np.testing.assert_array_equal(
                observations[row],
                env.reset(seed=5, options={"episode": row % 2})[0].astype(np.float32),
            )
        for step in range(2 * HORIZON):
            actions = draw.uniform(-1, 1, (4, 2)).astype(np.float32)
            observations, rewards, _, truncated, infos = envs.step(actions)
            for row, env in enumerate(alone):
                seen, reward, _, cut, info = env.step(actions[row])
                assert reward == rewards[row] and cut == truncated[row]
                assert info["success"] == infos["success"][row]
                assert infos["success"].shape == (4,) and envs.tells_success.all()
                if cut:
                    last = infos["final_obs"][row]
                    np.testing.assert_array_equal(last, seen.astype(np.float32))
                    seen, _ = env.reset()
                np.testing.assert_array_equal(observations[row], seen.astype(np.float32))
            assert truncated.all() == (step % HORIZON == HORIZON - 1)
    finally:
        envs.close()


def test_actions_are_scaled_to_the_environments_range():
    class Wide(gym.Env):
        observation_space = Box(-9, 9, (2,))
        action_space = Box(np.float32([0, -4]), np.float32([10, 4]))

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return action, 0.0, False, False, {}

    env = CustomTask("wide", Wide)
    env.reset(seed=0)
    for action, expected in (([-1, -1], [0, -4]), ([1, 1], [10, 4]), ([0, 0.5], [5, 2])):
        np.testing.assert_allclose(env.step(np.float32(action))[0], expected, atol=1e-6)


def test_an_own_loop_needs_the_same_scale_of_actions():
    """As the manual and the card say: `RescaleAction` is what training does."""
    policy = Policy(("swing",), AgentConfig(hidden_sizes=(8,)), 3, 1)
    ours = CustomTask("swing", partial(gym.make, "Pendulum-v1"), for_training=False)
    (mine, _), seed = ours.reset(seed=0), ours.env.unwrapped.np_random_seed
    theirs = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), -1, 1)
    other, _ = theirs.reset(seed=seed)
    for _ in range(20):
        np.testing.assert_array_equal(mine, other)
        (action, _) = policy.predict(other, deterministic=False)
        mine, reward, *_ = ours.step(action)
        other, expected, *_ = theirs.step(action)
        assert reward == pytest.approx(expected, rel=1e-6)
    assert abs(theirs.unwrapped.last_u) <= 2


def test_evaluation_uses_other_episodes_than_training():
    ours = [
        CustomTask("a", REACHERS.custom["gravity0"], "solved", HORIZON, for_training=training)
        for training in (True, False)
    ]
    first, second = (env.reset(seed=0)[0] for env in ours)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, ours[0].reset(seed=0)[0])


BOX = {
    "discrete": (
        {"action": Discrete(3)},
        "task 'b': expected actions in a Box of one .*Discrete",
    ),
    "picture": (
        {"observation": Box(0, 1, (8, 8))},
        "task 'b': expected observations in a Box of.*FlattenObservation",
    ),
    "longer": ({"observation": Box(-1, 1, (4,))}, r"observations of equal shape, got \(3,\) for"),
    "unbounded": ({"action": Box(-np.inf, np.inf, (2,))}, "task 'b': expected bounded actions"),
}


@pytest.mark.parametrize("case", BOX)
def test_spaces_that_do_not_fit_are_named(case):
    spaces, message = BOX[case]
    benchmark = Benchmark("x", {"a": make, "b": partial(make, **spaces)})
    with pytest.raises(UsageError, match=message):
        examined(benchmark)


def test_invalid_benchmarks():
    with pytest.raises(UsageError, match=r"benchmark: expected tasks .* got none"):
        Benchmark("empty", {})
    with pytest.raises(UsageError, match=r"benchmark: expected tasks .* got both"):
        Benchmark("both", {"reach-v3": None, "mine": make})
    with pytest.raises(UsageError, match="simulator: expected 'auto' for reachers"):
        choose_simulators(REACHERS, EnvironmentConfig(simulator="envpool"))
    with pytest.raises(UsageError, match=r"benchmark: cannot import 'no.such:thing'"):
        get_benchmark("no.such:thing")
    with pytest.raises(UsageError, match=r"benchmark: expected a mtrl.Benchmark at .* got float"):
        get_benchmark("math:pi")


def test_benchmark_by_name(tmp_path, monkeypatch):
    (tmp_path / "mine_for_a_test.py").write_text(
        "import gymnasium as gym\nfrom functools import partial\nfrom mtrl import Benchmark\n"
        "def both():\n"
        "    make = partial(gym.make, 'Reacher-v5')\n"
        "    return Benchmark('both', {'a': make, 'b': make})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert get_benchmark("mine_for_a_test:both").tasks == ("a", "b")
    assert get_benchmark("mine_for_a_test:both", ("b",)).tasks == ("b",)
    with pytest.raises(UsageError, match="tasks: unknown 'c'"):
        get_benchmark("mine_for_a_test:both", ("c",))


config = partial(
    small_config,
    tasks=None,
    total_timesteps=360,
    learning_starts=120,
    surgery="pcgrad",
    horizon=HORIZON,
    simulator="auto",
    eval_every=360,
    eval_episodes=50,
)


def test_trains_and_evaluates(tmp_path):
    outcome = train(config(tmp_path / "run"), REACHERS)
    assert outcome.evaluation is not None
    assert outcome.evaluation.tasks == REACHERS.tasks
    # Within 0.2 m of a target that lies within 0.2 m of the arm: this succeeds sometimes.
    assert 0 < outcome.evaluation.mean < 1


def test_a_name_in_place_of_an_object_gets_a_hint():
    with pytest.raises(
        UsageError, match=r"config: expected an mtrl\.TrainConfig, such as preset\("
    ):
        train("quickstart")
    with pytest.raises(UsageError, match=r"benchmark: expected an mtrl\.Benchmark, such as get_be"):
        train(TrainConfig(), "mt10")


def test_without_success_tasks_are_scored_by_return(tmp_path, monkeypatch, capsys):
    """With the commands, and a benchmark in a module of the working directory."""
    (tmp_path / "silent_for_a_test.py").write_text(
        "import gymnasium as gym\nfrom functools import partial\nfrom mtrl import Benchmark\n"
        "pair = Benchmark('pair', dict.fromkeys('ab', partial(gym.make, 'Reacher-v5')))\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = "--config plain --total-timesteps 200 --learning-starts 80"
    flags += " --hidden-sizes 8 --batch-size 8 --workers 1"
    name = "silent_for_a_test:pair"
    assert train_main(["--benchmark", name, "--run-dir", "run", *flags.split()]) == 0
    said = capsys.readouterr().out
    assert "success" not in said and "training: return -" in said
    stored = json.loads(Path("run/eval.json").read_text())
    assert set(stored["tasks"][0]) == {"task", "episodes", "return_mean"}
    assert eval_main(["run", "--benchmark", name, "--json", "again.json"]) == 0
    again = json.loads(Path("again.json").read_text())
    assert again["tasks"] == stored["tasks"] and again["mean_return"] == stored["mean_return"]
    rows = [json.loads(line) for line in Path("run/progress.json").read_text().splitlines()]
    tags = set().union(*rows)
    assert {"eval/return/a", "eval/return/mean"} <= tags
    assert not any(tag.startswith("eval/success_rate") for tag in tags)
    assert not any(tag.startswith("rollout/success_rate") for tag in tags)
    assert {task.score for task in read_benchmark(Path("run")).tasks} == {"return"}
    assert export_main(["run", "-o", "policy.safetensors", "--card"]) == 0
    card = capsys.readouterr().out
    assert "| a | 50 | – | – | -" in card
    assert "mtrl-eval FILE --benchmark MODULE:NAME" in card
    assert "numbers in [-1, 1], for an environment in `gymnasium.wrappers.RescaleAction(" in card
    assert eval_main(["policy.safetensors"]) == 2
    assert "custom tasks of pair, because a file only names" in capsys.readouterr().err
    for given in (["run"], ["run", "--benchmark", name]):
        assert eval_main([*given, "--video", "films"]) == 2
        told = capsys.readouterr().err
        assert "video: expected Meta-World tasks, got pair" in told and "evaluating" not in told


def test_plotting_runs_does_not_import_their_benchmark(tmp_path):
    """A run folder may come from a stranger, so the benchmark it names is not imported."""
    outcome = train(config(tmp_path / "run"), REACHERS)
    path = outcome.run_dir / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("benchmark: mt10", "benchmark: no_such_module:thing"))
    run = read_run(outcome.run_dir)
    assert run.tasks == REACHERS.tasks and run.final is not None


def test_a_run_records_its_benchmark(tmp_path, capsys):
    """If given in Python, every command finds the tasks again, because a module holds them."""
    run_dir = train(
        config(tmp_path / "run", total_timesteps=360, max_runtime=1e-9), REACHERS
    ).run_dir
    record = read_benchmark(run_dir)
    assert record is not None and record.names == REACHERS.tasks
    assert (record.name, record.environments) == ("reachers", "custom")
    assert record.source == "own_tasks:REACHERS"
    saved = TrainConfig.from_yaml(run_dir / "config.yaml")
    assert saved.benchmark == "own_tasks:REACHERS"
    assert get_benchmark(saved.benchmark, saved.tasks).tasks == REACHERS.tasks
    with pytest.raises(UsageError, match="benchmark: expected custom tasks like those of reachers"):
        resume(run_dir, benchmark=get_benchmark("mt10"))
    with pytest.raises(
        UsageError, match="expected the tasks of reachers, got r without 'gravity-9'"
    ):
        resume(run_dir, benchmark=Benchmark("r", {"gravity0": make}))
    assert train_main(["--resume", str(run_dir), "--max-runtime", "1"]) == 0
    capsys.readouterr()
    assert eval_main([str(run_dir), "--episodes", "2"]) == 0
    assert "gravity-9" in capsys.readouterr().out
    policy = run_dir / "policy_final.safetensors"  # may come from a stranger
    assert eval_main([str(policy), "--episodes", "2"]) == 2
    assert "expected --benchmark MODULE:NAME for the custom tasks of reachers" in (
        capsys.readouterr().err
    )
    assert eval_main([str(policy), "--episodes", "2", "--benchmark", "own_tasks:REACHERS"]) == 0


def test_a_benchmark_outside_modules_has_to_be_given(tmp_path, capsys):
    benchmark = Benchmark("lost", dict(REACHERS.environments), "solved")
    run_dir = train(config(tmp_path / "run", max_runtime=1e-9), benchmark).run_dir
    assert read_benchmark(run_dir).source is None
    for command in (train_main, ["--resume", str(run_dir)]), (eval_main, [str(run_dir)]):
        assert command[0](command[1]) == 2
        assert "'lost' was not imported from a module" in capsys.readouterr().err
    again = ["--resume", str(run_dir), "--max-runtime", "1"]
    assert train_main([*again, "--benchmark", "mt10"]) == 2
    assert "expected custom tasks like those of lost, got metaworld" in capsys.readouterr().err
    assert train_main([*again, "--benchmark", "own_tasks:REACHERS"]) == 0
    assert read_benchmark(run_dir).name == "lost"


def test_meta_worlds_tasks_given_in_python_are_recorded_too(tmp_path):
    benchmark = Benchmark("pair", dict.fromkeys(("reach-v3", "drawer-close-v3")))
    run_dir = train(config(tmp_path / "run", max_runtime=1e-9), benchmark).run_dir
    record = read_benchmark(run_dir)
    assert (record.name, record.names) == ("pair", benchmark.tasks)
    assert {task.score for task in record.tasks} == {"success"}
    saved = TrainConfig.from_yaml(run_dir / "config.yaml")
    assert get_benchmark(saved.benchmark, saved.tasks).tasks == benchmark.tasks
    (run_dir / "benchmark.json").unlink()  # as in older runs
    assert resume(run_dir, max_runtime=1e-9).evaluation is None
    assert read_benchmark(run_dir).names == benchmark.tasks
