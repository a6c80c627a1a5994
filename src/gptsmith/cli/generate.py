"""`gptsmith generate`: continue a prompt."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from gptsmith.engine.sampling import GenerationOptions, SamplingParams
from gptsmith.errors import UsageError
from gptsmith.log import duration, note

if TYPE_CHECKING:
    from gptsmith.engine.engine import Engine
    from gptsmith.engine.sampling import Constraint
    from gptsmith.engine.speculative import Speculator
    from gptsmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model; the text appears as it is made."""

    model: tyro.conf.Positional[str]
    """A run (its best checkpoint), a model directory, a .gguf file, org/name on the hub, or smollm2-135m."""
    prompt: str = "\n"
    """The text to continue; - reads it from standard input."""
    sampling: tyro.conf.OmitArgPrefixes[GenerationOptions] = field(default=GenerationOptions())
    num_samples: int = 1
    """How many continuations."""
    json_schema: Path | None = None
    """The text is JSON that the schema in this file describes ({}: any)."""
    regex: str | None = None
    """The text is matched by this regular expression."""
    choice: tuple[str, ...] = field(default=())
    """The text is this; given several times, one of them."""
    grammar: Path | None = None
    """The text follows the grammar in this file, in Lark or GBNF."""
    prompt_lookup: bool = False
    """Guess several tokens ahead where the text repeats itself: the same text, sooner. Left off where it is slower."""
    draft_model: str | None = None
    """Guess several tokens ahead with a smaller model of the same vocabulary."""
    stats: bool = False
    """Say at the end how fast it went, what of the prompt was known and how many guesses were right."""
    overflow: Literal["shift", "truncate", "error"] = "shift"
    """Beyond the context: forget the oldest tokens as the window shifts, cut the prompt's beginning off, or refuse."""
    quantize: Literal["auto", "none", "int8", "int4"] = "auto"
    """int8 or int4: make the weights 8 or 4 bits while loading; they take less memory, and less time where memory is
    what takes time. auto: as they are stored. none: full precision in memory, whatever they are stored in."""
    adapter: Path | None = None
    """A LoRA adapter in PEFT's layout: a directory with adapter_config.json and adapter_model.safetensors."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def main(arguments: list[str]) -> int:
    chosen = tyro.cli(Generate, prog="gptsmith generate", args=arguments, config=(tyro.conf.UseAppendAction,))
    if chosen.num_samples < 1:
        raise UsageError(f"--num-samples must be at least 1, not {chosen.num_samples}.")

    if sum(map(bool, (chosen.json_schema, chosen.regex is not None, chosen.choice, chosen.grammar))) > 1:
        raise UsageError("give one of --json-schema, --regex, --choice and --grammar.")
    params = SamplingParams.from_options(
        chosen.sampling,
        n=chosen.num_samples,
        overflow=chosen.overflow,
        adapter=None if chosen.adapter is None else str(chosen.adapter),
    )
    from gptsmith.engine.text import engine_for, stream
    from gptsmith.loading import load_model
    from gptsmith.runtime import choose_device

    prompt = _read_input() if chosen.prompt == "-" else chosen.prompt
    model, tokenizer = load_model(chosen.model, device=choose_device(chosen.device), quantize=chosen.quantize)
    context = model.config.max_position_embeddings

    params = replace(params, constraint=_constraint(chosen, tokenizer))
    guessing = speculator(tokenizer, chosen.prompt_lookup, chosen.draft_model, chosen.device)
    engine = engine_for(model, tokenizer, params, guessing)
    if chosen.adapter is not None:
        engine.add_adapter(str(chosen.adapter), chosen.adapter)

    def on_shift() -> None:
        if params.overflow == "shift":
            note(f"note: beyond the context of {context} tokens the oldest are forgotten as the window slides.")
        else:
            note(f"note: the prompt's beginning is cut off to fit the context of {context} tokens.")

    began, first = time.perf_counter(), 0.0
    pieces = stream(engine, tokenizer, prompt, params, on_shift=on_shift)
    texts, reasons = [""] * params.n, [""] * params.n
    if params.n == 1:
        _write(prompt)
    for piece in pieces:
        first = first or time.perf_counter() - began
        texts[piece.index] += piece.text
        reasons[piece.index] = piece.finish_reason or ""
        if params.n == 1:
            _write(piece.text)
    seconds = time.perf_counter() - began
    if params.n == 1:
        _write("\n")
    for i, text in enumerate(texts if params.n > 1 else ()):
        _write(f"{'' if i == 0 else chr(10)}--- sample {i + 1} of {params.n} ---\n{prompt}{text}\n")
    if "context" in reasons:
        note(f"note: the context of {context} tokens is full; --overflow shift goes on beyond it.")
    if params.constraint is not None and not {"length", "context"}.isdisjoint(reasons):
        note("note: the text ended before it was complete; --max-tokens is how long it may become.")
    if chosen.stats:
        note(_told(engine, first, seconds))
    return 0


def speculator(tokenizer: Tokenizer, prompt_lookup: bool, draft_model: str | None, device: str) -> Speculator | None:
    """What guesses ahead, if anything is to. Raises UsageError for options that contradict each other or a draft model
    of another vocabulary."""
    if not prompt_lookup and draft_model is None:
        return None
    if prompt_lookup and draft_model is not None:
        raise UsageError("give --prompt-lookup or --draft-model, not both.")
    from gptsmith.engine.draft_model import DraftModel
    from gptsmith.engine.speculative import PromptLookup, Speculator
    from gptsmith.loading import load_model
    from gptsmith.runtime import choose_device

    if draft_model is None:
        return Speculator(PromptLookup())
    model, its = load_model(draft_model, device=choose_device(device))
    same = its.vocab_size == tokenizer.vocab_size and all(
        its.token_bytes(id) == tokenizer.token_bytes(id) for id in range(its.vocab_size)
    )
    if not same:
        raise UsageError(f"--draft-model {draft_model} has other tokens than the model; it must have the same.")
    return Speculator(DraftModel(model, vocab_size=its.vocab_size))


def _constraint(chosen: Generate, tokenizer: Tokenizer) -> Constraint | None:
    from gptsmith.engine import grammar

    def read(path: Path, option: str) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{option} {path} cannot be read: {error}.") from None

    if chosen.json_schema is not None:
        return grammar.json_schema(tokenizer, read(chosen.json_schema, "--json-schema"))
    if chosen.regex is not None:
        return grammar.regex(tokenizer, chosen.regex)
    if chosen.choice:
        return grammar.choices(tokenizer, chosen.choice)
    if chosen.grammar is not None:
        return grammar.grammar(tokenizer, read(chosen.grammar, "--grammar"))
    return None


def _told(engine: Engine, first: float, seconds: float) -> str:
    """How it went, in a line. first, seconds: until the first text and in all."""
    stats = engine.stats
    told = (
        f"{stats.generated_tokens:,} tokens in {duration(seconds)}, {stats.generated_tokens / max(seconds, 1e-9):,.1f} "
        f"tok/s; the first after {first:.2f} s; {stats.prefix_hits:,} of {stats.prompt_tokens:,} prompt tokens known"
    )
    if engine.speculator is not None:
        told += f"; {stats.accepted:,} of {stats.drafted:,} guesses right ({stats.acceptance_rate:.0%})"
    return told


def _read_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not {sys.stdin.encoding} text: {error.reason} at byte {error.start}."
        ) from None


def _write(text: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
