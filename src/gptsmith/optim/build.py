"""Build a run's optimizers: which parameter goes to which optimizer, and optimizer state as named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.model.parameters import ParameterInfo, parameter_info
from gptsmith.optim.muon import Muon, Owners

Whole = Callable[[nn.Parameter, Tensor], Tensor | None]  # (parameter, its part of a state tensor) -> the whole tensor
Part = Callable[[nn.Parameter, Tensor], Tensor]  # (parameter, a whole state tensor) -> its part


class Optimizers:
    """One or two torch optimizers that are stepped together; each group has its own peak learning rate.

    names: the names of the parameters, for `state_tensors`.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], names: Mapping[nn.Parameter, str]) -> None:
        self.optimizers, self.names = optimizers, names
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in self.groups:
            group["peak_lr"] = group["lr"]

    def set_factor(self, factor: float) -> None:
        """Set the learning rate of every group to its peak times `factor`."""
        for group in self.groups:
            group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_tensors(self, whole: Whole = lambda p, value: value) -> dict[str, Tensor]:
        """Return every state tensor, as it is, under the name `parameter/key`.

        whole: where processes share a parameter, makes the whole of their parts; what it returns None for is left out.
        """
        return {
            f"{self.names[p]}/{key}": found.detach()
            for optimizer in self.optimizers
            for p, state in _parameter_states(optimizer)
            for key, value in state.items()
            if (found := whole(p, value) if value.shape == p.shape else value) is not None
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor], part: Part = lambda p, value: value) -> None:
        """Restore what `state_tensors` returned. part: takes a parameter's part of a whole tensor.

        Raises CheckpointError if it belongs to other parameters.
        """
        by_name = {name: p for p, name in self.names.items()}
        owner = {p: optimizer for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]}
        for name, value in tensors.items():
            parameter_name, _, key = name.rpartition("/")
            p = by_name.get(parameter_name)
            if p is not None and value.ndim:
                value = part(p, value)
            if p is None or (value.ndim and value.shape != p.shape):
                raise CheckpointError(f"the optimizer state of {parameter_name!r} does not fit this model.")
            # The fused AdamW keeps its step counter on the parameter's device, in fp32.
            owner[p].state[p][key] = value.clone().to(p.device)


def _parameter_states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p in optimizer.state:
                yield p, optimizer.state[p]


def _groups(
    parameters: list[nn.Parameter], infos: Mapping[nn.Parameter, ParameterInfo], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return AdamW's groups: what has weight decay and what has none."""
    groups = [
        {"params": [p for p in parameters if infos[p].kind != "vector"], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if infos[p].kind == "vector"], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizers(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    embedding_lr: float,
    weight_decay: float,
    momentum: float,
    betas: tuple[float, float],
    newton_schulz_steps: int = 5,
    extra: Mapping[str, nn.Module] | None = None,
    extra_lr: float | None = None,
    rate_factors: Mapping[nn.Module, float] | None = None,
    named_parameters: Callable[[nn.Module], Iterable[tuple[str, nn.Parameter]]] = nn.Module.named_parameters,
    local: Callable[[nn.Parameter], nn.Parameter] = lambda p: p,
    owners: Owners | None = None,
) -> Optimizers:
    """Return the optimizers for the trainable parameters of `model`; frozen ones (`requires_grad` False) have none.

    name: "adamw": AdamW (Loshchilov & Hutter 2017, 1711.05101) for everything, at rate `lr`. "muon": Muon for hidden
        matrices, at rate `lr`; AdamW for everything else (embeddings, heads, norms, biases), at rate `embedding_lr`.
        What is a hidden matrix is decided by `parameter_info`. Vectors have no weight decay.
    extra: further modules to train (a value model, a reward head), by the prefix that their parameters' names get.
    extra_lr: AdamW trains those at this rate; None: they are trained as the model is.
    rate_factors: modules of the model whose rates are multiplied by a number.
    named_parameters, local, owners: where processes share a model: its parameters, the part of each that this process
        updates, and who has whole matrices.
    Raises UsageError if no parameter is trainable.
    """
    modules = {"": model, **{f"{prefix}.": module for prefix, module in (extra or {}).items()}}
    names: dict[nn.Parameter, str] = {}
    infos: dict[nn.Parameter, ParameterInfo] = {}
    apart: set[nn.Parameter] = set()
    for prefix, module in modules.items():
        for local_name, shared in named_parameters(module):
            p = local(shared)
            if p.requires_grad and p not in names:
                names[p], infos[p] = prefix + local_name, parameter_info(module, local_name)
                if prefix and extra_lr is not None:
                    apart.add(p)
    if not names:
        raise UsageError("there is nothing to train: all parameters are frozen.")

    factors: dict[nn.Parameter, float] = {
        p: factor
        for module, factor in (rate_factors or {}).items()
        for p in map(local, module.parameters())
        if p in names
    }
    kinds = [1.0, *sorted({factor for factor in factors.values() if factor != 1.0})]
    optimizers: list[torch.optim.Optimizer] = []
    matrices = [p for p in names if name == "muon" and infos[p].kind == "matrix" and p not in apart]
    if matrices:
        muon_groups = [
            {"params": own, "split_sizes": [infos[p].split_sizes for p in own], "lr": lr * factor}
            for factor in kinds
            if (own := [p for p in matrices if factors.get(p, 1.0) == factor])
        ]
        optimizers.append(
            Muon(
                muon_groups,
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                steps=newton_schulz_steps,
                owners=owners,
            )
        )
    elsewhere = apart | set(matrices)
    rest, rate = [p for p in names if p not in elsewhere], embedding_lr if name == "muon" else lr
    groups = [
        group
        for factor in kinds
        for group in _groups([p for p in rest if factors.get(p, 1.0) == factor], infos, rate * factor, weight_decay)
    ]
    if extra_lr is not None:
        groups += _groups([p for p in names if p in apart], infos, extra_lr, weight_decay)
    if groups:
        fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
        optimizers.append(torch.optim.AdamW(groups, betas=betas, eps=1e-8, fused=fused))
    return Optimizers(optimizers, names)
