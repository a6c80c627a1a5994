"""Generation: one loop over the model with a key/value cache, and text on top of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gptsmith.engine.sampling import SamplingParams, choose, penalize_repetition
from gptsmith.errors import GptsmithError, UsageError
from gptsmith.model.cache import KVCache
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer


@torch.inference_mode()
def generate_ids(
    model: Transformer,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    num_samples: int = 1,
    stop_ids: Sequence[int] = (),
    num_ids: int | None = None,
    on_slide: Callable[[], None] | None = None,
) -> Iterator[list[int | None]]:
    """Continue `prompt` (at least one id) `num_samples` times, together.

    Yields, per step, one id for each sample, or None for a sample that is finished (it produced one of `stop_ids`,
    which is yielded too). When the context is full the window slides: the last three quarters of it are read again and
    generation goes on (`on_slide` is called the first time, also for a prompt longer than the context).
    num_ids: choose only ids below this; a model's vocabulary is often padded beyond its tokenizer's.
    The model is left in the mode it was in. Raises UsageError for an empty prompt or ids outside the vocabulary.
    """
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
    if num_ids is not None:
        vocabulary = min(vocabulary, num_ids)
    if not prompt:
        raise UsageError("the prompt is empty; give at least one token to continue.")
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise UsageError(f"the prompt has a token id outside 0..{vocabulary - 1}.")
    if num_samples < 1:
        raise UsageError(f"--num-samples must be at least 1, not {num_samples}.")
    device = next(model.parameters()).device
    seed = params.seed if params.seed is not None else secrets.randbits(48)
    generators = [torch.Generator().manual_seed((seed + i) % 2**63) for i in range(num_samples)]
    kept = max(1, context * 3 // 4)
    was_training = model.training
    model.eval()
    try:
        tokens = torch.tensor([list(prompt)] * num_samples, device=device)  # (B, all tokens so far)
        seen = torch.zeros(num_samples, vocabulary, dtype=torch.bool, device=device)
        seen[:, tokens[0]] = True
        finished = [False] * num_samples
        capacity = min(context, len(prompt) + params.max_tokens)
        dtype = next(model.parameters()).dtype
        cache = KVCache(model.config, num_samples, capacity, device=device, dtype=dtype)
        new = tokens
        if len(prompt) > context:
            new = tokens[:, -kept:]
            if on_slide is not None:
                on_slide()
        for _ in range(params.max_tokens):
            if cache.length + new.shape[1] > context:
                if on_slide is not None and tokens.shape[1] <= context + 1:
                    on_slide()
                cache.length, new = 0, tokens[:, -kept:]
            hidden = model.hidden_states(new, cache=cache)[:, -1]
            logits = model.lm_head(hidden).float()[:, :vocabulary]
            if not torch.isfinite(logits).all():
                raise GptsmithError("the model gives NaN or infinite logits; its weights are damaged or it diverged.")
            if params.repetition_penalty != 1:
                logits = penalize_repetition(logits, seen, params.repetition_penalty)
            chosen = choose(logits, params, generators)
            seen.scatter_(1, chosen[:, None], True)
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
            new = chosen[:, None]
            step = [None if done else int(i) for done, i in zip(finished, chosen.tolist(), strict=True)]
            finished = [done or i in stop_ids for done, i in zip(finished, step, strict=True)]
            yield step
            if all(finished):
                return
    finally:
        model.train(was_training)


class StopText:
    """Text that arrives in pieces, held back while it may still become a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held, self.stopped = tuple(stop), "", False

    def push(self, piece: str) -> str:
        """The text that is now certain; sets `stopped` once a stop string is complete (it and what follows is cut)."""
        if self.stopped:
            return ""
        self.held += piece
        found = [position for s in self.stop if (position := self.held.find(s)) >= 0]
        if found:
            self.stopped = True
            text, self.held = self.held[: min(found)], ""
            return text
        longest = max(
            (n for s in self.stop for n in range(min(len(s) - 1, len(self.held)), 0, -1) if self.held.endswith(s[:n])),
            default=0,
        )
        text, self.held = self.held[: len(self.held) - longest], self.held[len(self.held) - longest :]
        return text

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        text, self.held = ("" if self.stopped else self.held), ""
        return text


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    params: SamplingParams,
    *,
    num_samples: int = 1,
    on_slide: Callable[[], None] | None = None,
) -> Iterator[tuple[int, str]]:
    """Continuations of `prompt` as they are made: pairs (sample, piece of whole characters).

    An empty prompt starts from the end-of-document token. Ends a sample at that token or at a stop string.
    Raises, before anything is made, TokenizerError for characters the tokenizer does not know and UsageError for an
    empty prompt where there is no such token.
    """
    ids = tokenizer.encode(prompt)
    stop_ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if not ids:
        if tokenizer.eos_id is None:
            raise UsageError("the prompt is empty and this tokenizer has no token to start from; give a prompt.")
        ids = [tokenizer.eos_id]
    steps = generate_ids(
        model,
        ids,
        params,
        num_samples=num_samples,
        stop_ids=stop_ids,
        num_ids=tokenizer.vocab_size,
        on_slide=on_slide,
    )
    return _pieces(steps, tokenizer, params, num_samples, stop_ids)


def _pieces(
    steps: Iterator[list[int | None]],
    tokenizer: Tokenizer,
    params: SamplingParams,
    num_samples: int,
    stop_ids: Sequence[int],
) -> Iterator[tuple[int, str]]:
    decoders = [tokenizer.stream() for _ in range(num_samples)]
    texts = [StopText(params.stop) for _ in range(num_samples)]
    for step in steps:
        for i, token in enumerate(step):
            if token is not None and token not in stop_ids:
                piece = texts[i].push(decoders[i].push(token))
                if piece:
                    yield i, piece
        if all(text.stopped or token is None for text, token in zip(texts, step, strict=True)):
            break
    for i in range(num_samples):
        piece = texts[i].push(decoders[i].finish()) + texts[i].finish()
        if piece:
            yield i, piece


def generate_samples(
    model: Transformer, tokenizer: Tokenizer, prompt: str, params: SamplingParams, *, num_samples: int = 1
) -> list[str]:
    """`num_samples` continuations of `prompt` (without it)."""
    results = [""] * num_samples
    for i, piece in stream(model, tokenizer, prompt, params, num_samples=num_samples):
        results[i] += piece
    return results


def generate(model: Transformer, tokenizer: Tokenizer, prompt: str, **params: Any) -> str:
    """The continuation of `prompt` (without it).

    params: those of `SamplingParams`: max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop, seed.

    >>> model, tokenizer = gptsmith.load("runs/bard")
    >>> gptsmith.generate(model, tokenizer, "ROMEO:", max_tokens=200, temperature=0.8)
    """
    stop = params.pop("stop", ())
    params["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    try:
        chosen = SamplingParams(**params)
    except TypeError as error:
        raise UsageError(f"generate: {str(error).partition(') ')[2] or error}.") from None
    return generate_samples(model, tokenizer, prompt, chosen)[0]
