"""`gptsmith generate`: continue a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptsmith.errors import UsageError
from gptsmith.log import note


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model; the text appears as it is made."""

    model: tyro.conf.Positional[str]
    """A run (its best checkpoint), a model directory, a .gguf file, org/name on the hub, or smollm2-135m."""
    prompt: str = "\n"
    """The text to continue; - reads it from standard input."""
    max_tokens: int = 200
    """Most tokens to generate."""
    min_tokens: int = 0
    """Do not stop before this many."""
    temperature: float = 0.8
    """0: always the most probable token. Below 1 safer, above 1 wilder."""
    top_k: int | None = None
    """Choose among the k most probable tokens."""
    top_p: float | None = None
    """Choose among the fewest tokens whose probabilities add up to p."""
    min_p: float | None = None
    """Drop tokens less probable than this share of the most probable one."""
    typical_p: float | None = None
    """Choose among the tokens of most nearly average information that add up to p."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens seen before less likely."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that were generated before."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens that were generated before, for each time."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """Stop before this text; can be given several times."""
    seed: int | None = None
    """The same seed gives the same text."""
    num_samples: int = 1
    """How many continuations."""
    best_of: int | None = None
    """Make this many continuations and keep the --num-samples most probable ones."""
    beams: int = 1
    """Above 1: beam search, with --temperature 0."""
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
    chosen = tyro.cli(Generate, prog="gptsmith generate", args=arguments)
    if chosen.num_samples < 1:
        raise UsageError(f"--num-samples must be at least 1, not {chosen.num_samples}.")

    from gptsmith.engine.sampling import SamplingParams

    params = SamplingParams(
        max_tokens=chosen.max_tokens,
        min_tokens=chosen.min_tokens,
        temperature=chosen.temperature,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        min_p=chosen.min_p,
        typical_p=chosen.typical_p,
        repetition_penalty=chosen.repetition_penalty,
        presence_penalty=chosen.presence_penalty,
        frequency_penalty=chosen.frequency_penalty,
        stop=chosen.stop,
        seed=chosen.seed,
        n=chosen.num_samples,
        best_of=chosen.best_of,
        beams=chosen.beams,
        overflow=chosen.overflow,
        adapter=None if chosen.adapter is None else str(chosen.adapter),
    )
    from gptsmith.checkpoint import load
    from gptsmith.engine.text import engine_for, stream
    from gptsmith.runtime import choose_device

    prompt = _read_input() if chosen.prompt == "-" else chosen.prompt
    model, tokenizer = load(chosen.model, device=choose_device(chosen.device), quantize=chosen.quantize)
    context = model.config.max_position_embeddings

    def on_shift() -> None:
        note(f"note: beyond the context of {context} tokens the oldest are forgotten as the window slides.")

    engine = engine_for(model, tokenizer, params)
    if chosen.adapter is not None:
        engine.add_adapter(str(chosen.adapter), chosen.adapter)
    pieces = stream(engine, tokenizer, prompt, params, on_shift=on_shift)
    if params.n == 1:
        _write(prompt)
        for piece in pieces:
            _write(piece.text)
            if piece.finish_reason == "context":
                note(f"\nnote: the context of {context} tokens is full; --overflow shift goes on beyond it.")
        _write("\n")
        return 0
    texts = [""] * params.n
    for piece in pieces:
        texts[piece.index] += piece.text
    for i, text in enumerate(texts):
        _write(f"{'' if i == 0 else chr(10)}--- sample {i + 1} of {params.n} ---\n{prompt}{text}\n")
    return 0


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
