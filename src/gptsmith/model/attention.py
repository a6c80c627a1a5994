"""Causal attention, over everything, a sliding window, or packed documents, by the fastest kernel for each.

All functions compute softmax(q kᵀ · scale + mask) v, where the mask is 0 for the keys that a query may see and -∞ for
the others; `transformer.attention_weights` spells it out. With a sliding window a token sees the W tokens that end with
itself (Child et al. 2019, 1904.10509; Beltagy et al. 2020, 2004.05150).

Axis letters: B batch · H heads · K key/value heads · T new tokens · S all tokens attended to · D head_dim · W window.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith.kernels.cpu_attention import fused_attention, is_supported
from gptsmith.model.documents import Documents
from gptsmith.runtime import compiler_available


def causal_mask(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """Return whether each of the last T of S tokens sees each of the S: (T, S) bool."""
    causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return causal if window is None else causal.triu(S - T - window + 1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the causal attention of q: (B, H, T, D) over k, v: (B, K, S, D): (B, H, T, D).

    The queries are those of the last T of the S tokens.
    window: how many tokens each token sees, itself included; None: all. documents: each token sees only its own
        document; T must be S. dropout: of attention weights. scale: of the scores; None: 1/√D. sinks: see
        `transformer.attention_weights`.
    """
    T, S = q.shape[2], k.shape[2]
    if window is not None and window >= S:
        window = None
    if documents is not None:
        return _attend_within_documents(q, k, v, documents, window, dropout, scale, sinks)
    mask = None
    if window is not None and T == 1:  # decoding: the window is the end of the cache
        k, v = k[:, :, -window:], v[:, :, -window:]
    elif window is not None and T == S and 2 * window <= T:
        if q.is_cuda and not dropout and sinks is None and _can_use_flex(q.device):
            flexible: Tensor = flex_attention(q, k, v, window=window, scale=scale)
            return flexible
        return sliding_window_attention(q, k, v, window, dropout, scale, sinks)
    elif window is not None or 1 < T < S:  # new tokens after a past: SDPA would align its own causal mask wrongly
        mask = causal_mask(T, S, window, q.device)
    fusible = mask is None and T == S and not dropout and sinks is None
    if torch.compiler.is_compiling() and fusible and is_supported(q, k, v):
        return fused_attention(q, k, v, scale)
    if sinks is not None:
        return attend_with_sinks(q, k, v, sinks[:, None, None], mask, causal=T > 1, dropout=dropout, scale=scale)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and T > 1,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def attend_with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    mask: Tensor | None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Return attention in which a score of each query head takes part in the softmax without a value.

    It is one more key, with a value of 0: queries and keys get one more number, in which only that key is not 0.
    sinks: broadcast to (B, H, T, 1). mask: bool, as SDPA takes it; None: causal if `causal`, or all keys are seen.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    T, S = q.shape[-2], k.shape[-2]
    if mask is None and causal:
        mask = causal_mask(T, S, None, q.device)
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True)
    padding = -(q.shape[-1] + 1) % 8  # kernels want rows of whole vectors
    q = torch.cat(
        (q, (sinks / scale).to(q.dtype).expand(*q.shape[:-1], 1), q.new_zeros(*q.shape[:-1], padding)), dim=-1
    )
    sink = F.pad(k.new_ones(*k.shape[:2], 1, 1), (k.shape[-1], padding))
    k = torch.cat((sink, F.pad(k, (0, 1 + padding))), dim=2)
    v = F.pad(v, (0, 0, 1, 0))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    dropout: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return attention with a sliding window alone, in time and memory O(T·W).

    q: (B, H, T, D); k, v: (B, K, T, D) -> (B, H, T, D). Queries are cut into blocks of W, which see the keys of their
    own and of the previous block.
    """
    B, _, T, _ = q.shape
    blocks = -(-T // window)
    padding = blocks * window - T

    def in_blocks(x: Tensor) -> Tensor:  # (B, H, T, D) -> (B, blocks, H, W, D)
        return F.pad(x, (0, 0, 0, padding)).view(B, x.shape[1], blocks, window, -1).transpose(1, 2)

    def with_previous(x: Tensor) -> Tensor:  # (B·blocks, K, 2W, D); before the first block there is padding
        x = in_blocks(x)
        previous = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat((previous, x), dim=3).flatten(0, 1)

    inner = causal_mask(window, 2 * window, window, q.device)
    first = inner.clone()
    first[:, :window] = False
    mask = torch.stack([first, *[inner] * (blocks - 1)])[:, None].repeat(B, 1, 1, 1)  # (B·blocks, 1, W, 2W)
    parts = in_blocks(q).flatten(0, 1), with_previous(k), with_previous(v)
    if sinks is not None:
        y = attend_with_sinks(*parts, sinks[:, None, None], mask, dropout=dropout, scale=scale)
    else:
        y = F.scaled_dot_product_attention(
            *parts, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    y = y.view(B, blocks, -1, window, v.shape[-1])
    return y.transpose(1, 2).reshape(B, -1, blocks * window, v.shape[-1])[:, :, :T]


# Packed documents -----------------------------------------------------------------------------------------------------


def _attend_within_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    window: int | None,
    dropout: float,
    scale: float | None,
    sinks: Tensor | None,
) -> Tensor:
    y: Tensor
    if q.is_cuda and not dropout and sinks is None and _can_use_flex(q.device):
        y = flex_attention(q, k, v, documents=documents, window=window, scale=scale)
    elif not torch.compiler.is_compiling():
        y = document_attention(q, k, v, documents, window, dropout, scale, sinks)
    elif not dropout and sinks is None and is_supported(q, k, v):
        y = fused_attention(q, k, v, scale, documents.first_visible(window))
    else:
        y = _uncompiled_document_attention(q, k, v, documents, window, dropout, scale, sinks)
    return y


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    window: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return attention within documents, by one causal attention per group of documents of similar length.

    q: (B, H, T, D); k, v: (B, K, T, D) -> (B, H, T, D). Memory is linear in T, and time is Σ (length of a document)²:
    from a context of about 1,000 on this is several times faster than SDPA with a (B, 1, T, T) mask, and not slower
    below (measured on a CPU, forward and backward).
    """
    groups = documents.groups
    if groups is None:
        return attend(q, k, v, window=window, dropout=dropout, scale=scale, sinks=sinks)
    B, H, T, _ = q.shape
    order = torch.cat([index.flatten() for index in groups.index])
    sizes = [index.numel() for index in groups.index]

    def gather(x: Tensor) -> tuple[Tensor, ...]:  # (B, H, T, D) -> for each group (n·L, H, D)
        rows: tuple[Tensor, ...] = torch.split(x.transpose(1, 2).flatten(0, 1).index_select(0, order), sizes)
        return rows

    outputs = []
    for index, *qkv in zip(groups.index, gather(q), gather(k), gather(v), strict=True):
        q_, k_, v_ = (x.view(*index.shape, *x.shape[1:]).transpose(1, 2) for x in qkv)  # (n, H, L, D)
        y = attend(q_, k_, v_, window=window, dropout=dropout, scale=scale, sinks=sinks)
        outputs.append(y.transpose(1, 2).flatten(0, 1))  # (n·L, H, D)
    return torch.cat(outputs).index_select(0, groups.inverse).view(B, T, H, -1).transpose(1, 2)


# FlexAttention (Dong et al. 2024, 2412.05496) -------------------------------------------------------------------------

# `torch.compiler.disable`, but it does not load the compiler before it is called. The marked functions are not part of
# the graph of a compiled block: their shapes depend on the data, or they are compiled on their own.
_disable_compile: Any = torch._disable_dynamo  # type: ignore[attr-defined]

_uncompiled_document_attention: Any = _disable_compile(document_attention)


@_disable_compile  # type: ignore[untyped-decorator]
def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    compiled: bool = True,
) -> Tensor:
    """Return causal attention by one kernel that skips the blocks of scores that are masked everywhere.

    Shapes as in `attend`, with T = S. Not compiled it computes all scores, on any device: for tests.
    """
    flex = _flex_kernel(compiled)
    if documents is None:
        block_mask = _block_mask(q.shape[2], window, q.device)
    else:
        if window not in documents.block_masks:
            documents.block_masks[window] = _document_block_mask(documents, window, compiled)
        block_mask = documents.block_masks[window]
    y: Tensor = flex(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y


@_disable_compile  # type: ignore[untyped-decorator]
@functools.cache
def _can_use_flex(device: torch.device) -> bool:
    return compiler_available(device)


@functools.cache
def _flex_kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


@functools.lru_cache(maxsize=8)
def _block_mask(T: int, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def is_visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = key <= query
        return causal if window is None else causal & (query - key < window)

    return create_block_mask(is_visible, None, None, T, T, device=device)


def _document_block_mask(documents: Documents, window: int | None, compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    first = documents.first_visible(window)
    B, T = first.shape

    def is_visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[b, query])

    # Compiled, it does not build the (B, T, T) mask.
    return create_block_mask(is_visible, B, None, T, T, device=first.device, _compile=compiled)
