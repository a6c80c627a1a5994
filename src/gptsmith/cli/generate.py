"""`gptsmith generate`: continue a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated

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
    temperature: float = 0.8
    """0: always the most probable token. Below 1 safer, above 1 wilder."""
    top_k: int | None = None
    """Choose among the k most probable tokens."""
    top_p: float | None = None
    """Choose among the fewest tokens whose probabilities add up to p."""
    min_p: float | None = None
    """Drop tokens less probable than this share of the most probable one."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens seen before less likely."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """Stop before this text; can be given several times."""
    seed: int | None = None
    """The same seed gives the same text."""
    num_samples: int = 1
    """How many continuations."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def main(arguments: list[str]) -> int:
    chosen = tyro.cli(Generate, prog="gptsmith generate", args=arguments)
    if chosen.num_samples < 1:
        raise UsageError(f"--num-samples must be at least 1, not {chosen.num_samples}.")

    from gptsmith.engine.sampling import SamplingParams

    params = SamplingParams(
        max_tokens=chosen.max_tokens,
        temperature=chosen.temperature,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        min_p=chosen.min_p,
        repetition_penalty=chosen.repetition_penalty,
        stop=chosen.stop,
        seed=chosen.seed,
    )
    from gptsmith.checkpoint import load
    from gptsmith.engine.generate import stream
    from gptsmith.runtime import choose_device

    prompt = _read_input() if chosen.prompt == "-" else chosen.prompt
    model, tokenizer = load(chosen.model, device=choose_device(chosen.device))

    def on_slide() -> None:
        context = model.config.max_position_embeddings
        note(f"note: beyond the context of {context} tokens the oldest are forgotten as the window slides.")

    pieces = stream(model, tokenizer, prompt, params, num_samples=chosen.num_samples, on_slide=on_slide)
    if chosen.num_samples == 1:
        _write(prompt)
        for _, piece in pieces:
            _write(piece)
        _write("\n")
        return 0
    texts = [""] * chosen.num_samples
    for sample, piece in pieces:
        texts[sample] += piece
    for i, text in enumerate(texts):
        _write(f"{'' if i == 0 else chr(10)}--- sample {i + 1} of {chosen.num_samples} ---\n{prompt}{text}\n")
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
