"""Sparse upcycling: turn a dense model into a mixture of experts (Komatsuzaki et al. 2022, 2212.05055)."""

from __future__ import annotations

from dataclasses import replace

import torch

from gptsmith.errors import UsageError
from gptsmith.model.moe import MixtureOfExperts
from gptsmith.model.transformer import MLP, Transformer

SPARSE_LAYOUT = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}


@torch.no_grad()
def upcycle(model: Transformer, num_experts: int, num_experts_per_tok: int = 2) -> Transformer:
    """Return a model in which every feed-forward layer is `num_experts` copies of the original behind a new router.

    The chosen experts' weights add up to 1 and all experts are equal, so at first it computes what `model` computes.
    Raises UsageError for a model whose family has no layout with experts.
    """
    c = model.config
    if c.model_type not in SPARSE_LAYOUT or c.num_experts or c.attention_bias or c.mlp_bias:
        raise UsageError(
            f"a {c.model_type} model cannot be upcycled; these can: {', '.join(SPARSE_LAYOUT)}, without biases."
        )
    config = replace(
        c,
        model_type=SPARSE_LAYOUT[c.model_type],
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=True,
    )
    sparse = Transformer(config, dropout=model.dropout).to(next(model.parameters()).device)
    sparse.generation_config = dict(model.generation_config)
    dense = model.state_dict()
    sparse.load_state_dict({k: v for k, v in dense.items() if ".mlp." not in k}, strict=False)
    for new, old in zip(sparse.layers, model.layers, strict=True):
        assert isinstance(new.mlp, MixtureOfExperts)
        assert isinstance(old.mlp, MLP)
        new.mlp.up_proj.copy_(old.mlp.up_proj.weight.expand_as(new.mlp.up_proj))
        new.mlp.down_proj.copy_(old.mlp.down_proj.weight.expand_as(new.mlp.down_proj))
    return sparse
