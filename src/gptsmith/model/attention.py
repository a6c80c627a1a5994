"""Who looks at whom: causal, masked and banded attention over scaled_dot_product_attention.

Axis letters: B batch · H heads · K key/value heads · T new tokens · S all tokens attended to · D head_dim · W window.
A token of a banded layer sees the W tokens that end with itself (Child et al. 2019, 1904.10509; Beltagy et al. 2020,
2004.05150).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """(T, S) bool: whether each of the last T of S tokens sees each of the S."""
    causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return causal if window is None else causal.triu(S - T - window + 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None, dropout: float) -> Tensor:
    """Attention of q: (B, H, T, D) over k, v: (B, K, S, D), the last T of S being q's own tokens -> (B, H, T, D).

    mask: bool, broadcast to (B, H, T, S), causal already; None: plainly causal. A window narrows either.
    """
    T, S = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if window is not None and window < S:
        if mask is None and T == 1:  # decoding: the band is the end of the cache
            k, v = k[:, :, -window:], v[:, :, -window:]
        elif mask is None and T == S and 2 * window <= T:
            return attend_in_blocks(q, k, v, window, dropout)
        else:
            band = visible(T, S, window, q.device)
            mask = band if mask is None else mask & band
    elif mask is None and 1 < T < S:  # new tokens after a past: SDPA's own causal mask would be aligned wrongly
        mask = visible(T, S, None, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, dropout_p=dropout, enable_gqa=grouped
    )


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float) -> Tensor:
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
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.view(B, blocks, -1, window, D).transpose(1, 2).reshape(B, -1, blocks * window, D)[:, :, :T]


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, window: int | None) -> Tensor:
    """softmax(q kᵀ / √D) under the mask, written out: (B, H, T, S). For looking at; SDPA never builds it."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    allowed = visible(q.shape[2], k.shape[2], window, q.device)
    if mask is not None:
        allowed = allowed & mask
    return scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
