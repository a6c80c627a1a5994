"""Hooks into a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptsmith.run_directory import Run


class Callback:
    """Override what you need. Return True from any method to have the run saved and stopped.

    A callback must not draw from torch's global random-number generator, or a resumed run differs from one that was
    never interrupted (`torch.random.fork_rng` keeps it as it was).
    """

    def on_log(self, run: Run, row: Mapping[str, Any]) -> bool | None:
        """A line of metrics.jsonl with training metrics was written: `step`, `loss`, `lr`, `tokens_per_second`, …"""

    def on_evaluation(self, run: Run, row: Mapping[str, Any]) -> bool | None:
        """An evaluation was written: `step` and the objective's metrics."""

    def on_save(self, run: Run, step: int, checkpoint: Path) -> bool | None:
        """The checkpoint of `step` has become complete. It is written during later steps, so this may be some steps
        later; before the next checkpoint begins, and before `on_end`."""

    def on_end(self, run: Run, outcome: str) -> None:
        """Training ended: finished, interrupted, diverged or failed."""
