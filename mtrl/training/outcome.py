"""What a call of `train` returns."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from mtrl.evaluation.scores import Evaluation


@dataclass(frozen=True)
class Outcome:
    """How `train` ended.

    Attributes:
        run_dir: Folder of the run.
        evaluation: Of the final policy, all 50 goals; None if the run was interrupted or stopped.
        signal: What interrupted it, or None.
        stopped_by: The callback's hook that returned False, such as `Patience.on_eval`, or None.
    """

    run_dir: Path
    evaluation: Evaluation | None
    signal: int | None = None
    stopped_by: str | None = None

    def __str__(self) -> str:
        """The evaluation's table and the folder, for `print`."""
        table = "" if self.evaluation is None else f"{self.evaluation}\n"
        return f"{table}{self.run_dir}"

    def _repr_html_(self) -> str:
        """For notebooks: the folder and the evaluation's table."""
        table = "" if self.evaluation is None else self.evaluation._repr_html_()
        return f"<code>{html.escape(str(self.run_dir))}</code>{table}"
