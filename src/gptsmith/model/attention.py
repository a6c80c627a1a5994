"""Who looks at whom: causal, masked and banded attention over scaled_dot_product_attention, bands by FlexAttention on
a GPU.

Axis letters: B batch · H heads · K key/value heads · T new tokens · S all tokens attended to · D head_dim · W window.
A token of a banded layer sees the W tokens that end with itself (Child et al. 2019, 1904.10509; Beltagy et al. 2020,
2004.05150).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.kernels.cpu_attention import fused_attention, suits
from gptsmith.runtime import compiler_available


def visible(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """(T, S) bool: whether each of the last T of S tokens sees each of the S."""
    causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return causal if window is None else causal.triu(S - T - window + 1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    window: int | None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention of q: (B, H, T, D) over k, v: (B, K, S, D), the last T of S being q's own tokens -> (B, H, T, D).

    mask: bool, broadcast to (B, H, T, S), causal already; None: plainly causal. A window narrows either.
    scale: of the scores; None: 1/√D.
    """
    T, S = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if window is not None and window < S:
        if mask is None and T == 1:  # decoding: the band is the end of the cache
            k, v = k[:, :, -window:], v[:, :, -window:]
        elif mask is None and T == S and 2 * window <= T:
            if q.is_cuda and not dropout and _can_flex(q.device):
                flexible: Tensor = attend_flex(q, k, v, window, scale)
                return flexible
            return attend_in_blocks(q, k, v, window, dropout, scale)
        else:
            band = visible(T, S, window, q.device)
            mask = band if mask is None else mask & band
    elif mask is None and 1 < T < S:  # new tokens after a past: SDPA's own causal mask would be aligned wrongly
        mask = visible(T, S, None, q.device)
    if torch.compiler.is_compiling() and mask is None and T == S and not dropout and suits(q, k, v):
        return fused_attention(q, k, v, scale)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """The same for a band alone, in time and memory O(T·W): blocks of W queries look at their own and the last block.

    q: (B, H, T, D); k, v: (B, K, T, D) -> (B, H, T, D).
    """
    B, _, T, D = q.shape
    blocks = -(-T // window)
    fill = blocks * window - T

    def in_blocks(x: Tensor) -> Tensor:  # (B, H, T, D) -> (B, blocks, H, W, D)
        return F.pad(x, (0, 0, 0, fill)).view(B, x.shape[1], blocks, window, D).transpose(1, 2)

    def with_previous(x: Tensor) -> Tensor:  # (B, blocks, K, 2W, D); the first block's previous one is empty
        x = in_blocks(x)
        previous = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat((previous, x), dim=3).flatten(0, 1)

    band = visible(window, 2 * window, window, q.device)
    first = band.clone()
    first[:, :window] = False
    mask = torch.stack([first, *[band] * (blocks - 1)])[:, None].repeat(B, 1, 1, 1)  # (B·blocks, 1, W, 2W)
    y = F.scaled_dot_product_attention(
        in_blocks(q).flatten(0, 1),
        with_previous(k),
        with_previous(v),
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.view(B, blocks, -1, window, D).transpose(1, 2).reshape(B, -1, blocks * window, D)[:, :, :T]


# `torch.compiler.disable`, but one that does not load the compiler until it is called. What it marks is compiled by
# itself: whatever compiles the caller need not see how the mask is made.
_outside_of_compiling: Any = torch._disable_dynamo  # type: ignore[attr-defined]


@_outside_of_compiling  # type: ignore[untyped-decorator]
def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None, *, compiled: bool = True
) -> Tensor:
    """The same for a band alone, by one kernel that passes over blocks outside of it (FlexAttention: Dong et al. 2024,
    2412.05496). Not compiled it builds all scores, on any device: for comparing.
    """
    flex = _flex_attention(compiled)
    mask = _band_of_blocks(q.shape[2], window, q.device)
    y: Tensor = flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y


@_outside_of_compiling  # type: ignore[untyped-decorator]
@functools.cache
def _can_flex(device: torch.device) -> bool:
    return compiler_available(device)


@functools.cache
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


@functools.lru_cache(maxsize=8)
def _band_of_blocks(T: int, window: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def band(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < window)

    return create_block_mask(band, None, None, T, T, device=device)


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None, window: int | None, scale: float | None = None
) -> Tensor:
    """softmax(q kᵀ · scale) under the mask, written out: (B, H, T, S). For looking at; SDPA never builds it."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    allowed = visible(q.shape[2], k.shape[2], window, q.device)
    if mask is not None:
        allowed = allowed & mask
    return scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
