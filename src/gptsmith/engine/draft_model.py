"""A draft model for speculative decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence as Items

from gptsmith.engine.engine import Engine
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.sequence import Sequence
from gptsmith.errors import UsageError
from gptsmith.model.transformer import Transformer


class DraftModel:
    """Proposes what a smaller model of the same vocabulary generates.

    It samples with the sequence's own random numbers: where it gives tokens about the same probabilities as the large
    model does, it draws the same tokens.
    """

    def __init__(self, model: Transformer, *, vocab_size: int | None = None, max_batch: int = 32) -> None:
        # With small blocks, the prefix cache holds all but a few tokens of the last proposal's prompt.
        budget = max(256, max_batch)
        self.engine = Engine(model, vocab_size=vocab_size, max_batch=max_batch, max_batch_tokens=budget, block_size=8)

    def propose(self, sequences: Items[Sequence], count: int) -> list[list[int]]:
        requests: dict[int, int] = {}
        for i, sequence in enumerate(sequences):
            room = min(count, self.engine.context - sequence.length)
            if room < 1:
                continue
            params, sampler = sequence.request.params, sequence.sampler
            draft_params = SamplingParams(
                max_tokens=room,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                typical_p=params.typical_p,
                seed=sampler.seed,
            )
            # A token that the draft model lacks, or a text beyond its context: no proposal.
            with contextlib.suppress(UsageError):
                requests[i] = self.engine.add_request(
                    sequence.tokens[sequence.start :], draft_params, offset=sampler.offset + sampler.generated
                )
        proposals: list[list[int]] = [[] for _ in sequences]
        for i, result in zip(requests, self.engine.drain(list(requests.values())), strict=True):
            proposals[i] = result.ids
        return proposals
