"""`mtrl-eval`: evaluate a saved policy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mtrl.cli.flags import Parser, add_flags, run
from mtrl.config.fields import Camera, PolicyDevice, Seed, TrunkImports, Workers
from mtrl.config.section import Section, expect_writable, validate
from mtrl.folder import find_policy, write_text


class EvalConfig(Section):
    """Options of mtrl-eval."""

    policy: Path = Field(description="Run folder, checkpoint, or policy file.")
    episodes: int = Field(
        default=50, gt=0, le=50, description="Episodes per task, each on a different goal."
    )
    tasks: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Tasks to evaluate (default: all tasks of the policy). A policy with "
        "task_input 'description' and one head can also be evaluated on other tasks.",
    )
    benchmark: str | None = Field(
        default=None,
        description="Benchmark of custom tasks, as package.module:attribute (default: as recorded "
        "in the run folder).",
    )
    imports: TrunkImports = ()
    seed: Seed | None = Field(
        default=None,
        description="Random seed of the 50 goals (default: that of the training run, which gives "
        "its goals). Another seed evaluates on goals that the policy was not trained on.",
    )
    workers: Workers = None
    device: PolicyDevice = "auto"
    stochastic: bool = Field(
        default=False,
        description="Sample actions from the policy instead of taking its mode; the seed "
        "determines the samples.",
    )
    video: Path | None = Field(
        default=None,
        description="Folder for one MP4 per task, which shows the first episodes. It does not "
        "affect results.",
    )
    video_episodes: int = Field(default=1, gt=0, le=50, description="Episodes per video.")
    camera: Camera = Field(default="corner4", description="Camera of the videos.")
    json_file: Path | None = Field(default=None, description="JSON file to write the results to.")
    csv_file: Path | None = Field(
        default=None, description="CSV file to write the results to, one line per task."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    return run("mtrl-eval", _eval, arguments)


def _eval(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="mtrl-eval",
        description="Evaluate a saved policy on one episode per goal. An episode counts as "
        "successful if the success flag was set at any step.",
    )
    parser.add_argument(
        "policy", metavar="RUN_OR_POLICY", help=EvalConfig.model_fields["policy"].description
    )
    add_flags(parser, EvalConfig(policy=Path()), leave_out=("policy",))
    config = validate(EvalConfig, parser.parse(arguments))
    expect_writable("json", config.json_file)
    expect_writable("csv", config.csv_file)
    expect_writable("video", config.video, is_folder=True)

    if config.video is not None:
        from mtrl.evaluation.video import film, find_backend

        find_backend()  # raises at once if there is none
    find_policy(config.policy)  # raises before the import of PyTorch
    from mtrl.evaluation.saved import evaluate_file
    from mtrl.nets.trunks import import_trunks

    import_trunks(config.imports)
    outputs = {"imports", "video", "video_episodes", "camera", "json_file", "csv_file"}
    result, context = evaluate_file(
        **config.model_dump(exclude=outputs), filmed=config.video is not None
    )
    print(result.table(), flush=True)
    if unseen := context["unseen_tasks"]:
        print(f"never trained on: {', '.join(unseen)}", flush=True)
    if config.json_file is not None:
        write_text(config.json_file, result.to_json(**context))
    if config.csv_file is not None:
        write_text(config.csv_file, result.to_csv())
    if config.video is not None:
        film(result, config.video, config.camera, config.video_episodes, progress=True)
        print(f"videos: {config.video}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
