"""From logits to the next token: temperature, top-k, top-p, min-p, repetition penalty.

Axis letters: B sequences · V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptsmith.errors import UsageError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Raises UsageError for values out of range."""

    max_tokens: int = 200
    """Most tokens to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable token every time."""
    top_k: int | None = None
    """Choose among the k most probable tokens."""
    top_p: float | None = None
    """Choose among the fewest tokens whose probabilities add up to p (Holtzman et al. 2019, 1904.09751)."""
    min_p: float | None = None
    """Drop tokens less probable than this share of the most probable one (Nguyen et al. 2024, 2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens seen before less likely (Keskar et al. 2019, 1909.05858)."""
    stop: tuple[str, ...] = ()
    """Texts at which to stop; they are not part of the result."""
    seed: int | None = None
    """The same seed gives the same text. Sample i of several uses seed + i. None: a new one each time."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, expected: str) -> None:
            value = getattr(self, name)
            if not ok or (isinstance(value, float) and not math.isfinite(value)):
                raise UsageError(f"--{name.replace('_', '-')} must be {expected}, not {value}.")

        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(self.temperature >= 0, "temperature", "0 (greedy) or above")
        check(self.top_k is None or self.top_k >= 1, "top_k", "at least 1")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        check(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(self.repetition_penalty > 0, "repetition_penalty", "above 0")
        check(all(self.stop), "stop", "texts that are not empty")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens seen before. logits, seen (bool): (B, V)."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def filter_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then top-k, top-p and min-p: what is not to be chosen becomes -inf. logits: (B, V) float32."""
    logits = logits / params.temperature
    if params.top_k is not None and params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p is not None and params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= params.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if params.min_p:
        highest = logits.max(dim=-1, keepdim=True).values
        logits = logits.masked_fill(logits < highest + math.log(params.min_p), -torch.inf)
    return logits


def choose(logits: Tensor, params: SamplingParams, generators: list[torch.Generator]) -> Tensor:
    """One token for each row of logits: (B, V) float32 -> (B,) int64. Row i draws from generators[i] alone.

    Sampling by exponential noise: argmax(p / e), e ~ Exp(1), is a draw from p.
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = filter_logits(logits, params).softmax(dim=-1)
    noise = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=g) for g in generators])
    return (probabilities / noise.to(logits.device).clamp_min(1e-30)).argmax(dim=-1)
