"""Logging of a run with Stable-Baselines3's TensorBoard, CSV and JSON writers.

The step of every number is environment steps over all tasks; see docs/tensorboard.md for all tags.
"""

from __future__ import annotations

import json
import os
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    JSONOutputFormat,
    Logger,
    TensorBoardOutputFormat,
)
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from mtrl.config.train import TrainConfig
from mtrl.folder import COSINES, STEP, read_rows, write_text
from mtrl.progress import duration
from mtrl.training import charts, hparams
from mtrl.training.console import Bar, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Writer = TypeVar("Writer", CSVOutputFormat, JSONOutputFormat)


class RunLogger:
    """Writes logs in a run folder, and progress to the terminal.

    Args:
        total_timesteps: End of the run [environment steps over all tasks].
        config: Configuration, shown in TensorBoard's text tab and its table of runs.
        tasks: Tasks in the order of TensorBoard's charts.
        tells_success: Whether any task may have a success rate.
        resume_at: Steps at which the run resumes; log entries after them are removed first.
        on_row: Called with the tags and numbers of every row.
    """

    def __init__(
        self,
        run_dir: Path,
        total_timesteps: int,
        config: TrainConfig,
        tasks: Sequence[str],
        *,
        tells_success: bool = True,
        resume_at: int = 0,
        on_row: Callable[[Mapping[str, float]], object] = dict,
    ) -> None:
        kept = read_rows(run_dir / "progress.json", resume_at)
        self._cosines = run_dir / COSINES
        if self._cosines.exists():
            diagnoses = read_rows(self._cosines, resume_at)
            write_text(self._cosines, "".join(json.dumps(row) + "\n" for row in diagnoses))
        tensorboard = _TensorBoard(run_dir, resume_at)
        files = [
            _rewritten(CSVOutputFormat, run_dir / "progress.csv", kept),
            _rewritten(JSONOutputFormat, run_dir / "progress.json", kept),
        ]
        self._logger = Logger(str(run_dir), [tensorboard, *files])
        self._tensorboard = tensorboard.writer
        if not resume_at:
            text = textwrap.indent(config.to_yaml(), "    ")  # a code block
            self._tensorboard.add_text("config", text)
            self._add(*hparams.start(config), charts.layout(tasks, tells_success))
        self._total, self._on_row = total_timesteps, on_row
        self._bar = Bar(total_timesteps, resume_at)

    def record(self, name: str, value: float) -> None:
        """Add a number to the next row.

        Raises:
            ValueError: If the value is not a number, or the name cannot be written to the logs.
        """
        if not name.isprintable() or set(',"') & set(name):
            raise ValueError(f"expected a printable name without comma and quotes, got {name!r}")
        self._logger.record(name, float(value))

    @property
    def recorded(self) -> list[tuple[str, float]]:
        """Numbers for the next row."""
        return list(self._logger.name_to_value.items())

    def write(self, steps: int, values: Mapping[str, float]) -> None:
        """Write one row of values."""
        for key, value in {STEP: steps, **values}.items():
            self._logger.record(key, value, exclude="tensorboard" if key == STEP else None)
        row = dict(self._logger.name_to_value)
        self._logger.dump(steps)
        self._on_row(row)

    def figure(self, steps: int, tag: str, figure: Figure) -> None:
        """Write a figure to TensorBoard only; the other files hold numbers."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        # Like SummaryWriter.add_figure, but without pyplot.
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self._tensorboard.add_image(tag, pixels, steps, dataformats="HWC")
        self._tensorboard.flush()

    def animation(self, steps: int, tag: str, gif: bytes) -> None:
        """Write an animated GIF to TensorBoard only, as an encoded image."""
        image = Summary.Image(encoded_image_string=gif, colorspace=3)
        self._add(Summary(value=[Summary.Value(tag=tag, image=image)]), steps=steps)

    def text(self, steps: int, tag: str, text: str) -> None:
        """Write Markdown to TensorBoard's Text tab only."""
        self._tensorboard.add_text(tag, text, steps)
        self._tensorboard.flush()

    def cosines(self, steps: int, by_network: Mapping[str, np.ndarray]) -> None:
        """Append the cosines between task gradients, `[T, T]` for each network."""
        # Enough digits for a figure, and signs are kept.
        row = {
            network: [[float(f"{value:.4g}") for value in line] for line in values.tolist()]
            for network, values in by_network.items()
        }
        with self._cosines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({STEP: steps} | row) + "\n")

    def tick(self, steps: int) -> None:
        """Move the progress bar, if there is one."""
        self._bar.move(steps)

    def progress(self, steps: int, fps: float | None, left: float | None, scores: str) -> None:
        """Show progress: in the progress bar on a terminal, in a new line elsewhere.

        Args:
            steps: Environment steps so far.
            fps: Environment steps per second; None before the first measurement.
            left: Time left [s]; None if unknown.
            scores: Summary of the policy's scores.
        """
        speed = "–" if fps is None else f"{fps:,.0f}"
        text = f"{speed} steps/s  {duration(left)} left  {scores}"
        if self._bar:
            self._bar.move(steps, text)
        else:
            say(f"{steps:,}/{self._total:,} steps  {text}")

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        say(text)

    def finish(self) -> None:
        """Mark the run as finished in TensorBoard's HParams tab."""
        self._add(hparams.end())

    def close(self) -> None:
        """Flush and close all writers."""
        self._bar.close()
        self._logger.close()

    def _add(self, *summaries: Summary, steps: int | None = None) -> None:
        for summary in summaries:
            self._tensorboard._get_file_writer().add_summary(summary, steps)
        self._tensorboard.flush()


def _rewritten(kind: type[Writer], path: Path, rows: list[dict[str, Any]]) -> Writer:
    """Create a writer that continues after `rows`, in a new file that replaces the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    writer = kind(str(temporary))
    # The locale's encoding may lack characters of a custom task's name.
    writer.file.close()
    writer.file = temporary.open("w+", encoding="utf-8")
    for row in rows:
        writer.write(row, {key: () for key in row}, row[STEP])
    os.replace(temporary, path)
    return writer


class _TensorBoard(TensorBoardOutputFormat):
    """Hides values that an earlier process logged after the checkpoint of a resumed run."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        _keep_in_order(folder)
        # Also for a new run, because TensorBoard ignores the first such mark.
        self.writer = SummaryWriter(folder, purge_step=resume_at + 1)
        self._is_closed = False


def _keep_in_order(folder: Path) -> None:
    """Rename TensorBoard's files whose names would sort after the next one.

    They are read in the order of their names, which start with the second of their creation. The
    clock may have been set back since, or the run may be resumed within the same second.
    """
    limit = int(time.time())
    for path in sorted(folder.glob(f"events.out.tfevents.{10 * '[0-9]'}.*"), reverse=True):
        *kind, second, rest = path.name.split(".", 4)
        if int(second) >= limit:
            path.rename(folder / ".".join([*kind, f"{limit - 1:010d}", rest]))
        limit = min(int(second), limit - 1)
