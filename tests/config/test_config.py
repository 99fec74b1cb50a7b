"""Configuration: one tree from YAML and flags, and one-line errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mtrl.cli.eval import main as eval_main
from mtrl.cli.train import main as train_main
from mtrl.config import presets
from mtrl.config.agent import AgentConfig
from mtrl.config.learner import LearnerConfig
from mtrl.config.presets import preset
from mtrl.config.section import validate
from mtrl.config.train import TrainConfig
from mtrl.errors import UsageError
from mtrl.nets import precision
from mtrl.nets.precision import resolve_precision
from mtrl.training.check import check

CPUINFO = Path("/proc/cpuinfo")
TINY = [
    "--config",
    "plain",
    "--tasks",
    "reach-v3",
    "push-v3",
    "--batch-size",
    "8",
    "--hidden-sizes",
    "8",
]


def run_python(code: str) -> str:
    """Return the output of a new interpreter, which must not fail."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_neither_torch_nor_a_simulator():
    code = (
        "import sys\nfrom mtrl.cli import eval, export, train\n"
        "for command in (export, eval, train):\n"
        "    try: command.main(['--help'])\n"
        "    except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'mujoco', 'metaworld', 'gymnasium', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = run_python(code)
    for flag in (
        "--total-timesteps --learning-starts --buffer-size --batch-size --gradient-steps --tau "
        "--gamma --learning-rate --seed --device --benchmark --tasks --surgery --run-dir "
        "--eval-every --eval-episodes --checkpoint-every --resume --config --diagnose-every "
        "--actor-surgery --critic-surgery --rotation-lr --rotation-decay --rotation-size "
        "--eval-video --video --camera --stochastic --json --csv --output --card"
    ).split():
        assert flag in shown


def test_an_error_that_needs_torch_brings_neither_its_compiler_nor_a_simulator():
    """`torch._dynamo` takes as long to import as torch itself."""
    code = (
        "import sys\nfrom mtrl.cli import train\n"
        "arguments = ['--config', 'quickstart', '--trunk', 'moore(experts=0)']\n"
        "assert train.main(arguments) == 2\n"
        "heavy = {'torch._dynamo', 'mujoco', 'metaworld', 'matplotlib'} & set(sys.modules)\n"
        "assert 'torch' in sys.modules and not heavy, heavy"
    )
    run_python(code)


def test_a_config_file_becomes_the_defaults_that_help_shows(tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 41\nlearner:\n  batch_size: 77\n  learning_rate: 1e-5\n")
    with pytest.raises(SystemExit):
        train_main(["--config", str(path), "--help"])
    shown = capsys.readouterr().out
    assert "(default: 77)" in shown and "(default: 41)" in shown and "(default: 1e-05)" in shown


def test_yaml_round_trip(tmp_path):
    config = TrainConfig(tasks=("push-v3",), agent=AgentConfig(hidden_sizes=(3, 4)), seed=8)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(path) == config


def test_a_sections_fields_may_be_given_without_it():
    flat = TrainConfig(benchmark="mt50", surgery="pcgrad", hidden_sizes=(3, 4), horizon=100)
    nested = {"learner": {"surgery": "pcgrad"}, "agent": {"hidden_sizes": (3, 4)}}
    tree = {"benchmark": "mt50", **nested, "environment": {"horizon": 100}}
    assert flat == TrainConfig.model_validate(tree)
    both = TrainConfig(learner=LearnerConfig(tau=0.1), surgery="pcgrad").learner
    assert (both.tau, both.surgery) == (0.1, "pcgrad")
    with pytest.raises(ValueError, match="tau is given twice"):
        TrainConfig(learner=LearnerConfig(tau=0.1), tau=0.2)
    with pytest.raises(UsageError, match="unknown 'surgry'; did you mean 'surgery'"):
        validate(TrainConfig, {"surgry": "none"})


def test_the_tree_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().learner.batch_size = 3


def test_defaults_grow_with_the_number_of_tasks():
    schedule = TrainConfig().schedule(10)
    assert (schedule.total_timesteps, schedule.learning_starts) == (20_000_000, 40_000)
    assert TrainConfig(total_timesteps=500_000).schedule(50).total_timesteps == 500_000


def test_presets_are_the_files_of_configs(request):
    folder = request.config.rootpath / "configs"
    assert set(presets.EXPECTED) == {path.stem for path in folder.glob("*.yaml")}
    for name in presets.EXPECTED:
        config = presets.preset(name)
        assert config == TrainConfig.from_yaml(folder / f"{name}.yaml")
        check(config.model_copy(update={"device": "cpu"}))


def test_plain_presets_are_the_published_protocol():
    for name in ("mt10", "mt50"):
        defaults = TrainConfig(benchmark=name, target_entropy=-4.0)  # actions have four numbers
        assert check(defaults)[2] == check(preset(f"{name}_plain"))[2]
        assert check(defaults)[2] == check(preset("plain", benchmark=name))[2]


def test_a_run_without_a_configuration_starts_from_the_best_for_its_device(monkeypatch):
    for named in ("mt10", None):  # the default
        assert presets.start(None, named, None, "cpu").name == "mt10_cpu"
        assert presets.start(None, named, None, "cuda").name == "mt10"
    recipe = "recipe_cpu", preset("recipe_cpu")
    for other in ("mt1:reach-v3", "mt25", "module:benchmark"):
        assert presets.start(None, other, None, "cpu") == recipe
        assert presets.start(None, other, None, "cuda").name == "recipe_gpu"
    assert presets.start(None, "mt10", ["reach-v3"], "cpu") == recipe

    started, notes = [], []

    def start(config, note, resume_if_exists):
        started.append(config)
        notes.append(note)
        raise UsageError("far enough")

    monkeypatch.setattr("mtrl.training.run.train", start)
    assert train_main(["--benchmark", "mt10", "--surgery", "pcgrad", "--device", "cpu"]) == 2
    assert train_main(["--tasks", "reach-v3", "--device", "cpu"]) == 2
    assert notes[0].startswith("configuration: mt10_cpu (")
    assert notes[1] == "configuration: recipe_cpu"
    assert train_main(["--config", "quickstart", "--total-timesteps", "1e9"]) == 2
    assert train_main(["--config", "quickstart", "--seed", "4"]) == 2
    assert notes[2:] == [
        "configuration: quickstart",  # no time: its length is not the preset's
        "configuration: quickstart (about ten minutes on two CPU cores)",
    ]
    found, recipe, *_ = started
    learner = preset("mt10_cpu").learner.model_copy(update={"surgery": "pcgrad"})
    changes = {"device": "cpu", "learner": learner}
    assert found == preset("mt10_cpu").model_copy(update=changes)
    assert recipe == preset("recipe_cpu", tasks=("reach-v3",), device="cpu")
    assert recipe.schedule(1).total_timesteps == 280_000


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_help_shows_the_presets_values(device, capsys):
    with pytest.raises(SystemExit):
        train_main(["--benchmark", "mt10", "--device", device, "--help"])
    shown = capsys.readouterr().out
    batch_size = presets.start(None, "mt10", None, device).config.learner.batch_size
    assert f"[transitions per task]. (default: {batch_size})" in " ".join(shown.split())


WRONG = {
    "benchmark": (["--benchmark", "mt11"], "benchmark: unknown 'mt11'; did you mean 'mt10'"),
    "task": (["--tasks", "reech-v3"], "tasks: unknown 'reech-v3'; did you mean 'reach-v3'"),
    "surgery": (["--surgery", "pcgard"], "surgery: unknown 'pcgard'; did you mean 'pcgrad'"),
    "option": (
        ["--surgery", "rotograd(reset_evry=3)"],
        "surgery: option of rotograd: unknown 'reset_evry'; did you mean 'reset_every'",
    ),
    "brackets": (["--surgery", "pcgrad(3"], "surgery: expected NAME or NAME(option=value, …)"),
    "actor surgery": (["--actor-surgery", "pcgard"], "surgery: unknown 'pcgard'"),
    "no module": (["--surgery", "nowhere.at:all"], "surgery: cannot import 'nowhere.at:all'"),
    "memory of no scale": (
        ["--config", "mt10_plain", "--return-memory", "9"],
        "return_memory: expected return_scale with it",
    ),
    "no function": (["--surgery", "math:pi"], "expected a function from Gramian to weights"),
    "rotation": (
        ["--config", "mt10_plain", "--surgery", "rotograd", "--rotation-size", "500"],
        "rotation_size: expected at most 400, the trunk's last width, got 500",
    ),
    "single head": (
        ["--surgery", "rotograd-rotate", "--heads", "single"],
        "heads: expected 'multi', a head per task, for rotations, got 'single'",
    ),
    "rotation step": (["--rotation-step", "exp"], "rotation_step: input should be 'geodesic' or"),
    "flag": (["--bach-size", "3"], "flag: unknown '--bach-size'; did you mean '--batch-size'"),
    "stray": (["mt10"], "unexpected argument 'mt10'"),
    "no value": (["--seed"], "expected one argument"),
    "zero": (["--batch-size", "0"], "batch_size: input should be greater than 0, got '0'"),
    "negative": (["--total-timesteps", "-5"], "total_timesteps: input should be greater than 0"),
    "text": (["--gamma", "high"], "gamma: input should be a valid number"),
    "nan": (["--learning-rate", "nan"], "learning_rate: input should be a finite number"),
    "above one": (["--gamma", "1.5"], "gamma: input should be less than or equal to 1"),
    "no width": (["--hidden-sizes", "8", "0"], "hidden_sizes: input should be greater than 0"),
    "late start": (
        [*TINY, "--learning-starts", "900", "--total-timesteps", "800"],
        "learning_starts: expected less than total_timesteps (800), got 900",
    ),
    "batch": (
        [*TINY, "--learning-starts", "14", "--total-timesteps", "800"],
        "batch_size: expected at most the 7 transitions per task",
    ),
    "buffer": ([*TINY, "--buffer-size", "7"], "batch_size: expected at most the 7"),
    "copies": (
        [*TINY, "--buffer-size", "11", "--envs-per-task", "6"],
        "batch_size: expected at most the 6 transitions per task",
    ),
    "folder": ([*TINY, "--run-dir", "/dev/null/run"], "run_dir: cannot create /dev/null/run"),
    "resume": (["--resume", "nowhere"], "resume: expected a run folder with a checkpoint"),
    "resume flag": (["--resume", "nowhere", "--seed", "1"], "got --seed"),
    "config": (["--config", "nowhere.yaml"], "config: cannot read nowhere.yaml"),
    "preset": (["--config", "mt10_gpu"], "config: unknown 'mt10_gpu'; did you mean 'mt10_cpu'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line_and_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = WRONG[case]
    assert train_main(arguments) == 2
    written = capsys.readouterr()
    assert message in written.err
    assert written.err.startswith("mtrl-train: error: ") and written.err.count("\n") == 1
    assert not written.out and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_missing_cuda(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_main([*TINY, "--device", "cuda"]) == 2
    assert "device: expected a machine with CUDA" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_run_folder_is_refused(tmp_path, capsys):
    assert train_main([*TINY, "--run-dir", str(tmp_path)]) == 2
    assert f"--resume {tmp_path}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner:\n  bach_size: 3\n", "key: unknown 'bach_size'; did you mean 'batch_size'"),
        ("lerner: {}\n", "key: unknown 'lerner'; did you mean 'learner'"),
        ("learner: 3\n", "learner: input should be a mapping from fields to values"),
        ("- 1\n", "the file: input should be a mapping from fields"),
        ("seed: [1\n", "cannot read"),
        ("tasks: reach-v3\n", "tasks: input should be a list of values, got 'reach-v3'"),
        ("seed: !!python/object/apply:os.getpid []\n", "cannot read"),
    ],
)
def test_wrong_config_files(text, message, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        TrainConfig.from_yaml(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "door-open-v3"], "what the policy was trained for"),
        (["--episodes", "51"], "episodes: input should be less than or equal to 50"),
        (["--json", "nowhere/x.json"], "json: expected a file in a folder that exists"),
        (["--json", "/"], "json: expected a file, got the folder /"),
        (["--csv", "nowhere/x.csv"], "csv: expected a file in a folder that exists"),
        (["--video", "nowhere/x"], "video: expected a folder in a folder that exists"),
        (["--video", "/dev/null"], "video: expected a folder, got the file /dev/null"),
        (["--video", "/proc/x"], "video: expected a folder that can be written, got '/proc/x' ("),
        (["--camera", "corner9"], "camera: input should be 'corner', 'corner2',"),
        (["--video-episodes", "0"], "video_episodes: input should be greater than 0"),
        (["--stochastic", "maybe"], "stochastic: input should be a valid boolean"),
    ],
)
def test_invalid_arguments_of_eval(arguments, message, policy, capsys):
    assert eval_main([str(policy), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_paths_without_a_policy(tmp_path, capsys):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x00" * 64)
    header = {"tasks": ["reach-v3"], "observation_size": 39, "action_size": 4, "agent": {"x": 1}}
    odd = tmp_path / "odd.safetensors"
    save_file({}, odd, {"format": "mtrl-policy-1", "config": yaml.safe_dump(header)})
    for path in (foreign, broken, odd, tmp_path / "missing", tmp_path):
        assert eval_main([str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("mtrl-eval: error: ") and error.count("\n") == 1


def test_top_level_names():
    code = (
        "from mtrl import MTSAC, Benchmark, TrainConfig, evaluate, get_benchmark, resume, train\n"
        "assert all(map(callable, (evaluate, get_benchmark, resume, train)))\n"
        "import mtrl, mtrl.evaluation.protocol, mtrl.training.run\n"
        "assert all(callable(getattr(mtrl, name)) for name in mtrl.__all__)"
    )
    run_python(code)


def test_precision_follows_the_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve_precision("auto", device) for device in (cpu, cuda)] == ["fp32", "tf32"]
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: True)
    assert resolve_precision("bf16", cpu) == "bf16"
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: False)
    assert resolve_precision("bf16", cuda) == "bf16"
    with pytest.warns(UserWarning, match="precision: using fp32 instead of bf16"):
        _, _, config = check(preset("mt10_cpu").model_copy(update={"device": "cpu"}))
    assert config.learner.precision == "fp32"  # the run folder records the precision in use
    with pytest.raises(UsageError, match="precision: expected 'fp32' or 'bf16' on a CPU"):
        resolve_precision("tf32", cpu)


@pytest.mark.skipif(not CPUINFO.exists(), reason="Linux says what a processor can do in /proc")
def test_bf16_if_the_cpu_supports_it():
    flags = CPUINFO.read_text().split()
    assert precision.multiplies_bf16() == ("avx512_bf16" in flags or "amx_tile" in flags)
