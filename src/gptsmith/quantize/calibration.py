"""What the matrices of a model multiply on a calibration text.

    ids = calibration_ids(model, tokenizer, Path("text.txt"))     # or None: the built-in mixture
    importance = mean_squared_inputs(model, ids)                  # (K,) by name of a matrix

A matrix is named as in `model.quantized.replace_matrices`: a parameter's name, and for experts that of their stack with
a number, like `layers.0.mlp.up_proj.3`.

Axis letters: N sequences · T tokens of each · K columns (inputs) of a matrix · R rows (outputs).
"""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptsmith.errors import TokenizerError, UsageError
from gptsmith.log import note, progress
from gptsmith.model.cache import KVCache
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer

TOKENS = 16384  # of the calibration text, if there are as many
SEQUENCE = 512  # tokens of a sequence, or the context if that is shorter
LEAST = 1024  # tokens; of fewer, the inputs say little about those of other texts
_MAX_UNKNOWN = 0.1  # the share of a text that may become unknown tokens
_MODULES = ("argparse", "calendar", "difflib", "heapq", "inspect", "pathlib", "statistics", "tarfile", "textwrap")


def matrices_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights (R, K) that inputs are multiplied by, by name; experts one by one. They share memory."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[f"{path}.weight" if path else "weight"] = module.weight.detach()
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:  # a stack of experts
                    stack = f"{path}.{name}" if path else name
                    found |= {f"{stack}.{e}": weight for e, weight in enumerate(parameter.detach())}
    return found


class ObservedInputs(TorchFunctionMode):
    """A context in which `seen(name, inputs)` is called with the inputs (n, K) of each product with a matrix, and after
    it `multiplied(name, outputs)`.

    matrices: as from `matrices_of`. They must stay where they are in memory.
    """

    def __init__(
        self,
        matrices: Mapping[str, Tensor],
        seen: Callable[[str, Tensor], None],
        multiplied: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._names = {(weight.data_ptr(), weight.shape): name for name, weight in matrices.items()}
        self._seen, self._multiplied = seen, multiplied

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if function is F.linear:
            weight = arguments[1] if len(arguments) > 1 else named["weight"]
            name = self._names.get((weight.data_ptr(), weight.shape))
            if name is not None:
                x = arguments[0] if arguments else named["input"]
                self._seen(name, x.detach().reshape(-1, x.shape[-1]))
                y = function(*arguments, **named)
                if self._multiplied is not None:
                    self._multiplied(name, y)
                return y
        return function(*arguments, **named)


LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]


def layer_arguments(model: Transformer, ids: Tensor) -> list[LayerArguments]:
    """Return the arguments of each layer but the hidden states; they are the same for all texts of one length."""
    found: list[LayerArguments] = []

    def remember(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((positional[1:], named))

    hooks = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in model.layers]
    try:
        with torch.no_grad():
            model.hidden_states(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def first_states(model: Transformer, ids: Tensor) -> Tensor:
    """Return the input of the first layer, without a gradient: (1, T, C). ids: (1, T)."""
    found: list[Tensor] = []

    def stop(_: nn.Module, positional: tuple[Any, ...]) -> None:
        found.append(positional[0])
        raise _Stop

    hook = model.layers[0].register_forward_pre_hook(stop)
    try:
        with torch.no_grad(), contextlib.suppress(_Stop):
            model.hidden_states(ids)
    finally:
        hook.remove()
    return found[0]


@torch.no_grad()
def mean_squared_inputs(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """Return the mean square of each input of each matrix over a text, (K,) float32 by the matrix's name.

    ids: (N, T). An expert's mean is over the tokens that use it; an expert that no token uses is left out. In memory
    are the states of one sequence at a time.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        if len(x):
            square = x.float().square().sum(dim=0)
            sums[name] = sums[name] + square if name in sums else square
            counts[name] = counts.get(name, 0) + len(x)

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with progress(len(ids), "Reading the calibration text") as bar, ObservedInputs(matrices_of(model), add):
            for row in ids:
                hidden = model.hidden_states(row[None].to(device))
                add("lm_head.weight", hidden.flatten(0, -2))  # without its product, which is large
                bar.advance(1)
    finally:
        model.train(was_training)
    return {name: (total / counts[name]).cpu() for name, total in sums.items()}


# The text -------------------------------------------------------------------------------------------------------------


def calibration_ids(
    model: Transformer, tokenizer: Tokenizer, path: Path | None = None, *, tokens: int = TOKENS
) -> Tensor:
    """Return sequences of a calibration text, (N, T) int64: about `tokens` tokens, from all parts of the text.

    path: a text file; None: a mixture of prose in several languages, dialogue, documentation and code. Of a tokenizer
    that lacks characters of that mixture, what the model writes itself. Each sequence begins with the tokenizer's
    `prefix_ids`. Raises UsageError for a file that cannot be read, or is too short, or a number of tokens below 1,024,
    and TokenizerError for characters that the tokenizer lacks.
    """
    if tokens < LEAST:
        raise UsageError(f"--calibration-tokens must be at least {LEAST:,}, not {tokens:,}.")
    prefix = tokenizer.prefix_ids
    width = min(SEQUENCE, model.config.max_position_embeddings) - len(prefix)
    if width < 1:
        raise UsageError(f"the model's context leaves no room for text after the {len(prefix)} tokens before it.")
    if path is not None:
        return _with_prefix(_file_ids(tokenizer, path, tokens, width), prefix)
    text = built_in_text()
    if _share_unknown(tokenizer, text) > 0:
        note("note: the tokenizer lacks characters of the built-in calibration text: calibrating on the model's own.")
        return sampled_ids(model, prefix, min(tokens, 4 * LEAST), width)
    return _with_prefix(_spread(tokenizer.encode(text), tokens, width), prefix)


def _share_unknown(tokenizer: Tokenizer, text: str) -> float:
    """Return the share of a text's characters that the tokenizer has no token for."""
    return sum(len(part) * count for part, count in tokenizer.count_unknown(text).items()) / max(1, len(text))


def _file_ids(tokenizer: Tokenizer, path: Path, tokens: int, width: int) -> Tensor:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--calibration {path} cannot be read: {error}.") from None
    pieces = max(1, tokens // width)
    span = 16 * width  # characters, nearly always enough for `width` tokens
    if len(text) > 2 * pieces * span:  # encode only parts of a long text
        step = len(text) // pieces
        text = "".join(text[i * step : i * step + span] for i in range(pieces))
    try:
        ids = tokenizer.encode(text)
    except TokenizerError as error:
        raise TokenizerError(f"--calibration {path}: {error}") from None
    if (unknown := _share_unknown(tokenizer, text)) > _MAX_UNKNOWN:
        raise UsageError(
            f"--calibration {path}: the tokenizer has no tokens for {100 * unknown:.0f}% of the text. Choose a text in "
            "the language of the model."
        )
    if len(ids) < LEAST:
        raise UsageError(
            f"--calibration {path} is too short: {len(ids):,} tokens. At least {LEAST:,} are needed, better {TOKENS:,}."
        )
    return _spread(ids, tokens, width)


def _spread(ids: Sequence[int], tokens: int, width: int) -> Tensor:
    """Return about `tokens` tokens as rows of `width`, at the same distance from each other; all if there are fewer."""
    rows = max(1, min(tokens, len(ids)) // width)
    width = min(width, len(ids))
    step = (len(ids) - width) / max(1, rows - 1)
    starts = [round(i * step) for i in range(rows)]
    return torch.tensor([list(ids[start : start + width]) for start in starts])


def _with_prefix(rows: Tensor, prefix: Sequence[int]) -> Tensor:
    return torch.cat([torch.tensor(list(prefix), dtype=torch.int64).expand(len(rows), -1), rows], dim=1)


def built_in_text() -> str:
    """Return the built-in calibration text: prose in several languages, dialogue, and Python's code with its
    documentation."""
    prose = files("gptsmith.quantize").joinpath("calibration.txt").read_text(encoding="utf-8")
    code = [textwrap.dedent(inspect.getsource(import_module(name)))[:4_000] for name in _MODULES]
    return "\n\n".join([prose, *code])


@torch.no_grad()
def sampled_ids(model: Transformer, prefix: Sequence[int], tokens: int, width: int, *, seed: int = 0) -> Tensor:
    """Return what the model writes at temperature 1 after `prefix`, or after a token drawn at random: rows of `width`
    tokens besides the prefix. They do not stop at an end token."""
    generator = torch.Generator().manual_seed(seed)
    rows = -(-tokens // width)
    start = torch.tensor(list(prefix), dtype=torch.int64).expand(rows, -1)
    if not prefix:
        start = torch.randint(model.config.vocab_size, (rows, 1), generator=generator)
    written, device = start, next(model.parameters()).device
    width -= 0 if prefix else 1
    with progress(width, "Writing a calibration text") as bar:
        cache = KVCache(model.config, rows, width + len(start[0]), device=device)
        logits = model(start.to(device), cache=cache)[:, -1]
        for _ in range(width):
            chosen = torch.multinomial(logits.float().softmax(dim=-1).cpu(), 1, generator=generator)
            written = torch.cat([written, chosen], dim=1)
            bar.advance(1)
            logits = model(chosen.to(device), cache=cache)[:, -1]
    return written
