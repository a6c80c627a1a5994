"""The data of the engine: requests, their sequences, and the events and results that they return."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Literal

from gptsmith.engine.prompt import PromptImage, after_image
from gptsmith.engine.sampler import SamplerState
from gptsmith.engine.sampling import SamplingParams
from gptsmith.errors import GptsmithError
from gptsmith.model.lora import Adapter

FinishReason = Literal["stop", "length", "context", "cancelled", "error"]
"""stop: a stop token or stop string, or the end of a grammar. length: `max_tokens` reached, or `prompt_only`. context:
the context is full and `overflow` does not allow more. cancelled: by `abort`. error: see the result's `error`."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a token (in nats), before temperature and filters unless `sampled_logprobs` was set.

    top: (token, log-probability) of the most probable tokens at that position, as many as were asked for, best first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Completion:
    """One continuation of a prompt.

    ids: generated tokens, including the stop token that ended it, if any; with `echo`, the prompt comes first.
    logprobs: of each of the ids, if asked for. None for the first token of an echoed prompt, which nothing predicts.
    cumulative_logprob: of all generated ids; None unless log-probabilities, best_of or beams were asked for.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None


@dataclass
class Result:
    """The result of a request.

    prompt_ids: the prompt as it was computed, that is, without what `overflow="truncate"` cut off.
    prompt_logprobs: for each token of the prompt, if asked for; None for the first.
    cached_tokens: how many tokens of the prompt came from the prefix cache.
    error: why the request failed; its completions hold what had been generated before.
    """

    request: int
    prompt_ids: list[int]
    completions: list[Completion] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0
    error: GptsmithError | None = None

    @property
    def ids(self) -> list[int]:
        """The ids of the first completion."""
        return self.completions[0].ids


@dataclass(slots=True)
class Event:
    """New tokens of one sample since its last event, their log-probabilities, and why it ended, if it did.

    result: of the whole request; only on its last event.
    """

    request: int
    index: int
    ids: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    result: Result | None = None


class Request:
    """A prompt, its parameters, and the sequences that continue it.

    number: its position in the order of arrival. salt: only requests with the same salt share cached blocks.
    forked: whether the samples after the first have been created. images: the pictures in the prompt.
    """

    def __init__(
        self,
        number: int,
        prompt: Items[int],
        params: SamplingParams,
        seed: int,
        salt: bytes = b"",
        adapter: Adapter | None = None,
        images: tuple[PromptImage, ...] = (),
    ) -> None:
        self.number, self.params, self.seed, self.salt, self.adapter = number, params, seed, salt, adapter
        self.prompt, self.images = list(prompt), images
        self.live: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.forked = False
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.error: GptsmithError | None = None

    @property
    def reads_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still missing: then all of it is computed, cached or not."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt)


class Sequence:
    """A list of tokens that is being continued.

    tokens: the prompt and the generated tokens; those before `start` are outside the context.
    computed: for how many tokens from `start` on `tables` (one block table per group of layers) holds keys and values;
    0 again after the blocks are taken away.
    num_hashed_blocks: how many full blocks are registered for prefix caching, under `block_hashes`.
    drafts: speculative tokens to be checked in the next step. speculation_enabled: whether drafts are allowed.
    candidates: of a beam that waits for the other beams of its request.
    """

    def __init__(self, request: Request, index: int, sampler: SamplerState, groups: int) -> None:
        self.request, self.index, self.sampler = request, index, sampler
        self.tokens = list(request.prompt)
        self.start = self.computed = self.num_hashed_blocks = self.preemptions = 0
        self.tables: list[list[int]] = [[] for _ in range(groups)]
        self.block_hashes: list[bytes] = []
        self.drafts: list[int] = []
        self.speculation_enabled = True
        self.logprobs: list[TokenLogprob] = []
        self.cumulative_logprob = 0.0
        self.candidates: list[tuple[float, int, TokenLogprob]] | None = None
        self.finish_reason: FinishReason | None = None
        self.emitted, self.emitted_end = 0, False
        """How many generated tokens events have reported, and whether they have reported the end."""

    @property
    def order(self) -> tuple[int, int]:
        """The scheduling order: by arrival, then by index."""
        return self.request.number, self.index

    @property
    def salt(self) -> bytes:
        return self.request.salt

    @property
    def length(self) -> int:
        """The number of tokens within the context."""
        return len(self.tokens) - self.start

    @property
    def remaining(self) -> int:
        """The number of tokens that are not computed yet; 1 when decoding."""
        return len(self.tokens) - self.start - self.computed

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    def push(self, token: int, logprob: TokenLogprob | None) -> None:
        """Append a generated token."""
        self.tokens.append(token)
        self.sampler.push(token)
        if logprob is not None:
            self.logprobs.append(logprob)
            self.cumulative_logprob += logprob.logprob

    def fork(self, index: int, seed: int) -> Sequence:
        """Return an independent copy without blocks."""
        child = Sequence(self.request, index, self.sampler.fork(seed), len(self.tables))
        child.tokens, child.start, child.block_hashes = list(self.tokens), self.start, list(self.block_hashes)
        child.logprobs, child.cumulative_logprob = list(self.logprobs), self.cumulative_logprob
        child.preemptions = self.preemptions
        return child

    def shift(self, length: int) -> None:
        """Move the context forward so that it begins with the last `length` tokens, or after the picture whose tokens
        would be cut in two."""
        self.start = after_image(self.request.images, len(self.tokens) - length)
        self.block_hashes.clear()
