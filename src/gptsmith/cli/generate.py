"""`gptsmith generate`: continue a prompt."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptsmith.cli.parser import parse
from gptsmith.distributed.context import ALONE, DistributedContext, environment_world_size, join_processes
from gptsmith.distributed.layout import Layout
from gptsmith.engine.sampling import INT32_MAX, GenerationOptions, SamplingParams, model_defaults
from gptsmith.errors import TokenizerError, UsageError
from gptsmith.log import Aside, duration, note

if TYPE_CHECKING:
    from gptsmith.data.images import DecodedImage
    from gptsmith.engine.engine import Engine
    from gptsmith.engine.sampling import Constraint
    from gptsmith.engine.speculative import Speculator
    from gptsmith.engine.text import TextChunk
    from gptsmith.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model. The text appears as it is generated."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run (its best checkpoint), a model directory, a .gguf file, ORG/NAME on the hub, or smollm2-135m."""
    prompt: str = "\n"
    """Text to continue; - reads it from standard input."""
    image: tuple[Path, ...] = field(default=())
    """Picture (PNG, JPEG, WebP, or the first frame of a GIF) to show to a model that reads pictures. The prompt is then
    a question about it, written by the chat template, and the output is the answer."""
    sampling: tyro.conf.OmitArgPrefixes[GenerationOptions] = field(default=GenerationOptions())
    """sampling"""
    num_samples: int = 1
    """Number of continuations."""
    json_schema: Path | None = None
    """Restrict the output to JSON that matches the schema in this file ({} allows any JSON)."""
    regex: str | None = None
    """Restrict the output to text that this regular expression matches as a whole."""
    choice: tuple[str, ...] = field(default=())
    """Restrict the output to one of these texts."""
    grammar: Path | None = None
    """Restrict the output to the grammar in this file (Lark or GBNF)."""
    prompt_lookup: bool = False
    """Speculative decoding: draft tokens by looking up repetitions in the text. Same output; paused while it
    does not pay off."""
    draft_model: str | None = None
    """Speculative decoding: draft tokens with this smaller model, which needs the same tokenizer."""
    stats: bool = False
    """Report speed, cached prompt tokens and accepted draft tokens at the end."""
    overflow: Literal["shift", "truncate", "error"] = "shift"
    """What to do when the context is full. shift: forget the oldest tokens and continue. truncate: cut off the start of
    the prompt so that the output fits. error: refuse a prompt that does not fit, and stop at the limit."""
    quantize: Literal["auto", "none", "int8", "int4"] = "auto"
    """int8, int4: quantize the weights to 8 or 4 bits while loading. auto: as stored. none: full precision."""
    adapter: Path | None = None
    """LoRA adapter: a run that trained one, or a directory in PEFT format (adapter_config.json and
    adapter_model.safetensors)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    parallel: str | None = None
    """tp=N: N processes, which torchrun has started, share each layer of a model that is too large for one."""


def main(arguments: list[str]) -> int:
    chosen = parse(Generate, "gptsmith generate", arguments)
    if chosen.parallel is None:
        return _generate(chosen, arguments, ALONE, Layout())
    layout = Layout.parse(chosen.parallel, environment_world_size() or 1)
    if layout.tp != layout.size:
        raise UsageError(f"--parallel {chosen.parallel}: text is generated with tp alone, as in tp={layout.size}.")
    with join_processes() as ranks:
        return _generate(chosen, arguments, ranks, layout)


def _generate(chosen: Generate, arguments: list[str], ranks: DistributedContext, layout: Layout) -> int:
    if not 1 <= chosen.num_samples <= INT32_MAX:
        raise UsageError(f"--num-samples must be at least 1 and at most {INT32_MAX:,}, not {chosen.num_samples}.")

    if sum(map(bool, (chosen.json_schema, chosen.regex is not None, chosen.choice, chosen.grammar))) > 1:
        raise UsageError("--json-schema, --regex, --choice and --grammar exclude each other. Use one of them.")
    _params(chosen)  # raises for bad options before the model is loaded
    import torch

    from gptsmith.engine.text import engine_for, prepare_image, question, stream, stream_answer
    from gptsmith.loading import load_model, resolve_adapter
    from gptsmith.runtime import choose_device
    from gptsmith.tokenizer.chat import ChatTemplate

    pictures = [read_picture(path, "--image ") for path in chosen.image]
    prompt = ranks.on_main(_read_input) if chosen.prompt == "-" else chosen.prompt
    device = ranks.device(choose_device(chosen.device))
    whole_on = torch.device("cpu") if layout.divides_model else device  # each process then moves its part
    model, tokenizer = load_model(chosen.model, device=whole_on, quantize=chosen.quantize)
    if layout.divides_model:
        from gptsmith.distributed.parallel import parallelize

        if chosen.adapter is not None:
            raise UsageError("--adapter with --parallel: fold the adapter into the model first: gptsmith merge.")
        layout.check(model.config)
        ranks.arrange(layout, device)
        parallelize(model, ranks.mesh, layout)
    context = model.config.max_position_embeddings
    if prompt == Generate.prompt and not _knows(tokenizer, prompt):  # its text has no line end
        prompt = ""

    defaults = model_defaults(model.generation_config)
    own = Generate(model="", sampling=replace(GenerationOptions(), **defaults.options))
    chosen = parse(Generate, "gptsmith generate", arguments, default=own)
    if (text := defaults.describe(GenerationOptions(), chosen.sampling)) is not None:
        note(f"note: {text}")
    params = replace(_params(chosen), constraint=_constraint(chosen, tokenizer))
    if layout.divides_model:  # all processes draw the same tokens
        params = replace(params, seed=ranks.broadcast(secrets.randbits(48) if params.seed is None else params.seed))
    write = _write if ranks.is_main else _ignore
    spec = make_speculator(tokenizer, chosen.prompt_lookup, chosen.draft_model, chosen.device)
    engine = engine_for(model, tokenizer, params, spec)
    if chosen.adapter is not None:
        engine.add_adapter(str(chosen.adapter), resolve_adapter(chosen.adapter))

    def on_shift() -> None:
        if params.overflow == "shift":
            note(f"note: the context of {context} tokens is full; the oldest tokens are forgotten as the text grows.")
        else:
            note(f"note: the beginning of the prompt was cut off to fit the context of {context} tokens.")

    if pictures:
        template = ChatTemplate(tokenizer)
        text = "" if prompt == Generate.prompt else prompt
        asked = question(model, template, text, [prepare_image(model, picture) for picture in pictures])
        chunks = stream_answer(engine, template, asked, params, on_shift=on_shift)
        prompt = ""
    else:
        chunks = stream(engine, tokenizer, prompt, params, on_shift=on_shift)
    reasons, first, seconds = _write_samples(chunks, prompt, params.n, write)
    if "context" in reasons:
        note(f"note: the context of {context} tokens is full. To continue beyond it, use --overflow shift.")
    if params.constraint is not None and not {"length", "context"}.isdisjoint(reasons):
        note("note: the output is incomplete: it reached the length limit. Raise --max-tokens.")
    if chosen.stats:
        note(_stats_line(engine, first, seconds))
    return 0


def _write_samples(
    chunks: Iterable[TextChunk], prompt: str, count: int, write: Callable[[str], None]
) -> tuple[list[str], float, float]:
    """Write the samples of a prompt: one as it is generated, several once all are complete. Reasoning goes before a
    sample, to standard error.

    Returns why each of them ended, and the seconds until the first token and until the end.
    """
    began, first = time.perf_counter(), 0.0
    texts, thoughts, reasons = [""] * count, [""] * count, [""] * count
    thinking = Aside("thinking")
    if count == 1:
        write(prompt)
    for chunk in chunks:
        first = first or time.perf_counter() - began
        texts[chunk.index] += chunk.text
        thoughts[chunk.index] += chunk.reasoning
        reasons[chunk.index] = chunk.finish_reason or ""
        if count == 1:
            thinking.write(chunk.reasoning)
            if chunk.text:
                thinking.end()
                write(chunk.text)
    seconds = time.perf_counter() - began
    if count == 1:
        thinking.end()
        write("\n")
    for i, text in enumerate(texts if count > 1 else ()):
        write(f"{'' if i == 0 else chr(10)}--- sample {i + 1} of {count} ---\n")
        thinking.write(thoughts[i])
        thinking.end()
        write(f"{prompt}{text}\n")
    return reasons, first, seconds


def read_picture(path: Path, option: str) -> DecodedImage:
    """Decode a picture file. Raise UsageError that begins with `option`."""
    from gptsmith.data.images import ImageError, read_image_part

    try:
        return read_image_part(path.expanduser(), base=Path())
    except ImageError as error:
        raise UsageError(f"{option}{path}: {error}") from None


def _params(chosen: Generate) -> SamplingParams:
    return SamplingParams.from_options(
        chosen.sampling,
        n=chosen.num_samples,
        overflow=chosen.overflow,
        adapter=None if chosen.adapter is None else str(chosen.adapter),
    )


def make_speculator(
    tokenizer: Tokenizer, prompt_lookup: bool, draft_model: str | None, device: str
) -> Speculator | None:
    """Return what drafts tokens for speculative decoding; None if neither option is set.

    Raise UsageError if both are set, or if the draft model has another vocabulary.
    """
    if not prompt_lookup and draft_model is None:
        return None
    if prompt_lookup and draft_model is not None:
        raise UsageError("--prompt-lookup and --draft-model exclude each other. Use one of them.")
    from gptsmith.engine.draft_model import DraftModel
    from gptsmith.engine.speculative import PromptLookup, Speculator
    from gptsmith.loading import load_model
    from gptsmith.runtime import choose_device

    if draft_model is None:
        return Speculator(PromptLookup())
    model, draft_tokenizer = load_model(draft_model, device=choose_device(device))
    same = draft_tokenizer.vocab_size == tokenizer.vocab_size and all(
        draft_tokenizer.token_bytes(id) == tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)
    )
    if not same:
        raise UsageError(f"--draft-model {draft_model} has another vocabulary than the model. Use one with the same.")
    return Speculator(DraftModel(model, vocab_size=tokenizer.vocab_size))


def _constraint(chosen: Generate, tokenizer: Tokenizer) -> Constraint | None:
    from gptsmith.engine import grammar

    def read(path: Path, option: str) -> str:
        try:
            return path.read_text(encoding="utf-8-sig")
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


def _stats_line(engine: Engine, first: float, seconds: float) -> str:
    """Return speed and cache use in a line. first, seconds: the time until the first text, and the total time."""
    stats = engine.stats
    speed = stats.generated_tokens / max(seconds, 1e-9)
    line = (
        f"{stats.generated_tokens:,} tokens in {duration(seconds)}, {speed:,.1f} tok/s; first after {first:.2f} s; "
        f"{stats.prefix_hits:,} of {stats.prompt_tokens:,} prompt tokens cached"
    )
    if engine.speculator is not None:
        line += f"; {stats.accepted:,} of {stats.drafted:,} draft tokens accepted ({stats.acceptance_rate:.0%})"
    return line


def _read_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not {sys.stdin.encoding} text: {error.reason} at byte {error.start}."
        ) from None


def _knows(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return bool(tokenizer.encode(text))
    except TokenizerError:
        return False


def _ignore(text: str) -> None:
    """Write nothing: another process does."""


def _write(text: str) -> None:
    """Write to standard output without buffering."""
    sys.stdout.write(text)
    sys.stdout.flush()
