"""Cross-entropy of next tokens, without ever holding all logits of a large vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptsmith.model.transformer import Transformer
from gptsmith.runtime import compiler_available

LossFunction = Callable[[Transformer, Tensor, Tensor, Tensor | None], Tensor]


IGNORED = -100  # a target that is not to be predicted
MOST_LOGITS = 1 << 25  # logits held at once: 128 MB in fp32
MOST_LOGITS_ON_GPU = 1 << 29  # 1 GB in bf16: each stretch reads and writes the whole gradient of the weights


def token_loss_sum(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    document_ids: Tensor | None,
    router_logits: list[Tensor] | None = None,
) -> Tensor:
    """Cross-entropy in nats, summed over targets that are not -100; ids and targets: (B, T) int64.

    router_logits: as in `Transformer.forward`.
    """
    hidden = model.hidden_states(ids, document_ids=document_ids, router_logits=router_logits)
    if targets.numel() * model.config.vocab_size <= MOST_LOGITS:
        return cross_entropy_sum(model.lm_head(hidden), targets)
    most = MOST_LOGITS_ON_GPU if hidden.is_cuda else MOST_LOGITS
    return linear_cross_entropy_sum(hidden, model.lm_head.weight, targets, most)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) summed over targets that are not -100; logits: (B, T, V), targets: (B, T)."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def linear_cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, most: int = MOST_LOGITS) -> Tensor:
    """The same for logits = hidden · weightᵀ, of which no more than `most` are ever in memory.

    hidden: (B, T, C), weight: (V, C), targets: (B, T). Under autocast products are in its type, losses in fp32.
    """
    rows = max(1, most // weight.shape[0])
    rows -= rows % 128 if rows > 128 else 0  # what products on a GPU are cut into
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return apply(hidden.flatten(0, 1), weight, targets.flatten(), rows)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward pass, a stretch of rows at a time, while its logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        w = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if wanted else hidden
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else weight
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden), rows):
                h, y = hidden[start : start + rows].to(dtype), targets[start : start + rows]
                loss, error = _loss_and_error(h @ w.T, y, wanted)
                total += loss
                if wanted:
                    grad_hidden[start : start + rows] = error @ w
                    grad_weight += (error.T @ h).float()
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


def _loss_and_error(logits: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """The summed loss of logits (N, V), and if `wanted` its derivative by them, softmax - one-hot, in their type. The
    logits are overwritten."""
    if logits.is_cuda:
        from torch._subclasses.fake_tensor import FakeTensor

        if isinstance(logits, FakeTensor):  # a forecast
            return logits.new_empty((), dtype=torch.float32), logits
        kernel = _gpu_kernel(logits.device)
        if kernel is not None:
            return kernel(logits, targets, IGNORED, wanted), logits
    scores, counted = logits.float(), targets != IGNORED
    log_sum = scores.logsumexp(dim=-1, keepdim=True)
    index = targets.clamp(min=0)[:, None]
    loss = ((log_sum - scores.gather(1, index))[:, 0] * counted).sum()
    if wanted:
        scores.sub_(log_sum).exp_().scatter_add_(1, index, torch.full_like(log_sum, -1.0)).mul_(counted[:, None])
    return loss, scores.to(logits.dtype) if wanted else scores


@functools.cache
def _gpu_kernel(device: torch.device) -> Callable[[Tensor, Tensor, int, bool], Tensor] | None:
    """`loss_kernel.loss_and_error`, where Triton works."""
    if not compiler_available(device):
        return None
    try:
        from gptsmith.kernels.cross_entropy import loss_and_error

        loss_and_error(
            torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device), IGNORED, True
        )
    except Exception:  # whatever a compiler, its headers or its runtime can do wrong on a machine
        return None
    return loss_and_error
