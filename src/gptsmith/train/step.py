"""One optimizer update. The trainer, the forecasts and the compile probe all make it here.

gradients of Σ loss / Σ count over all micro-batches and processes  →  clip  →  optimizer step at peak rate · lr_factor

Each process takes its rows of the batch and divides their loss by the count of the whole batch. So gradients, losses
and metrics are sums over processes, and nothing is averaged.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from gptsmith.distributed.context import ALONE, DistributedContext, seed_of_rank
from gptsmith.distributed.layout import DATA_AXES
from gptsmith.distributed.sharding import local, sharding_of
from gptsmith.errors import TrainingError, UsageError
from gptsmith.model.transformer import Transformer
from gptsmith.optim.build import Optimizers, build_optimizers
from gptsmith.optim.muon import Owners
from gptsmith.runtime import ChosenPrecision, autocast_dtype, out_of_memory
from gptsmith.train.adapter import rate_factors
from gptsmith.train.config import EXACT_PARTS, RunConfig
from gptsmith.train.fp8 import use_fp8
from gptsmith.train.objectives.base import Batch, LossOutput, Models, Objective, Sum

B = TypeVar("B", bound=Batch)


class OutOfMemoryError(TrainingError):
    """Memory ran out with micro-batches of a single row. The message is the allocator's."""


@dataclass(frozen=True)
class StepResult:
    """What an update was. Tensors are on the device: reading them waits for a GPU."""

    loss: Tensor
    """Mean loss over the batch, in nats."""
    grad_norm: Tensor
    """Norm of the gradients before clipping."""
    tokens: int
    metrics: Mapping[str, Sum] = field(default_factory=dict)


class TrainingStep(Generic[B]):
    """Makes updates: `step(batch, lr_factor)`.

    precision: what losses are computed in. clip: largest gradient norm; 0: no clipping.
    batch_size: rows of a usual batch on this process. micro_batch_size: rows per forward pass. Where memory runs out,
        on any process, it becomes smaller, and the batch is computed again from its beginning with the same random
        numbers: the result is that of the same batch.
    on_shrink: called with the old and the new size then.
    before_update: called before weights and optimizer states change: a checkpoint may still be reading them.
    ranks: the processes that share each batch. All are called with the same one and return the same result.
    """

    def __init__(
        self,
        models: Models,
        objective: Objective[B],
        optimizers: Optimizers,
        *,
        precision: ChosenPrecision,
        micro_batch_size: int,
        batch_size: int,
        clip: float,
        on_shrink: Callable[[int, int], None] = lambda before, after: None,
        before_update: Callable[[], None] = lambda: None,
        ranks: DistributedContext = ALONE,
    ) -> None:
        self.models, self.objective, self.optimizers, self.precision = models, objective, optimizers, precision
        self.micro_batch_size, self.batch_size = micro_batch_size, batch_size
        self.clip, self.on_shrink, self.before_update, self.ranks = clip, on_shrink, before_update, ranks
        self.device = models.device
        self.autocast_dtype = autocast_dtype(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        named = named_parameters_of(ranks)
        trained = (p for _, module in models.named_modules() for _, p in named(module) if p.requires_grad)
        self._shared: list[nn.Parameter] = list(dict.fromkeys(trained))  # those that models share once
        self.parameters: list[nn.Parameter] = [local(p) for p in self._shared]
        """What this process has of each trained parameter, and updates."""
        self.whole = models
        """The models in one piece, as of the last `gather`: in the main process where the layout divides them."""
        self._summands, self._compared, self._is_idle = _Summands(), False, False
        if models.policy.config.num_experts and ranks.world_size > 1:
            models.policy.sum_over_processes = self._sum_of_batch

    @classmethod
    def build(
        cls,
        policy: Transformer,
        objective: Objective[B],
        config: RunConfig,
        *,
        precision: ChosenPrecision,
        micro_batch_size: int,
        ranks: DistributedContext = ALONE,
    ) -> Self:
        """Return the step of a run that trains `policy`: with the objective's models and the optimizers of `config`."""
        if precision == "fp8":
            use_fp8(policy)
        models = objective.models(policy.train())
        whole = models
        if ranks.layout.divides_model:
            if precision in ("fp8", "fp16"):  # fp16: processes would have to agree on which updates to leave out
                raise UsageError(f"--precision {precision} with --parallel {ranks.layout}: use bf16 or fp32.")
            trained = Models(models.policy, value=models.value)
            whole = copy.deepcopy(trained) if ranks.is_main else trained
            divide(models, ranks)
        owners: Owners | None = None
        if ranks.world_size > 1 and not ranks.exact:
            from gptsmith.distributed.owners import Owners as SharedOwners

            owners = SharedOwners(ranks.layout, ranks.rank)
        optim = config.optim
        optimizers = build_optimizers(
            models.policy,
            name=optim.name,
            lr=optim.lr,
            embedding_lr=optim.embedding_lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            betas=(optim.beta1, optim.beta2),
            newton_schulz_steps=optim.newton_schulz_steps,
            rate_factors=rate_factors(models.policy, config.adapter, config.vision),
            extra_lr=config.method.extra_lr,
            extra={prefix.removesuffix("."): module for prefix, module in models.named_modules() if prefix},
            named_parameters=named_parameters_of(ranks),
            local=local,
            owners=owners,
        )
        step = cls(
            models,
            objective,
            optimizers,
            precision=precision,
            micro_batch_size=micro_batch_size,
            batch_size=max(1, config.loop.batch_size // ranks.data_size),
            clip=optim.clip,
            ranks=ranks,
        )
        step.whole = whole
        return step

    def __call__(self, batch: B, lr_factor: float) -> StepResult:
        """Update the models with the gradients of `batch`, all learning rates times `lr_factor`.

        Raises OutOfMemoryError where not even one row fits.
        """
        count, tokens = self.objective.normalizer(batch)
        if self.ranks.world_size > 1 and not self._compared:
            self.ranks.check_same({"batches": _fingerprint(batch, count)})
            self._compared = True
        mine = batch.slice(*self.ranks.share(batch.num_rows))
        while True:
            random = self.random_state()
            reason = ""
            try:
                with self.own_random_numbers(), self._explained():
                    if self.ranks.exact:
                        loss, metrics = self.accumulate_exactly(batch, count)
                    else:
                        loss, metrics = self.accumulate(mine, count, batch)
            except (RuntimeError, MemoryError) as error:
                # In a divided model the others wait within the forward pass: they cannot begin again with this one.
                if not out_of_memory(error) or self.runs_together:
                    raise
                reason = str(error) or "out of memory"
            if not self.ranks.any(reason != ""):
                break
            # Outside of the handler: the error holds on to every tensor of the failed forward pass.
            self.clear_gradients()
            self.set_random_state(random)
            self.shrink(next(filter(None, self.ranks.gather(reason))))
        loss, metrics = self.sum_over_ranks(loss, metrics)
        return StepResult(loss, self.apply(lr_factor), tokens, metrics)

    def sum_over_ranks(self, loss: Tensor, metrics: dict[str, Sum]) -> tuple[Tensor, dict[str, Sum]]:
        """Add up the gradients over all processes, and the loss and the metrics, which are returned."""
        self._take_gradients()
        if self.ranks.world_size == 1:
            return loss.float(), metrics
        mine = _Summands(frozenset(metrics), frozenset(i for i, p in enumerate(self.parameters) if p.grad is not None))
        if self.ranks.any(mine != self._summands):  # rarely: what has a gradient hardly changes
            everyone = self.ranks.gather(mine)
            self._summands = _Summands(
                frozenset[str]().union(*(each.metrics for each in everyone)),
                frozenset[int]().union(*(each.gradients for each in everyone)),
            )
        names = sorted(self._summands.metrics)
        values = [loss]
        for name in names:
            part = metrics.get(name, Sum(torch.zeros(()), 0.0))
            values += [part.total, torch.as_tensor(part.count)]
        numbers = torch.stack([value.detach().to(self.device, torch.float64) for value in values])
        self.ranks.sum(numbers)
        parameters = [self.parameters[i] for i in sorted(self._summands.gradients)]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for axes, same in _grouped(parameters, _axes_to_sum).items():
            self.ranks.sum(*(p.grad for p in same if p.grad is not None), over=axes)
        loss, *sums = numbers.unbind()
        pairs = zip(names, sums[::2], sums[1::2], strict=True)
        return loss.float(), {name: Sum(total, count) for name, total, count in pairs}

    def accumulate(self, batch: B, count: float, whole: B | None = None) -> tuple[Tensor, dict[str, Sum]]:
        """Add the gradients of (loss sum of `batch`) / count, one micro-batch after the other; return it, and the sums
        of the metrics. All of this process alone.

        whole: the batch of all processes. Where they run every forward pass together and another has more rows, this
        one takes part with rows that do not count.
        """
        total = torch.zeros((), device=self.device)
        if not batch.num_rows:  # fewer rows than processes
            self.scaler.scale(total)  # which makes its scale on first use
        metrics: dict[str, Sum] = {}
        for start in range(0, batch.num_rows, self.micro_batch_size):
            output = self.loss(batch.slice(start, min(start + self.micro_batch_size, batch.num_rows)))
            loss = output.loss_sum / count
            torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
            add_sums(metrics, output.metrics)
        if whole is not None and self.runs_together:
            most = -(-whole.num_rows // self.ranks.data_size)
            passes = [-(-rows // self.micro_batch_size) for rows in (batch.num_rows, most)]
            self._is_idle = True
            for _ in range(*passes):
                torch.autograd.backward(self.scaler.scale(0.0 * self.loss(whole.slice(0, 1)).loss_sum))
            self._is_idle = False
        return total, metrics

    def accumulate_exactly(self, batch: B, count: float) -> tuple[Tensor, dict[str, Sum]]:
        """Do what `accumulate` does for this process's share of the whole `batch`, in the same parts and the same order
        of summation for any number of processes: a binary tree, whose upper levels are those of `ranks.sum`."""
        rows, size = batch.num_rows, EXACT_PARTS // self.ranks.data_size
        seed = torch.initial_seed()
        nodes: list[_Node] = []
        for part in range(self.ranks.data_rank * size, (self.ranks.data_rank + 1) * size):
            torch.manual_seed(seed_of_rank(seed, part))
            mine = batch.slice(rows * part // EXACT_PARTS, rows * (part + 1) // EXACT_PARTS)
            loss, metrics = self.accumulate(mine, count)
            self._take_gradients()
            doubled = {name: Sum(_double(each.total), _double(each.count)) for name, each in metrics.items()}
            node = _Node(0, loss.double(), doubled, [p.grad for p in self.parameters])
            self.clear_gradients()
            while nodes and nodes[-1].level == node.level:
                node = nodes.pop().plus(node)
            nodes.append(node)
        for p, gradient in zip(self.parameters, nodes[0].gradients, strict=True):
            p.grad = gradient
        return nodes[0].loss, nodes[0].metrics

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        """Where a forward pass needs the other processes, name the one that is missing."""
        return self.ranks.explained() if self.ranks.layout.divides_model else contextlib.nullcontext()

    @property
    def runs_together(self) -> bool:
        """Whether no process can run a forward pass alone."""
        return self.ranks.layout.divides_model or self.models.policy.sum_over_processes is not None

    def _sum_of_batch(self, values: Tensor) -> None:
        """Add up values of a micro-batch, in place, over the processes; those of rows that do not count are 0."""
        if self._is_idle:
            values.zero_()
        self.ranks.sum(values)

    def _take_gradients(self) -> None:
        """Give the gradients of divided parameters to what this process updates of them."""
        for shared, p in zip(self._shared, self.parameters, strict=True):
            if shared is not p and shared.grad is not None:
                gradient: Any = shared.grad
                p.grad, shared.grad = gradient.to_local().contiguous(), None

    def loss(self, rows: B) -> LossOutput:
        """Return the loss of some rows in the run's precision."""
        with self.autocast():
            return self.objective.loss(self.models, rows.to(self.device))

    def apply(self, lr_factor: float) -> Tensor:
        """Clip the gradients, step the optimizers and clear the gradients; return the norm before clipping.

        On a CPU an update whose norm is not finite is left out. On a GPU asking would mean waiting, so that the trainer
        finds out when it logs; with fp16 the scaler leaves it out.
        """
        self._take_gradients()
        for optimizer in self.optimizers.optimizers:
            self.scaler.unscale_(optimizer)
        norm = self.gradient_norm()
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.optimizers.set_factor(lr_factor)
        self.before_update()
        if self.scaler.is_enabled():
            for optimizer in self.optimizers.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        elif self.device.type == "cuda" or bool(torch.isfinite(norm)):
            self.optimizers.step()
        self.clear_gradients()
        return norm

    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradients of all parameters, of which each process can have a part."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not self.ranks.layout.divides_model:
            return torch.nn.utils.get_total_norm(gradients)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for axes, same in _grouped(self.parameters, lambda p: sharding_of(p).axes).items():
            norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in same if p.grad is not None]
            square = torch.stack([*norms, torch.zeros_like(total)]).square().sum()
            self.ranks.sum(square, over=axes)
            total += square
        return total.sqrt().float()

    def clear_gradients(self) -> None:
        for p in (*self.parameters, *self._shared):
            p.grad = None

    # -- models that are divided ---------------------------------------------------------------------------------------

    def gather(self) -> Models:
        """Return the models in one piece, with their present weights: in the main process. A collective."""
        if self.ranks.layout.divides_model:
            from gptsmith.distributed.parallel import full_state

            # A value model can contain the policy.
            divided, whole = self.models.value or self.models.policy, self.whole.value or self.whole.policy
            targets = dict(whole.named_parameters())
            with torch.no_grad():
                for name, value in full_state(divided, self.ranks.mesh):
                    if self.ranks.is_main:
                        targets[name].copy_(value)
        return self.whole

    def whole_tensor(self, p: nn.Parameter, value: Tensor) -> Tensor | None:
        """Return the whole of a tensor that is divided as `p` is, in the main process. A collective."""
        if not sharding_of(p).splits:
            return value
        from gptsmith.distributed.parallel import whole_tensor

        return whole_tensor(value, sharding_of(p), self.ranks.mesh)

    def part_of(self, p: nn.Parameter, value: Tensor) -> Tensor:
        """Return this process's part of a tensor, as it has one of `p`."""
        return sharding_of(p).block(value, self.ranks.layout.coordinates(self.ranks.rank))

    def shrink(self, reason: str) -> None:
        """Continue with the largest divisor of the batch size that is at most half the micro-batch size.

        reason: the allocator's message. Raises OutOfMemoryError with it where the micro-batch is 1 already.
        """
        before = self.micro_batch_size
        if before == 1:
            raise OutOfMemoryError(reason)
        self.micro_batch_size = max(n for n in range(1, before // 2 + 1) if self.batch_size % n == 0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.on_shrink(before, self.micro_batch_size)

    @contextlib.contextmanager
    def probe(self) -> Iterator[None]:
        """Leave no trace: within it gradients may come up and random numbers be drawn, and afterwards they have not."""
        random = self.random_state()
        try:
            yield
        finally:
            self.clear_gradients()
            self.set_random_state(random)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which losses are computed."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    @contextlib.contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        """Within, draw other random numbers than the other processes, for dropout of other rows.

        They follow from one number that all draw. So those outside, which batches may depend on, stay the same on all,
        and a checkpoint has nothing to hold for each process.
        """
        if self.ranks.world_size == 1 and not self.ranks.exact:
            yield
            return
        seed = int(torch.randint(2**62, ()))
        common = self.random_state()
        torch.manual_seed(seed if self.ranks.exact else seed_of_rank(seed, self.ranks.data_rank))
        try:
            yield
        finally:
            self.set_random_state(common)

    def random_state(self) -> dict[str, Tensor]:
        """Return the state of the random-number generators that a loss can draw from."""
        state = {"rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random_state(self, state: Mapping[str, Tensor]) -> None:
        if "rng/cpu" in state:
            torch.set_rng_state(state["rng/cpu"])
        if self.device.type == "cuda" and "rng/cuda" in state:
            torch.cuda.set_rng_state(state["rng/cuda"], self.device)


def divide(models: Models, ranks: DistributedContext) -> None:
    """Divide the models that are trained among the processes, in place."""
    from gptsmith.distributed.parallel import parallelize, to_device

    divided: set[int] = set()
    for _, module in models.named_modules():
        if module is models.reference:
            module.to(ranks.mesh.device_type)
            continue
        for part in list(module.modules()):
            if (
                isinstance(part, Transformer)
                and id(part) not in divided
                and any(p.requires_grad for p in part.parameters())
            ):
                parallelize(part, ranks.mesh, ranks.layout)
                divided.add(id(part))
        to_device(module, torch.device(ranks.mesh.device_type))  # what is not divided: a head


def named_parameters_of(ranks: DistributedContext) -> Callable[[nn.Module], Iterable[tuple[str, nn.Parameter]]]:
    """Return what gives names and parameters of a model that the processes share."""
    if not ranks.layout.divides_model:
        return nn.Module.named_parameters
    from gptsmith.distributed.parallel import named_parameters

    return named_parameters


def _axes_to_sum(p: nn.Parameter) -> tuple[str, ...]:
    """Return the axes over which a gradient is not the sum yet: FSDP and experts have added up theirs."""
    return tuple(axis for axis in DATA_AXES if axis not in sharding_of(p).axes)


K = TypeVar("K")


def _grouped(parameters: Iterable[nn.Parameter], key: Callable[[nn.Parameter], K]) -> dict[K, list[nn.Parameter]]:
    found: dict[K, list[nn.Parameter]] = {}
    for p in parameters:
        found.setdefault(key(p), []).append(p)
    return found


def _fingerprint(batch: Any, count: float) -> str:
    """Return what is equal for equal batches; the loss count alone where a batch cannot be written."""
    file = io.BytesIO()
    try:
        torch.save(batch, file)
    except Exception:  # of a class that cannot be pickled
        return str(count)
    return hashlib.sha256(file.getvalue()).hexdigest()


@dataclass(frozen=True)
class _Summands:
    """What is added up over processes: names of metrics, and the indices of the parameters that have gradients."""

    metrics: frozenset[str] = frozenset()
    gradients: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Node:
    """What has been added up of a batch: 2^level of its parts."""

    level: int
    loss: Tensor
    metrics: dict[str, Sum]
    gradients: list[Tensor | None]

    def plus(self, later: _Node) -> _Node:
        metrics = dict(self.metrics)
        add_sums(metrics, later.metrics)
        gradients = [_plus(a, b) for a, b in zip(self.gradients, later.gradients, strict=True)]
        return _Node(self.level + 1, self.loss + later.loss, metrics, gradients)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:  # 0, as between processes: then -0 becomes 0
        known = b if a is None else a
        return None if known is None else known + 0.0
    return a.add_(b)


def _double(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value).detach().double()


def add_sums(sums: dict[str, Sum], more: Mapping[str, Sum]) -> None:
    """Add `more` to `sums`, name by name."""
    for name, part in more.items():
        total, known = part.total.detach(), sums.get(name)
        sums[name] = Sum(total, part.count) if known is None else Sum(known.total + total, known.count + part.count)
