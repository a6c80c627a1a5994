"""What quantization costs: perplexity, divergence from the full model and agreement with it, and sizes.

    full = Reference(model, ids, prefix)         # before the model is quantized, in place
    full.compare(quantized)                      # after

Of the full model, the final hidden states (in a file) and the output layer are kept, from which its probabilities are
computed again, a few tokens at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptsmith.errors import UsageError
from gptsmith.evaluate.text import Window, text_windows
from gptsmith.log import progress
from gptsmith.model.quantized import BITS, Bits, can_quantize
from gptsmith.model.transformer import Transformer
from gptsmith.quantize.file_matrix import FileMatrix
from gptsmith.quantize.widths import bits_per_weight, quantizable

WINDOW = 512  # tokens
_TOKENS = 128  # whose logits are in memory at once


@dataclass(frozen=True)
class Comparison:
    """How the predictions of a quantized model differ from those of the full model, on `tokens` tokens.

    before, after: perplexity. divergence: the mean of KL(full ‖ quantized), in nats. agreement: the share of tokens at
    which both models think the same next token the most likely.
    """

    tokens: int
    before: float
    after: float
    divergence: float
    agreement: float

    @property
    def change(self) -> float:
        """The relative change of the perplexity."""
        return self.after / self.before - 1


class Reference:
    """What is needed of the full model to compare it with a quantized one on a text."""

    @torch.no_grad()
    def __init__(
        self, model: Transformer, ids: Sequence[int], prefix: Sequence[int] = (), directory: Path | None = None
    ) -> None:
        """ids: of the text; it is cut into windows that begin with `prefix`. directory: on a disk with room for the
        hidden states of all tokens; None: that of temporary files. Raises UsageError for too short a text."""
        self.windows = text_windows(model, ids, window=WINDOW, prefix=prefix)
        self._head = model.lm_head  # it keeps its weight when the model gets another one
        self._begins = [0, *itertools.accumulate(len(window.ids) - 1 for window in self.windows)]
        self._hidden = FileMatrix(self._begins[-1], model.lm_head.in_features, directory)
        for window, begin in zip(self.windows, self._begins, strict=False):
            self._hidden.write(begin, _hidden(model, window))

    def compare(self, model: Transformer) -> Comparison:
        """Return how the predictions of a model differ from those of the full one."""
        return self.compare_logits(
            lambda window: map(model.lm_head, torch.split(_scored(window, _hidden(model, window)), _TOKENS))
        )

    @torch.no_grad()
    def compare_logits(self, logits: Callable[[Window], Iterable[Tensor]]) -> Comparison:
        """Return how the predictions of any program differ from those of the full model.

        logits: returns those after each token of a window that precedes a scored one, in pieces of 128 tokens, (n, V).
        """
        losses = torch.zeros(2, dtype=torch.float64)
        divergence, agreed, count = 0.0, 0, 0
        with progress(len(self.windows), "Comparing with the full model") as bar:
            for window, (begin, end) in zip(self.windows, itertools.pairwise(self._begins), strict=True):
                hidden = self._hidden.read(begin, end)
                targets = torch.split(_scored(window, torch.from_numpy(window.ids[1:])), _TOKENS)
                parts = zip(targets, torch.split(_scored(window, hidden), _TOKENS), logits(window), strict=True)
                for wanted, part, theirs in parts:
                    full, other = (x.float().log_softmax(dim=-1) for x in (self._head(part), theirs))
                    for i, logprobs in enumerate((full, other)):
                        losses[i] -= logprobs.gather(1, wanted[:, None]).double().sum()
                    divergence += float((full.exp() * (full - other)).sum(dim=-1).double().sum())
                    agreed += int((full.argmax(dim=-1) == other.argmax(dim=-1)).sum())
                    count += len(wanted)
                bar.advance(1)
        before, after = (math.exp(loss / count) for loss in losses.tolist())
        return Comparison(count, before, after, divergence / count, agreed / count)


@torch.no_grad()
def _hidden(model: Transformer, window: Window) -> Tensor:
    """Return the final hidden states (T - 1, C) of all tokens of a window but the last."""
    return model.hidden_states(torch.from_numpy(window.ids[None, :-1]))[0]


def _scored(window: Window, values: Tensor) -> Tensor:
    """Return those of the values (T - 1, ...) that belong to a scored token; the first token has none."""
    return values[torch.from_numpy(window.scored[1:])]


# Sizes ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Bytes of the weights with so many bits: in a file, and in memory."""

    bits: Bits
    file: int
    memory: int


def planned_sizes(model: Transformer, spare: float = 0.5) -> list[Size]:
    """Return the sizes that a full-precision model would have with each number of bits, mixed widths included.

    spare: bits per weight for wider matrices.
    """
    matrices = quantizable(model)
    layers, rows = sum(w.numel() for w in matrices.values()), sum(len(w) for w in matrices.values())
    table, outer = model.embed_tokens.weight, 0
    if can_quantize(table):
        tables = 1 if model.config.tie_word_embeddings else 2
        outer, rows = table.numel() * tables, rows + len(table) * tables
    rest = 4 * (model.num_parameters(trainable_only=False) - layers - outer) + 4 * rows  # two units of each row
    sizes = []
    for bits in BITS:
        found = []
        for in_memory in (False, True):
            each = bits_per_weight(bits, in_memory=in_memory) + (spare if bits < 8 else 0)
            found.append(round((each * layers + bits_per_weight(8, in_memory=in_memory) * outer) / 8) + rest)
        sizes.append(Size(bits, *found))
    return sizes


def recommended(sizes: Sequence[Size], memory: int) -> Size | None:
    """Return the largest size whose weights fit in `memory` bytes; None if not even 4 bits do."""
    fitting = [size for size in sizes if size.memory <= memory]
    return max(fitting, key=lambda size: size.memory, default=None)


def parse_bytes(text: str, option: str) -> int:
    """Return the number of bytes of a text such as `100MB` or `1.5 GB`. Raises UsageError for any other text."""
    units: Mapping[str, int] = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    compact = text.strip().lower().replace(" ", "")
    number = compact.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = compact[len(number) :]
    try:
        size = float(number) * units[unit if unit.endswith("b") else f"{unit}b"]
    except (ValueError, KeyError):
        raise UsageError(f"{option} is a size such as 100MB or 1.5GB, not {text!r}.") from None
    if not 0 < size < math.inf:
        raise UsageError(f"{option} must be above 0, not {text!r}.")
    return int(size)
