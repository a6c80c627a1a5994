"""Divide a model among processes, from outside: the model's own code knows nothing of it.

    layout = Layout.parse("fsdp=4,tp=2", 8)
    mesh = make_mesh(layout, "cpu")
    parallelize(model, mesh, layout)        # in place

Tensor parallelism (Shoeybi et al. 2019, 1909.08053) and expert parallelism replace the classes of layers by ones that
compute a part and add up or exchange the results; their parameters become DTensors. FSDP (torch's `fully_shard`) then
divides what is left, block by block. Gradients are sums, never means: `TrainingStep` divides by the count of the batch.

Every parameter knows its `sharding`, and its `local_part` is what the optimizer updates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.distributed.layout import Layout
from gptsmith.distributed.sharding import Sharding, Split, local, numel, set_sharding, sharding_of
from gptsmith.errors import UsageError
from gptsmith.model.config import IGNORED
from gptsmith.model.moe import Biases, MixtureOfExperts
from gptsmith.model.transformer import MLP, Attention, HeadsNorm, LatentAttention, Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SPLITS = "_parallel_splits"  # of a module: how tensor or expert parallelism has divided its parameters
_GROUPS = "_process_groups"  # of a mesh: those that were asked for, by their axes
_NAMED = "_parallel_parameters"  # of a model: its parameters, as they are while FSDP has not gathered them


def make_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """Return the mesh of all processes, with an axis for each of `layout.sizes`. A collective."""
    from torch.distributed.device_mesh import init_device_mesh

    sizes = layout.sizes
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def parallelize(model: Transformer, mesh: DeviceMesh, layout: Layout) -> Transformer:
    """Divide `model` as `layout` says, in place, and return it. Its parts move to the mesh's device.

    All processes have the same weights before. Nothing is communicated.
    Raises UsageError for a model that cannot be divided so.
    """
    layout.check(model.config)
    _refuse_other_layers(model, layout)
    if layout.tp > 1:
        _tensor_parallel(model, mesh["tp"], layout)
    if layout.ep > 1:
        _expert_parallel(model, mesh["ep"])
    if layout.fsdp > 1:
        _fully_sharded(model, mesh["fsdp"])
    else:
        to_device(model, torch.device(mesh.device_type))
    _record_shardings(model)
    return model


def _refuse_other_layers(model: Transformer, layout: Layout) -> None:
    from gptsmith.model.lora import lora_layers
    from gptsmith.model.quantized import bits_of

    if layout.divides_model and bits_of(model) is not None:
        raise UsageError(f"--parallel {layout}: quantized weights cannot be divided. Use dp, or load them in full.")
    if (layout.tp > 1 or layout.ep > 1) and lora_layers(model):
        raise UsageError(f"--parallel {layout}: adapters cannot be divided by tp or ep. Use fsdp, dp, or --lora off.")


# Sums over the processes that share rows -----------------------------------------------------------------------------


def replicated(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return x, which is the same on all processes of a mesh of one axis; its gradient is the sum of theirs."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum of x over all processes of a mesh of one axis."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def gathered(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the x of all processes of a mesh of one axis, joined along the last axis."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(x, mesh, [Shard(x.ndim - 1)], run_check=False).full_tensor()


def _own(p: Any) -> Tensor:
    """Return this process's part of a DTensor; differentiable. Other tensors as they are."""
    part: Tensor = p.to_local() if hasattr(p, "to_local") else p
    return part


# Layers of which each process computes a part ------------------------------------------------------------------------


class ColumnParallelLinear(nn.Linear):
    """Some rows of the weight: x is the same on all processes, and each has its own outputs."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(replicated(x, self.mesh), _own(self.weight), None if self.bias is None else _own(self.bias))


class RowParallelLinear(nn.Linear):
    """Some columns of the weight: each process has its own inputs, and the outputs are added up."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        y = summed(F.linear(x, _own(self.weight)), self.mesh)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class ReplicatedLinear(nn.Linear):
    """The whole layer on each process, whose outputs each uses for its own heads: their gradients are added up."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        return replicated(super().forward(x), self.mesh)


class ColumnParallelLatent(nn.Linear):
    """As `ColumnParallelLinear`, of a layer behind a `ReplicatedLinear`, which adds up the gradients of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _own(self.weight))


@contextlib.contextmanager
def _used_as(module: nn.Module, use: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, a module computes with `use(p)` of each of its own parameters p."""
    own: dict[str, Any] = dict(module._parameters)
    try:
        module._parameters.update({n: None if p is None else use(p) for n, p in own.items()})  # type: ignore[misc]
        yield
    finally:
        module._parameters.update(own)


class SharedNorm(nn.Module):
    """A norm before or in the heads, whose weight all of them share: its gradient is the sum over the processes'
    heads."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        with _used_as(self, lambda p: replicated(p, self.mesh)):
            y: Tensor = super().forward(x)
        return y


class OwnPart(nn.Module):
    """A layer that needs no other process: its parameters are those of this process's heads."""

    def forward(self, *arguments: Any) -> Tensor:
        with _used_as(self, _own):
            y: Tensor = super().forward(*arguments)
        return y


class DividedNorm(nn.Module):
    """An RMSNorm over the queries or keys of all heads, of which each process has some (OLMo 2)."""

    mesh: DeviceMesh
    weight: nn.Parameter
    eps: float
    zero_centered: bool

    def forward(self, x: Tensor) -> Tensor:
        y, weight = x.float(), _own(self.weight)
        # The gradient of a sum that each process needs for its own heads is the sum of what they ask for.
        squares = replicated(summed(y.square().sum(dim=-1, keepdim=True), self.mesh), self.mesh)
        y = y * torch.rsqrt(squares / (x.shape[-1] * self.mesh.size()) + self.eps)
        return (y * (1 + weight if self.zero_centered else weight)).to(x.dtype)


class VocabularyParallelEmbedding(nn.Embedding):
    """Some rows of the table: the others are zero, and the results are added up."""

    mesh: DeviceMesh

    def forward(self, ids: Tensor) -> Tensor:
        weight = _own(self.weight)
        index = ids - self.mesh.get_local_rank() * len(weight)
        is_here = (index >= 0) & (index < len(weight))
        rows = F.embedding(index.clamp(0, len(weight) - 1), weight)
        return summed(torch.where(is_here[..., None], rows, 0.0), self.mesh)


class VocabularyParallelHead(nn.Linear):
    """Logits of some tokens of the vocabulary. Losses need no more (1909.08053, section 3); `forward` joins all."""

    mesh: DeviceMesh

    def forward(self, hidden: Tensor) -> Tensor:
        return gathered(F.linear(replicated(hidden, self.mesh), _own(self.weight)), self.mesh)

    def _logits(self, hidden: Tensor, temperature: float, tokens: int | None) -> tuple[Tensor, Tensor, int]:
        """Return this process's logits (n, V / size), float32, the log of the sum of all exponentials, (n,), and the
        first id that is here. Logits of ids from `tokens` on are as good as -∞, but finite."""
        weight = _own(self.weight)
        first = self.mesh.get_local_rank() * len(weight)
        logits = F.linear(replicated(hidden, self.mesh), weight).float()
        if temperature != 1.0:
            logits = logits / temperature
        if tokens is not None and tokens < first + len(weight):
            here = torch.arange(first, first + len(weight), device=logits.device) < tokens
            logits = torch.where(here, logits, -1e30)
        highest = _highest(logits.detach().amax(dim=-1), self.mesh)
        total = summed((logits - highest[:, None]).exp().sum(dim=-1), self.mesh)
        return logits, highest + total.log(), first

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, tokens: int | None = None) -> Tensor:
        """Return log p(target), (n,) float32, 0 where the target is -100, for hidden: (n, C) and targets: (n,)."""
        logits, log_sum, first = self._logits(hidden, temperature, tokens)
        index = targets - first
        is_here = (index >= 0) & (index < logits.shape[-1])
        chosen = logits.gather(1, index.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
        chosen = summed(torch.where(is_here, chosen, 0.0), self.mesh)
        return torch.where(targets == IGNORED, 0.0, chosen - log_sum)

    def entropies(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, tokens: int | None = None) -> Tensor:
        """Return the entropy of each distribution, (n,) float32, 0 where the target is -100."""
        logits, log_sum, _ = self._logits(hidden, temperature, tokens)
        # The gradient of a sum that each process needs for its own logits is the sum of what they ask for.
        inner = replicated(log_sum, self.mesh)[:, None]
        mean = summed(((logits - inner).exp() * logits).sum(dim=-1), self.mesh)
        return torch.where(targets == IGNORED, 0.0, log_sum - mean)


def _highest(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the elementwise maximum over all processes of a mesh of one axis; without a gradient."""
    import torch.distributed as dist

    x = x.contiguous()
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=mesh.get_group())
    return x


class ParallelMixture(MixtureOfExperts):
    """A mixture whose experts are divided: each process has some of them (expert_mesh), or a part of each
    (tensor_mesh). Routing is the model's own.

    Tokens go to the processes that have their experts and come back (Lepikhin et al. 2020, 2006.16668).
    """

    expert_mesh: DeviceMesh | None = None
    tensor_mesh: DeviceMesh | None = None

    def run_experts(self, runs: tuple[Tensor, ...]) -> list[Tensor]:
        sizes = [len(run) for run in runs]
        if self.tensor_mesh is not None:
            parts = self._compute(torch.split(replicated(torch.cat(runs), self.tensor_mesh), sizes))
            outputs = torch.split(summed(torch.cat(parts), self.tensor_mesh), sizes)
            biases = self.down_bias.unbind() if self.has_bias else ()
            return [y + bias.to(y.dtype) for y, bias in zip(outputs, biases, strict=True)] if biases else list(outputs)
        assert self.expert_mesh is not None
        return self._exchanged(torch.cat(runs), sizes, self.expert_mesh)

    def _compute(self, runs: tuple[Tensor, ...]) -> list[Tensor]:
        none = (None,) * len(runs)
        biases: Biases = (none, none)
        if self.has_bias:  # the sum over parts of an expert gets the second one once
            down = none if self.tensor_mesh is not None else _own(self.down_bias).unbind()
            biases = _own(self.up_bias).unbind(), down
        return self.apply_experts(runs, _own(self.up_proj), _own(self.down_proj), biases)

    def _exchanged(self, tokens: Tensor, sizes: list[int], mesh: DeviceMesh) -> list[Tensor]:
        """Return each expert's output for tokens that are sorted by expert. sizes: how many each expert has."""
        import torch.distributed as dist

        size, group = mesh.size(), mesh.get_group()
        counts = torch.tensor(sizes, device=tokens.device)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=group)
        numbers = arriving.tolist()
        here = len(sizes) // size  # experts of this process
        from_each = [numbers[first : first + here] for first in range(0, len(sizes), here)]  # [process][expert of this]
        sent = [sum(sizes[first : first + here]) for first in range(0, len(sizes), here)]
        received = [sum(row) for row in from_each]
        pieces = torch.split(_exchange(tokens, received, sent, group), numbers)  # by process, then expert
        experts = range(len(from_each[0]))
        runs = tuple(torch.cat(pieces[expert :: len(experts)]) for expert in experts)
        outputs = [
            torch.split(output, [row[expert] for row in from_each])
            for expert, output in zip(experts, self._compute(runs), strict=True)
        ]
        back = torch.cat([outputs[expert][process] for process in range(size) for expert in experts])
        return list(torch.split(_exchange(back, sent, received, group), sizes))


def _exchange(x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    """Return the rows that all processes have for this one. sent, received: how many go to and come from each."""
    apply: Any = _Exchange.apply
    found: Tensor = apply(x, received, sent, group)
    return found


class _Exchange(torch.autograd.Function):
    """An all-to-all; in the backward pass the gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _all_to_all(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], ctx.sent, ctx.received, ctx.group), None, None, None


def _all_to_all(x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    import torch.distributed as dist

    found = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), received, sent, group=group)
    return found


# Dividing ------------------------------------------------------------------------------------------------------------


def _tensor_parallel(model: Transformer, mesh: DeviceMesh, layout: Layout) -> None:
    tied = model.lm_head.weight is model.embed_tokens.weight
    _as_part(model.embed_tokens, VocabularyParallelEmbedding, mesh, {"weight": Split("tp", 0, layout.tp)})
    _as_part(model.lm_head, VocabularyParallelHead, mesh, {} if tied else {"weight": Split("tp", 0, layout.tp)})
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
        vars(model.lm_head)[_SPLITS] = vars(model.embed_tokens)[_SPLITS]
    for block in model.layers:
        assert isinstance(block, nn.Module)
        if isinstance(block.attention, LatentAttention):
            _divide_latent_attention(block.attention, mesh, layout)
        else:
            assert isinstance(block.attention, Attention)
            _divide_attention(block.attention, mesh, layout)
        mlp = block.mlp
        if isinstance(mlp, MixtureOfExperts):
            if mlp.shared:
                _columns(mlp.shared_up_proj, mesh, layout, (mlp.shared, mlp.shared))
                _rows(mlp.shared_down_proj, mesh, layout)
            if layout.ep == 1:
                width = mlp.down_proj.shape[-1]
                fused = Split("tp", 1, layout.tp, (width, width))
                splits = {"up_proj": fused, "down_proj": Split("tp", 2, layout.tp)}
                if mlp.has_bias:
                    splits["up_bias"] = fused
                _as_part(mlp, ParallelMixture, mesh, splits)
                vars(mlp)["tensor_mesh"] = mesh
        else:
            assert isinstance(mlp, MLP)
            width = mlp.down_proj.in_features
            _columns(mlp.up_proj, mesh, layout, (width, width) if mlp.gated else None)
            _rows(mlp.down_proj, mesh, layout)


def _divide_attention(attention: Attention, mesh: DeviceMesh, layout: Layout) -> None:
    rows, kv_rows = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    _columns(attention.qkv_proj, mesh, layout, (rows, kv_rows, kv_rows))
    _rows(attention.o_proj, mesh, layout)
    attention.heads, attention.kv_heads = attention.heads // layout.tp, attention.kv_heads // layout.tp
    for norm in (attention.q_norm, attention.k_norm):
        if isinstance(norm, HeadsNorm):
            _mixed_in(norm, OwnPart, mesh, {"weight": Split("tp", 0, layout.tp)})
        elif attention.normalizes_all_heads:
            _as_part(norm, DividedNorm, mesh, {"weight": Split("tp", 0, layout.tp)})
        elif not isinstance(norm, nn.Identity):
            _mixed_in(norm, SharedNorm, mesh)
    if attention.sinks is not None:
        _mixed_in(attention, OwnPart, mesh, {"sinks": Split("tp", 0, layout.tp)})


def _divide_latent_attention(attention: LatentAttention, mesh: DeviceMesh, layout: Layout) -> None:
    """Divide what makes queries, keys and values of latent vectors, by heads. Each process makes the vectors itself."""
    _columns(attention.q_proj if attention.q_rank is None else attention.q_b_proj, mesh, layout, None)
    _as_part(attention.kv_a_proj, ReplicatedLinear, mesh, {})
    _mixed_in(attention.kv_a_norm, SharedNorm, mesh)
    _as_part(attention.kv_b_proj, ColumnParallelLatent, mesh, {"weight": Split("tp", 0, layout.tp)})
    _rows(attention.o_proj, mesh, layout)
    attention.heads //= layout.tp


def _columns(layer: nn.Linear, mesh: DeviceMesh, layout: Layout, parts: tuple[int, ...] | None) -> None:
    split = Split("tp", 0, layout.tp, parts)
    _as_part(layer, ColumnParallelLinear, mesh, {"weight": split, "bias": split})


def _rows(layer: nn.Linear, mesh: DeviceMesh, layout: Layout) -> None:
    _as_part(layer, RowParallelLinear, mesh, {"weight": Split("tp", 1, layout.tp)})


def _expert_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    for module in list(model.modules()):
        if isinstance(module, MixtureOfExperts):
            split = Split("ep", 0, mesh.size())
            names = ("up_proj", "down_proj", *(("up_bias", "down_bias") if module.has_bias else ()))
            _as_part(module, ParallelMixture, mesh, dict.fromkeys(names, split))
            vars(module)["expert_mesh"] = mesh


def _mixed_in(module: nn.Module, kind: type[nn.Module], mesh: DeviceMesh, splits: Mapping[str, Split] = {}) -> None:
    """Do what `_as_part` does, and let the class be one of `kind` before its own."""
    own = type(module)
    _as_part(module, type(f"{kind.__name__}Of{own.__name__}", (kind, own), {}), mesh, splits)


def _as_part(module: nn.Module, kind: type[nn.Module], mesh: DeviceMesh, splits: Mapping[str, Split]) -> None:
    """Make `module` one of class `kind` that has this process's part of the parameters in `splits`."""
    from torch.distributed.tensor import DTensor, Shard

    module.__class__ = kind
    vars(module)["mesh"] = mesh
    noted = vars(module).setdefault(_SPLITS, {})
    for name, split in splits.items():
        p = getattr(module, name)
        if p is None:
            continue
        part = split.chunks(p.detach())[mesh.get_local_rank()].to(mesh.device_type, copy=True).contiguous()
        divided = DTensor.from_local(part, mesh, [Shard(split.dim)], run_check=False)
        setattr(module, name, nn.Parameter(divided, requires_grad=p.requires_grad))
        noted[name] = split


def _fully_sharded(model: Transformer, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    def placement(p: nn.Parameter) -> Shard | None:
        """Divide stacks of experts within each: there may be fewer experts than processes."""
        shape = _own(p.detach()).shape
        return Shard(1) if len(shape) == 3 and shape[1] % mesh.size() == 0 else None

    for module in (*model.layers, model):
        # An explicit mesh: the default would be that of a GPU, wherever there is one.
        fully_shard(module, mesh=mesh, shard_placement_fn=placement)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # otherwise a factor needs an operation that gloo has not
        if model.config.vision is not None:  # the rows of a process may have no picture
            module.set_reduce_scatter_unused_params(True, recurse=False)
    register_fsdp_forward_method(model, "hidden_states")


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move all parameters and buffers but DTensors, which are there."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and not hasattr(tensor, "to_local"):
                tensor.data = tensor.data.to(device)


def _record_shardings(model: Transformer) -> None:
    named: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        noted: Mapping[str, Split] = vars(module).get(_SPLITS, {})
        for name, p in module._parameters.items():
            if p is None or id(p) in seen:
                continue
            seen.add(id(p))
            named[f"{path}.{name}" if path else name] = p
            splits = [noted[name]] if name in noted else []
            part: Any = p
            if hasattr(p, "to_local"):
                mesh, placements = part.device_mesh, part.placements
                if "fsdp" in mesh.mesh_dim_names:
                    axis = mesh.mesh_dim_names.index("fsdp")
                    splits.append(Split("fsdp", placements[axis].dim, mesh.size(axis)))
                part = part._local_tensor
            set_sharding(p, Sharding(tuple(p.shape), tuple(splits)), part)
    vars(model)[_NAMED] = named


# The whole of what is divided ----------------------------------------------------------------------------------------


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield names and parameters, tied ones once. Where FSDP has gathered some, yield those that it divides.

    `local(p)` is what this process has of p, and `sharding_of(p)` says which part.
    """
    gathered = {path: vars(module)[_NAMED] for path, module in model.named_modules() if _NAMED in vars(module)}
    for path, named in gathered.items():
        for name, p in named.items():
            yield f"{path}.{name}" if path else name, p
    inside = tuple(f"{path}." if path else "" for path in gathered)
    for name, p in model.named_parameters():
        if not name.startswith(inside) or not inside:
            yield name, p


def group_of(mesh: DeviceMesh, axes: tuple[str, ...]) -> Any:
    """Return the process group of this process along some axes of a mesh; None where there is no other process.

    A collective the first time that it is called for these axes.
    """
    names = tuple(name for i, name in enumerate(mesh.mesh_dim_names or ()) if name in axes and mesh.size(i) > 1)
    groups: dict[tuple[str, ...], Any] = vars(mesh).setdefault(_GROUPS, {(): None})
    if names not in groups:
        groups[names] = mesh.get_group(names[0]) if len(names) == 1 else mesh[names]._flatten().get_group()
    return groups[names]


def whole_tensor(part: Tensor, sharding: Sharding, mesh: DeviceMesh, *, everywhere: bool = False) -> Tensor | None:
    """Return the whole of a tensor that is divided as a parameter is: on process 0, or everywhere; elsewhere None.

    part: what this process has of it. A collective.
    """
    import torch.distributed as dist

    if not sharding.splits:
        return part.detach()
    names = [name for name in mesh.mesh_dim_names or () if name in sharding.axes]
    here = dict(zip(mesh.mesh_dim_names or (), mesh.get_coordinate() or (), strict=True))
    if not everywhere and any(at for name, at in here.items() if name not in names):
        return None  # the processes of the first replica are enough
    group = group_of(mesh, tuple(names))
    longest = max(numel(sharding.block_shape(at)) for at in sharding.positions())
    flat = part.detach().new_zeros(longest)
    flat[: part.numel()] = part.detach().reshape(-1)
    ranks = dist.get_process_group_ranks(group)
    found = [torch.empty_like(flat) for _ in ranks]
    if everywhere:
        dist.all_gather(found, flat, group=group)
    else:
        dist.gather(flat, found if dist.get_rank() == 0 else None, dst=0, group=group)
        if dist.get_rank() != 0:
            return None
    sizes = [mesh[name].size() for name in names]

    def block_at(at: dict[str, int]) -> Tensor:
        index = 0
        for name, size in zip(names, sizes, strict=True):
            index = index * size + at[name]
        shape = sharding.block_shape(at)
        return found[index][: numel(shape)].view(shape)

    return sharding.whole(block_at)


def full_state(model: nn.Module, mesh: DeviceMesh, *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and the whole values of all parameters, one at a time: on process 0, or everywhere.

    A collective: the other processes iterate, too, and get nothing.
    """
    for name, p in named_parameters(model):
        whole = whole_tensor(local(p), sharding_of(p), mesh, everywhere=everywhere)
        if whole is not None:
            yield name, whole


@torch.no_grad()
def load_full_state(model: nn.Module, state: Mapping[str, Tensor], mesh: DeviceMesh) -> None:
    """Take this process's part of all parameters from their whole values. KeyError for one that is missing."""
    here = dict(zip(mesh.mesh_dim_names or (), mesh.get_coordinate() or (), strict=True))
    for name, p in named_parameters(model):
        local(p).copy_(sharding_of(p).block(state[name], here))
