"""Answers that the policy samples to learn from.

They come from the engine that serves the model, on the policy's own weights: token ids in, token ids out, with the
log-probability of each token under the distribution that it was drawn from, which equals the trainer's up to rounding.
Whether the engine uses its own kernels is decided once in a run, since they round differently.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from gptsmith.data.loader import RowLoader
from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import Completion
from gptsmith.engine.text import stop_strings
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.prompts import Prompt

MAX_BATCH = 64  # answers that the engine writes at once
MAX_BATCH_TOKENS = 1024
BLOCK_SIZE = 16  # tokens in a block of the cache


@dataclass(frozen=True)
class Rollout:
    """One answer.

    group: the position of its prompt among those sampled together. ids: its tokens, the end token included if it has
    ended. logprobs: of each of them, in nats, when it was sampled. text: without special tokens
    and without the text that it stops at.
    """

    prompt: Prompt
    group: int
    ids: list[int]
    logprobs: list[float]
    text: str
    ended: bool


class PromptLoader(RowLoader[list[Prompt]]):
    """Endless batches of prompts, each once in an epoch."""

    def __init__(self, prompts: Sequence[Prompt], *, batch_size: int, seed: int) -> None:
        super().__init__(len(prompts), batch_size=batch_size, seed=seed)
        self.prompts = prompts

    def batch_of(self, rows: Sequence[int]) -> list[Prompt]:
        return [self.prompts[i] for i in rows]

    def _identity(self) -> dict[str, object]:
        return {"prompts": len(self.prompts), "seed": self.seed}


def sample_answers(
    policy: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    per_prompt: int,
    answer_tokens: int,
    context: int,
    temperature: float,
    stop: Sequence[str] = (),
    seed: int,
    kernels: bool = False,
    number: int = 0,
    first_group: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Rollout] | None:
    """Return `per_prompt` answers of the policy to each prompt, in the order of the prompts. None on a stop.

    answer_tokens: at most so many tokens each; context: prompt and answer together. temperature: above 0; there are no
    other sampling options, since training would have to correct for them. stop: texts that end an answer, too.
    kernels: whether the engine uses its own.
    seed, number: of the run, and of this rollout: the same ones give the same answers to the same prompts.
    first_group: the number of the first prompt.
    """
    if not prompts:
        return []
    together = min(MAX_BATCH, len(prompts) * per_prompt)
    longest = max(len(prompt.ids) for prompt in prompts) + answer_tokens
    engine = Engine(
        policy,
        vocab_size=tokenizer.vocab_size,
        max_batch=together,
        cache_tokens=together * (min(context, longest) + BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_batch_tokens=MAX_BATCH_TOKENS,
        kernels="always" if kernels else "never",
    )
    requests = {}
    for group, prompt in enumerate(prompts, first_group):
        params = SamplingParams(
            n=per_prompt,
            max_tokens=max(1, min(answer_tokens, context - len(prompt.ids))),
            temperature=temperature,
            seed=_seed(seed, number, group),
            stop_ids=tuple(tokenizer.end_ids),
            stop_condition=stop_strings(tokenizer, stop, prompt.ids),
            logprobs=0,
            sampled_logprobs=True,
        )
        requests[engine.add_request(prompt.ids, params)] = group
    answers: dict[int, list[Completion]] = {}
    with _undisturbed(policy):
        while engine.has_work:
            if should_stop():
                return None
            for event in engine.step():
                if event.result is not None:
                    if event.result.error is not None:
                        raise event.result.error
                    answers[requests[event.request]] = event.result.completions
    return [
        _rollout(prompt, group, each, tokenizer, stop)
        for group, prompt in enumerate(prompts, first_group)
        for each in answers[group]
    ]


@contextlib.contextmanager
def _undisturbed(policy: Transformer) -> Iterator[None]:
    """Keep the policy in evaluation mode, and Python's cycle collector off.

    The engine would change the mode in each step. The collector looks at all of torch's objects whenever the engine has
    made some thousands. Each takes a tenth of the time of a small model's rollout.
    """
    was_training, was_collecting = policy.training, gc.isenabled()
    policy.eval()
    gc.disable()
    try:
        yield
    finally:
        policy.train(was_training)
        if was_collecting:
            gc.enable()


def _rollout(prompt: Prompt, group: int, answer: Completion, tokenizer: Tokenizer, stop: Sequence[str]) -> Rollout:
    assert answer.logprobs is not None
    logprobs = [token.logprob for token in answer.logprobs if token is not None]
    text = tokenizer.decode(answer.ids, skip_special_tokens=True)
    text = text[: min((text.find(each) for each in stop if each in text), default=len(text))]
    return Rollout(prompt, group, answer.ids, logprobs, text, answer.finish_reason == "stop")


def _seed(seed: int, number: int, group: int) -> int:
    """Return the seed of the first answer to a prompt. Further answers have the seeds after it."""
    digest = hashlib.blake2b(b"%d %d %d" % (seed, number, group), digest_size=6, person=b"rollout").digest()
    return int.from_bytes(digest, "little")


def weights_hash(policy: Transformer) -> str:
    """Return a hash of the weights that training changes: equal for equal weights, bit for bit."""
    digest = hashlib.blake2b(digest_size=8)
    for p in policy.parameters():
        if p.requires_grad:
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
