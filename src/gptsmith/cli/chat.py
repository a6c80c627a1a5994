"""`gptsmith chat`: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from gptsmith.engine.sampling import SamplingOptions, SamplingParams
from gptsmith.errors import GptsmithError, UsageError, nearest
from gptsmith.log import note

if TYPE_CHECKING:
    from gptsmith.engine.engine import Engine
    from gptsmith.tokenizer import Tokenizer

HELP = """\
/system TEXT       what the model is told before the conversation (without TEXT: forget it); begins anew
/reset             begin anew
/temperature X     0: always the most probable token; below 1 safer, above 1 wilder
/save FILE         write the conversation, as JSON that fine-tuning reads
/stats             how fast answers came, and what of the conversation did not have to be read again
/help              this
/quit              leave (Ctrl-D does, too)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""

Overflow = Literal["truncate", "shift", "error"]


@dataclass(frozen=True)
class Chat:
    """Talk to a model. In the conversation /help lists what can be done."""

    model: tyro.conf.Positional[str]
    """A run (its best checkpoint), a model directory, a .gguf file, org/name on the hub, or smollm2-135m."""
    system: str = ""
    """What the model is told before the conversation."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = field(
        default=SamplingOptions(max_tokens=1000, temperature=0.7, top_p=0.95)
    )
    overflow: Overflow = "truncate"
    """When the context is full: leave out the oldest turns and end the answer there, let the answer go on as the window
    shifts, or refuse to go on."""
    prompt_lookup: bool = False
    """Guess several tokens ahead where the text repeats itself: the same text, sooner. Left off where it is slower."""
    draft_model: str | None = None
    """Guess several tokens ahead with a smaller model of the same vocabulary."""
    quantize: Literal["auto", "none", "int8", "int4"] = "auto"
    """int8 or int4: make the weights 8 or 4 bits while loading; they take less memory, and less time where memory is
    what takes time. auto: as they are stored. none: full precision in memory, whatever they are stored in."""
    adapter: Path | None = None
    """A LoRA adapter in PEFT's layout: a directory with adapter_config.json and adapter_model.safetensors."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def main(arguments: list[str]) -> int:
    chosen = tyro.cli(Chat, prog="gptsmith chat", args=arguments)

    adapter = None if chosen.adapter is None else str(chosen.adapter)
    params = SamplingParams.from_options(chosen.sampling, adapter=adapter)
    from gptsmith.cli.generate import speculator
    from gptsmith.engine.engine import Engine
    from gptsmith.loading import load_model
    from gptsmith.runtime import choose_device

    model, tokenizer = load_model(chosen.model, device=choose_device(chosen.device), quantize=chosen.quantize)
    room = 2 * (model.config.max_position_embeddings + 16)  # this conversation, and the one before
    guessing = speculator(tokenizer, chosen.prompt_lookup, chosen.draft_model, chosen.device)
    engine = Engine(model, vocab_size=tokenizer.vocab_size, max_batch=1, cache_tokens=room, speculator=guessing)
    if chosen.adapter is not None:
        engine.add_adapter(str(chosen.adapter), chosen.adapter)
    conversation = Conversation(engine, tokenizer, params, chosen.system, chosen.overflow)
    if conversation.template.plain:
        note("note: this model has no chat template; names are put before what is said. It may not know how to chat.")
    if sys.stdin.isatty():
        note("/help lists what can be done; Ctrl-D leaves.")
    with _line_editing():
        _talk(conversation)
    return 0


class Conversation:
    """What has been said, and how to go on. overflow: what to do when the context is full; see `Chat`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        params: SamplingParams,
        system: str = "",
        overflow: Overflow = "truncate",
    ) -> None:
        from gptsmith.tokenizer.chat import ChatTemplate

        self.engine, self.tokenizer, self.params = engine, tokenizer, params
        self.template = ChatTemplate(tokenizer)
        self.system, self.overflow = system, overflow
        self.turns: list[dict[str, str]] = []
        self.seconds = 0.0
        """That answers took, all together."""

    @property
    def messages(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def answer(self, text: str) -> Iterator[str]:
        """Say something; the answer as it is made. What has been made when it is broken off counts as the answer.

        Where they no longer fit, the oldest turns are left out, with a note (unless `overflow` says otherwise). Raises
        GptsmithError if the model or its template cannot go on; the turn is taken back then.
        """
        from gptsmith.engine.text import stream

        self.turns.append({"role": "user", "content": text})
        made, began = "", time.perf_counter()
        try:
            ids, room = self._fitting()
            shifts = self.overflow == "shift"
            params = replace(
                self.params,
                max_tokens=self.params.max_tokens if shifts else min(self.params.max_tokens, room),
                overflow="shift" if shifts else "error",
                stop=self.template.stop,
                stop_ids=self.template.end_ids(),
            )
            pieces = stream(self.engine, self.tokenizer, ids, params, on_shift=_shifted)
            with contextlib.closing(pieces):  # type: ignore[type-var]
                for piece in pieces:
                    made += piece.text
                    yield piece.text
                    if piece.finish_reason == "length":
                        full = params.max_tokens < self.params.max_tokens
                        note(f"\n({'the context is full: ' if full else ''}ended after {params.max_tokens} tokens)")
        except GptsmithError:
            self.turns.pop()
            raise
        finally:
            self.seconds += time.perf_counter() - began
            if self.turns and self.turns[-1]["role"] == "user":
                self.turns.append({"role": "assistant", "content": made.strip() if self.template.plain else made})

    def _fitting(self) -> tuple[list[int], int]:
        """The ids of as much of the conversation as leaves room for an answer, and the room."""
        context = self.engine.context
        wanted = min(self.params.max_tokens, context // 4)
        turns, dropped = list(self.turns), 0
        while True:
            system = [{"role": "system", "content": self.system}] if self.system else []
            ids = self.template.encode(system + turns)
            if len(ids) + wanted <= context:
                break
            if self.overflow == "error":
                raise UsageError(
                    f"the conversation has {len(ids):,} tokens, and the context of {context:,} must hold an answer, "
                    "too. /reset begins anew; with --overflow truncate the oldest turns are left out."
                )
            if len(turns) <= 1:
                raise UsageError(f"that is too long: {len(ids):,} tokens, and the context has {context:,}.")
            turns, dropped = turns[2:], dropped + 1
        if dropped:
            note(f"(the oldest {dropped} {'turns do' if dropped > 1 else 'turn does'} not fit the context any more)")
        return ids, context - len(ids)

    def told(self) -> str:
        """How it went so far, in a line."""
        stats = self.engine.stats
        told = (
            f"({stats.generated_tokens:,} tokens, {stats.generated_tokens / max(self.seconds, 1e-9):,.1f} tok/s; of "
            f"{stats.prefix_tokens:,} tokens read {stats.prefix_hits:,} were known ({stats.prefix_hit_rate:.0%})"
        )
        if self.engine.speculator is not None:
            told += f"; {stats.accepted:,} of {stats.drafted:,} guesses right ({stats.acceptance_rate:.0%})"
        return told + ")"

    def save(self, path: Path) -> None:
        from gptsmith.storage import write_text

        write_text(path, json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n")


def _shifted() -> None:
    note("\n(the context is full: the answer goes on, and its beginning is forgotten)")


def _talk(conversation: Conversation) -> None:
    while True:
        try:
            line = _read()
        except KeyboardInterrupt:
            note("\n(Ctrl-D or /quit leaves)")
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
    begun = False
    try:
        for text in answer:
            text = text if begun else text.lstrip()
            begun = begun or bool(text)
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
        note("\n(stopped)")
    print(flush=True)


def _command(conversation: Conversation, line: str) -> bool:
    """Obey; False to leave."""
    name, _, value = line[1:].partition(" ")
    value = value.strip()
    if name in ("quit", "exit"):
        return False
    if name == "help":
        note(HELP)
    elif name == "stats":
        note(conversation.told())
    elif name == "reset":
        conversation.turns.clear()
        note("(a new conversation)")
    elif name == "system":
        conversation.system = value
        conversation.turns.clear()
        note(f"(a new conversation, {'with' if value else 'without'} a system prompt)")
    elif name == "temperature":
        try:
            conversation.params = replace(conversation.params, temperature=float(value))
        except ValueError:
            raise UsageError(f"/temperature needs a number, not {value!r}.") from None
        note(f"(temperature {conversation.params.temperature:g})")
    elif name == "save":
        if not value:
            raise UsageError("/save needs a file to write to.")
        conversation.save(Path(value).expanduser())
        note(f"(saved to {value})")
    else:
        names = ("system", "reset", "temperature", "save", "stats", "help", "quit")
        raise UsageError(f"there is no /{name}.{nearest(name, names)} /help lists what there is.")
    return True


def _read() -> str:
    """A line, and those it goes on in. Raises EOFError at the end."""
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
    """Arrow keys, and what was typed in earlier conversations, at a terminal that has `readline`."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # Windows has its own
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
            os.chmod(path, 0o600)  # it is nobody else's business
