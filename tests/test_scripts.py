"""The scripts run and write the documented output."""

import copy
import csv
import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import t as student_t
from scipy.stats import ttest_1samp, ttest_rel
from torch.utils._python_dispatch import TorchDispatchMode

from mtrl.config.presets import preset
from mtrl.config.train import TrainConfig
from mtrl.folder import newest_checkpoint
from mtrl.surgery import MultiTaskModel, available
from mtrl.training.check import check


@pytest.fixture
def script(request, tmp_path):
    """Run a script with --quick in `tmp_path`, and return its output."""

    def run(name: str, *arguments: str) -> str:
        path = request.config.rootpath / "scripts" / name
        command = [sys.executable, path, "--quick", "-o", tmp_path / "out", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def picture(path) -> tuple[int, int]:
    """Check that an image decodes, is not blank and is small; return its size."""
    with Image.open(path) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 20
        assert path.stat().st_size < 250_000
        return image.size


def cells(text: str) -> list[list[str]]:
    """Return the rows of Markdown tables, without separators."""
    rows = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-:")]


def test_landscape(script, tmp_path):
    printed = script("landscape.py")
    assert picture(tmp_path / "out/triad.png") == (1012, 705)
    assert picture(tmp_path / "out/theorem1.png") == (1012, 780)
    assert (tmp_path / "out/landscape.md").read_text(encoding="utf-8") == printed
    rows = cells(printed)
    methods = {"Adam", "PCGrad + Adam", "RotoScale + Adam"}
    assert {row[1] for row in rows if row[0].startswith("(")} == methods
    assert "the bound held at every step" in printed
    together, separate = rows[-2:]
    for row in (together, separate):
        assert re.fullmatch(r"\d\d of 40", row[2]) and float(row[3]) >= 1
    assert float(together[5]) < 1e-3  # the minimum
    assert float(separate[4]) == -1 and float(separate[5]) > 0.1  # stopped before the minimum


def test_the_theorem_fails_where_the_bound_is_violated(request, monkeypatch):
    """With twice the step size that the theorem allows."""
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")
    theorem = importlib.import_module("theorem1")
    heads = {task: theorem.Quadratic((x, 0.5), 0, 1, 1) for task, x in {"a": 0, "b": 1}.items()}
    monkeypatch.setitem(theorem.CASES, "two bowls", theorem.Case(heads, (3.0, 2.0)))
    theorem.check_theorem("two bowls")
    eigvalsh = torch.linalg.eigvalsh
    monkeypatch.setattr("torch.linalg.eigvalsh", lambda hessian: eigvalsh(hessian) / 2)
    with pytest.raises(SystemExit, match="two bowls: the bound of theorem 1 is violated by"):
        theorem.check_theorem("two bowls")


def test_digits(script, tmp_path):
    surgery = ["none", "pcgrad", "rotograd(rotation_lr=0.01)", "famo"]
    printed = script("digits.py", "--surgery", *surgery, "--seeds", "3")
    assert picture(tmp_path / "out/digits.png") == (1012, 456)
    assert (tmp_path / "out/digits.md").read_text(encoding="utf-8") == printed
    methods = [*surgery, "none, MSE ÷ variance", "each task alone"]
    with (tmp_path / "out/digits.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:2] == ["method", "seed"] and len(head) == 5
    assert [row[:2] for row in rows] == [[name, str(seed)] for name in methods for seed in range(3)]
    assert all(0 <= float(row[i]) <= 1 >= float(row[4]) for row in rows for i in (2, 3))
    tables = cells(printed)
    assert [row[0] for row in tables] == ["surgery", *methods, "surgery", *methods[1:]]
    mean = sum(float(row[2]) for row in rows[:3]) / 3
    assert tables[1][1].startswith(f"{mean:.3f} ± ")


@pytest.fixture
def scripts(request, monkeypatch):
    """Import a script."""
    monkeypatch.syspath_prepend(request.config.rootpath / "scripts")
    return importlib.import_module


@pytest.fixture
def one_thread():
    """If cores are busy, two threads wait for each other in every small product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("surgery", "most"), [("none", 200), ("pcgrad", 375), ("rotograd", 375)])
def test_an_update_takes_no_more_operations_than_before(surgery, most, scripts):
    """For ten tasks with the published networks, including sampling."""
    counting, cases = scripts("count_operations"), scripts("cases")
    case = cases.Case(10)
    learner, replay = case.learner(surgery), case.full_replay(200)
    found = counting.operations_of(lambda: learner.step(replay))
    assert 100 < found.counts.total() <= most


@pytest.mark.usefixtures("one_thread")
def test_bench_update(scripts, tmp_path, monkeypatch, capsys):
    bench, timing = scripts("bench_update"), scripts("timing")
    monkeypatch.setattr(timing, "WARM_UP", {"cpu": 0})
    monkeypatch.setattr(
        bench, "interleaved", lambda runs, _, d, c: timing.interleaved(runs, 1, d, c)
    )
    monkeypatch.setattr(bench, "PER_TASK", 500)
    monkeypatch.setattr(
        "mtrl.nets.precision.multiplies_bf16", lambda: True
    )  # the slow modes are equivalent
    file = tmp_path / "found.json"
    bench.main(["--tasks", "1", "2", "--width", "16", "--precision", "bf16", "--json", str(file)])
    assert "bf16" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert all(value > 0 for table in ("ms", "ratios") for value in found[table].values())
    single = {"none/matmul", "pcgrad/none", "ours/sb3", "ours-fp32/sb3"}
    assert {f"mt1/w16/{key}" for key in single} == {k for k in found["ratios"] if "mt1/" in k}
    several = [f"{a}/{b}" for a in ("published", "torchjd", "torchjd-autogram")
               for b in ("pcgrad", "pcgrad-fp32")]  # fmt: skip
    methods = [f"{name}/none" for name in available() if name != "none"]
    assert {f"mt2/w16/{key}" for key in (*several, *methods)} <= found["ratios"].keys()


@pytest.mark.usefixtures("one_thread")
def test_bench_update_of_trunks(scripts, tmp_path, monkeypatch):
    """PCGrad beside none on each, with the memory it holds; told descriptions too."""
    bench, timing = scripts("bench_update"), scripts("timing")
    monkeypatch.setattr(timing, "WARM_UP", {"cpu": 0})
    monkeypatch.setattr(
        bench, "interleaved", lambda runs, _, d, c: timing.interleaved(runs, 1, d, c)
    )
    file, trunks = (
        tmp_path / "found.json",
        ["care(encoders=2)", "paco(sets=3)", "cases:UserMLP(width=16)"],
    )
    bench.main(["--tasks", "2", "--width", "16", "--trunk", *trunks, "--json", str(file)])
    found = json.loads(file.read_text())
    for trunk in trunks:
        assert found["ratios"][f"mt2/{trunk}/pcgrad/none"] > 0
        assert found["MiB"][f"mt2/{trunk}/pcgrad"] > found["MiB"][f"mt2/{trunk}/none"] == 0


@pytest.mark.usefixtures("one_thread")
def test_bench_update_of_a_configuration(scripts, tmp_path, monkeypatch):
    """With its networks, batch and tasks, for each number of threads."""
    bench, timing = scripts("bench_update"), scripts("timing")
    monkeypatch.setattr(timing, "WARM_UP", {"cpu": 0})
    monkeypatch.setattr(
        bench, "interleaved", lambda runs, _, d, c: timing.interleaved(runs, 1, d, c)
    )
    made = []
    monkeypatch.setattr(bench, "Case", lambda *how: made.append(Case(*how)) or made[-1])
    Case = scripts("cases").Case
    config, file = tmp_path / "small.yaml", tmp_path / "found.json"
    config.write_text(
        "tasks: [reach-v3, push-v3, door-close-v3]\n"
        "agent: {trunk: residual, layer_norm: true, hidden_sizes: [16, 16], critic_bins: 11}\n"
        "learner: {batch_size: 4}\n"
    )
    bench.main(
        ["--config", str(config), "--threads", "1", "2", "--clock", "cpu", "--json", str(file)]
    )
    ratios = json.loads(file.read_text())["ratios"]
    for threads in (1, 2):
        prefix = f"small/threads={threads}"
        assert ratios[f"{prefix}/none/matmul"] > 0 and ratios[f"{prefix}/pcgrad/none"] > 0
    (case,) = made
    assert (case.n_tasks, case.rows) == (3, 4)
    assert case.agent().critics.shared["weight2"].shape == (2, 16, 16)
    with pytest.raises(SystemExit):
        bench.main(["--config", "no-such-preset"])


class Multiplications(TorchDispatchMode):
    """Counts the operations of all matrix products."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        first = {"bmm": 0, "mm": 0, "baddbmm_": 1}.get(function.overloadpacket.__name__)
        if first is not None:
            self.total += args[first].numel() * args[first + 1].shape[-1]
        return function(*args, **kwargs or {})


def test_products_equal_those_of_an_update(scripts):
    cases, products = scripts("cases"), scripts("products")
    agent = {"hidden_sizes": (16, 24), "critic_bins": 11}
    case = cases.Case(3, config=TrainConfig(agent=agent, learner={"batch_size": 4}))
    learner, arguments = case.learner("none"), case.batch()
    floor = products.matrix_products(case.agent(), case.rows, "cpu", "fp32")
    with Multiplications() as ours:
        learner.update(*arguments)
    with Multiplications() as least:
        floor()
    # Only the actions among a first layer's inputs need a gradient; ours covers all columns.
    spare = 2 * 3 * 4 * 39 * 16
    values = 2 * 3 * 4 * 11  # backward through the means of histograms
    assert least.total <= ours.total <= least.total + spare + values


@pytest.mark.parametrize("engine", ["autojac", "autogram"])
def test_torchjd_makes_the_same_step(scripts, monkeypatch, engine):
    """With two tasks, there is only one order of projections."""
    peers = scripts("peer_torchjd")
    monkeypatch.setattr(peers, "MAX_NORM", torch.inf)
    torch.manual_seed(0)
    peer = peers.TorchJD(2, "cpu", 16, engine)
    critic, inputs, y = peer.critics[0], torch.randn(2, 128, 45), torch.randn(2, 128, 1)
    y[1] *= -3
    heads = {str(t): copy.deepcopy(head) for t, head in enumerate(critic.heads)}
    found = []
    for surgery in ("none", "pcgrad"):
        ours = MultiTaskModel(copy.deepcopy(critic.trunk), heads, surgery)
        for module in ours.trunk.modules():
            module._forward_hooks.clear()  # autogram's
        outputs = ours({str(t): inputs[t] for t in range(2)})
        ours.backward({str(t): (outputs[str(t)] - y[t]).square().mean() for t in range(2)})
        found.append([p.grad for p in ours.trunk.parameters()])
    assert not torch.allclose(found[0][0], found[1][0])  # there is a conflict
    peer.descend(critic, inputs, lambda outputs, t: (outputs - y[t]).square().mean((-2, -1)))
    for theirs, own in zip(critic.trunk.parameters(), found[1], strict=True):
        torch.testing.assert_close(2 * theirs.grad, own)  # mean and sum of two losses


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("own", [False, True])
def test_bench_model_times_equal_steps(scripts, own):
    """With two tasks, PCGrad has one order: all variants give the same gradient, unlike `none`."""
    bench = scripts("bench_model")
    case = bench.Case(bench.layers, 2, 400, lambda: torch.randn(8, 39), own)
    ways, models = bench.ways(case)
    found = {}
    for name, step in ways.items():
        step()
        found[name] = torch.cat([p.grad.flatten() for p in models[name].trunk.parameters()])
    for name in ("naive", "torchjd, at once", "torchjd, one by one"):
        torch.testing.assert_close(found[name], found["pcgrad"], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found["none"], found["plain"], atol=1e-6, rtol=1e-4)
    assert not torch.allclose(found["none"], found["pcgrad"], rtol=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engines_agree(scripts, precision):
    engines = scripts("bench_engines")
    case = engines.Case(3, 200, "cpu", precision)
    assert engines.difference(case) < {"fp32": 1e-5, "bf16": 2e-2}[precision]


def test_each_part_of_the_ablation_is_a_different_agent(scripts):
    ablation = scripts("ablation")
    recipe = preset("quickstart").flat()
    agents = {name: TrainConfig(**recipe | change) for name, change in ablation.variants().items()}
    for name, config in agents.items():
        check(config)
        assert name == "recipe" or config != agents["recipe"]
    assert len({config.to_yaml() for config in agents.values()}) == len(agents)
    for name, config in agents.items():
        _, sign, part = name.partition(" - ")
        if sign:  # a removed part has the value of the plain agent or the default
            changed = {k for k, v in config.flat().items() if v != recipe[k]}
            plain = agents["plain"].flat() | {"reward_scale": 0.005}
            assert changed and all(config.flat()[k] == plain[k] for k in changed), part


def test_the_ablation_table_agrees_with_its_data(scripts, request):
    report, found = scripts("ablation_report"), request.config.rootpath / "results/ablation"
    agents = scripts("trials").read(list(scripts("ablation").variants()), found)
    assert report.table(agents) + "\n" == (found / "table.md").read_text()


def test_the_block_design_of_two_agents_is_a_paired_t_test(scripts, request):
    report, found = scripts("ablation_report"), request.config.rootpath / "results/ablation"
    names = ["recipe", "recipe - LayerNorm"]
    agents = scripts("trials").read(names, found)
    ends = ttest_rel(*(agents[name].scores.mean(0) for name in names)).confidence_interval(0.95)
    assert report.spread(agents, "recipe") == pytest.approx((ends.high - ends.low) / 2, rel=1e-9)
    assert report.spread(agents, "plain") is None
    assert report.spread({"recipe": agents["recipe"]}, "recipe") is None


@pytest.mark.slow
def test_ablation_runs_what_is_missing(request, tmp_path):
    path = request.config.rootpath / "scripts/ablation.py"
    command = [sys.executable, path, "-o", tmp_path / "kept", "--runs", tmp_path / "runs"]
    command += ["--only", "AdamW", "--total-timesteps", "14000", "--seeds", "0"]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in "12"
    )
    kept = {path.parent.name for path in tmp_path.glob("kept/*/eval.csv")}
    assert kept == {"recipe_-_AdamW_seed_0", "plain_+_AdamW_seed_0"}
    assert all(name in first and name not in second for name in kept)
    assert first.endswith(second) and "| recipe - AdamW | " in second
    other = subprocess.run([*command, "--total-timesteps", "9"], capture_output=True, text=True)
    assert other.returncode == 2 and "--total-timesteps: expected 14000, as " in other.stderr


def test_the_noise_queue_has_valid_runs(scripts):
    noise = scripts("noise")
    queue = [trial for step in noise.PLAN for trial in noise.trials(*step)]
    assert len({trial.folder for trial in queue}) == len(queue)
    assert {trial.name for trial in queue} >= {"easy none", "easy pcgrad", "hard none"}
    first = {trial.name: trial for trial in reversed(queue)}  # first seed of each
    assert all(trial.config.seed == 0 for trial in first.values())
    for name, trial in first.items():
        check(trial.config)
        base = first[f"{name.split()[0]} none"]
        assert trial == base or (trial.config, trial.variables) != (base.config, base.variables)
    assert set(noise.VARIANTS) == {name.split(" ", 1)[1] for name in first}


def test_paired_differences_are_a_paired_t_test(scripts, request):
    report, found = scripts("noise_report"), request.config.rootpath / "results/ablation"
    names = {"recipe": "none", "recipe - LayerNorm": "other"}
    read = scripts("trials").read(list(names), found)
    agents = {names[name]: agent for name, agent in read.items()}
    scores = [agents[name].scores.mean(0) for name in ("other", "none")]
    ends = ttest_rel(*scores).confidence_interval(0.95)
    middle = (scores[0] - scores[1]).mean()
    row = cells(report.differences(agents, "none"))[-1]
    assert row[5].strip() == f"{middle:+.2f} [{ends.low:+.2f}, {ends.high:+.2f}], 3 pairs"
    pairs = int(row[6])  # this many pairs suffice at this deviation, and one less does not
    for n, enough in ((pairs, True), (pairs - 1, False)):
        half = student_t.ppf(0.975, n - 1) * (scores[0] - scores[1]).std(ddof=1) / n**0.5
        assert (half <= report.WANTED) == enough
    assert report.conflicts(agents) == ""  # these runs were not diagnosed


def test_the_noise_table_agrees_with_its_data(scripts, request):
    found = request.config.rootpath / "results/noise"
    assert scripts("noise").report(found) == (found / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_failed_run_is_reported_and_does_not_stop_the_others(scripts, tmp_path, capsys):
    trials = scripts("trials")
    config = trials.short("quickstart", 14_000, 0, {})
    bad = trials.Trial("bad", config.model_copy(update={"tasks": ("no-such-task-v3",)}))
    queue = [bad, trials.Trial("good", config)]
    with pytest.raises(SystemExit, match=r"bad_seed_0 failed: .*no-such-task-v3"):
        trials.train_all(queue, tmp_path / "kept", tmp_path / "runs", 1)
    assert [path.parent.name for path in tmp_path.glob("kept/*/eval.csv")] == ["good_seed_0"]
    assert (tmp_path / "kept/good_seed_0/run.json").exists()


def test_the_conflicts_table_agrees_with_its_data(scripts, request):
    conflicts, found = scripts("conflicts"), request.config.rootpath / "results/conflicts"
    stored = json.loads((found / "conflicts.json").read_text(encoding="utf-8"))
    rows = [conflicts.Row(**row) for row in stored]
    assert conflicts.table(rows) + "\n" == (found / "table.md").read_text(encoding="utf-8")


def test_signs_of_mean_cosines_are_a_t_test(scripts):
    draw = np.random.default_rng(0)
    means = np.array([[1, -0.3, 0.01], [-0.3, 1, 0.3], [0.01, 0.3, 1]])
    cosines = means + 0.2 * draw.normal(size=(20, 3, 3))
    first, second = np.triu_indices(3, 1)
    t, p = ttest_1samp(cosines[:, first, second], 0)
    assert ((p < 0.05) == [True, False, True]).all()  # the case distinguishes them
    expected = {
        "negative": ((p < 0.05) & (t < 0)).mean(),
        "positive": ((p < 0.05) & (t > 0)).mean(),
    }
    assert scripts("conflicts").signs(cosines) == expected == {"negative": 1 / 3, "positive": 1 / 3}


@pytest.mark.slow
def test_conflicts_of_a_checkpoint_at_several_batch_sizes(request, tmp_path):
    flags = "--config quickstart --total-timesteps 13200".split()
    train = [sys.executable, "-m", "mtrl.cli.train", *flags, "--run-dir", tmp_path / "run"]
    subprocess.run(train, check=True, capture_output=True)
    before = newest_checkpoint(tmp_path / "run").read_bytes()
    script = request.config.rootpath / "scripts/conflicts.py"
    looks = "--sizes 16 512 --batches 5 -o".split()
    command = [sys.executable, script, tmp_path / "run", *looks, tmp_path / "out"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "out/table.md").read_text(encoding="utf-8") == printed
    rows = json.loads((tmp_path / "out/conflicts.json").read_text(encoding="utf-8"))
    assert [row["batch_size"] for row in rows] == 3 * [16] + 3 * [512]
    assert {row["network"] for row in rows} == {"actor", "critic1", "critic2"}
    small, large = (
        [row["measures"]["self_cosine"] for row in half] for half in (rows[:3], rows[3:])
    )
    assert all(a < b for a, b in zip(small, large, strict=True))  # less noise in larger batches
    assert newest_checkpoint(tmp_path / "run").read_bytes() == before


@pytest.mark.slow
def test_a_short_soak_reports_resources(request, tmp_path):
    path, file = request.config.rootpath / "scripts/soak.py", tmp_path / "held.json"
    subprocess.run([sys.executable, path, "4000", "--json", file], check=True, capture_output=True)
    found = json.loads(file.read_text())
    assert found["held"]["host files"] >= 3 and found["held"]["processes"] >= 4
    assert found["ratios"]["vector-steps"] > 3000
