"""Read the cosines between task gradients that a run recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mtrl.analysis.logs import BROKEN, read_final, read_log, tasks_of
from mtrl.errors import UsageError
from mtrl.folder import COSINES, STEP, read_rows


def read_cosines(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray], tuple[str, ...]]:
    """Read the cosines between task gradients measured over a run.

    Returns:
        A tuple of the steps of the measurements [environment steps over all tasks], `[D]`; the
        cosines of each network, `[D, T, T]`, NaN where undefined; and the T task names.

    Raises:
        UsageError: If the folder has no cosines, or the file is damaged.
    """
    config, rows = read_log(path)
    try:
        lines = read_rows(path / COSINES)
        if not lines:
            every = config.diagnose_every
            interval = f"{every:,} steps (--diagnose-every)" if every else "--diagnose-every steps"
            why = (
                f"they are measured every {interval} once learning has started, if there is more "
                "than one task"
            )
            if every == 0:
                why = (
                    "the run has --diagnose-every 0. Train with --diagnose-every N to measure them "
                    "every N steps"
                )
            raise UsageError(
                f"cosine: expected cosines between task gradients, got none in {path}: {why}"
            )
        tasks = tasks_of(path, config, read_final(path), rows)
        steps = np.array([float(line[STEP]) for line in lines])
        cosines = {
            network: np.array([line[network] for line in lines], float)
            for network in sorted(lines[0].keys() - {STEP})
        }
        shape = (len(steps), len(tasks), len(tasks))
        for network, values in cosines.items():
            if values.shape != shape:
                raise ValueError(f"expected {shape} cosines of {network}, got {values.shape}")
        if not np.isfinite(steps).all():
            raise ValueError("non-finite step")
    except UsageError:
        raise
    except BROKEN as error:
        raise UsageError(f"cosine: cannot read {path / COSINES}: {error!r}") from None
    return steps, cosines, tasks
