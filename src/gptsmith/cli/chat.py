"""`gptsmith chat`: talk to a model in the terminal."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gptsmith.cli.parser import parse
from gptsmith.engine.sampling import SamplingOptions, SamplingParams, model_defaults
from gptsmith.errors import GptsmithError, UsageError, nearest
from gptsmith.log import Aside, note

if TYPE_CHECKING:
    from gptsmith.engine.engine import Engine
    from gptsmith.engine.prompt import Prompt, PromptImage
    from gptsmith.engine.text import TextChunk
    from gptsmith.tokenizer import Tokenizer

HELP = """\
/system TEXT       set the system prompt (without TEXT: remove it) and start over
/image FILE        show a picture with the next message, to a model that reads pictures
/reset             start over
/temperature X     0: always take the most probable token; below 1 safer, above 1 more varied
/save FILE         save the conversation as JSON: {"messages": [...]}
/stats             show speed and cached prompt tokens
/help              show this help
/quit              exit (so does Ctrl-D)
Ctrl-C stops an answer. End a line with \\ to continue on the next."""

Overflow = Literal["truncate", "shift", "error"]
DEFAULT_SAMPLING = SamplingOptions(max_tokens=1000, temperature=0.7, top_p=0.95)
"""Where the model has no defaults of its own."""


@dataclass(frozen=True)
class Chat:
    """Talk to a model. Type /help in the conversation for its commands."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run (its best checkpoint), a model directory, a .gguf file, ORG/NAME on the hub, or smollm2-135m."""
    system: str = ""
    """System prompt (default: none)."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = field(default=DEFAULT_SAMPLING)
    """sampling"""
    overflow: Overflow = "truncate"
    """What to do when the context is full. truncate: drop the oldest turns, and end the answer when it is full again.
    shift: drop the oldest turns, and forget the oldest tokens as the answer grows. error: refuse to continue."""
    prompt_lookup: bool = False
    """Speculative decoding: draft tokens by looking up repetitions in the text. Same output; paused while it
    does not pay off."""
    draft_model: str | None = None
    """Speculative decoding: draft tokens with this smaller model, which needs the same tokenizer."""
    quantize: Literal["auto", "none", "int8", "int4"] = "auto"
    """int8, int4: quantize the weights to 8 or 4 bits while loading. auto: as stored. none: full precision."""
    adapter: Path | None = None
    """LoRA adapter: a run that trained one, or a directory in PEFT format (adapter_config.json and
    adapter_model.safetensors)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def main(arguments: list[str]) -> int:
    chosen = parse(Chat, "gptsmith chat", arguments)
    SamplingParams.from_options(chosen.sampling)  # raises for bad options before the model is loaded
    from gptsmith.cli.generate import make_speculator
    from gptsmith.engine.engine import Engine
    from gptsmith.loading import load_model, resolve_adapter
    from gptsmith.runtime import choose_device

    model, tokenizer = load_model(chosen.model, device=choose_device(chosen.device), quantize=chosen.quantize)
    defaults = model_defaults(model.generation_config)
    names = [each.name for each in fields(SamplingOptions)]
    own = replace(DEFAULT_SAMPLING, **{name: x for name, x in defaults.options.items() if name in names})
    chosen = parse(Chat, "gptsmith chat", arguments, default=Chat(model="", sampling=own))
    if (text := defaults.describe(DEFAULT_SAMPLING, chosen.sampling)) is not None:
        note(f"note: {text}")
    adapter = None if chosen.adapter is None else str(chosen.adapter)
    others = {name: x for name, x in defaults.options.items() if name not in names}
    params = SamplingParams.from_options(chosen.sampling, adapter=adapter, **others)
    cache_tokens = 2 * (model.config.max_position_embeddings + 16)  # for this conversation and the previous one
    spec = make_speculator(tokenizer, chosen.prompt_lookup, chosen.draft_model, chosen.device)
    engine = Engine(model, vocab_size=tokenizer.vocab_size, max_batch=1, cache_tokens=cache_tokens, speculator=spec)
    if chosen.adapter is not None:
        engine.add_adapter(str(chosen.adapter), resolve_adapter(chosen.adapter))
    conversation = Conversation(engine, tokenizer, params, chosen.system, chosen.overflow)
    if conversation.template.plain:
        form = "is prefixed with the speaker's name" if conversation.template.names_speakers else "is a line of text"
        note(f"note: no chat template; each turn {form}. Answers may be poor.")
    if sys.stdin.isatty():
        note("/help lists the commands; Ctrl-D exits.")
    with _line_editing():
        _talk(conversation)
    return 0


class Conversation:
    """A conversation with a model. overflow: what to do when the context is full; see `Chat`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        params: SamplingParams,
        system: str = "",
        overflow: Overflow = "truncate",
    ) -> None:
        from gptsmith.tokenizer.chat import ChatTemplate

        self.engine, self.params = engine, params
        self.template = ChatTemplate(tokenizer)
        self.system, self.overflow = system, overflow
        self.turns: list[dict[str, Any]] = []
        self.pictures: dict[str, PromptImage] = {}
        """The pictures of the conversation, by their data: URLs."""
        self.next_pictures: list[str] = []
        """Those that the next message shows."""
        self.seconds = 0.0
        """Total time of all answers."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def reset(self) -> None:
        """Start over."""
        self.turns.clear()
        self.pictures.clear()
        self.next_pictures.clear()

    def show(self, path: Path) -> str:
        """Show a picture with the next message. Return its size for a note.

        Raise UsageError for a model that reads text only, and for a file that cannot be read.
        """
        from gptsmith.data.images import ImageError, decode_image, image_bytes, media_type
        from gptsmith.engine.text import prepare_image

        try:
            data = image_bytes(path, base=Path())
            image = decode_image(data)
        except ImageError as error:
            raise UsageError(f"/image {path}: {error}") from None
        picture = prepare_image(self.engine.model, image)
        url = f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"
        self.pictures[url] = picture
        self.next_pictures.append(url)
        return f"{image.width}×{image.height}, {picture.tokens} tokens"

    def answer(self, text: str) -> Iterator[TextChunk]:
        """Add a turn of the user and yield the answer as it is generated. An interrupted answer is kept as it is.

        What the conversation goes on with is the text of the answer, without the reasoning of a model that answers in
        channels.

        The oldest turns are dropped, with a note, if they no longer fit, unless `overflow` is "error". Raise
        GptsmithError, and remove the turn, if the model or its template cannot continue.
        """
        from gptsmith.engine.text import stream_answer

        shown, self.next_pictures = self.next_pictures, []
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in shown]
        self.turns.append({"role": "user", "content": [*parts, {"type": "text", "text": text}] if shown else text})
        generated, began = "", time.perf_counter()
        try:
            prompt, room = self._fitting()
            shifts = self.overflow == "shift"
            params = replace(
                self.params,
                max_tokens=self.params.max_tokens if shifts else min(self.params.max_tokens, room),
                overflow="shift" if shifts else "error",
            )
            chunks = stream_answer(self.engine, self.template, prompt, params, on_shift=_shifted)
            with contextlib.closing(chunks):  # type: ignore[type-var]
                for chunk in chunks:
                    generated += chunk.text
                    yield chunk
                    if chunk.finish_reason == "length":
                        full = params.max_tokens < self.params.max_tokens
                        limit = "the context is full" if full else "length limit"
                        note(f"\n(stopped after {params.max_tokens} tokens: {limit})")
        except GptsmithError:
            self.turns.pop()
            self.next_pictures = shown
            raise
        finally:
            self.seconds += time.perf_counter() - began
            if self.turns and self.turns[-1]["role"] == "user":
                self.turns.append(
                    {"role": "assistant", "content": generated.strip() if self.template.plain else generated}
                )

    def _encode(self, messages: list[dict[str, Any]]) -> Prompt:
        from gptsmith.engine.text import conversation_prompt

        images: list[PromptImage] = []
        written: list[dict[str, Any]] = []
        for message in messages:
            content = message["content"]
            if isinstance(content, list):
                urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
                images += [self.pictures[url] for url in urls]
                content = [{"type": "image"} if part["type"] == "image_url" else part for part in content]
            written.append({**message, "content": content})
        return conversation_prompt(self.engine.model, self.template, written, images)

    def _fitting(self) -> tuple[Prompt, int]:
        """Return the prompt, without the oldest turns that do not fit, and the room for an answer."""
        context = self.engine.context
        wanted = min(self.params.max_tokens, context // 4)
        turns, dropped = list(self.turns), 0
        while True:
            system = [{"role": "system", "content": self.system}] if self.system else []
            prompt = self._encode(system + turns)
            if len(prompt) + wanted <= context:
                break
            if self.overflow == "error":
                raise UsageError(
                    f"the conversation has {len(prompt):,} tokens, which leaves no room for an answer in the context "
                    f"of {context:,}. Use /reset to start over, or --overflow truncate to drop the oldest turns."
                )
            if len(turns) <= 1:
                raise UsageError(f"the message is too long: {len(prompt):,} tokens for a context of {context:,}.")
            turns, dropped = turns[2:], dropped + 1
        if dropped:
            turns_were = f"{dropped} turns were" if dropped > 1 else "turn was"
            note(f"(the oldest {turns_were} dropped: the context is full)")
        return prompt, context - len(prompt)

    def stats_line(self) -> str:
        """Return speed and cache use so far in a line."""
        stats = self.engine.stats
        line = (
            f"{stats.generated_tokens:,} tokens, {stats.generated_tokens / max(self.seconds, 1e-9):,.1f} tok/s; "
            f"{stats.prefix_hits:,} of {stats.prefix_tokens:,} prompt tokens cached ({stats.prefix_hit_rate:.0%})"
        )
        if self.engine.speculator is not None:
            line += f"; {stats.accepted:,} of {stats.drafted:,} draft tokens accepted ({stats.acceptance_rate:.0%})"
        return f"({line})"

    def save(self, path: Path) -> None:
        from gptsmith.storage import write_text

        write_text(path, json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n")


def _shifted() -> None:
    note("\n(the context is full: the answer continues, the oldest tokens are forgotten)")


def _talk(conversation: Conversation) -> None:
    while True:
        try:
            line = _read()
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /quit exits)")
            continue
        except EOFError:
            if sys.stdin.isatty():
                print()
            return
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if not _command(conversation, line):
                    return
            else:
                _speak(conversation, line)
        except GptsmithError as error:
            note(f"error: {error}")


def _speak(conversation: Conversation, line: str) -> None:
    answer = conversation.answer(line)
    thinking, started = Aside("thinking"), False
    calls: list[str] = []
    try:
        for chunk in answer:
            thinking.write(chunk.reasoning)
            text = chunk.text if started else chunk.text.lstrip()
            if text:
                thinking.end()
                started = True
                sys.stdout.write(text)
                sys.stdout.flush()
            for delta in chunk.calls:
                if delta.name is not None:
                    calls.append(f"{delta.name} ")
                calls[-1] += delta.arguments
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
        note("\n(stopped)")
    thinking.end()
    print(flush=True)
    for call in calls:
        note(f"(the model calls a function, and there is none here: {call})")


def _command(conversation: Conversation, line: str) -> bool:
    """Run a command of the conversation. Return whether the conversation continues."""
    name, _, value = line[1:].partition(" ")
    value = value.strip()
    if name in ("quit", "exit"):
        return False
    if name == "help":
        note(HELP)
    elif name == "stats":
        note(conversation.stats_line())
    elif name == "reset":
        conversation.reset()
        note("(new conversation)")
    elif name == "image":
        if not value:
            raise UsageError("/image needs the name of a file.")
        size = conversation.show(Path(value).expanduser())
        note(f"(the next message shows {value}: {size})")
    elif name == "system":
        conversation.system = value
        conversation.reset()
        note(f"(new conversation, {'with' if value else 'without'} a system prompt)")
    elif name == "temperature":
        try:
            conversation.params = replace(conversation.params, temperature=float(value))
        except ValueError:
            raise UsageError(f"/temperature needs a number, not {value!r}.") from None
        note(f"(temperature {conversation.params.temperature:g})")
    elif name == "save":
        if not value:
            raise UsageError("/save needs the name of a file.")
        try:
            conversation.save(Path(value).expanduser())
        except OSError as error:
            raise UsageError(f"cannot write {value}: {error.strerror or error}.") from None
        note(f"(saved to {value})")
    else:
        names = ("system", "image", "reset", "temperature", "save", "stats", "help", "quit")
        raise UsageError(f"unknown command /{name}.{nearest(name, names)} /help lists the commands.")
    return True


def _read() -> str:
    """Read a line, joined with the next one while it ends in a backslash. Raise EOFError at the end of the input."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        line = input(prompt)
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input("  " if prompt else "")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not {sys.stdin.encoding} text: {error.reason}.") from None
    return line


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Edit lines with arrow keys and recall earlier ones, at a terminal, where `readline` exists."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # on Windows, the console edits lines
        yield
        return
    from gptsmith.runtime import cache_directory

    path = cache_directory() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)
            os.chmod(path, 0o600)  # for the user's eyes only
