"""Text on top of the engine, which deals in token ids: encoding of prompts, chunks of whole characters, stop strings.

for chunk in stream(engine, tokenizer, "Once", SamplingParams(n=2, stop=("\\n\\n",))): ...
texts = generate_texts(engine, tokenizer, prompts, params)
text = generate(model, tokenizer, "ROMEO:", max_tokens=200)
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptsmith.engine.engine import Engine
from gptsmith.engine.prompt import (
    Prompt,
    PromptImage,
    around_images,
    as_prompt,
    processor_of,
    prompt_image,
    with_images,
)
from gptsmith.engine.sampling import SamplingParams, StopCondition, model_defaults
from gptsmith.engine.sequence import Event, FinishReason, TokenLogprob
from gptsmith.engine.speculative import Speculator
from gptsmith.errors import GptsmithError, UsageError
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.chat import ChatTemplate
from gptsmith.tokenizer.harmony import HarmonyParser, split
from gptsmith.tokenizer.tools import ToolCallDelta

if TYPE_CHECKING:
    from gptsmith.data.images import DecodedImage


class StopStringFilter:
    """Cuts a text at the first stop string. Text that could be the beginning of one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held, self.stopped = tuple(stop), "", False

    def push(self, text: str) -> str:
        """Return the text that is now certain. A complete stop string and what follows is cut, and sets `stopped`."""
        if self.stopped:
            return ""
        self.held += text
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
        """Return what was held back and did not become a stop string."""
        text, self.held = ("" if self.stopped else self.held), ""
        return text


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token of a text. start: the character of its sample's text at which it begins. previous: the token before it
    in the text, as `Tokenizer.token_bytes` takes it."""

    id: int
    start: int
    logprob: TokenLogprob | None
    previous: int | None = None


@dataclass(frozen=True, slots=True)
class TextChunk:
    """New text of one sample, and why it ended, if it did.

    error: of the request; only on its last chunk. tokens: those that begin in this chunk (or in text that was held back
    before), if log-probabilities were asked for. reasoning, calls: of an answer in channels (`stream_answer`), beside
    its text.
    """

    index: int
    text: str
    finish_reason: FinishReason | None = None
    error: GptsmithError | None = None
    tokens: tuple[TextToken, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class Detokenizer:
    """Turns a request's events into text. Push events; when `push` finds a stop string, `engine.stop` the sample.

    engine_params: the parameters for the engine. They end a text at any of the tokenizer's end tokens (unless
    `params.ignore_eos`), and leave stop strings and echo to the detokenizer. Only an echo with log-probabilities of the
    prompt comes from the engine; `prompt_length` is then the number of the prompt's ids.
    skip_special_tokens: leave them out of the text.
    prompt_ids: the prompt that the text continues. Without it, and for constrained texts, the text is one of its own,
    as the answer in a conversation is: a tokenizer that writes "▁who" for " who" then begins it with "who".
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        params: SamplingParams,
        *,
        prompt_length: int = 0,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.prompt, self.params = tokenizer, prompt, params
        self.previous = None
        if params.constraint is None:
            special = tokenizer.special_tokens() if skip_special_tokens else {}
            self.previous = next((id for id in reversed(prompt_ids) if id not in special), None)
        self.skip_special_tokens = skip_special_tokens
        self.echoed = prompt_length if params.echo and params.prompt_logprobs is not None else 0
        if self.echoed:  # the prompt is decoded, too
            self.previous = None
        end_ids = () if params.ignore_eos else tokenizer.end_ids
        stop_ids = tuple(dict.fromkeys((*params.stop_ids, *end_ids)))
        stop_condition = _StopStrings(self) if params.stop and params.returns_only_at_end else params.stop_condition
        self.engine_params = replace(
            params, stop=(), echo=self.echoed > 0, stop_ids=stop_ids, stop_condition=stop_condition
        )
        self._samples: dict[int, _SampleText] = {}

    def push(self, event: Event) -> tuple[TextChunk | None, bool]:
        """Return the chunk that an event makes, if any, and whether to stop the sample because of a stop string."""
        sample = self._samples.get(event.index)
        if sample is None:
            sample = self._samples[event.index] = _SampleText(self)
        if sample.ended:
            return None, False
        text = sample.push(event.ids, event.logprobs)
        reason: FinishReason | None = event.finish_reason
        if sample.stop_filter.stopped:
            reason = "stop"
        if reason is not None:
            sample.ended = True
            text += sample.finish()
        error = event.result.error if event.result is not None else None
        if not text and reason is None:
            return None, False
        chunk = TextChunk(event.index, text, reason, error, sample.take_tokens(len(text)))
        return chunk, reason is not None and event.finish_reason is None


class _SampleText:
    """The text of one sample: decoded tokens, cut at the first stop string."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.params, self.stop_ids = detokenizer.params, frozenset(detokenizer.engine_params.stop_ids)
        self.previous = detokenizer.previous
        self.decoder = detokenizer.tokenizer.stream(
            skip_special_tokens=detokenizer.skip_special_tokens, previous=self.previous
        )
        self.skipped = frozenset(detokenizer.tokenizer.special_tokens() if detokenizer.skip_special_tokens else ())
        self.stop_filter, self.echoed = StopStringFilter(detokenizer.params.stop), detokenizer.echoed
        self.prefix = detokenizer.prompt if detokenizer.params.echo and not detokenizer.echoed else ""
        self.count, self.ended = 0, False
        self.decoded = len(self.prefix)
        """Characters of all tokens so far, including those that are held back."""
        self.sent = 0
        """Characters that have been returned."""
        self.tokens: deque[TextToken] = deque()
        """Tokens that have not been returned."""
        self.unplaced: deque[TextToken] = deque()
        """Tokens after those, of which it is not yet certain where they begin."""

    def push(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None] | None) -> str:
        """Decode tokens; return the text that is now certain."""
        text, self.prefix = self.prefix, ""
        for i, token in enumerate(ids):
            if self.echoed:
                self.echoed -= 1
                text += self._decode(token, logprobs[i] if logprobs is not None else None)
                continue
            self.count += 1
            if token in self.stop_ids:
                continue
            decoded = self._decode(token, logprobs[i] if logprobs is not None else None)
            text += self.stop_filter.push(decoded) if self.count >= self.params.min_tokens else decoded
            if self.stop_filter.stopped:
                break
        return text

    def _decode(self, token: int, logprob: TokenLogprob | None) -> str:
        if self.params.logprobs is not None:
            self.unplaced.append(TextToken(token, 0, logprob, self.previous))
        text = self.decoder.push(token)
        if token not in self.skipped:
            self.previous = token
        self._place(text)
        return text

    def _place(self, text: str) -> None:
        """Record where the tokens begin whose place has become certain with newly decoded text."""
        if self.params.logprobs is not None:
            for position in self.decoder.positions:
                self.tokens.append(replace(self.unplaced.popleft(), start=self.decoded + position))
        self.decoded += len(text)

    def finish(self) -> str:
        """Return the text that was held back."""
        text = self.decoder.finish()
        self._place(text)
        return self.stop_filter.push(text) + self.stop_filter.finish()

    def take_tokens(self, length: int) -> tuple[TextToken, ...]:
        """Return the remaining tokens that begin in the text returned so far, `length` more characters included."""
        self.sent += length
        all_tokens = self.ended and not self.stop_filter.stopped
        taken = []
        while self.tokens and (all_tokens or self.tokens[0].start < self.sent):
            taken.append(self.tokens.popleft())
        return tuple(taken)

    def copy(self) -> _SampleText:
        other = copy.copy(self)
        other.decoder, other.stop_filter = self.decoder.copy(), copy.copy(self.stop_filter)
        other.tokens, other.unplaced = self.tokens.copy(), self.unplaced.copy()
        return other


@dataclass(frozen=True)
class _StopStrings:
    """Stop strings as a `StopCondition`, for requests whose texts are returned only at their end."""

    detokenizer: Detokenizer

    def start(self) -> _StopStringMatcher:
        sample = _SampleText(self.detokenizer)
        sample.echoed = 0  # only generated tokens are pushed
        return _StopStringMatcher(sample)


@dataclass(frozen=True)
class _StopStringMatcher:
    sample: _SampleText

    def push(self, token: int) -> bool:
        self.sample.push([token], None)
        return self.sample.stop_filter.stopped

    def copy(self) -> _StopStringMatcher:
        return _StopStringMatcher(self.sample.copy())


def stop_strings(tokenizer: Tokenizer, texts: Sequence[str], prompt_ids: Sequence[int] = ()) -> StopCondition | None:
    """Return a condition for `SamplingParams` that ends the continuation of a prompt with any of these texts."""
    if not texts:
        return None
    return _StopStrings(Detokenizer(tokenizer, "", SamplingParams(stop=tuple(texts)), prompt_ids=prompt_ids))


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the prompt's ids, with a beginning-of-sequence token if the tokenizer adds one.

    For an empty prompt without such a token: the end-of-text token, after which texts begin.
    Raise TokenizerError for characters that the tokenizer lacks, UsageError for an empty prompt if there is no token to
    start from.
    """
    ids = tokenizer.encode_prompt(prompt)
    if ids:
        return ids
    if tokenizer.eos_id is None or tokenizer.eos_id >= tokenizer.vocab_size:  # the model may lack it
        raise UsageError(
            "the prompt is empty, and this tokenizer has no end-of-text token to start from; give a prompt."
        )
    return [tokenizer.eos_id]


def prepare_image(model: Transformer, image: DecodedImage) -> PromptImage:
    """Return a picture as the model takes it. Raise UsageError for a model that reads text only."""
    processor = processor_of(model.config)
    if processor is None:
        raise UsageError("this model reads text only: it takes no pictures.")
    return prompt_image(image, processor)


def conversation_prompt(
    model: Transformer, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], images: Sequence[PromptImage]
) -> Prompt:
    """Return a conversation as a prompt that ends where the assistant answers.

    images: one for each part {"type": "image"} of the messages. Raise UsageError where they do not fit, TokenizerError
    as `ChatTemplate.encode` does.
    """
    ids, placeholder = template.encode(messages), model.config.image_token_id
    if placeholder is None:
        return Prompt(ids)
    return with_images(ids, images, placeholder, around_images(model.config, template.tokenizer))


def question(model: Transformer, template: ChatTemplate, text: str, images: Sequence[PromptImage]) -> Prompt:
    """Return the prompt that asks `text` about pictures. Raise as `conversation_prompt` does."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in images]
    if text:
        content.append({"type": "text", "text": text})
    return conversation_prompt(model, template, [{"role": "user", "content": content}], images)


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | Prompt,
    params: SamplingParams,
    *,
    ignore_eos: bool = False,
    continues_prompt: bool = True,
    skip_special_tokens: bool = True,
    on_shift: Callable[[], None] | None = None,
) -> Iterator[TextChunk]:
    """Continue a prompt (a text, or its ids, with pictures or without); yield the text as it is generated, in chunks of
    whole characters.

    ignore_eos: as `params.ignore_eos`. continues_prompt: whether the prompt and the text are one text, unlike the turns
    of a conversation. skip_special_tokens: leave them out of the text.
    on_shift: called once when the oldest tokens are forgotten (`overflow="shift"`) or cut off (`"truncate"`).
    Raise, before anything is computed, what `encode_prompt` and `Engine.add_request` raise, and later the error of a
    request that fails.
    """
    encoded, text = _encoded(tokenizer, prompt, params)
    params = replace(params, ignore_eos=True) if ignore_eos else params
    detokenizer = Detokenizer(
        tokenizer,
        text,
        params,
        skip_special_tokens=skip_special_tokens,
        prompt_ids=encoded.ids if continues_prompt else (),
    )
    return _chunks(engine, engine.stream(encoded, detokenizer.engine_params), detokenizer, len(encoded), on_shift)


def stream_answer(
    engine: Engine,
    template: ChatTemplate,
    prompt: Prompt,
    params: SamplingParams,
    *,
    on_shift: Callable[[], None] | None = None,
) -> Iterator[TextChunk]:
    """Answer a conversation; yield the answer as `stream` does. It also ends where the template ends an answer.

    prompt: as `conversation_prompt` returns it. The reasoning and the calls of a model that answers in channels are in
    fields of their own, and the text is what is for the user. If `params` has a constraint, it is one of the text, and
    there is no reasoning before it.
    """
    harmony, tokenizer = template.harmony, template.tokenizer
    in_text = harmony is not None and params.constraint is not None
    if harmony is not None and in_text:
        prompt = Prompt([*prompt.ids, *harmony.final_ids(tokenizer)], prompt.images)
    chunks = stream(
        engine,
        tokenizer,
        prompt,
        answering(params, template),
        continues_prompt=False,
        skip_special_tokens=harmony is None,
        on_shift=on_shift,
    )
    return chunks if harmony is None else _in_channels(chunks, in_text)


def _in_channels(chunks: Iterator[TextChunk], in_text: bool) -> Iterator[TextChunk]:
    """Split answers in harmony. in_text: they begin inside their text."""
    parsers: dict[int, HarmonyParser] = {}
    with contextlib.closing(chunks):  # type: ignore[type-var]
        for chunk in chunks:
            parser = parsers.get(chunk.index) or parsers.setdefault(chunk.index, HarmonyParser(in_text=in_text))
            text, reasoning, calls = split(parser, chunk.text, last=chunk.finish_reason is not None)
            yield replace(chunk, text=text, reasoning=reasoning, calls=tuple(calls))


def _encoded(tokenizer: Tokenizer, prompt: str | Sequence[int] | Prompt, params: SamplingParams) -> tuple[Prompt, str]:
    """Return a prompt as ids, and its text as far as a `Detokenizer` needs it."""
    if isinstance(prompt, str):
        return Prompt(encode_prompt(tokenizer, prompt)), prompt
    encoded = as_prompt(prompt)
    return encoded, tokenizer.decode(list(encoded.ids)) if params.echo else ""


def _chunks(
    engine: Engine, events: Generator[Event], detokenizer: Detokenizer, length: int, on_shift: Callable[[], None] | None
) -> Iterator[TextChunk]:
    num_generated: dict[int, int] = {}
    if on_shift is not None and engine.cut(length, detokenizer.params):
        on_shift()
        on_shift = None
    with contextlib.closing(events):
        for event in events:
            num_generated[event.index] = num_generated.get(event.index, 0) + len(event.ids)
            if (
                on_shift is not None
                and detokenizer.params.overflow == "shift"
                and length + num_generated[event.index] > engine.context
            ):
                on_shift()
                on_shift = None
            chunk, stop = detokenizer.push(event)
            if chunk is not None:
                yield chunk
            if stop:
                engine.stop(event.request, event.index)
            if event.result is not None and event.result.error is not None:
                raise event.result.error


def generate_texts(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int] | Prompt],
    params: SamplingParams,
    *,
    continues_prompt: bool = True,
) -> list[list[str]]:
    """Continue many prompts (see `stream`) together; return `params.n` texts for each, without the prompt unless
    `echo`.

    continues_prompt: as for `stream`. Raise the first error of any request.
    """
    detokenizers: dict[int, Detokenizer] = {}
    texts: dict[int, list[str]] = {}
    try:
        for prompt in prompts:
            encoded, text = _encoded(tokenizer, prompt, params)
            detokenizer = Detokenizer(tokenizer, text, params, prompt_ids=encoded.ids if continues_prompt else ())
            number = engine.add_request(encoded, detokenizer.engine_params)
            detokenizers[number], texts[number] = detokenizer, [""] * params.n
        unfinished = set(detokenizers)
        while unfinished:
            for event in engine.step():
                if event.request not in unfinished:
                    continue
                chunk, stop = detokenizers[event.request].push(event)
                if chunk is not None:
                    texts[event.request][event.index] += chunk.text
                if stop:
                    engine.stop(event.request, event.index)
                if event.result is not None:
                    unfinished.discard(event.request)
                    if event.result.error is not None:
                        raise event.result.error
    finally:
        for number in detokenizers:
            engine.abort(number)
    return list(texts.values())


def answering(params: SamplingParams, template: ChatTemplate) -> SamplingParams:
    """Return parameters of a text that also ends where the chat template ends an answer."""
    end_ids = () if params.ignore_eos else template.end_ids()
    return replace(params, stop=(*params.stop, *template.stop), stop_ids=(*params.stop_ids, *end_ids))


def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: str, *, images: Sequence[Path | str | bytes] = (), **params: Any
) -> str:
    """Return the continuation of `prompt` (without the prompt).

    images: pictures (paths, data: URLs or contents of files) for a model that reads them. The prompt is then a question
    about them, written by the chat template, and what is returned is the answer.
    params: fields of `SamplingParams`: max_tokens, temperature, top_k, top_p, min_p, stop, seed, ...
    Others are the model's own defaults (`engine.sampling.model_defaults`), then those of `SamplingParams`.
    By default (`overflow="shift"`), the oldest tokens are forgotten when the context is full.
    For many prompts, create one `Engine` and use `generate_texts`.

    >>> model, tokenizer = gptsmith.load("runs/bard")
    >>> gptsmith.generate(model, tokenizer, "ROMEO:", max_tokens=200, temperature=0.8)
    """
    stop = params.pop("stop", ())
    params["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    try:
        own = model_defaults(model.generation_config).options
        chosen = SamplingParams(**{"overflow": "shift", **own, **params})
    except TypeError as error:
        raise UsageError(f"generate: {str(error).partition(') ')[2] or error}.") from None
    if chosen.n > 1:
        raise UsageError("generate returns one text; for several use generate_texts.")
    engine = engine_for(model, tokenizer, chosen)
    if images:
        from gptsmith.data.images import read_image_part

        template = ChatTemplate(tokenizer)
        pictures = [prepare_image(model, read_image_part(each, base=Path())) for each in images]
        chunks = stream_answer(engine, template, question(model, template, prompt, pictures), chosen)
    else:
        chunks = stream(engine, tokenizer, prompt, chosen)
    return "".join(chunk.text for chunk in chunks)


def engine_for(
    model: Transformer, tokenizer: Tokenizer, params: SamplingParams, speculator: Speculator | None = None
) -> Engine:
    """Return an engine for one prompt at a time, with a cache just large enough for `params`."""
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
