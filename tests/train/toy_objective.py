"""An objective of our own: a model learns to write one token more often, from its own samples."""

from typing import Any, NamedTuple

import torch

from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.model.loss import token_logprobs
from gptsmith.train.objectives.base import LossHistory, LossOutput, Models, Objective, Selection, Sum, TrainState


class Samples(NamedTuple):
    ids: torch.Tensor  # (B, 9) int64: a prompt of one token, then eight that the model wrote
    advantages: torch.Tensor  # (B,)

    @property
    def num_rows(self) -> int:
        return len(self.ids)

    def slice(self, start: int, stop: int) -> "Samples":
        return Samples(self.ids[start:stop], self.advantages[start:stop])

    def to(self, device: torch.device) -> "Samples":
        return Samples(self.ids.to(device), self.advantages.to(device))


class WriteLiked(Objective[Samples]):
    selection = Selection("reward", "max")

    def __init__(self, context: Any) -> None:
        self.baseline = torch.zeros(1)

    def sample(self, models: Models, seed: int, count: int) -> Samples:
        result = Engine(models.policy).generate([[seed % 7]], SamplingParams(max_tokens=8, seed=seed, n=count))[0]
        ids = torch.tensor([[seed % 7, *completion.ids] for completion in result.completions])
        return Samples(ids, (ids[:, 1:] == 5).float().mean(dim=1))

    def next_batch(self, models: Models, step: int) -> Samples:
        ids, rewards = self.sample(models, step, 2 + step % 5)  # another number of rows each time
        return Samples(ids, rewards - self.baseline.lerp_(rewards.mean(), 0.1))

    def loss(self, models: Models, batch: Samples) -> LossOutput:
        logprobs = token_logprobs(models.policy, batch.ids[:, :-1], batch.ids[:, 1:]).sum(dim=1)
        return LossOutput(-(logprobs @ batch.advantages), {"advantage": Sum(batch.advantages.sum(), len(logprobs))})

    def diverged(self, history: LossHistory) -> str | None:
        return None  # this loss means nothing by itself

    def evaluate(self, models: Models, rows: int) -> dict[str, float]:
        return {"reward": float(self.sample(models, 1000, 64).advantages.mean())}

    def example_batch(self, rows: int) -> Samples:
        return Samples(torch.randint(10, (rows, 9)), torch.ones(rows))

    def state(self) -> TrainState:
        return TrainState({}, {"baseline": self.baseline})

    def load_state(self, state: TrainState) -> None:
        self.baseline = state.tensors["baseline"]
