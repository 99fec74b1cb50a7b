"""`mtrl-export`: write a policy to a file to share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mtrl.cli.flags import Parser, add_flags, run
from mtrl.config.fields import TrunkImports
from mtrl.config.section import Section, expect_writable, validate
from mtrl.errors import UsageError
from mtrl.folder import find_policy


class ExportConfig(Section):
    """Options of mtrl-export."""

    policy: Path = Field(description="Run folder, checkpoint, policy file, or exported file.")
    output: Path | None = Field(
        default=None,
        description="File to write: NAME.safetensors for Policy.load and mtrl-eval, or NAME.pt2 "
        "for torch.export.load, which needs PyTorch 2.7 or newer but not mtrl.",
    )
    imports: TrunkImports = ()
    card: bool = Field(default=False, description="Print a model card of the policy as Markdown.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    return run("mtrl-export", _export, arguments)


def _export(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="mtrl-export",
        description="Export a policy to a single file with its actor, configuration, evaluation "
        "results, package versions and a checksum.",
    )
    help_of = {name: field.description for name, field in ExportConfig.model_fields.items()}
    parser.add_argument("policy", metavar="RUN_OR_POLICY", help=help_of["policy"])
    parser.add_argument(
        "-o", "--output", metavar="FILE", default=argparse.SUPPRESS, help=help_of["output"]
    )
    parser.add_argument("--card", action="store_true", help=help_of["card"])
    add_flags(parser, ExportConfig(policy=Path()), leave_out=("policy", "output", "card"))
    config = validate(ExportConfig, parser.parse(arguments))
    if config.output is None and not config.card:
        raise UsageError("output: expected -o FILE or --card, got neither")
    expect_writable("output", config.output)
    find_policy(config.policy)  # raises before the import of PyTorch

    from mtrl.nets.trunks import import_trunks
    from mtrl.policy.export import card, export_policy

    import_trunks(config.imports)
    if config.output is not None:
        export_policy(config.policy, config.output)
    if config.card:
        print(card(config.policy), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
