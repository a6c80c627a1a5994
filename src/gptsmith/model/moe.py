"""Mixture of experts: many feed-forward layers, a few of which each token uses.

Axis letters: N tokens · C hidden · E experts · F width of an expert · k experts per token.

Papers: Shazeer et al. 2017 (1701.06538); load-balancing loss, Fedus et al. 2021 (2101.03961); router z-loss, Zoph et
al. 2022 (2202.08906); Mixtral, Jiang et al. 2024 (2401.04088); shared experts, Dai et al. 2024 (2401.06066); upcycling,
Komatsuzaki et al. 2022 (2212.05055).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.model.activations import gate_function
from gptsmith.model.config import ModelConfig
from gptsmith.model.parameters import annotate

Biases = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]  # of both matrices of each expert


class MixtureOfExperts(nn.Module):
    """Experts with a gate (mostly SwiGLU) behind a top-k router. No token is dropped: tokens are sorted by expert, and
    each expert computes its own run of them, so the cost is that of k experts per token, whatever E is. A shared
    expert, if there is one, computes all tokens; its own gate weighs its output for each token (Qwen2-57B-A14B,
    2407.10671). With sigmoid scores and groups: DeepSeek-V3 (2412.19437, section 2.1.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.normalize, self.gate = config.norm_topk_prob, gate_function(config)
        self.router = nn.Linear(config.hidden_size, self.experts, bias=config.router_bias)
        self.up_proj = nn.Parameter(torch.empty(self.experts, 2 * config.intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.experts, config.hidden_size, config.intermediate_size))
        annotate(self, "up_proj", kind="matrix", split_sizes=(config.intermediate_size,) * (2 * self.experts))
        annotate(self, "down_proj", kind="matrix", split_sizes=(config.hidden_size,) * self.experts)
        self.has_bias = config.mlp_bias
        if self.has_bias:
            self.up_bias = nn.Parameter(torch.zeros(self.experts, 2 * config.intermediate_size))
            self.down_bias = nn.Parameter(torch.zeros(self.experts, config.hidden_size))
            for name in ("up_bias", "down_bias"):
                annotate(self, name, kind="vector")
        self.sigmoid, self.scaling = config.router_scoring == "sigmoid", config.routed_scaling_factor
        self.groups, self.top_groups = config.n_group, config.topk_group
        if self.sigmoid:
            self.score_correction_bias: Tensor
            self.register_buffer("score_correction_bias", torch.zeros(self.experts))
        self.shared = config.shared_expert_intermediate_size
        if self.shared:
            self.shared_up_proj = nn.Linear(config.hidden_size, 2 * self.shared, bias=False)
            self.shared_down_proj = nn.Linear(self.shared, config.hidden_size, bias=False)
            self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
            annotate(self, "shared_up_proj.weight", split_sizes=(self.shared, self.shared))

    def forward(self, x: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        """x: (B, T, C) -> (B, T, C). router_logits: a list to which the router's logits (N, E) are appended."""
        tokens = x.flatten(0, 1)  # (N, C)
        logits = self.router(tokens).float()  # (N, E)
        if router_logits is not None:
            router_logits.append(logits)
        weights, experts = self.route(logits)  # (N, k)
        order = experts.flatten().argsort(stable=True)  # (N·k,): the pairs (token, expert), sorted by expert
        sizes = torch.bincount(experts.flatten(), minlength=self.experts).tolist()
        token = order // self.top_k  # (N·k,): the token of each pair
        runs = torch.split(tokens.index_select(0, token), sizes)  # E tensors (n, C)
        outputs = torch.cat(self.run_experts(runs))  # (N·k, C)
        outputs = outputs * weights.flatten()[order, None].to(outputs.dtype)
        mixed: Tensor = outputs.new_zeros(tokens.shape).index_add(0, token, outputs)  # (N, C)
        if self.shared:
            gate, up = self.shared_up_proj(tokens).chunk(2, dim=-1)
            shared = self.shared_down_proj(self.gate(gate, up))
            mixed = mixed + (shared if self.shared_gate is None else self.shared_gate(tokens).sigmoid() * shared)
        return mixed.view_as(x)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and numbers of each token's experts, two (N, k), from the router's logits (N, E)."""
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1)
        experts = self.choose(scores)
        weights = scores.gather(1, experts)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + (1e-20 if self.sigmoid else 0.0))
        return weights * self.scaling if self.scaling != 1 else weights, experts

    def choose(self, scores: Tensor) -> Tensor:
        """Return the numbers of each token's experts (N, k) from the scores of all (N, E)."""
        choice = scores + self.score_correction_bias if self.sigmoid else scores
        if self.groups > 1:
            grouped = choice.view(len(choice), self.groups, -1)
            best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.top_groups, dim=-1).indices  # (N, groups used)
            used = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice = grouped.masked_fill(~used[..., None], -torch.inf).flatten(1)
        return choice.topk(self.top_k, dim=-1).indices

    def run_experts(self, runs: tuple[Tensor, ...]) -> list[Tensor]:
        """Return each expert's output (n, C) for its run of tokens (n, C)."""
        return self.apply_experts(runs, self.up_proj, self.down_proj, self.biases())

    def apply_experts(
        self, runs: tuple[Tensor, ...], up_proj: Tensor, down_proj: Tensor, biases: Biases
    ) -> list[Tensor]:
        """Return the output of each expert of two stacks of weights for its run of tokens."""
        # unbind, not indexing: then the gradient of the stacked weights is assembled once, not expert by expert.
        parts = zip(runs, up_proj.unbind(), down_proj.unbind(), *biases, strict=True)
        return [gated(run, up, down, self.gate, up_bias, down_bias) for run, up, down, up_bias, down_bias in parts]

    def biases(self) -> Biases:
        """Return the experts' biases of both matrices; None for each expert without."""
        if not self.has_bias:
            return (None,) * self.experts, (None,) * self.experts
        return self.up_bias.unbind(), self.down_bias.unbind()


def gated(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    gate: Callable[[Tensor, Tensor], Tensor],
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Return the output of one expert for x: (n, C). up_proj: (2F, C), rows of gate, then of up; down_proj: (C, F).

    gate: from `gate_function`.
    """
    gated, up = F.linear(x, up_proj, up_bias).chunk(2, dim=-1)
    return F.linear(gate(gated, up), down_proj, down_bias)


def load_balancing_loss(router_logits: list[Tensor], top_k: int, load: Tensor | None = None) -> Tensor:
    """Return E · Σ_e (share of tokens that chose e) · (mean probability of e), over the tokens of all layers together.

    Its minimum is `top_k`, where all experts are used equally (2101.03961, equation 4, for top-k as in Mixtral).
    router_logits: (N, E) of each layer. load: the result of `expert_load`, if it is known.
    """
    if load is None:
        load = expert_load(router_logits, top_k)
    probabilities = torch.cat(router_logits).softmax(dim=-1)
    return len(load) * top_k * (load * probabilities.mean(dim=0)).sum()


def router_z_loss(router_logits: list[Tensor]) -> Tensor:
    """Return the mean of logsumexp(logits)², which keeps the logits small (2202.08906, equation 5)."""
    return torch.cat(router_logits).logsumexp(dim=-1).square().mean()


def expert_load(router_logits: list[Tensor], top_k: int) -> Tensor:
    """Return the share of all choices that fell on each expert, (E,); 1/E each is perfect balance."""
    logits = torch.cat(router_logits).detach()
    choices = logits.topk(top_k, dim=-1).indices.flatten()
    counts = choices.new_zeros(logits.shape[-1]).index_add_(0, choices, torch.ones_like(choices))  # no synchronization
    return counts / counts.sum()
