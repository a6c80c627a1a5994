"""Documents packed into rows: which tokens belong together.

Axis letters: B rows · T tokens per row · n documents of a group · L their padded length.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentGroups:
    """Documents gathered by similar length. All indices are into the B·T tokens of the flattened rows.

    index: for each group (n, L) int64: a document's tokens in order, then its last token again as padding. Padding
        comes last, so a causal attention needs no mask for it.
    inverse: (B·T,) int64: where each token is in the concatenation of the flattened groups.
    """

    index: list[Tensor]
    inverse: Tensor


class Documents:
    """The documents of a batch. A document is a run of equal numbers in a row of `document_ids`: (B, T) int.

    starts: (B, T) int64, the position in the row of the first token of each token's document.
    """

    def __init__(self, document_ids: Tensor) -> None:
        position = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
        is_first = torch.ones_like(document_ids, dtype=torch.bool)
        is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        self.starts = torch.where(is_first, position, 0).cummax(dim=1).values
        self.block_masks: dict[int | None, Any] = {}  # FlexAttention's, by window

    def positions(self) -> Tensor:
        """Return each token's position within its document: (B, T) int64."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    def first_visible(self, window: int | None) -> Tensor:
        """Return the position of the first token that each token attends to: (B, T) int64."""
        if window is None:
            return self.starts
        oldest = torch.arange(self.starts.shape[1], device=self.starts.device) - window + 1
        return torch.maximum(self.starts, oldest)

    def mask(self, window: int | None = None) -> Tensor:
        """Return whether each token attends to each other one: (B, 1, T, T) bool. Quadratic in T: for reference."""
        position = torch.arange(self.starts.shape[1], device=self.starts.device)
        mask = (position >= self.first_visible(window)[..., None]) & (position <= position[:, None])  # (B, T, T)
        return mask[:, None]

    @functools.cached_property
    def groups(self) -> DocumentGroups | None:
        """The documents by length, or None if every row is a single document. On a GPU this waits for the device."""
        B, T = self.starts.shape
        if is_fake(self.starts):  # a memory forecast has no values: assume two documents per row
            return DocumentGroups(
                [self.starts.new_zeros(2 * B, _padded_length(-(-T // 2)))], self.starts.new_zeros(B * T)
            )
        position = torch.arange(B * T)
        begins = position[self.starts.cpu().flatten() == position % T]  # in the flattened rows
        if len(begins) == B:
            return None
        ends = torch.cat((begins[1:], torch.tensor([B * T])))
        padded = torch.tensor([_padded_length(length) for length in (ends - begins).tolist()])
        index, inverse, total = [], torch.empty(B * T, dtype=torch.int64), 0
        for L in sorted(set(padded.tolist())):
            chosen = padded == L
            tokens = begins[chosen, None] + torch.arange(L)  # (n, L)
            is_real = tokens < ends[chosen, None]
            places = torch.arange(total, total + tokens.numel()).view_as(tokens)
            inverse[tokens[is_real]] = places[is_real]
            index.append(torch.minimum(tokens, ends[chosen, None] - 1).to(self.starts.device))
            total += tokens.numel()
        return DocumentGroups(index, inverse.to(self.starts.device))


def _padded_length(length: int) -> int:
    """Round up to a multiple of 8 or, from 64 on, of a quarter of the power of two below: at most 25% more."""
    step = max(8, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape but no values, as in a memory forecast."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)
