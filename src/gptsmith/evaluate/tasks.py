"""Evaluation on a task: generate an answer to each example, and average the scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.text import generate_texts
from gptsmith.errors import UsageError
from gptsmith.log import progress
from gptsmith.model.transformer import Transformer
from gptsmith.tasks import Conversation, Task, make_task
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chat import ChatTemplate

EXAMPLES_AT_ONCE = 256  # given to the engine together, between two updates of the progress bar


@dataclass(frozen=True)
class TaskOutcome:
    """The answer to one example, and its score."""

    index: int
    answer: str
    score: float


@dataclass(frozen=True)
class TaskResult:
    """The outcomes in order of the examples."""

    outcomes: tuple[TaskOutcome, ...]

    @property
    def score(self) -> float:
        """The mean score."""
        return math.fsum(outcome.score for outcome in self.outcomes) / len(self.outcomes)


def evaluate_task(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task | str,
    *,
    limit: int | None = None,
    params: SamplingParams | None = None,
) -> TaskResult:
    """Return a model's score on a task, with its answer to each example.

    A conversation becomes a prompt by the tokenizer's chat template. Without a template, the prompt is the contents of
    the messages, one on each line, and the answer ends with its line (unless `params.stop` says otherwise).

    task: a task, or the name of a registered one. limit: use only so many examples, from the first.
    params: how to generate; by default greedily, at most 128 tokens. One answer to each example (`n` must be 1).
    Raises UsageError for a task without examples or a prompt that is longer than the context, TokenizerError for
    characters that the tokenizer lacks.
    """
    task = make_task(task) if isinstance(task, str) else task
    params = SamplingParams(temperature=0.0, max_tokens=128) if params is None else params
    if params.n != 1:
        raise UsageError(f"a task takes one answer to each example, so n must be 1, not {params.n}.")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}.")
    count = len(task) if limit is None else min(limit, len(task))
    if count < 1:
        raise UsageError("the task has no examples.")
    template = ChatTemplate(tokenizer)
    if template.plain:
        params = replace(params, stop=params.stop or ("\n",))
    else:
        params = replace(params, stop_ids=(*params.stop_ids, *template.end_ids()))
    engine = Engine(model, vocab_size=tokenizer.vocab_size)
    outcomes: list[TaskOutcome] = []
    with progress(count, "Evaluating") as bar:
        for start in range(0, count, EXAMPLES_AT_ONCE):
            indices = range(start, min(start + EXAMPLES_AT_ONCE, count))
            prompts = [_prompt(template, task.example(i)) for i in indices]
            answers = generate_texts(engine, tokenizer, prompts, params, continues_prompt=template.plain)
            outcomes += [TaskOutcome(i, text, task.score(i, text)) for i, (text,) in zip(indices, answers, strict=True)]
            bar.advance(len(indices))
    return TaskResult(tuple(outcomes))


def _prompt(template: ChatTemplate, conversation: Conversation) -> str | Sequence[int]:
    if template.plain:
        return "\n".join(str(message["content"]) for message in conversation)
    return template.encode(conversation)
