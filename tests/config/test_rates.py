"""Numbers per task or action dimension, and configurations that change another one."""

import pytest
from small_runs import small_config

from mtrl.config.presets import preset
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.training.check import check
from mtrl.training.place import existing_run
from mtrl.training.record import record_benchmark

BUDGETS = {"total_timesteps": 2_800_000, "learning_starts": 20_000, "eval_every": 280_000}


def test_the_recipe_on_mt10_has_the_numbers_of_the_runs_in_results(request):
    """Except for what changed since `results/mt10_cpu_seed1`."""
    path = request.config.rootpath / "results" / "mt10_cpu_seed1" / "config.yaml"
    ran = TrainConfig.from_yaml(path).flat()
    before = {"gradient_steps": 1, "exploration_noise": "white"}
    recipe = preset("recipe_cpu", benchmark="mt10", device="cpu", **before)
    ours = check(recipe)[2].flat()
    machine = {"run_dir", "seed", "threads", "precision", "device", "workers", "diagnose_every"}
    assert {k: v for k, v in ours.items() if k in ran.keys() - machine and v != ran[k]} == {}
    assert ours.items() >= BUDGETS.items()


def test_budgets_scale_with_tasks_and_entropy_with_actions():
    config = preset("recipe_cpu")
    assert [config.schedule(n).total_timesteps for n in (1, 4)] == [280_000, 1_120_000]
    assert [config.learner.entropy_of(n) for n in (1, 4)] == [-0.5, -2.0]
    assert config.schedule(50).log_every == 200_000
    assert TrainConfig().learner.entropy_of(6) == -6.0


@pytest.mark.parametrize(
    ("leaf", "value", "found"),
    [
        ("total_timesteps", "3_000/task", "3000/task"),
        ("total_timesteps", "1e4 / task", "10000/task"),
        ("total_timesteps", "1e4", 10_000),
        ("diagnose_every", "0/task", "0/task"),
        ("target_entropy", "-1/action", "-1.0/action"),
        ("target_entropy", "-1", -1.0),
    ],
)
def test_rates_are_read_and_written(leaf, value, found, tmp_path):
    config = TrainConfig(**{leaf: value})
    assert config.flat()[leaf] == found
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("total_timesteps: 5/tasks", "total_timesteps: input should be a number, or NUMBER/task"),
        ("total_timesteps: 0/task", "total_timesteps: input should be greater than 0"),
        ("total_timesteps: 1e12/task", "total_timesteps: input should be less than"),
        ("total_timesteps: x/task", "total_timesteps: input should be a valid integer"),
        ("target_entropy: 1/task", "learner.target_entropy: input should be a number, or NUMBER/a"),
        ("base: recip_cpu", "base: unknown 'recip_cpu'; did you mean 'recipe_cpu'"),
        ("base: [1]", "base: expected the name of a preset or a file, got "),
        ("base: c.yaml", "base: expected files without a cycle of bases"),
        ("base: none.yaml", "config: cannot read .*none.yaml"),
        ("base: plain\nlearner:\n  hidden_sizes: [8]", "unknown 'hidden_sizes'"),
    ],
)
def test_invalid_files_are_reported(text, told, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=told):
        TrainConfig.from_yaml(tmp_path / "c.yaml")


def test_a_file_changes_its_base(tmp_path):
    (tmp_path / "a.yaml").write_text("base: recipe_cpu\nagent:\n  hidden_sizes: [64]\nseed: 4\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntau: 0.1\nlearner:\n  surgery: pcgrad\n")
    found = TrainConfig.from_yaml(tmp_path / "b.yaml").flat()
    changed = {"hidden_sizes": (64,), "seed": 4, "tau": 0.1, "surgery": "pcgrad"}
    # Actor widths of the recipe would take precedence over those of all networks.
    changed["actor_hidden_sizes"] = None
    assert found == preset("recipe_cpu").flat() | changed


def test_a_requeued_run_is_the_same_run(tmp_path):
    """Its stored configuration has totals where the command has numbers per task."""
    asked = small_config(tmp_path, total_timesteps="120/task", target_entropy="-0.5/action")
    benchmark, _, resolved = check(asked)
    assert resolved.total_timesteps == 240 and resolved.learner.target_entropy == -2.0
    (tmp_path / "config.yaml").write_text(resolved.to_yaml())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_000000000060.safetensors").touch()
    record_benchmark(tmp_path, benchmark)
    assert existing_run(asked, compare_tasks=True) == tmp_path
    with pytest.raises(UsageError, match="learning_starts: expected 40, as in the run in"):
        existing_run(asked.model_copy(update={"learning_starts": "21/task"}), compare_tasks=True)
