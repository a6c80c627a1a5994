"""Which requests an engine can serve: checks before anything is computed."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from gptsmith.engine.prompt import Prompt, after_image, check_images
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """What an engine can serve.

    vocab_size: token ids must be below it. context: maximum number of tokens that the model attends to. capacity:
    maximum number of tokens of one sequence that the cache can hold. image_token_id: the placeholder of pictures; None
    for a model that reads text only.
    """

    vocab_size: int
    context: int
    capacity: int
    image_token_id: int | None = None

    @property
    def shifted_length(self) -> int:
        """The number of tokens that are kept, and computed again, when a full context shifts."""
        return max(1, self.context * 3 // 4)

    def num_truncated(self, length: int, params: SamplingParams) -> int:
        """Return how many tokens are cut off the beginning of a prompt: 0 unless `overflow="truncate"`."""
        if params.overflow != "truncate":
            return 0
        return max(0, length - max(self.context - params.max_tokens, self.context // 4, 1))

    def check(self, prompt: Prompt, params: SamplingParams, adapters: Iterable[str]) -> Prompt:
        """Return the prompt as it will be computed. Raise UsageError if the request cannot be served."""
        try:
            ids = [operator.index(id) for id in prompt.ids]
        except TypeError:
            raise UsageError("the prompt must be a list of token ids (integers).") from None
        if not ids:
            raise UsageError("the prompt is empty; give at least one token to continue.")
        self._check_ids("the prompt", ids)
        self._check_params(params, adapters)
        check_images(Prompt(ids, prompt.images), self.image_token_id)
        prompt = Prompt(ids, prompt.images).without_beginning(self.num_truncated(len(ids), params))
        start = len(prompt) - self.shifted_length if len(prompt) > self.context else 0
        if after_image(prompt.images, start) >= len(prompt):
            raise UsageError(
                f"the prompt of {len(ids):,} tokens ends with a picture that does not fit the context of "
                f"{self.context:,} tokens as a whole."
            )
        ids = list(prompt.ids)
        if len(ids) > self.context:
            if params.overflow == "error":
                raise UsageError(
                    f"the prompt has {len(ids):,} tokens, more than the context of {self.context:,}. Shorten it, or "
                    "set overflow to truncate or shift."
                )
            if params.prompt_logprobs is not None:
                raise UsageError("prompt_logprobs needs a prompt that fits the context.")
        needed = min(self.context, len(ids) + params.max_tokens)
        if needed > self.capacity:
            raise UsageError(
                f"the request needs room for {needed:,} tokens, and the cache holds {self.capacity:,}. "
                "Ask for fewer tokens, or give the engine a larger cache."
            )
        return prompt

    def _check_params(self, params: SamplingParams, adapters: Iterable[str]) -> None:
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_ids", params.stop_ids)
        if params.adapter is not None and params.adapter not in (known := sorted(adapters)):
            raise UsageError(f"there is no adapter {params.adapter!r}. Known adapters: {', '.join(known) or 'none'}.")
        if params.stop:
            raise UsageError("the engine takes stop_ids; stop strings need engine.text.")
        if 2 * params.beams > self.vocab_size:
            raise UsageError(f"beams must be at most half of the vocabulary ({self.vocab_size}), not {params.beams}.")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.vocab_size:
                raise UsageError(f"--{name.replace('_', '-')} must be at most {self.vocab_size}, the vocabulary size.")

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        if min(ids, default=0) < 0 or max(ids, default=0) >= self.vocab_size:
            raise UsageError(f"{name} has a token id outside 0..{self.vocab_size - 1}.")
