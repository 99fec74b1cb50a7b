"""Where a run's numbers go: Stable-Baselines3's TensorBoard, CSV and JSON writers.

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
from mtrl.training import charts, hparams, pace
from mtrl.training.console import Bar, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Writer = TypeVar("Writer", CSVOutputFormat, JSONOutputFormat)


class RunLogger:
    """Writers in a run folder, and a line for whoever watches.

    Args:
        run_dir: The run's folder.
        total_timesteps: Where the run ends.
        config: Shown in TensorBoard's text tab, and in its table of runs.
        tasks: In the order of TensorBoard's charts.
        tells_success: Whether any task may have a success rate.
        resume_at: Steps the run goes on from; what was logged beyond them is taken out first.
        told: Called with the tags and numbers of every row.
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
        told: Callable[[Mapping[str, float]], object] = dict,
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
            text = textwrap.indent(config.to_yaml(), "    ")  # a block of code
            self._tensorboard.add_text("config", text)
            self._add(*hparams.start(config), charts.layout(tasks, tells_success))
        self._total, self._told = total_timesteps, told
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
        """Numbers that wait for the next row."""
        return list(self._logger.name_to_value.items())

    def write(self, steps: int, values: Mapping[str, float]) -> None:
        """Write one row of numbers."""
        for key, value in {STEP: steps, **values}.items():
            self._logger.record(key, value, exclude="tensorboard" if key == STEP else None)
        row = dict(self._logger.name_to_value)
        self._logger.dump(steps)
        self._told(row)

    def figure(self, steps: int, tag: str, figure: Figure) -> None:
        """Show a picture in TensorBoard alone; the files hold numbers."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        # What SummaryWriter.add_figure does, without its pyplot.
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self._tensorboard.add_image(tag, pixels, steps, dataformats="HWC")
        self._tensorboard.flush()

    def animation(self, steps: int, tag: str, gif: bytes) -> None:
        """Show an animated GIF in TensorBoard alone, as an image it does not look into."""
        image = Summary.Image(encoded_image_string=gif, colorspace=3)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._tensorboard._get_file_writer().add_summary(summary, steps)
        self._tensorboard.flush()

    def text(self, steps: int, tag: str, text: str) -> None:
        """Show Markdown in TensorBoard's text tab alone."""
        self._tensorboard.add_text(tag, text, steps)
        self._tensorboard.flush()

    def cosines(self, steps: int, by_network: Mapping[str, np.ndarray]) -> None:
        """Append the cosines between the tasks' gradients, `[T, T]` for each network."""
        # Digits enough for a picture, and none of the signs lost.
        row = {
            network: [[float(f"{value:.4g}") for value in line] for line in values.tolist()]
            for network, values in by_network.items()
        }
        with self._cosines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({STEP: steps} | row) + "\n")

    def tick(self, steps: int) -> None:
        """Move the live line, if there is one."""
        self._bar.move(steps)

    def progress(self, steps: int, fps: float, left: float | None, scores: str) -> None:
        """Tell how far the run is: in the live line on a terminal, in a new line elsewhere.

        Args:
            steps: Environment steps so far.
            fps: Environment steps per second.
            left: Time to the end [s]; None if nobody knows yet.
            scores: How good the policy is, in words.
        """
        text = f"{fps:,.0f} steps/s  {pace.shown(left)} left  {scores}"
        if self._bar:
            self._bar.move(steps, text)
        else:
            say(f"{steps:,}/{self._total:,} steps  {text}")

    def say(self, text: str) -> None:
        """Print a line without breaking the live one."""
        say(text)

    def finish(self) -> None:
        """Mark the run as successful in TensorBoard's table."""
        self._add(hparams.end())

    def close(self) -> None:
        """Flush and close all writers."""
        self._bar.close()
        self._logger.close()

    def _add(self, *summaries: Any) -> None:
        events: Any = self._tensorboard.file_writer
        for summary in summaries:
            events.add_summary(summary)
        self._tensorboard.flush()


def _rewritten(kind: type[Writer], path: Path, rows: list[dict[str, Any]]) -> Writer:
    """A writer that goes on after `rows`, in a new file that takes the name once it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    writer = kind(str(temporary))
    # The locale's encoding may lack letters of a custom task's name.
    writer.file.close()
    writer.file = temporary.open("w+", encoding="utf-8")
    for row in rows:
        writer.write(row, {key: () for key in row}, row[STEP])
    os.replace(temporary, path)
    return writer


class _TensorBoard(TensorBoardOutputFormat):
    """Hides, when a run is resumed, what an earlier process logged past its last checkpoint."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        _keep_in_order(folder)
        # At a new run's start too: TensorBoard takes the first such mark for no restart.
        self.writer = SummaryWriter(folder, purge_step=resume_at + 1)
        self._is_closed = False


def _keep_in_order(folder: Path) -> None:
    """Rename TensorBoard's files that the next one would not come after.

    They are read in the order of their names, which begin with the second they were opened in; but
    a clock may have jumped back since, or a run go on within the second.
    """
    limit = int(time.time())
    for path in sorted(folder.glob(f"events.out.tfevents.{10 * '[0-9]'}.*"), reverse=True):
        *kind, second, rest = path.name.split(".", 4)
        if int(second) >= limit:
            path.rename(folder / ".".join([*kind, f"{limit - 1:010d}", rest]))
        limit = min(int(second), limit - 1)
