"""The optimizers of a run: which parameters go to which, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from gptsmith.errors import CheckpointError
from gptsmith.model.transformer import Transformer
from gptsmith.optim.muon import Muon


class Optimizers:
    """One or two torch optimizers stepped together, each group at its own peak rate times a common factor."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], names: Mapping[nn.Parameter, str]) -> None:
        self.optimizers, self.names = optimizers, names
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in self.groups:
            group["peak_lr"] = group["lr"]

    def set_factor(self, factor: float) -> None:
        for group in self.groups:
            group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor, named `parameter/key`."""
        return {
            f"{self.names[p]}/{key}": value.detach().cpu().contiguous()
            for optimizer in self.optimizers
            for p, state in _parameter_states(optimizer)
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave. CheckpointError if it is of other parameters."""
        by_name = {name: p for p, name in self.names.items()}
        owner = {p: optimizer for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]}
        for name, value in tensors.items():
            parameter_name, _, key = name.rpartition("/")
            p = by_name.get(parameter_name)
            if p is None or (value.ndim and value.shape != p.shape):
                raise CheckpointError(f"the optimizer state of {parameter_name!r} does not fit this model.")
            # AdamW's fused kernel keeps its step counter beside the parameter, in fp32.
            owner[p].state[p][key] = value.clone().to(p.device)


def _parameter_states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p in optimizer.state:
                yield p, optimizer.state[p]


def build_optimizers(
    model: Transformer,
    *,
    name: str,
    lr: float,
    embedding_lr: float,
    weight_decay: float,
    momentum: float,
    betas: tuple[float, float],
    newton_schulz_steps: int = 5,
) -> Optimizers:
    """`adamw`: everything by AdamW (Loshchilov & Hutter 2017, 1711.05101). `muon`: the blocks' matrices by Muon.

    Weight decay touches matrices and embeddings, not norms and biases.
    """
    names = {p: n for n, p in model.named_parameters()}
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and n.startswith("layers.")]
    optimizers: list[torch.optim.Optimizer] = []
    if name == "muon":
        splits = [model.fused_rows(names[p]) for p in matrices]
        group = {"params": matrices, "splits": splits}
        optimizers.append(Muon([group], lr=lr, momentum=momentum, weight_decay=weight_decay, steps=newton_schulz_steps))
        chosen = set(matrices)
        others, rate = [p for p in model.parameters() if p not in chosen], embedding_lr
    else:
        others, rate = list(model.parameters()), lr
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in others)
    groups = [g for g in groups if g["params"]]
    optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=betas, eps=1e-8, fused=fused))
    return Optimizers(optimizers, names)
