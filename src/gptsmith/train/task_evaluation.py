"""Tasks that are measured while a model is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from gptsmith.errors import UsageError
from gptsmith.evaluate.harness import TaskSpec, check_tasks, resolve_task, run_tasks
from gptsmith.log import quiet
from gptsmith.model.transformer import Transformer
from gptsmith.tasks.definition import Definition
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.config import ClassifyConfig, RewardConfig, RunConfig


class TaskEvaluation:
    """Measures the tasks of `config.eval`.

    They are checked against the tokenizer and the context at once, so that no mistake in them stops a run later.
    Raises UsageError for tasks that do not fit the run, and what `run_tasks` raises.
    """

    def __init__(self, config: RunConfig, model: Transformer, tokenizer: Tokenizer) -> None:
        if isinstance(config.method, ClassifyConfig | RewardConfig):
            raise UsageError("--eval.tasks measures language models; this method trains a model that writes no text.")
        names = [name.strip() for name in (config.eval.tasks or "").split(",") if name.strip()]
        self.every, self.limit, self.shots = config.eval.every, config.eval.limit, config.eval.shot_counts
        self.model, self.tokenizer = model, tokenizer
        found = [(name, resolve_task(name)) for name in names]  # once: their examples stay in memory
        self.tasks: list[TaskSpec] = [task if isinstance(task, Definition) else name for name, task in found]
        check_tasks(model, tokenizer, self.tasks, shots=self.shots, limit=self.limit)

    def measure(self) -> list[dict[str, Any]]:
        """Return a row for each task and number of shots. Leaves no trace in torch's random numbers."""
        with quiet(), torch.random.fork_rng():
            results = run_tasks(self.model, self.tokenizer, self.tasks, shots=self.shots, limit=self.limit)
        keys = ("task", "shots", "score", "low", "high", "chance", "examples")
        return [{key: dataclasses.asdict(row)[key] for key in keys} for row in results.summary()]
