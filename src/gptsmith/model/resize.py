"""Give a model more tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from gptsmith.errors import UsageError
from gptsmith.model.parameters import annotate
from gptsmith.model.quantized import bits_of
from gptsmith.model.transformer import Transformer


@torch.no_grad()
def resize_embeddings(model: Transformer, vocab_size: int) -> Transformer:
    """Extend the embeddings and the output layer of `model` to `vocab_size` tokens, in place, and return it.

    New rows are the mean of the old ones, so that new tokens begin as an average token and get no outstanding
    probability (Hewitt 2021, "Initializing new word embeddings for pretrained language models"). Tied matrices stay
    tied. Raises UsageError for fewer tokens than there are, and for quantized embeddings.
    """
    rows = model.config.vocab_size
    if vocab_size == rows:
        return model
    if vocab_size < rows:
        raise UsageError(f"the model has embeddings for {rows:,} tokens; {vocab_size:,} are fewer.")
    if not isinstance(model.embed_tokens.weight, Tensor) or bits_of(model) is not None:
        raise UsageError("embeddings can be extended only before a model is quantized.")
    model.config = replace(model.config, vocab_size=vocab_size)
    embeddings = _extended(model.embed_tokens.weight, vocab_size)
    head = embeddings if model.config.tie_word_embeddings else _extended(model.lm_head.weight, vocab_size)
    model.embed_tokens = nn.Embedding(embeddings.shape[0], embeddings.shape[1], _weight=embeddings)
    model.embed_tokens.weight.requires_grad_(True)
    model.lm_head = nn.Linear(head.shape[1], vocab_size, bias=False, device="meta")
    model.lm_head.weight = model.embed_tokens.weight if head is embeddings else nn.Parameter(head)
    annotate(model, "lm_head.weight", kind="head")
    return model


def _extended(matrix: Tensor, rows: int) -> Tensor:
    mean = matrix.float().mean(dim=0, keepdim=True).to(matrix.dtype)
    return torch.cat((matrix.detach(), mean.expand(rows - len(matrix), -1)))
