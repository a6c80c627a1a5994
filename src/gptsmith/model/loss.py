"""Losses and log-probabilities of next tokens, without ever holding all logits of a large vocabulary.

Axis letters: B batch · T time · C hidden · V vocabulary · N = B·T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptsmith.model.config import IGNORED
from gptsmith.model.documents import is_fake
from gptsmith.model.moe import expert_load, load_balancing_loss, router_z_loss
from gptsmith.model.transformer import Transformer
from gptsmith.model.vision import Images
from gptsmith.runtime import compiler_available

LossFunction = Callable[[Transformer, Tensor, Tensor, Tensor | None, Images | None], Tensor]

MAX_LOGITS = 1 << 25  # logits in memory at once: 128 MB in fp32
MAX_LOGITS_ON_GPU = 1 << 29  # 1 GB in bf16; every chunk reads and writes the whole gradient of the weights


def token_logprobs(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    *,
    document_ids: Tensor | None = None,
    temperature: float = 1.0,
    tokens: int | None = None,
) -> Tensor:
    """Return log p(target | tokens up to here) for every token: (B, T) float32, in nats; 0 where the target is -100.

    ids, targets: (B, T) int64. document_ids: as in `Transformer.forward`. temperature: what the logits are divided by.
    tokens: only ids below it are possible, as when the engine samples (default: the model's whole vocabulary).
    Differentiable. Beyond `MAX_LOGITS` the logits are computed chunk by chunk and again in the backward pass.
    """
    hidden = model.hidden_states(ids, document_ids=document_ids)
    return head_logprobs(model.lm_head, hidden, targets, model.config.vocab_size, temperature, tokens)


def head_logprobs(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    tokens: int | None = None,
) -> Tensor:
    """Return the log-probabilities (B, T) of `targets` that `head` gives for hidden states (B, T, C), as above.

    head: any module that computes logits (N, V) from hidden states (N, C): plain, quantized or adapted. One of
        which each process has a part computes what is asked for itself (`logprobs`, `entropies`).
    """
    if (own := _own_way(head, "logprobs")) is not None:
        return _in_chunks(lambda h, y: own(h, y, temperature, tokens), hidden, targets, vocab_size)

    def chunk_logprobs(hidden: Tensor, targets: Tensor) -> Tensor:  # (n, C), (n,) -> (n,)
        logits = head(hidden)[:, :tokens].float()
        if temperature != 1.0:
            logits = logits / temperature
        return -F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")

    return _in_chunks(chunk_logprobs, hidden, targets, vocab_size)


def head_entropies(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    tokens: int | None = None,
) -> Tensor:
    """Return the entropy of the distribution of each next token: (B, T) float32, in nats; 0 where the target is -100.

    The arguments are those of `head_logprobs`.
    """
    if (own := _own_way(head, "entropies")) is not None:
        return _in_chunks(lambda h, y: own(h, y, temperature, tokens), hidden, targets, vocab_size)

    def chunk_entropies(hidden: Tensor, targets: Tensor) -> Tensor:
        logprobs = (head(hidden)[:, :tokens].float() / temperature).log_softmax(dim=-1)
        entropies: Tensor = -(logprobs.exp() * logprobs).sum(dim=-1) * (targets != IGNORED)
        return entropies

    return _in_chunks(chunk_entropies, hidden, targets, vocab_size)


def _own_way(head: nn.Module, name: str) -> Callable[..., Tensor] | None:
    """Return how a head computes log-probabilities or entropies itself, if it does."""
    found: Callable[..., Tensor] | None = getattr(type(head), name, None)
    return None if found is None else functools.partial(found, head)


def _in_chunks(compute: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return `compute` of hidden states (n, C) and targets (n,) for all of (B, T, C) and (B, T), as many at a time as
    `MAX_LOGITS` allows; what it computes from logits is computed again in the backward pass."""
    flat_hidden, flat_targets = hidden.flatten(0, 1), targets.flatten()
    rows = _chunk_rows(vocab_size, _max_logits(hidden))
    if len(flat_hidden) <= rows:
        return compute(flat_hidden, flat_targets).view_as(targets)
    parts = []
    for h, y in zip(torch.split(flat_hidden, rows), torch.split(flat_targets, rows), strict=True):
        parts.append(checkpoint(compute, h, y, use_reentrant=False) if torch.is_grad_enabled() else compute(h, y))
    return torch.cat(parts).view_as(targets)


def token_loss_sum(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    document_ids: Tensor | None = None,
    images: Images | None = None,
    router_logits: list[Tensor] | None = None,
) -> Tensor:
    """Return the cross-entropy in nats, summed over the targets that are not -100; ids, targets: (B, T) int64.

    It equals `-token_logprobs(...).sum()` up to rounding. Only the sum is needed here, so its gradient is computed in
    the forward pass where the vocabulary is large, which saves the second computation of the logits.
    images: the pictures of the batch. router_logits: as in `Transformer.forward`.
    """
    pixels = None if images is None else images.pixels
    hidden = model.hidden_states(ids, pixels=pixels, document_ids=document_ids, router_logits=router_logits)
    if _own_way(model.lm_head, "logprobs") is not None:
        return -head_logprobs(model.lm_head, hidden, targets, model.config.vocab_size).sum()
    if targets.numel() * model.config.vocab_size <= MAX_LOGITS:
        return cross_entropy_sum(model.lm_head(hidden), targets)
    if type(model.lm_head) is not nn.Linear:  # quantized or adapted
        return -head_logprobs(model.lm_head, hidden, targets, model.config.vocab_size).sum()
    return linear_cross_entropy_sum(hidden, model.lm_head.weight, targets, _max_logits(hidden))


def training_loss_sum(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    document_ids: Tensor | None = None,
    images: Images | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss that training minimizes, summed over the targets that are not -100, and metrics to log.

    That is `token_loss_sum`; a mixture of experts adds, per target, its load-balancing loss and router z-loss with the
    weights of its configuration. Its metrics: balance_loss, expert_load_max and expert_load_min (relative to an even
    load, which is 1). They stay on the device: nothing here waits for it.
    """
    config = model.config
    if not config.num_experts:
        return token_loss_sum(model, ids, targets, document_ids, images), {}
    router_logits: list[Tensor] = []
    loss = token_loss_sum(model, ids, targets, document_ids, images, router_logits)
    if not router_logits:  # all layers are dense
        return loss, {}
    scores = router_logits
    if config.router_scoring == "sigmoid":  # the balance loss is about their shares (2412.19437, equation 19)
        scores = [F.logsigmoid(logits) for logits in router_logits]
    load = expert_load(scores, config.num_experts_per_tok)
    count: Tensor = (targets != IGNORED).sum()
    share: Tensor | float = 1.0
    if model.sum_over_processes is not None:  # those of the whole batch, of which each process has some tokens
        tokens = torch.tensor(float(targets.numel()), device=load.device)
        sums = torch.cat([load * tokens, torch.stack([tokens, count.float(), torch.ones_like(tokens)])]).double()
        model.sum_over_processes(sums)
        load, count = (sums[:-3] / sums[-3]).float(), sums[-2].float()
        share = (tokens / sums[-3]).float()
    balance_loss = share * load_balancing_loss(scores, config.num_experts_per_tok, load)
    router_loss = config.router_aux_loss_coef * balance_loss
    if config.router_z_loss_coef:
        router_loss = router_loss + share * config.router_z_loss_coef * router_z_loss(router_logits)
    balance = balance_loss.detach()
    if model.sum_over_processes is not None:
        balance = balance * sums[-1].float()  # what is logged is the mean over the processes
    metrics = {
        "balance_loss": balance,
        "expert_load_max": load.max() * config.num_experts,
        "expert_load_min": load.min() * config.num_experts,
    }
    return loss + count * router_loss, metrics


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target), summed over the targets that are not -100; logits: (B, T, V), targets: (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, max_logits: int = MAX_LOGITS) -> Tensor:
    """Return `cross_entropy_sum` of the logits hidden · weightᵀ, of which at most `max_logits` are in memory at once.

    hidden: (B, T, C), weight: (V, C), targets: (B, T). Under autocast products are in its dtype, losses in fp32.
    """
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return apply(hidden.flatten(0, 1), weight, targets.flatten(), _chunk_rows(weight.shape[0], max_logits))


def _max_logits(hidden: Tensor) -> int:
    return MAX_LOGITS_ON_GPU if hidden.is_cuda else MAX_LOGITS


def _chunk_rows(vocab_size: int, max_logits: int) -> int:
    """Return how many tokens' logits are computed at once."""
    rows = max(1, max_logits // vocab_size)
    return rows - rows % 128 if rows > 128 else rows  # GPUs compute products in tiles of 128 rows


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, while the chunk's logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        w = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_grad else hidden
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else weight
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden), rows):
                h, y = hidden[start : start + rows].to(dtype), targets[start : start + rows]
                loss, grad_logits = _loss_and_gradient(h @ w.T, y, needs_grad)
                total += loss
                if needs_grad:
                    grad_hidden[start : start + rows] = grad_logits @ w
                    grad_weight += (grad_logits.T @ h).float()
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = gradients[0]
        return (
            grad_hidden * scale if ctx.needs_input_grad[0] else None,
            grad_weight * scale if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _loss_and_gradient(logits: Tensor, targets: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss of logits (N, V) and, if needed, its gradient with respect to them (softmax - one-hot) in
    their dtype. The logits are overwritten."""
    if logits.is_cuda:
        if is_fake(logits):
            return logits.new_empty((), dtype=torch.float32), logits
        kernel = _gpu_kernel(logits.device)
        if kernel is not None:
            return kernel(logits, targets, IGNORED, needs_grad), logits
    scores, counted = logits.float(), targets != IGNORED
    log_sum = scores.logsumexp(dim=-1, keepdim=True)
    index = targets.clamp(min=0)[:, None]
    loss = ((log_sum - scores.gather(1, index))[:, 0] * counted).sum()
    if needs_grad:
        scores.sub_(log_sum).exp_().scatter_add_(1, index, torch.full_like(log_sum, -1.0)).mul_(counted[:, None])
    return loss, scores.to(logits.dtype) if needs_grad else scores


@functools.cache
def _gpu_kernel(device: torch.device) -> Callable[[Tensor, Tensor, int, bool], Tensor] | None:
    """Return `kernels.cross_entropy.loss_and_gradient` where Triton works, else None."""
    if not compiler_available(device):
        return None
    try:
        from gptsmith.kernels.cross_entropy import loss_and_gradient

        loss_and_gradient(
            torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device), IGNORED, True
        )
    except Exception:  # a compiler, its headers and its runtime can fail in any way
        return None
    return loss_and_gradient
