"""Ablation of the recipe: remove one part, add one part to the plain agent, add surgery.

    python scripts/ablation.py [-o results/ablation] [--seeds 0 1 2] [--jobs 2] [--only PART …]

All runs use the tasks of `configs/quickstart.yaml`, --total-timesteps environment steps and one
thread. Every job has its own cores, so that times are comparable. Finished runs are skipped, so the
script can be stopped and restarted. It keeps the CSVs of each run. The table shows the **final**
success rate of every seed on 50 goals per task, and the difference from the agent that was changed.
One in twenty 95% intervals is wrong by chance.
"""

from __future__ import annotations

import argparse
from typing import Any

from ablation_report import draw, table
from trials import Trial, add_arguments, read, short, train_all

from mtrl.analysis.style import save, styled
from mtrl.config.train import TrainConfig
from mtrl.folder import write_text

Fields = dict[str, Any]

PLAIN: Fields = {
    "trunk": "mlp",
    "actor_hidden_sizes": (128, 128, 128),
    "layer_norm": False,
    "normalize_observations": False,
    "critic_bins": None,
    "initial_temperature": 1.0,
    "learning_rate": 3e-4,
    "final_learning_rate": None,
    "weight_decay": 0.0,
    "gamma": 0.99,
    "tau": 0.005,
    "target_entropy": None,
    "return_scale": None,
    "return_memory": None,
}
"""The published agent with the recipe's width, batch size and number of environments."""

SCALED: Fields = {"return_scale": 2.5, "return_memory": 50, "initial_temperature": 0.01}
BESIDES: dict[str, Fields] = {
    "learned task embeddings": {"task_embedding": 8},
    "return scale of the largest": {**SCALED, "return_scale": 10.0, "return_memory": None},
    "two updates per vector step": {"gradient_steps": 2},
    "pink noise": {"exploration_noise": "pink"},
    "bf16": {"precision": "bf16"},
}
"""Parts of the recipe that quickstart lacks."""

INTO_PLAIN: dict[str, Fields] = {
    "normalised observations": {"normalize_observations": True},
    "return scale": SCALED,
    "LayerNorm": {"layer_norm": True},
    "residual blocks": {"trunk": "residual", "actor_hidden_sizes": (128, 128)},
    "categorical critic": {"critic_bins": 101, "value_limit": 1000.0},
    "AdamW": {"weight_decay": 1e-3},
    "shorter look ahead": {"gamma": 0.98},
    "faster targets": {"tau": 0.02},
    "larger, falling steps": {"learning_rate": 1e-3, "final_learning_rate": 1e-4},
    "target entropy -2": {"target_entropy": -2.0},
}

OUT_OF_RECIPE: dict[str, Fields] = {
    "normalised observations": {"normalize_observations": False},
    # One scale for all tasks, with which the largest reward, 10, gives values like the recipe's.
    "return scale": {"return_scale": None, "return_memory": None, "reward_scale": 0.005},
    "LayerNorm": {"layer_norm": False},
    "residual blocks": {"trunk": "mlp", "actor_hidden_sizes": (128, 128, 128)},
    "categorical critic": {"critic_bins": None},
    "AdamW": {"weight_decay": 0.0},
    "shorter look ahead": {"gamma": 0.99},
    "faster targets": {"tau": 0.005},
    "larger, falling steps": {"learning_rate": 3e-4, "final_learning_rate": None},
    "target entropy -2": {"target_entropy": None},
}

TRUNKS = "film", "soft-modules", "moore", "care", "paco"
"""Trunks that replace residual blocks, with the same widths."""

SURGERY = ("pcgrad", "rotograd", "rotograd-scale", "aligned-mtl", "torchjd:UPGrad")


def variants() -> dict[str, Fields]:
    """Return each agent's differences from the recipe, by the agent's name."""
    found: dict[str, Fields] = {"recipe": {}, "plain": PLAIN}
    found |= {f"recipe - {part}": change for part, change in OUT_OF_RECIPE.items()}
    found |= {f"recipe + {method}": {"surgery": method} for method in SURGERY}
    found |= {
        f"recipe with {trunk}": {"trunk": trunk, "actor_hidden_sizes": (128, 128, 128)}
        for trunk in TRUNKS
    }
    found |= {f"plain + {part}": PLAIN | change for part, change in INTO_PLAIN.items()}
    found |= {f"recipe + {part}": change for part, change in BESIDES.items()}
    return found


def main() -> None:
    """Run missing runs, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, "ablation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="only agents whose name contains PART"
    )
    parser.add_argument("--total-timesteps", type=int, default=120_000, metavar="N")
    arguments = parser.parse_args()
    steps = arguments.total_timesteps
    for path in arguments.output.glob("*/config.yaml"):
        if (made := TrainConfig.from_yaml(path).total_timesteps) != steps:
            parser.error(f"--total-timesteps: expected {made}, as {path.parent} has, got {steps}")
    trials = [
        Trial(name, short("quickstart", steps, seed, change))
        for seed in arguments.seeds
        for name, change in variants().items()
        if arguments.only is None or any(part in name for part in arguments.only)
    ]
    train_all(trials, arguments.output, arguments.runs, arguments.jobs)
    agents = read(list(variants()), arguments.output)
    text = table(agents)
    write_text(arguments.output / "table.md", text + "\n")
    print(text)
    with styled():
        save({"ablation": draw(agents)}, arguments.output, ("png", "svg"))


if __name__ == "__main__":
    main()
