"""What PPO and GRPO share: sample answers, score them, learn from each a few times, sample again.

All that a run needs to continue is in `state`: how many rollouts there have been, the answers that are being learned
from, and how far that is. A run that is stopped while it samples or scores begins this rollout again, with the same
weights and seeds, and gets the same answers.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.checkpoint import TrainState
from gptsmith.distributed.context import ALONE, DistributedContext
from gptsmith.engine.cache_size import cache_bytes_per_token
from gptsmith.engine.warm_up import kernels_ready
from gptsmith.errors import TrainingError, UsageError
from gptsmith.evaluate.forgetting import text_bits_per_byte
from gptsmith.log import JsonLines, note
from gptsmith.model.config import ModelConfig
from gptsmith.model.documents import is_fake
from gptsmith.model.lora import adapter_off
from gptsmith.model.loss import head_logprobs
from gptsmith.model.transformer import Transformer
from gptsmith.run_directory import PLAIN_TEXT_METRIC
from gptsmith.runtime import choose_device
from gptsmith.tokenizer import Tokenizer
from gptsmith.train.adapter import is_on
from gptsmith.train.config import PolicyConfig, RunConfig
from gptsmith.train.init import absolute_spec, load_init, with_tokens
from gptsmith.train.objectives.base import LossHistory, Models, Objective, Rehearsal, Selection, Sum
from gptsmith.train.prompts import Prompts
from gptsmith.train.rollout.batch import RolloutBatch, Stats, joined, padded
from gptsmith.train.rollout.checks import GoodhartAlarm, try_rewards
from gptsmith.train.rollout.rewards import RewardModel, Rewards, Sample, Scores, changes, open_rewards
from gptsmith.train.rollout.rollout import MAX_BATCH, PromptLoader, Rollout, sample_answers, weights_hash

MAX_TOKENS = 8192  # of answers in one forward pass without gradients
MOST_DEAD = 10  # rollouts in a row without anything to learn from
GAP_WARNING = 1e-3  # nats between the sampler and the trainer, in float32
EVALUATION = -1  # the number of the rollout that evaluations sample
ROLLOUTS_FILE = "rollouts.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"


class PolicyObjective(Objective[RolloutBatch]):
    """Base of PPO and GRPO. A subclass says what a rollout teaches (`batch_of`) and what the loss of it is.

    reference: the model whose distribution the policy is to stay close to; None: the policy without its adapter, or
    none at all, as the method's `kl` says. directory: where rollouts.jsonl is written.
    """

    evaluates_start = True
    fixed_shapes = False
    can_divide = False

    def __init__(
        self,
        prompts: Prompts,
        tokenizer: Tokenizer,
        rewards: Rewards,
        method: PolicyConfig,
        *,
        gold: Rewards | None = None,
        reference: Transformer | None = None,
        batch_size: int,
        context: int,
        seed: int,
        directory: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        ranks: DistributedContext = ALONE,
    ) -> None:
        answers = batch_size * method.minibatches
        if answers % method.per_prompt:
            raise UsageError(
                f"--batch-size {batch_size} with --minibatches {method.minibatches} makes {answers} answers, which are "
                f"no whole groups of {method.per_prompt}."
            )
        self.prompts, self.tokenizer, self.rewards, self.gold = prompts, tokenizer, rewards, gold
        self.method, self.batch_size, self.context, self.seed = method, batch_size, context, seed
        self.frozen_reference, self.directory, self.should_stop, self.ranks = reference, directory, should_stop, ranks
        self.loader = PromptLoader(prompts.train, batch_size=answers // method.per_prompt, seed=seed)
        self.selection = Selection("val_reward" if gold is None else "val_gold", "max")
        self.updates = 0  # made so far
        self.evaluations: dict[int, dict[str, Any]] = {}  # of held-out answers with gold, by step
        self.number = 0  # of the rollout that is learned from, from 1
        self.buffer: RolloutBatch | None = None
        self.taken = 0  # batches of it
        self.kernels = None if method.fast_rollouts else False  # of the engine; None: not known yet
        if reference is not None:
            reference.requires_grad_(False).eval()

    # -- what a method is ----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def batch_of(self, models: Models, rollouts: Sequence[Rollout], scores: Tensor) -> tuple[RolloutBatch, Stats]:
        """Return what is learned from these answers with these scores, (B,), and metrics besides."""

    def models(self, policy: Transformer) -> Models:
        reference = self.frozen_reference
        if reference is not None:
            if is_fake(next(policy.parameters())):  # in a forecast
                reference = Transformer(reference.config, initialize=False).requires_grad_(False)
            else:
                reference.to(next(policy.parameters()).device)
        return Models(policy, reference=reference)

    def diverged(self, history: LossHistory) -> str | None:
        return None  # the loss of a policy says nothing; its reward and its divergence do

    # -- batches -------------------------------------------------------------------------------------------------------

    def next_batch(self, models: Models, step: int) -> RolloutBatch:
        self.updates = step + 1
        if self.buffer is None or self.taken == self.method.minibatches * self.method.passes:
            for _ in range(MOST_DEAD):
                found = self._collect(models, step)
                if found is None:  # asked to stop
                    return padded([])
                self.buffer, self.taken = found, 0
                if found.num_rows:
                    break
            else:
                raise TrainingError(
                    f"in {MOST_DEAD} rollouts in a row all answers to each prompt had the same reward, so there is "
                    "nothing to learn. Use a reward that tells answers apart, easier prompts, or a model that "
                    "sometimes succeeds."
                )
        batch = self._minibatch(self.buffer, self.taken)
        self.taken += 1
        return batch

    def _minibatch(self, buffer: RolloutBatch, index: int) -> RolloutBatch:
        """Return batch `index` of all that are made from a rollout."""
        parts = self.method.minibatches
        if parts == 1:
            chosen = torch.arange(buffer.num_rows)
        else:
            generator = torch.Generator().manual_seed(
                (self.seed * 1_000_003 + self.number) % (1 << 62) + index // parts
            )
            order = torch.randperm(buffer.num_rows, generator=generator)
            size = -(-buffer.num_rows // parts)
            chosen = order[size * (index % parts) : size * (index % parts + 1)]
        lengths = buffer.mask.int().argmax(dim=1) + buffer.mask.sum(dim=1)
        batch = buffer.rows(chosen[lengths[chosen].argsort(stable=True)])  # micro-batches have little padding
        first = index == 0
        return self.finish(dataclasses.replace(batch, fresh=first, stats=buffer.stats if first else {}), index)

    def finish(self, batch: RolloutBatch, index: int) -> RolloutBatch:
        """Complete a batch that was taken from a rollout: here, set what its loss is divided by."""
        return dataclasses.replace(batch, count=float(batch.weights.sum()))

    def _collect(self, models: Models, step: int) -> RolloutBatch | None:
        """Sample and score answers to the next prompts. None on a stop: then nothing has changed."""
        number, position, wanted = self.number + 1, self.loader.position, self.batch_size * self.method.minibatches
        batches: list[RolloutBatch] = []
        records: list[tuple[list[Rollout], Scores]] = []
        for attempt in range(1 + self.resampling):
            prompts = self.loader.batch_at(position)
            rollouts = self._sample(models.policy, prompts, number, attempt * len(prompts))
            if rollouts is None:
                return None
            scores = self.score(rollouts)
            if number == 1 and attempt == 0 and self.method.check_rewards:
                self._try_rewards(rollouts)
            batch, stats = self.batch_of(models, rollouts, torch.tensor(scores.total))
            batches.append(dataclasses.replace(batch, stats={**_statistics(rollouts, scores), **stats}))
            records.append((rollouts, scores))
            position += self.loader.batch_size
            if sum(each.num_rows for each in batches) >= wanted:
                break
        self.number, self.loader.position = number, position
        self._record(models.policy, step, records)
        whole = joined(batches)
        return whole if whole.num_rows <= wanted else whole.rows(torch.arange(wanted))

    @property
    def resampling(self) -> int:
        """How often more answers are sampled where too few teach something."""
        return 0

    def _sample(self, policy: Transformer, prompts: Sequence[Any], number: int, offset: int) -> list[Rollout] | None:
        """Return answers to all prompts; each process samples its share of them. offset: number of the first group."""
        start, stop = self.ranks.share(len(prompts))
        mine = prompts[start:stop]
        found = self._answers(policy, mine, self.method.per_prompt, number, offset + start)
        everyone = [each for each in self.ranks.gather(found) if each is not None]
        if len(everyone) < self.ranks.world_size:
            return None
        return [rollout for each in everyone for rollout in each]

    def _answers(
        self,
        policy: Transformer,
        prompts: Sequence[Any],
        per_prompt: int,
        number: int,
        first_group: int,
        answer_tokens: int | None = None,
    ) -> list[Rollout] | None:
        if self.kernels is None:
            self.kernels = kernels_ready(policy)
            if not self.kernels:
                note("note: the engine has no kernels for this model on this machine: --fast-rollouts changes nothing.")
        return sample_answers(
            policy,
            self.tokenizer,
            prompts,
            per_prompt=per_prompt,
            answer_tokens=answer_tokens or self.method.answer_tokens,
            context=self.context,
            temperature=self.method.temperature,
            stop=self.method.stop,
            seed=self.seed,
            kernels=self.kernels,
            number=number,
            first_group=first_group,
            should_stop=self.should_stop,
        )

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Return the rewards of answers, less the penalty for those without an end. The main process asks for them."""
        scores = self.ranks.on_main(lambda: self.rewards.score([_sample_of(each) for each in rollouts]))
        penalty = self.method.unended_penalty
        if not penalty:
            return scores
        total = [score - penalty * (not each.ended) for each, score in zip(rollouts, scores.total, strict=True)]
        return Scores(total, scores.parts)

    def _try_rewards(self, rollouts: Sequence[Rollout]) -> None:
        """Say what the reward pays for answers that nobody wants, compared with the model's own."""
        prompts, ordinary = self.prompts.train[: self.method.eval_prompts], [_sample_of(each) for each in rollouts]
        findings = self.ranks.on_main(
            lambda: try_rewards(self.rewards, prompts, self.tokenizer, self.method.answer_tokens, ordinary)
        )
        for line in findings.lines() if findings.warnings else []:
            note(line)
        for warning in findings.warnings:
            note(f"warning: the reward may be exploited: {warning}")

    def _record(self, policy: Transformer, step: int, records: Sequence[tuple[Sequence[Rollout], Scores]]) -> None:
        """Append the answers and their scores to rollouts.jsonl."""
        if self.directory is None or not self.ranks.is_main:
            return
        file, digest = JsonLines(self.directory / ROLLOUTS_FILE), weights_hash(policy)
        file.append_all(
            {
                "step": step + 1,
                "rollout": self.number,
                "weights": digest,
                "place": each.prompt.place,
                "prompt": each.prompt.prompt,
                "text": each.text,
                "tokens": len(each.ids),
                "ended": each.ended,
                "logprob": math.fsum(each.logprobs),
                "reward": scores.total[i],
                **{f"reward/{name}": values[i] for name, values in scores.parts.items()},
            }
            for rollouts, scores in records
            for i, each in enumerate(rollouts)
        )

    # -- log-probabilities ---------------------------------------------------------------------------------------------

    def logprobs(self, model: Transformer, batch: RolloutBatch) -> Tensor:
        """Return the log-probabilities (B, T) of the answers' tokens, as the engine samples them."""
        return self.from_hidden(head_logprobs, model, model.hidden_states(batch.ids), batch)

    def from_hidden(
        self, compute: Callable[..., Tensor], model: Transformer, hidden: Tensor, batch: RolloutBatch
    ) -> Tensor:
        """Return what `head_logprobs` or `head_entropies` computes from hidden states: (B, T)."""
        return compute(
            model.lm_head,
            hidden,
            batch.targets,
            model.config.vocab_size,
            self.method.temperature,
            self.tokenizer.vocab_size,
        )

    def reference_logprobs(self, models: Models, batch: RolloutBatch) -> Tensor:
        """Return the same of the model that training starts from."""
        if models.reference is not None:
            return self.in_chunks(batch, models.device, lambda rows: self.logprobs(models.reference, rows))  # type: ignore[arg-type]
        with adapter_off(models.policy), evaluating(models.policy):
            return self.in_chunks(batch, models.device, lambda rows: self.logprobs(models.policy, rows))

    @torch.no_grad()
    def in_chunks(self, batch: RolloutBatch, device: torch.device, compute: Callable[[RolloutBatch], Tensor]) -> Tensor:
        """Return `compute` of all rows, (B, T), on the CPU, a few rows at a time."""
        rows = max(1, MAX_TOKENS // batch.ids.shape[1])
        parts = torch.split(torch.arange(batch.num_rows), rows)
        whole = torch.zeros(batch.ids.shape)
        for part in parts:
            values = compute(batch.rows(part).to(device)).float().cpu()
            whole[part, : values.shape[1]] = values
        return whole

    def loss_metrics(self, batch: RolloutBatch, logprobs: Tensor, clipped: Tensor) -> dict[str, Sum]:
        """Return what to log of an update, besides what the rollout brings along."""
        mask = batch.mask
        count = mask.sum()
        metrics = {
            "clipped": Sum((clipped & mask).sum().float(), count),
            "moved": Sum(((batch.logprobs - logprobs.detach()) * mask).sum(), count),
        }
        if batch.fresh:
            gap = ((logprobs.detach() - batch.logprobs) * mask).abs().max()
            metrics["gap"] = Sum(gap, 1.0)
        for name, (total, number) in batch.stats.items():
            metrics[name] = Sum(torch.tensor(total, dtype=torch.float64), number)
        return metrics

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self, models: Models, rows: int) -> dict[str, float] | None:
        """Return the mean reward of answers to held-out prompts, and what else there is to know of them."""
        prompts = self.prompts.val[: self.method.eval_prompts]
        if not prompts:
            return None
        rollouts = self._answers(models.policy, prompts, 1, EVALUATION, 0)
        if rollouts is None:
            return None
        samples = [_sample_of(each) for each in rollouts]
        scores = self.rewards.score(samples)
        found = {
            "val_reward": mean(scores.total),
            "val_length": mean([len(each.ids) for each in rollouts]),
            "val_ended": mean([float(each.ended) for each in rollouts]),
        }
        if len(scores.parts) > 1:
            found |= {f"val_reward/{name}": mean(values) for name, values in scores.parts.items()}
        if self.method.kl or self.frozen_reference is not None:
            batch = padded(rollouts)
            difference = (batch.logprobs - self.reference_logprobs(models, batch)) * batch.mask
            found["val_kl"] = float(difference.sum()) / len(rollouts)
        if self.gold is not None:
            gold = self.gold.score(samples)
            found["val_gold"] = mean(gold.total)
            self._watch(scores.total, gold.total)
        plain = text_bits_per_byte(models.policy, self.tokenizer)
        if plain is not None:
            found[PLAIN_TEXT_METRIC] = plain
        return found

    def _watch(self, proxy: list[float], gold: list[float]) -> None:
        """Warn where the reward rises and gold falls. That follows from the evaluations in evaluations.jsonl alone, so
        a resumed run has nothing else to know."""
        self.evaluations[self.updates] = {"step": self.updates, "reward": proxy, "gold": gold, "alarm": None}
        alarm = GoodhartAlarm("/".join(self.gold.names) if self.gold is not None else "gold")
        for step, row in sorted(self.evaluations.items()):
            message = alarm.add(step, row["reward"], row["gold"])
            if step == self.updates and message is not None:
                self.evaluations[step]["alarm"] = message
                note(f"warning: {message}")
        if self.directory is not None:
            JsonLines(self.directory / EVALUATIONS_FILE).append(**self.evaluations[self.updates])

    def sample_prompts(self, models: Models) -> list[tuple[str, list[int]]] | None:
        shown = (self.prompts.val or self.prompts.train)[:3]
        return [(self.tokenizer.decode(each.ids, skip_special_tokens=False), each.ids) for each in shown]

    # -- forecasts and state -------------------------------------------------------------------------------------------

    def normalizer(self, batch: RolloutBatch) -> tuple[float, int]:
        return batch.count, int(batch.mask.sum()) if batch.num_rows else 0

    def example_batch(self, rows: int) -> RolloutBatch:
        ids = torch.zeros(rows, self.context, dtype=torch.int64)
        zeros, ones = torch.zeros(rows, self.context), torch.ones(rows, self.context)
        return RolloutBatch(
            ids, ids, zeros, zeros, ones, float(ones.sum()), values=zeros, returns=zeros, reference=zeros
        )

    @property
    def held_bytes(self) -> int:
        rewards = [*self.rewards.rewards, *([] if self.gold is None else self.gold.rewards)]
        models = [each.classifier for each in rewards if isinstance(each, RewardModel)]
        return sum(p.nbytes for model in models for p in model.parameters())

    def other_moments(self, model: ModelConfig) -> Mapping[str, Mapping[str, float]]:
        answers = min(MAX_BATCH, self.loader.batch_size * self.method.per_prompt)
        tokens = answers * min(self.context, self.prompts.longest + self.method.answer_tokens)
        return {"rollout": {"cache": float(tokens * cache_bytes_per_token(model, 4))}}

    def rehearse(self, models: Models, seconds: float) -> Rehearsal:
        """Answers are taken to have their full length. The time of reward functions and judges is not known."""
        per_prompt, full = self.method.per_prompt, self.method.answer_tokens
        prompts = self.loader.batch_at(0)[: max(1, MAX_BATCH // per_prompt)]
        timed: list[tuple[int, float]] = []
        rollouts: list[Rollout] = []
        for tokens in (min(4, full), min(16, full)):
            began = time.perf_counter()
            rollouts = self._answers(models.policy, prompts, per_prompt, EVALUATION, 0, answer_tokens=tokens) or []
            timed.append((tokens, time.perf_counter() - began))
            if timed[-1][1] > seconds:
                break
        per_token = timed[-1][1] / timed[-1][0]
        if len(timed) > 1 and timed[1][0] > timed[0][0]:
            per_token = max(0.0, timed[1][1] - timed[0][1]) / (timed[1][0] - timed[0][0])
        sampling = timed[-1][1] + per_token * (full - timed[-1][0])
        began = time.perf_counter()
        self.batch_of(models, rollouts, torch.arange(len(rollouts), dtype=torch.float32))
        for reward in self.rewards.rewards:
            if isinstance(reward, RewardModel):
                reward.score([_sample_of(each) for each in rollouts])
        read = sum(len(each.prompt.ids) + len(each.ids) for each in rollouts)
        whole = read + sum(full - len(each.ids) for each in rollouts)
        reading = (time.perf_counter() - began) * whole / read
        batches = self.method.minibatches * self.method.passes
        share = self.loader.batch_size / len(prompts) / batches
        held_out = min(self.method.eval_prompts, len(self.prompts.val)) / len(rollouts)
        return Rehearsal(sampling * share, reading * share, (sampling + reading) * held_out)

    def state(self) -> TrainState:
        values: dict[str, Any] = {
            "loader": self.loader.state_dict(),
            "number": self.number,
            "taken": self.taken,
            "updates": self.updates,
            "rewards": self.rewards.identity(),
            "stats": {} if self.buffer is None else dict(self.buffer.stats),
        }
        return TrainState(
            values,
            {} if self.buffer is None else {f"buffer/{n}": t.contiguous() for n, t in self.buffer.tensors().items()},
        )

    def load_state(self, state: TrainState) -> None:
        self.loader.load_state_dict(state.values["loader"])
        self.number, self.taken = state.values["number"], state.values["taken"]
        self.updates = state.values["updates"]
        now = self.rewards.identity()
        for change in changes(state.values.get("rewards", now), now):
            note(f"warning: {change} since the run was saved; what it has learned so far is not affected")
        if self.directory is not None:
            self.evaluations = {
                row["step"]: row
                for row in JsonLines(self.directory / EVALUATIONS_FILE).read()
                if row["step"] <= self.updates
            }
        tensors: dict[str, Any] = {
            name.removeprefix("buffer/"): tensor for name, tensor in state.tensors.items() if name.startswith("buffer/")
        }
        stats = {name: (total, count) for name, (total, count) in state.values["stats"].items()}
        self.buffer = RolloutBatch(**tensors, stats=stats) if tensors else None


@contextlib.contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Within, the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(1, len(values))


def _sample_of(rollout: Rollout) -> Sample:
    return Sample(rollout.prompt, rollout.ids, rollout.text)


def _statistics(rollouts: Sequence[Rollout], scores: Scores) -> dict[str, tuple[float, float]]:
    """Return the metrics of a rollout: totals and counts."""
    n = float(len(rollouts))
    average = mean(scores.total)
    variance = mean([(score - average) ** 2 for score in scores.total])
    tokens = sum(len(each.ids) for each in rollouts)
    parts = scores.parts if len(scores.parts) > 1 else {}
    return {
        "reward": (math.fsum(scores.total), n),
        "reward_std": (math.sqrt(variance), 1.0),
        "length": (float(tokens), n),
        "ended": (float(sum(each.ended for each in rollouts)), n),
        "entropy": (-math.fsum(lp for each in rollouts for lp in each.logprobs), float(tokens)),
        **{f"reward/{name}": (math.fsum(values), n) for name, values in parts.items()},
    }


def frozen_reference(config: RunConfig, tokenizer: Tokenizer, *, needed: bool) -> Transformer | None:
    """Return the model that training starts from, to compare with. None where nothing is compared, or where the policy
    without its adapter is that model."""
    if not needed:
        return None
    init = with_tokens(load_init(str(config.init.init)), tokenizer)
    if is_on(config.adapter) and not init.train_fully:
        return None
    return init.model


def settle_policy(config: RunConfig, overrides: Collection[str], prepared: Any) -> RunConfig:
    """Return the configuration with the context that prompts and answers need, the steps that the epochs take, and
    paths of rewards in full."""
    method = config.method
    assert isinstance(method, PolicyConfig)
    assert isinstance(prepared, Prompts)
    if "context" not in overrides:
        config = config.replace(context=min(config.loop.context, prepared.longest + method.answer_tokens))
    gold = None if method.gold is None else absolute_reward(method.gold)
    config = config.replace(reward=tuple(absolute_reward(spec) for spec in method.reward), gold=gold)
    if "steps" not in overrides:
        answers = config.loop.batch_size * method.minibatches
        rollouts = max(1, math.ceil(method.epochs * len(prepared.train) * method.per_prompt / answers))
        config = config.replace(steps=rollouts * method.minibatches * method.passes)
        if "eval_every" not in overrides:
            config = config.replace(eval_every=max(1, math.ceil(config.loop.steps / 10)))
    return config


def absolute_reward(spec: str) -> str:
    """Return a reward's spec with its path in full, so that the run can be resumed from another directory."""
    file, colon, name = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{Path(file).resolve()}:{name}"
    return absolute_spec(spec) if Path(spec).exists() else spec


def policy_arguments(context: Any, name: str, *, needs_reference: bool) -> dict[str, Any]:
    """Return the arguments of `PolicyObjective` for an `ObjectiveContext`. name: of the command, for messages."""
    config, method, prompts = context.config, context.config.method, context.dataset
    if not isinstance(method, PolicyConfig) or not isinstance(prompts, Prompts):
        raise UsageError(f"gptsmith {name} needs prompts: gptsmith {name} MODEL PROMPTS --reward module:function.")
    if not method.reward:
        raise UsageError(
            f"gptsmith {name} needs a reward: --reward module:function, --reward file.py:function, or the directory of "
            "a reward model."
        )
    if config.loop.dropout or (is_on(config.adapter) and config.adapter.dropout):
        raise UsageError("dropout would make the trainer's probabilities differ from the sampler's: leave it out.")
    record = None if context.directory is None else context.directory / "judgements.jsonl"
    opening: dict[str, Any] = {
        "tokenizer": context.tokenizer,
        "device": context.ranks.device(choose_device(config.loop.device)),
        "record": record,
    }
    rewards = open_rewards(method.reward, method.weights(), **opening)
    gold = None if method.gold is None else open_rewards([method.gold], **opening)
    for models in (rewards, *([] if gold is None else [gold])):
        if models.longest is not None and config.loop.context > models.longest:
            raise UsageError(
                f"--context {config.loop.context} is longer than a reward model can read: {models.longest} tokens. Set "
                f"--context {models.longest}."
            )
    if config.loop.context <= method.answer_tokens:
        raise UsageError(
            f"--answer-tokens {method.answer_tokens} leaves no room for prompts in --context {config.loop.context}."
        )
    fitting = prompts.within(config.loop.context, answer_tokens=method.answer_tokens, on_long=method.too_long)
    return {
        "prompts": fitting,
        "tokenizer": context.tokenizer,
        "rewards": rewards,
        "method": method,
        "gold": gold,
        "reference": frozen_reference(config, context.tokenizer, needed=needs_reference),
        "batch_size": config.loop.batch_size,
        "context": config.loop.context,
        "seed": config.loop.seed,
        "directory": context.directory,
        "should_stop": context.should_stop,
        "ranks": context.ranks,
    }
