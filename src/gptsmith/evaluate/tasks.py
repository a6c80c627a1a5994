"""Evaluation on one task, as `docs/extending.md` describes tasks of one's own."""

from __future__ import annotations

from gptsmith.engine.sampling import SamplingParams
from gptsmith.evaluate.harness import Outcome, TaskResult, TaskSpec, run_tasks
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer

__all__ = ["Outcome", "TaskResult", "evaluate_task"]


def evaluate_task(
    model: Transformer,
    tokenizer: Tokenizer,
    task: TaskSpec,
    *,
    limit: int | None = None,
    params: SamplingParams | None = None,
) -> TaskResult:
    """Return a model's score on a task, with its answer to each example: `run_tasks` for a single task.

    A conversation becomes a prompt by the tokenizer's chat template. Without a template, the prompt is the contents of
    the messages, one on each line, and the answer ends with its line (unless `params.stop` says otherwise).

    task: a task, the name of one, or the path of a YAML file. limit: use only so many examples, from the first.
    params: how to generate; by default greedily, at most 128 tokens. One answer to each example (`n` must be 1).
    Raises UsageError for a task without examples or a prompt that is longer than the context, TokenizerError for
    characters that the tokenizer lacks.
    """
    return run_tasks(model, tokenizer, [task], limit=limit, params=params).tasks[0]
