"""Text on top of the engine, which knows only token ids: prompts encoded, pieces of whole characters, stop strings.

for piece in stream(engine, tokenizer, "Once", SamplingParams(n=2, stop=("\\n\\n",))): ...
texts = generate_texts(engine, tokenizer, prompts, params)
text = generate(model, tokenizer, "ROMEO:", max_tokens=200)
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import Event, FinishReason, TokenLogprob
from gptsmith.errors import GptsmithError, UsageError
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gptsmith.engine.speculative import Speculator


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


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token of a text. start: at which character of its sample's text it begins."""

    id: int
    start: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class TextChunk:
    """New text of one sample, and why it ended, if it did. error: of the request, with its last piece.

    tokens: those whose text has begun and not been told of before, if log-probabilities were asked for.
    """

    index: int
    text: str
    finish_reason: FinishReason | None = None
    error: GptsmithError | None = None
    tokens: tuple[TextToken, ...] = ()


class Detokenizer:
    """A request's events as text. Feed it events; where it has found a stop string, `engine.stop` the sample.

    engine_params: what to give the engine for `params`: it ends at the tokenizer's end of text (unless `ignore_eos`)
    and leaves stop strings to this, and an echo, unless with the prompt's log-probabilities: then `prompt_length` is
    how many ids the prompt has. skip_special_tokens: leave them out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        params: SamplingParams,
        *,
        ignore_eos: bool = False,
        prompt_length: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self.tokenizer, self.prompt, self.params = tokenizer, prompt, params
        self.skip_special_tokens = skip_special_tokens
        self.echoed = prompt_length if params.echo and params.prompt_logprobs is not None else 0
        ends = () if tokenizer.eos_id is None or ignore_eos else (tokenizer.eos_id,)
        stop_ids = tuple(dict.fromkeys((*params.stop_ids, *ends)))
        stop_condition = _StopStrings(self) if params.stop and params.returns_only_at_end else params.stop_condition
        self.engine_params = replace(
            params, stop=(), echo=self.echoed > 0, stop_ids=stop_ids, stop_condition=stop_condition
        )
        self._samples: dict[int, _Sample] = {}

    def push(self, event: Event) -> tuple[TextChunk | None, bool]:
        """The piece that an event makes, if any, and whether the engine should stop the sample: a stop string came."""
        sample = self._samples.get(event.index)
        if sample is None:
            sample = self._samples[event.index] = _Sample(self)
        if sample.ended:
            return None, False
        text = sample.push(event.ids, event.logprobs)
        reason: FinishReason | None = event.finish_reason
        if sample.stopped.stopped:
            reason = "stop"
        if reason is not None:
            sample.ended = True
            text += sample.finish()
        error = event.result.error if event.result is not None else None
        if not text and reason is None:
            return None, False
        piece = TextChunk(event.index, text, reason, error, sample.told(len(text)))
        return piece, reason is not None and event.finish_reason is None


class _Sample:
    def __init__(self, writing: Detokenizer) -> None:
        self.params, self.stop_ids = writing.params, frozenset(writing.engine_params.stop_ids)
        self.decoder = writing.tokenizer.stream(skip_special_tokens=writing.skip_special_tokens)
        self.stopped, self.echoed = StopText(writing.params.stop), writing.echoed
        self.prefix = writing.prompt if writing.params.echo and not writing.echoed else ""
        self.count, self.ended = 0, False
        self.decoded = len(self.prefix)
        """Characters of all tokens so far; those that are held back are among them."""
        self.sent = 0
        self.tokens: deque[TextToken] = deque()

    def push(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None] | None) -> str:
        text, self.prefix = self.prefix, ""
        for i, token in enumerate(ids):
            if self.echoed:
                self.echoed -= 1
                text += self._decode(token, logprobs[i] if logprobs is not None else None)
                continue
            self.count += 1
            if token in self.stop_ids:
                continue
            piece = self._decode(token, logprobs[i] if logprobs is not None else None)
            text += self.stopped.push(piece) if self.count >= self.params.min_tokens else piece
            if self.stopped.stopped:
                break
        return text

    def _decode(self, token: int, logprob: TokenLogprob | None) -> str:
        if self.params.logprobs is not None:
            self.tokens.append(TextToken(token, self.decoded, logprob))
        piece = self.decoder.push(token)
        self.decoded += len(piece)
        return piece

    def finish(self) -> str:
        return self.stopped.push(self.decoder.finish()) + self.stopped.finish()

    def told(self, length: int) -> tuple[TextToken, ...]:
        """The tokens whose text begins within what has been sent, with these `length` characters."""
        self.sent += length
        everything = self.ended and not self.stopped.stopped
        told = []
        while self.tokens and (everything or self.tokens[0].start < self.sent):
            told.append(self.tokens.popleft())
        return tuple(told)

    def copy(self) -> _Sample:
        other = copy.copy(self)
        other.decoder, other.stopped = self.decoder.copy(), copy.copy(self.stopped)
        other.tokens = self.tokens.copy()
        return other


@dataclass(frozen=True)
class _StopStrings:
    """Stop strings, for the engine to find where it tells of a text only once it has ended."""

    writing: Detokenizer

    def start(self) -> _StopStringMatcher:
        sample = _Sample(self.writing)
        sample.echoed = 0  # it is shown new tokens only
        return _StopStringMatcher(sample)


@dataclass(frozen=True)
class _StopStringMatcher:
    sample: _Sample

    def push(self, token: int) -> bool:
        self.sample.push([token], None)
        return self.sample.stopped.stopped

    def copy(self) -> _StopStringMatcher:
        return _StopStringMatcher(self.sample.copy())


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids; of an empty one, the end-of-text token, after which texts begin. TokenizerError for characters
    the tokenizer does not know, UsageError for an empty prompt where there is no such token."""
    ids = tokenizer.encode(prompt)
    if ids:
        return ids
    if tokenizer.eos_id is None:
        raise UsageError("the prompt is empty and this tokenizer has no token to start from; give a prompt.")
    return [tokenizer.eos_id]


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    params: SamplingParams,
    *,
    ignore_eos: bool = False,
    on_shift: Callable[[], None] | None = None,
) -> Iterator[TextChunk]:
    """Continuations of a prompt (a text, or its ids) as they are made, in pieces of whole characters.

    on_shift: called once when the oldest tokens are forgotten (`overflow="shift"`) or cut off (`"truncate"`).
    Raises, before anything is made, what `encode_prompt` and `Engine.add_request` raise; a request that fails later
    raises its error.
    """
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    text = prompt if isinstance(prompt, str) else tokenizer.decode(ids) if params.echo else ""
    writing = Detokenizer(tokenizer, text, params, ignore_eos=ignore_eos)
    return _pieces(engine, engine.stream(ids, writing.engine_params), writing, len(ids), on_shift)


def _pieces(
    engine: Engine, events: Generator[Event], writing: Detokenizer, length: int, on_shift: Callable[[], None] | None
) -> Iterator[TextChunk]:
    made: dict[int, int] = {}
    if on_shift is not None and engine.cut(length, writing.params):
        on_shift()
        on_shift = None
    with contextlib.closing(events):
        for event in events:
            made[event.index] = made.get(event.index, 0) + len(event.ids)
            if (
                on_shift is not None
                and writing.params.overflow == "shift"
                and length + made[event.index] > engine.context
            ):
                on_shift()
                on_shift = None
            piece, stop = writing.push(event)
            if piece is not None:
                yield piece
            if stop:
                engine.stop(event.request, event.index)
            if event.result is not None and event.result.error is not None:
                raise event.result.error


def generate_texts(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], params: SamplingParams
) -> list[list[str]]:
    """Continuations of many prompts together: for each, its `params.n` texts (without the prompt, unless `echo`).

    Raises the first error of any.
    """
    writings: dict[int, Detokenizer] = {}
    texts: dict[int, list[str]] = {}
    try:
        for prompt in prompts:
            writing = Detokenizer(tokenizer, prompt, params)
            number = engine.add_request(encode_prompt(tokenizer, prompt), writing.engine_params)
            writings[number], texts[number] = writing, [""] * params.n
        unfinished = set(writings)
        while unfinished:
            for event in engine.step():
                if event.request not in unfinished:
                    continue
                piece, stop = writings[event.request].push(event)
                if piece is not None:
                    texts[event.request][event.index] += piece.text
                if stop:
                    engine.stop(event.request, event.index)
                if event.result is not None:
                    unfinished.discard(event.request)
                    if event.result.error is not None:
                        raise event.result.error
    finally:
        for number in writings:
            engine.abort(number)
    return list(texts.values())


def generate(model: Transformer, tokenizer: Tokenizer, prompt: str, **params: Any) -> str:
    """The continuation of `prompt` (without it).

    params: those of `SamplingParams`: max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop, seed, ...
    Beyond the context the oldest tokens are forgotten, unless `overflow` says otherwise.
    For many prompts make one `Engine` and use `generate_texts`.

    >>> model, tokenizer = gptsmith.load("runs/bard")
    >>> gptsmith.generate(model, tokenizer, "ROMEO:", max_tokens=200, temperature=0.8)
    """
    stop = params.pop("stop", ())
    params["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    try:
        chosen = SamplingParams(**{"overflow": "shift", **params})
    except TypeError as error:
        raise UsageError(f"generate: {str(error).partition(') ')[2] or error}.") from None
    if chosen.n > 1:
        raise UsageError("generate gives one text; for several use generate_texts.")
    engine = engine_for(model, tokenizer, chosen)
    return "".join(piece.text for piece in stream(engine, tokenizer, prompt, chosen))


def engine_for(
    model: Transformer, tokenizer: Tokenizer, params: SamplingParams, speculator: Speculator | None = None
) -> Engine:
    """An engine for one prompt at a time, with room for what `params` asks for and no more."""
    sequences = max(params.samples, params.beams)
    context = model.config.max_position_embeddings
    return Engine(
        model,
        vocab_size=tokenizer.vocab_size,
        max_batch=sequences,
        max_batch_tokens=max(256, sequences),
        cache_tokens=sequences * (context + 16),
        speculator=speculator,
    )
